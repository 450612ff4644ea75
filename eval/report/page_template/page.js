"use strict";
// The browser of responses. Texts of models and people become text nodes and nothing else.
const PER_PAGE = 20;
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const state = { rows: [], page: 0, shown: data.columns.map((column) => column.shown) };

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function option(value, text) {
  const made = element("option", text);
  made.value = value;
  return made;
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

function answer(column, row) {
  const made = element("div", undefined, "answer");
  made.append(element("h4", column.name));
  const numbers = [`reward ${column.rewards[row].toFixed(2).replace("-", "−")}`];
  if (column.gains) numbers[0] += ` (${signed(column.gains[row])})`;
  if (column.gold) numbers.push(`gold ${column.gold[row].toFixed(2).replace("-", "−")}`);
  if (column.refused[row]) numbers.push("refusal");
  made.append(element("p", numbers.join(" · "), "numbers"));
  const text = element("p", undefined, "text");
  // The parts alternate: shared with SFT's response, then not shared.
  column.responses[row].forEach((part, i) => {
    if (part) text.append(i % 2 ? element("mark", part) : part);
  });
  if (!text.textContent.trim()) text.append(element("em", "(empty)"));
  made.append(text);
  if (column.trace) made.append(decisions(column.trace[row]));
  return made;
}

// Filled when first opened: a page of traces has thousands of elements.
function decisions(tokens) {
  const made = element("details");
  const rejected = tokens.reduce((sum, [, candidates]) => sum + candidates.length, 0);
  made.append(element("summary", `Decisions: ${rejected} rejected, ${tokens.length} accepted`));
  made.addEventListener("toggle", () => {
    const text = element("p", undefined, "text");
    for (const [token, candidates] of tokens) {
      for (const candidate of candidates) text.append(element("del", candidate.replaceAll("\n", "\u21b5")));
      text.append(element("ins", token));
    }
    made.append(text);
  }, { once: true });
  return made;
}

function card(row) {
  const made = element("article");
  const title = element("h3", data.prompts[row]);
  title.prepend(element("small", data.kinds ? `prompt ${row + 1}, ${data.kinds[row]}` : `prompt ${row + 1}`));
  const answers = element("div", undefined, "answers");
  data.columns.forEach((column, i) => {
    if (state.shown[i]) answers.append(answer(column, row));
  });
  made.append(title, answers);
  return made;
}

function matches(row, query) {
  if (!query) return true;
  const texts = data.columns.filter((column, i) => state.shown[i]).map((column) => column.responses[row].join(""));
  return [data.prompts[row], ...texts].some((text) => text.toLowerCase().includes(query));
}

// Which rows, in which order; then the first page of them.
function select() {
  const query = find("query").value.trim().toLowerCase();
  const kind = find("kind").value;
  state.rows = data.prompts.map((_, row) => row);
  state.rows = state.rows.filter((row) => (!kind || data.kinds[row] === kind) && matches(row, query));
  const [key, direction] = find("order").value.split("-");
  find("column").disabled = !key;
  if (key) {
    const column = data.columns[find("column").value];
    const values = key === "gain" ? column.gains ?? column.rewards.map(() => 0) : column.rewards; // SFT gains nothing
    const sign = direction === "up" ? 1 : -1;
    state.rows.sort((a, b) => sign * (values[a] - values[b]));
  }
  show(0);
}

function show(page) {
  state.page = page;
  const from = page * PER_PAGE;
  const rows = state.rows.slice(from, from + PER_PAGE);
  find("list").replaceChildren(...rows.map(card));
  find("status").textContent = `${state.rows.length} of ${data.prompts.length} prompts`;
  find("place").textContent = rows.length ? `${from + 1} to ${from + rows.length}` : "no prompt matches";
  find("previous").disabled = page === 0;
  find("next").disabled = from + PER_PAGE >= state.rows.length;
}

function turn(step) {
  show(state.page + step);
  find("responses-title").scrollIntoView();
}

for (const kind of [...new Set(data.kinds ?? [])].sort()) find("kind").append(option(kind, kind));
find("kind").parentElement.hidden = !data.kinds;
data.columns.forEach((column, i) => {
  find("column").append(option(i, column.name));
  const box = element("input");
  box.type = "checkbox";
  box.checked = state.shown[i];
  box.addEventListener("change", () => {
    state.shown[i] = box.checked;
    find("query").value ? select() : show(state.page);
  });
  const label = element("label");
  label.append(box, column.name);
  find("methods").append(label);
});
// Sort by the first method that is not SFT.
find("column").value = Math.max(data.columns.findIndex((column) => !column.sft), 0);
find("controls").addEventListener("submit", (event) => event.preventDefault());
find("query").addEventListener("input", select);
for (const id of ["kind", "order", "column"]) find(id).addEventListener("change", select);
find("previous").addEventListener("click", () => turn(-1));
find("next").addEventListener("click", () => turn(1));
select();
