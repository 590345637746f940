"use strict";
// Texts from data only ever become text nodes and attributes: nothing is parsed as HTML.

const $ = id => document.getElementById(id);
const make = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};
const query = values => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null && value !== undefined));

let settings = null;
let rows = [];          // of this page
let total = 0, offset = 0;
let at = { row: 0, variant: 0 };
let history = [];       // what to undo: lists of [row key, variant, decision before]
let editing = null;     // the row in the caption editor
let ahead = null;       // the next page, fetched before it is asked for

async function ask(address, body) {
  const request = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(address, request);
  } catch {
    throw complain("The server does not answer. What you did last is not saved; start `sgid review` again.");
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw complain(said.problem || `The server refused this (${answer.status}). What you did last is not saved.`);
  }
  $("problem").hidden = true;
  return answer.json();
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
  return new Error(text);
}

const who = () => {
  const name = $("who").value.trim();
  if (!name) {
    $("who").focus();
    throw complain("Type your name first: verdicts and answers are kept with it.");
  }
  return name;
};

// --- the list

const filters = () => ({ label: $("label").value, search: $("search").value, order: $("order").value, state: $("state").value, who: $("who").value.trim() });

const page = start => ask(`/api/rows?${query({ ...filters(), offset: start })}`);

async function load(start = 0, row = 0) {
  const wanted = JSON.stringify([filters(), start]);
  const answer = ahead && ahead.wanted === wanted ? await ahead.answer : await page(start);
  ({ rows, total } = answer);
  offset = start;
  at = { row: Math.max(0, Math.min(row, rows.length - 1)), variant: 0 };
  show();
  const scored = answer.scored === null ? "" : `, ${answer.scored} of ${settings.originals} scored so far`;
  $("count").textContent = `${total} ${total === 1 ? "image" : "images"}${scored}`;
  ahead = null;
  if (start + settings.page < total) {
    const next = start + settings.page;
    ahead = { wanted: JSON.stringify([filters(), next]), answer: page(next) };
    ahead.answer.then(found => found.rows.forEach(one => pictures(one).forEach(address => { new Image().src = address; }))).catch(() => {});
  }
}

const address = (key, number) => `/picture?${query({ key, number })}`;
const pictures = row => [address(row.key), ...row.variants.map(one => address(one.key, one.number))];

function picture(source, text, current = false) {
  const image = make("img", { src: source, alt: text, loading: "lazy", decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 64));
  const button = make("button", { type: "button", className: `picture${current ? " current" : ""}`, title: text }, image);
  button.tabIndex = -1;
  return button;
}

function caption(variant) {
  const parts = [];
  if (variant.decision !== "none") parts.push(make("b", {}, `${variant.decision === "reject" ? "rejected" : "kept"} by ${variant.who}`), make("br"));
  const facts = [`strength ${variant.strength.toFixed(2)}`];
  if (variant.label_score !== null) facts.push(`label ${Math.round(100 * variant.label_score)} %`);
  if (variant.similarity !== null) facts.push(`similarity ${variant.similarity.toFixed(2)}`);
  parts.push(facts.join(" · "));
  return make("figcaption", { title: variant.prompt }, ...parts);
}

function draw(row, index) {
  const figures = [make("figure", { className: "origin" }, picture(address(row.key), "original"), make("figcaption", {}, make("b", {}, "original")))];
  row.variants.forEach((variant, number) => {
    const current = index === at.row && number === at.variant;
    const button = picture(address(variant.key, variant.number), variant.prompt, current);
    button.addEventListener("click", () => { at = { row: index, variant: number }; mark(); });
    figures.push(make("figure", { className: variant.decision }, button, caption(variant)));
  });
  if (!row.variants.length) figures.push(make("p", {}, "It has no variants of this recipe; run sgid generate, or make them in “Captions”."));
  const title = make("h2", {}, row.label || "(no label)", ...(row.name ? [` · ${row.name}`] : []));
  const text = make("p", {}, row.caption || "no caption", ...(row.contradiction ? [` — contradicts the label, by ${row.contradiction}`] : []));
  const article = make("article", { className: `row${index === at.row ? " current" : ""}`, tabIndex: 0 }, title, text, make("div", { className: "pictures" }, ...figures));
  article.dataset.key = row.key;
  article.addEventListener("focus", () => { if (at.row !== index) { at = { row: index, variant: 0 }; mark(); } });
  return article;
}

