// What the page shows: cards, the detail window, messages. Text goes in as text, never as HTML.

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const numbers = new Intl.NumberFormat("en");
export const count = (n, word) => `${numbers.format(n)} ${word}${n === 1 ? "" : "s"}`;
export const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

const nameOf = (source) => source.split("/").pop() || source;
const titleOf = (item) => item.text || (item.source ? nameOf(item.source) : item.id);
const timeOf = (seconds) => {
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.getTime()) ? `${seconds} s` : date.toISOString().slice(0, 19).replace("T", " ");
};

function shown(value) {
  if (Array.isArray(value)) return value.map((tag) => element("span", { className: "tag", textContent: tag }));
  if (typeof value === "number") return [Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6)))];
  return [value === null ? "–" : String(value)];
}

function definitions(list, facts) {
  list.replaceChildren(...facts.flatMap(([term, value]) => [
    element("dt", { textContent: term }), element("dd", { title: String(value) }, ...shown(value)),
  ]));
  return list;
}

// An image, replaced by the item's fields if it cannot be shown.
function picture(item, side, fallback) {
  if (!item.thumbnail) return fallback();
  const image = element("img", { src: `${item.thumbnail}?side=${side}`, alt: "", loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(fallback()), { once: true });
  return image;
}

function card(item, actions) {
  const title = titleOf(item);
  const fields = () => definitions(element("dl", { className: "words" }),
    Object.entries(item.metadata).slice(0, 6).filter(([, value]) => value !== null));
  const words = element("span", { className: "words" }, element("span", { className: "title", textContent: title }));
  if (item.time !== null) words.append(element("span", { className: "when", textContent: timeOf(item.time).slice(0, 16), title: "UTC" }));
  const open = element("button", { type: "button", className: "open" }, picture(item, 480, fields), words);
  open.setAttribute("aria-label", [title, item.score === undefined ? "" : `score ${item.score.toFixed(3)}`, "show details"].filter(Boolean).join(", "));
  open.addEventListener("click", () => actions.open(item));
  const similar = element("button", { type: "button", className: "similar plain", textContent: "More like this" });
  similar.setAttribute("aria-label", `More like ${title}`);
  similar.addEventListener("click", () => actions.similar(item));
  const score = element("span", { className: "score" });
  if (item.score !== undefined) {
    score.textContent = item.score.toFixed(3);
    score.title = "Cosine similarity";
  }
  return element("li", { className: "card" }, open, element("div", { className: "foot" }, score, similar));
}

export function showItems(items, actions, { keep = false } = {}) {
  const cards = items.map((item) => card(item, actions));
  if (keep) byId("results").append(...cards);
  else byId("results").replaceChildren(...cards);
}

export function showDetail(item, actions) {
  const dialog = byId("detail");
  byId("detail-title").textContent = titleOf(item);
  const image = byId("detail-image");
  image.hidden = !item.thumbnail;
  image.onerror = () => { image.hidden = true; };
  if (item.thumbnail) image.src = `${item.thumbnail}?side=1024`;
  else image.removeAttribute("src");
  const facts = [["id", item.id]];
  if (item.score !== undefined) facts.push(["score", item.score.toFixed(4)]);
  if (item.time !== null) facts.push(["time", `${timeOf(item.time)} UTC`]);
  if (item.source !== null) facts.push(["source", item.source]);
  if (item.text !== null) facts.push(["text", item.text]);
  if (item.part) facts.push(["part", item.part]);
  definitions(byId("detail-facts"), [...facts, ...Object.entries(item.metadata)]);
  byId("detail-similar").onclick = () => { dialog.close(); actions.similar(item); };
  dialog.showModal();
}

function headingOf(problem) {
  if (problem.errors?.some((each) => each.field === "where")) return "The filter cannot be used";
  if (!problem.status) return problem.title;
  return problem.status < 500 ? "This search cannot be done" : "The server failed";
}

export function showProblem(problem) {
  const box = byId("problem");
  box.replaceChildren();
  byId("where").removeAttribute("aria-invalid");
  if (!problem) return;
  const detail = element(problem.detail.includes("\n") ? "pre" : "p", { textContent: problem.detail });
  box.append(element("b", { textContent: headingOf(problem) }), detail);
  if (problem.errors?.some((each) => each.field === "where")) {
    byId("options").open = true;
    byId("where").setAttribute("aria-invalid", "true");
    byId("where").focus();
  }
}

export function showEmpty(title, ...lines) {
  const empty = byId("empty");
  empty.hidden = !title;
  empty.replaceChildren();
  if (title) empty.append(element("h2", { textContent: title }), ...lines.map((line) => element("p", {}, ...[line].flat())));
}

// Arrow keys move between cards.
export function moveByArrows(event) {
  const cards = [...document.querySelectorAll("#results .open")];
  const here = cards.indexOf(document.activeElement);
  if (here < 0) return;
  const top = (index) => cards[index].getBoundingClientRect().top;
  const columns = Math.max(1, cards.findIndex((_, index) => top(index) > top(0) + 4));
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -here, End: cards.length - 1 - here };
  const next = cards[here + steps[event.key]];
  if (next) {
    event.preventDefault();
    next.focus();
  }
}
