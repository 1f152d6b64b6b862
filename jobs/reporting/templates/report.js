"use strict";
// The viewer of all answers. They are untrusted text: every answer goes through textContent, none through innerHTML.
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
    answers: (row) => distinct(row, (answer) => answer.answer) > 1,
    names: (row) => distinct(row, (answer) => answer.named ?? answer.verdict) > 1,
    scores: (row) => {
      const scores = row.answers.filter(Boolean).map((answer) => answer.baseline);
      return Math.max(...scores) - Math.min(...scores) >= 0.5;
    },
    labels: (row) => distinct(row, (answer) => answer.label) > 1,
    unscored: (row) => row.answers.some((answer) => answer && answer.label === null),
  };

  for (const row of data.rows) {
    const texts = row.answers.filter(Boolean).flatMap((answer) => [answer.answer, answer.reason ?? ""]);
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
    const byAnswer = new Map();
    row.answers.forEach((answer, number) => {
      const key = answer ? JSON.stringify([answer.answer, answer.stopped]) : "";
      if (!byAnswer.has(key)) byAnswer.set(key, { answer, methods: [] });
      byAnswer.get(key).methods.push(data.methods[number]);
    });
    return [...byAnswer.values()];
  }

  function badges(answer) {
    const labels = [`baseline ${answer.baseline.toFixed(2)}`];
    if (answer.verdict) labels.push(answer.named ? `names ${answer.named}, ${answer.verdict}` : `names: ${answer.verdict}`);
    if (data.judged) labels.push(answer.label === null ? "judge: unscored" : `judge ${answer.label} of 4`);
    if (answer.loop) labels.push("loop");
    if (!answer.stopped) labels.push("never ended");
    return labels.flatMap((text) => [make("span", "badge", text), " "]); // spaces for screen readers
  }

  function makeText(text, className) {
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
    const list = make("dl", "", make("dt", "", "reference"), makeText(row.reference, "reference"));
    for (const { answer, methods } of groups(row)) {
      if (!answer) {
        list.append(make("dt", "", methods.join(", ")), makeText("not answered, or not by this model", "soft"));
        continue;
      }
      list.append(make("dt", "", methods.join(", "), " ", ...badges(answer)), makeText(answer.answer, "answer"));
      if (answer.reason) list.append(makeText(`Judge: ${answer.reason}`, "soft"));
    }
    entry.append(make("div", "sample", picture, list));
  }

  function entry(row) {
    const count = distinct(row, (answer) => answer.answer);
    const words = count > 1 ? `${count} different answers` : "one answer";
    const summary = make(
      "summary", "",
      make("strong", "", data.images[row.image].label), ` \u00b7 ${data.questions[row.question].text} \u00b7 ${words} \u00b7 `,
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