function show() {
  $("rows").replaceChildren(...rows.map(draw));
  $("none").hidden = rows.length > 0;
  if (!performance.getEntriesByName("rows").length) performance.mark("rows");
  const last = Math.max(1, Math.ceil(total / settings.page));
  $("pages").textContent = `page ${Math.floor(offset / settings.page) + 1} of ${last}`;
  $("previous-page").disabled = offset === 0;
  $("next-page").disabled = offset + settings.page >= total;
}

function mark(scroll = true) {
  [...$("rows").children].forEach((article, index) => {
    article.classList.toggle("current", index === at.row);
    [...article.querySelectorAll("figure:not(.origin) .picture")].forEach((button, number) => button.classList.toggle("current", index === at.row && number === at.variant));
  });
  if (scroll) $("rows").children[at.row]?.scrollIntoView({ block: "nearest" });
}

function redraw(index) {
  $("rows").children[index]?.replaceWith(draw(rows[index], index));
}

async function move(step) {
  const row = at.row + step;
  if (row >= rows.length && offset + settings.page < total) await load(offset + settings.page);
  else if (row < 0 && offset > 0) await load(offset - settings.page, settings.page - 1);
  else at = { row: Math.max(0, Math.min(row, rows.length - 1)), variant: 0 };
  mark();
}

async function forward() {
  if (at.variant + 1 < (rows[at.row]?.variants.length ?? 0)) { at.variant += 1; mark(); } else await move(1);
}

let saving = Promise.resolve();  // verdicts are sent one after the other, in the order of the keys

function judge(row, variants, decision, remember = true) {
  const given = { who: who(), verdicts: variants.map(one => ({ key: one.key, number: one.number, decision: typeof decision === "string" ? decision : decision[one.number] })) };
  const before = variants.map(one => one.who === given.who ? one.decision : "none");  // others' verdicts stand on their own
  saving = saving.catch(() => {}).then(async () => {
    const said = await ask("/api/verdicts", given);
    variants.forEach((one, index) => { one.decision = said.decisions[index]; one.who = said.who[index]; });
    if (remember) history.push({ row, variants, before });
    redraw(rows.indexOf(row));
  });
  return saving;
}

async function undo() {
  await saving.catch(() => {});
  const last = history.pop();
  if (!last) return;
  await judge(last.row, last.variants, Object.fromEntries(last.variants.map((one, index) => [one.number, last.before[index]])), false);
  const index = rows.indexOf(last.row);
  if (index >= 0) { at = { row: index, variant: last.row.variants.indexOf(last.variants[0]) }; mark(); }
}

async function act(action) {
  const row = rows[at.row];
  if (!row) return;
  const variant = row.variants[at.variant];
  if (action === "undo") return undo();
  if (action === "next") return move(1);
  if (action === "edit") return open("captions", row);
  if (!variant) return move(1);
  if (action.endsWith("-row")) {
    judge(row, row.variants, action.replace("-row", "")).catch(() => {});
    return move(1);
  }
  judge(row, [variant], action).catch(() => {});
  return forward();
}

// --- captions

async function edit(row) {
  editing = row;
  $("edit-pictures").replaceChildren(
    make("figure", { className: "origin" }, picture(address(row.key), "original"), make("figcaption", {}, make("b", {}, "original"))),
    ...row.variants.map(one => make("figure", { className: one.decision }, picture(address(one.key, one.number), one.prompt), make("figcaption", {}, one.prompt))));
  $("edit-name").textContent = `${row.label || "(no label)"}${row.name ? ` · ${row.name}` : ""} · caption by ${row.source === "human" ? "a person" : row.source === "import" ? "an import" : "a model"}`;
  $("edit-caption").value = row.caption;
  $("edit-words").value = row.words;
  $("edit-words").placeholder = row.label;
  $("edit-make").disabled = row.variants.length > 0;
  $("edit-status").textContent = "";
  $("edit-progress").hidden = true;
  const borrows = settings.caption_from !== "own";
  $("edit-lends").textContent = !borrows ? "" : `This recipe takes contexts from ${settings.caption_from === "class" ? "images of the class" : "the whole data set"}, so the caption is for the variants of other images${row.lends ? ", which may borrow its context" : "; this image is not one of those that lend"}.`;
  await prompts();
}

let asked = 0;

async function prompts() {
  const mine = asked += 1;
  const { prompts } = await ask(`/api/prompt?${query({ key: editing.key, caption: $("edit-caption").value.trim(), words: $("edit-words").value.trim() })}`);
  if (mine !== asked) return;
  $("edit-prompts").replaceChildren(...prompts.map(one => {
    if (one.problem) return make("li", {}, one.problem);
    const tokens = one.tokens === null ? "" : ` (${one.tokens} of ${one.limit} tokens${one.cut ? "; the caption is cut" : ""})`;
    return make("li", {}, one.prompt, make("span", { className: "hint" }, tokens));
  }));
}

