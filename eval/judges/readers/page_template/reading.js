"use strict";
// One sitting of blind reading. Texts of models and people become text nodes and nothing else.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const FIELDS = ["pref", "label_a", "label_b"]; // in the order in which they are asked
const ALLOWED = { pref: ["A", "B", "T"], label_a: data.labels, label_b: data.labels };
const KEY = `blind-reading:${data.sheet}`;
const state = { verdicts: {}, at: 0 };

const verdict = (at = state.at) => (state.verdicts[data.pairs[at].id] ??= {});
const asked = (at = state.at) => FIELDS.find((field) => !verdict(at)[field]);
const isRead = (_, at) => !asked(at);
const read = () => data.pairs.filter(isRead).length;
const say = (text) => { find("status").textContent = text; };

// Keeping: in this browser after every answer, in a file when asked to.
function keep() {
  try {
    localStorage.setItem(KEY, JSON.stringify({ verdicts: state.verdicts, at: state.at }));
  } catch {
    say("This browser does not keep your answers: save them to a file before you close the page.");
  }
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY));
    if (kept) take(data.pairs.map(({ id }) => ({ id, ...kept.verdicts[id] })));
    if (data.pairs[kept?.at]) state.at = kept.at;
  } catch {
    // nothing is kept, or what is kept is damaged
  }
}

// Takes over what is allowed in rows of id and fields; returns how many pairs that are.
function take(rows) {
  const ids = new Set(data.pairs.map((pair) => pair.id));
  let taken = 0;
  for (const row of rows) {
    const found = FIELDS.filter((field) => ALLOWED[field].includes(row[field]?.trim().toUpperCase()));
    if (!ids.has(row.id) || !found.length) continue;
    state.verdicts[row.id] = Object.fromEntries(found.map((field) => [field, row[field].trim().toUpperCase()]));
    taken += 1;
  }
  return taken;
}

function save() {
  const rows = data.pairs.filter(isRead).map(({ id }) => [id, ...FIELDS.map((field) => state.verdicts[id][field])]);
  const text = [["id", ...FIELDS], ...rows].map((row) => row.join(",") + "\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = data.file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  const half = data.pairs.filter((pair, at) => asked(at) && verdict(at).pref).length;
  const left = half ? ` ${half} with answers still missing ${half === 1 ? "is" : "are"} not in it.` : "";
  say(`Saved ${rows.length} of ${data.pairs.length} pairs to ${data.file}.${left}`);
}

// Rows of a CSV file: its cells may be quoted, and hold commas, quotes and new lines.
function parse(text) {
  const rows = [[""]];
  const separator = [",", ";", "\t"].find((mark) => text.split("\n")[0].split(mark).length > 3) ?? ",";
  let quoted = false;
  for (let i = 0; i < text.length; i++) {
    const [row, mark] = [rows.at(-1), text[i]];
    if (quoted && mark === '"' && text[i + 1] === '"') row[row.length - 1] += text[i++];
    else if (mark === '"' && (quoted || !row.at(-1))) quoted = !quoted;
    else if (!quoted && mark === separator) row.push("");
    else if (!quoted && mark === "\n") rows.push([""]);
    else if (quoted || mark !== "\r") row[row.length - 1] += mark;
  }
  const names = rows.shift().map((name) => name.trim().toLowerCase());
  return rows.map((row) => Object.fromEntries(names.map((name, i) => [name, row[i] ?? ""])));
}

async function load(file) {
  const taken = take(parse(await file.text()));
  if (!taken) return say(`${file.name} has no answer to a pair of this sitting.`);
  keep();
  show(firstUnread());
  say(`Took ${taken} pairs from ${file.name}.`);
}

// Showing
function firstUnread(from = 0) {
  const order = data.pairs.map((_, i) => (from + i) % data.pairs.length);
  return order.find((at) => asked(at)) ?? data.pairs.length - 1;
}

function show(at) {
  state.at = Math.min(Math.max(at, 0), data.pairs.length - 1);
  const pair = data.pairs[state.at];
  for (const name of ["prompt", "response_a", "response_b"]) {
    find(name).textContent = pair[name].trim() ? pair[name] : "(empty)";
  }
  find("place").textContent = `Pair ${state.at + 1} of ${data.pairs.length}`;
  refresh();
  find("place").focus({ preventScroll: true });
  find("place").scrollIntoView({ block: "nearest" });
}

function refresh() {
  const now = verdict();
  for (const button of document.querySelectorAll("[data-field]")) {
    button.setAttribute("aria-pressed", String(now[button.dataset.field] === button.dataset.value));
  }
  for (const field of FIELDS) find(field).classList.toggle("now", field === asked());
  find("progress").value = read();
  find("count").textContent = `${read()} of ${data.pairs.length} read`;
  find("previous").disabled = state.at === 0;
  find("next").disabled = state.at === data.pairs.length - 1;
  find("unread").disabled = read() === data.pairs.length;
  find("undo").disabled = state.at === 0 && !Object.keys(now).length;
}

// Answering
function answer(field, value) {
  const was = asked();
  find("guidelines").open &&= Object.keys(verdict()).length > 0; // once reading begins, they are folded away
  verdict()[field] = value;
  const finished = was && !asked(); // a changed answer of a finished pair turns no page
  if (finished && read() < data.pairs.length) {
    const { pref, label_a, label_b } = verdict();
    say(`Pair ${state.at + 1}: ${pref === "T" ? "tie" : `${pref} is better`}, A is ${label_a}, B is ${label_b}.`);
    state.at = firstUnread(state.at);
    keep();
    show(state.at);
  } else {
    keep();
    refresh();
    say(finished ? "All pairs are read: save the file, and send it to whoever gave you this page." : "");
    if (finished) find("save").focus();
  }
}

function undo() {
  if (!FIELDS.some((field) => verdict()[field]) && state.at > 0) show(state.at - 1);
  const last = FIELDS.findLast((field) => verdict()[field]);
  if (last) delete verdict()[last];
  keep();
  refresh();
  say(last ? `Took back the last answer to pair ${state.at + 1}.` : "");
}

function press(event) {
  if (!find("keys").checked || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === "ArrowLeft") return show(state.at - 1);
  if (event.key === "ArrowRight") return show(state.at + 1);
  const key = event.key.toUpperCase();
  if (key === "U") return undo();
  if (ALLOWED.pref.includes(key)) return answer("pref", key);
  if (!data.labels.includes(key)) return;
  if (!verdict().pref) return say("First A, B or T.");
  if (asked()) answer(asked(), key);
  else say("This pair is finished: choose another label with its button, or take the last one back with U.");
}

document.querySelector("main").hidden = false;
for (const button of document.querySelectorAll("[data-field]")) {
  button.addEventListener("click", () => answer(button.dataset.field, button.dataset.value));
}
document.addEventListener("keydown", press);
find("save").addEventListener("click", save);
find("load").addEventListener("change", (event) => {
  if (event.target.files.length) load(event.target.files[0]);
  event.target.value = "";
});
find("undo").addEventListener("click", undo);
find("previous").addEventListener("click", () => show(state.at - 1));
find("next").addEventListener("click", () => show(state.at + 1));
find("unread").addEventListener("click", () => show(firstUnread(state.at + 1)));
restore();
if (read() || Object.keys(verdict(0)).length) find("guidelines").open = false;
show(firstUnread(state.at));
window.scrollTo(0, 0);
if (read()) say(`${read()} of ${data.pairs.length} pairs are read: go on here.`);
