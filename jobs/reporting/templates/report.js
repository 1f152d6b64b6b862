"use strict";
// The viewer of all answers. They are untrusted text: every one goes through textContent, none through innerHTML.
(() => {
  const STEP = 20;
  const data = JSON.parse(document.getElementById("answers-data").textContent);
  const form = document.getElementById("filters");
  const entries = document.getElementById("entries");
  const found = document.getElementById("found");
  const more = document.getElementById("more");
  let matching = [];
  let shown = 0;

  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children); // strings become text nodes
    return element;
  }

  const distinct = (row, key) => new Set(row.answers.filter(Boolean).map(key)).size;
  const differ = {
    answers: (row) => distinct(row, (one) => one.answer) > 1,
    names: (row) => distinct(row, (one) => one.named ?? one.verdict) > 1,
    scores: (row) => {
      const scores = row.answers.filter(Boolean).map((one) => one.baseline);
      return Math.max(...scores) - Math.min(...scores) >= 0.5;
    },
    labels: (row) => distinct(row, (one) => one.label) > 1,
    unscored: (row) => row.answers.some((one) => one && one.label === null),
  };

  for (const row of data.rows) {
    const texts = row.answers.filter(Boolean).flatMap((one) => [one.answer, one.reason ?? ""]);
    row.text = [data.questions[row.question].text, row.reference, ...texts].join("\n").toLowerCase();
  }

  function matches(row, wanted) {
    return (
      (!wanted.label || data.images[row.image].label === wanted.label) &&
      (!wanted.question || row.question === Number(wanted.question)) &&
      (!wanted.differ || differ[wanted.differ](row)) &&
      row.text.includes(wanted.text.trim().toLowerCase())
    );
  }

  // The methods that gave the same answer stand together.
  function groups(row) {
    const found = new Map();
    row.answers.forEach((one, number) => {
      const key = one ? JSON.stringify([one.answer, one.stopped]) : "";
      if (!found.has(key)) found.set(key, { one, methods: [] });
      found.get(key).methods.push(data.methods[number]);
    });
    return [...found.values()];
  }

  function badges(one) {
    const said = [`baseline ${one.baseline.toFixed(2)}`];
    if (one.verdict) said.push(one.named ? `names ${one.named}, ${one.verdict}` : `names: ${one.verdict}`);
    if (data.judged) said.push(one.label === null ? "judge: unscored" : `judge ${one.label} of 4`);
    if (one.loop) said.push("loop");
    if (!one.stopped) said.push("never ended");
    return said.flatMap((text) => [make("span", "badge", text), " "]); // spaces: for readers aloud
  }

  function told(text, className) {
    const element = make("dd", className, text || "(empty)");
    element.dir = "auto";
    return element;
  }

  function fill(entry, row) {
    const image = data.images[row.image];
    const picture = make("div", "");
    if (image.thumbnail) {
      const img = make("img", "");
      img.src = image.thumbnail;
      img.alt = `test image ${image.name}, class ${image.label}`;
      picture.append(img);
    }
    picture.append(make("p", "soft", image.name));
    const list = make("dl", "", make("dt", "", "reference"), told(row.reference, "reference"));
    for (const { one, methods } of groups(row)) {
      if (!one) {
        list.append(make("dt", "", methods.join(", ")), told("not answered, or not by this model", "soft"));
        continue;
      }
      list.append(make("dt", "", methods.join(", "), " ", ...badges(one)), told(one.answer, "answer"));
      if (one.reason) list.append(told(`Judge: ${one.reason}`, "soft"));
    }
    entry.append(make("div", "sample", picture, list));
  }

  function entry(row) {
    const count = distinct(row, (one) => one.answer);
    const told = count > 1 ? `${count} different answers` : "one answer";
    const summary = make(
      "summary", "",
      make("strong", "", data.images[row.image].label), ` \u00b7 ${data.questions[row.question].text} \u00b7 ${told} \u00b7 `,
      make("span", "soft", data.images[row.image].name),
    );
    const element = make("details", "entry", summary);
    element.addEventListener("toggle", () => {
      if (element.open && element.children.length === 1) fill(element, row);
    });
    return element;
  }

  function showMore() {
    const next = matching.slice(shown, shown + STEP).map(entry);
    entries.append(...next);
    shown += next.length;
    found.textContent = `${matching.length} of ${data.rows.length} questions match; ${shown} shown.`;
    more.hidden = shown >= matching.length;
    return next;
  }

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    matching = data.rows.filter((row) => matches(row, wanted));
    shown = 0;
    entries.replaceChildren();
    showMore();
  }

  form.addEventListener("input", filter);
  document.getElementById("all").addEventListener("click", () => {
    form.reset();
    filter();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => showMore()[0].firstChild.focus());
  document.getElementById("viewer").hidden = false;
  document.getElementById("static").hidden = true;
  filter();
})();