async function save() {
  const { row, outdated } = await ask("/api/caption", { who: who(), key: editing.key, caption: $("edit-caption").value, words: $("edit-words").value });
  replaceRow(row);
  await edit(row);
  $("edit-status").textContent = outdated ? `Saved. ${outdated} variants of the old text are no longer used.` : "Saved.";
  $("edit-make").disabled = row.variants.length > 0;
}

function replaceRow(row) {
  const index = rows.findIndex(one => one.key === row.key);
  if (index >= 0) { rows[index] = row; redraw(index); }
}

const label = { loading: "loading the model", making: "making variants", done: "done", failed: "failed" };

async function makeNow() {
  const key = editing.key;
  const { started } = await ask("/api/make", { key });
  if (!started) { $("edit-status").textContent = "Variants of another image are being made; try again in a moment."; return; }
  $("edit-make").disabled = true;
  for (;;) {
    const job = await ask("/api/job");
    $("edit-progress").hidden = false;
    $("edit-progress").max = Math.max(1, job.total);
    if (job.state === "loading") $("edit-progress").removeAttribute("value"); else $("edit-progress").value = job.done;
    $("edit-status").textContent = `${label[job.state]}${job.total ? `: ${job.done} of ${job.total}` : ""}${job.message ? ` — ${job.message}` : ""}`;
    if (job.state === "done" || job.state === "failed") {
      const row = await ask(`/api/row?${query({ key })}`);
      replaceRow(row);
      if (editing.key === key) {
        const text = $("edit-status").textContent;
        await edit(row);
        $("edit-status").textContent = text;
        $("edit-make").disabled = job.state === "done";
      }
      return;
    }
    await new Promise(resolve => setTimeout(resolve, 250));
  }
}

async function editStep(step) {
  await move(step);
  if (rows[at.row]) await edit(rows[at.row]);
}

// --- study

let trial = null;

async function question(next) {
  trial = next ?? await ask(`/api/study?${query({ who: who() })}`);
  $("study-progress").textContent = `${trial.done} of ${trial.total} answered`;
  $("study-pictures").replaceChildren();
  $("study-choices").replaceChildren();
  if (!trial.trial) {
    $("study-title").textContent = trial.total ? "Thank you: that was all." : "There is nothing to ask: each class needs two originals, and each original two variants of every recipe.";
    return;
  }
  const isClass = trial.question === "class";
  $("study-title").textContent = isClass ? "Which class is this?" : "How different are these two? 1: the same picture; 5: nothing in common";
  $("study-pictures").replaceChildren(...trial.pictures.map((source, index) => make("figure", {}, picture(source, `picture ${index + 1}`))));
  const choose = choice => ask("/api/study", { who: who(), trial: trial.trial, answer: choice }).then(question).catch(() => {});
  if (trial.choices.length <= 20) {
    $("study-choices").replaceChildren(...trial.choices.map((choice, index) => {
      const key = trial.choices.length <= 10 ? [make("kbd", {}, String(isClass ? (index + 1) % 10 : choice)), " "] : [];
      const button = make("button", { type: "button" }, ...(isClass ? [...key, choice] : key));
      button.addEventListener("click", () => choose(choice));
      return button;
    }));
  } else {
    const list = make("datalist", { id: "classes" }, ...trial.choices.map(choice => make("option", { value: choice })));
    const input = make("input", { placeholder: "type the class", autocomplete: "off" });
    input.setAttribute("list", "classes");
    input.addEventListener("change", () => { if (trial.choices.includes(input.value)) choose(input.value); });
    $("study-choices").replaceChildren(input, list);
    input.focus();
  }
}

const percent = value => value === null ? "–" : `${(100 * value).toFixed(0)} %`;
const number = (value, digits = 2) => value === null ? "–" : value.toFixed(digits);
const range = (values, shape) => values === null ? "–" : `${shape(values[0])} (${shape(values[1])} to ${shape(values[2])})`;

