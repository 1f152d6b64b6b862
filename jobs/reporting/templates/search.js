"use strict";
// The table of settings is sorted by the column whose head is pressed; a second press reverses the order.
(() => {
  const table = document.getElementById("settings");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];

  function value(row, column, kind) {
    const cell = row.cells[column];
    if (kind === "text") return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  }

  function compare(a, b) {
    if (a === null || b === null) return (a === null) - (b === null); // without a number: always last
    return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  }

  function sort(column) {
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const kind = head.dataset.kind;
    const rows = [...body.rows].map((row) => ({ row, value: value(row, column, kind) }));
    rows.sort((a, b) => {
      const order = compare(a.value, b.value);
      return down && a.value !== null && b.value !== null ? -order : order;
    });
    body.append(...rows.map((each) => each.row));
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(column));
    head.replaceChildren(button);
  });
})();