async function results() {
  const { people, figures, alpha, correlation } = await ask("/api/study/results");
  const head = ["pictures", "answers", "label seen (95 %)", "label seen by the scorer", "ratings", "difference, 1 to 5 (95 %)", "distance by the scorer"];
  const body = figures.map(one => [one.name, String(one.seen), range(one.consistency, percent), percent(one.agreement), String(one.rated), range(one.diversity, value => number(value)), number(one.distance)]);
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head.map(text => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...body.map(cells => make("tr", {}, ...cells.map(text => make("td", {}, text))))));
  const list = make("ul", {},
    make("li", {}, `People: ${people.join(", ") || "nobody yet"}`),
    make("li", {}, `Agreement between people (Krippendorff's alpha): class ${number(alpha.class)}, difference ${number(alpha.difference)}`),
    make("li", {}, `Correlation with the scorer (Spearman): label ${number(correlation.class)}, difference ${number(correlation.difference)}`));
  $("study-results").replaceChildren(make("h2", {}, "Results"), make("div", { className: "scroll" }, table), list);
  $("study-results").hidden = false;
}

// --- the page

function open(mode, row, first = false) {
  for (const name of ["curate", "captions", "study"]) {
    $(name).hidden = name !== mode;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === mode));
  }
  $("controls").hidden = mode === "study";
  location.hash = mode;
  if (mode === "captions" && (row ?? rows[at.row])) edit(row ?? rows[at.row]).catch(() => {});
  if (mode === "study") question().catch(() => {});
  if (mode === "curate") mark(!first);
  else scrollTo(0, 0);
}

const mode = () => ["curate", "captions", "study"].find(name => !$(name).hidden);

function pressed(event) {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (mode() === "captions" && event.ctrlKey && event.key === "Enter") { event.preventDefault(); save().catch(() => {}); return; }
  if (typing) { if (event.key === "Escape" || (event.key === "Enter" && event.target.id === "search")) event.target.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (mode() === "study") {
    const digit = "1234567890".indexOf(event.key);
    const buttons = $("study-choices").querySelectorAll("button");
    if (event.key.length === 1 && digit >= 0 && buttons.length <= 10 && buttons[digit]) buttons[digit].click();
    return;
  }
  if (mode() !== "curate") return;
  const actions = { r: "reject", k: "keep", R: "reject-row", K: "keep-row", u: "undo", n: "next", Enter: "next", e: "edit" };
  const moves = { ArrowDown: () => move(1), ArrowUp: () => move(-1), ArrowRight: forward, ArrowLeft: async () => { at.variant = Math.max(0, at.variant - 1); mark(); } };
  if (event.key === "/") { event.preventDefault(); $("search").focus(); return; }
  if (event.key === "Enter" && event.target.tagName === "BUTTON") return;
  const run = moves[event.key] ?? (actions[event.key] && (() => act(actions[event.key])));
  if (run) { event.preventDefault(); Promise.resolve().then(run).catch(() => {}); }
}

async function begin() {
  settings = await ask("/api/start");
  let name = null;
  try { name = localStorage.getItem("sgid-name"); } catch { /* no storage: the proposed name is shown */ }
  $("who").value = name || settings.who;
  $("label").append(...settings.labels.map(one => make("option", { value: one }, one)));
  $("who").addEventListener("change", () => { try { localStorage.setItem("sgid-name", $("who").value.trim()); } catch { /* as above */ } open(mode()); });
  for (const name of ["label", "order", "state"]) $(name).addEventListener("change", () => load().then(() => open(mode())).catch(() => {}));
  let waiting = 0;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => load().catch(() => {}), 150); });
  for (const name of ["curate", "captions", "study"]) $(`tab-${name}`).addEventListener("click", () => open(name));
  for (const button of $("actions").querySelectorAll("button")) button.addEventListener("click", () => { act(button.dataset.action).catch(() => {}); });
  $("previous-page").addEventListener("click", () => load(Math.max(0, offset - settings.page)).then(() => scrollTo(0, 0)).catch(() => {}));
  $("next-page").addEventListener("click", () => load(offset + settings.page).then(() => scrollTo(0, 0)).catch(() => {}));
  for (const name of ["edit-caption", "edit-words"]) $(name).addEventListener("input", () => prompts().catch(() => {}));
  $("edit-form").addEventListener("submit", event => { event.preventDefault(); save().catch(() => {}); });
  $("edit-make").addEventListener("click", () => makeNow().catch(() => {}));
  $("edit-next").addEventListener("click", () => editStep(1).catch(() => {}));
  $("edit-previous").addEventListener("click", () => editStep(-1).catch(() => {}));
  $("study-show").addEventListener("click", () => results().catch(() => {}));
  document.addEventListener("keydown", pressed);
  await load();
  const wanted = location.hash.slice(1);
  open(["captions", "study"].includes(wanted) ? wanted : "curate", undefined, true);
}

begin().catch(() => {});
