// The search page: what is asked for stands in the address, so that links, reload and back work.
import { byId, count, element, milliseconds, moveByArrows, showDetail, showEmpty, showItems, showProblem } from "./results.js";

const PAGE = 24;
const USUAL = { where: "", without: "", words: "", k: "24", recall: "0.95", distinct: "" };
const OPTIONS = Object.keys(USUAL);
const images = [];  // files searched by; an address cannot hold them
let stats = null;
let running = null;  // AbortController of the request that is waited for
let exampleUrl = null;

const actions = {
  open: (item) => showDetail(item, actions),
  similar: (item) => {
    go({ like: item.id, part: item.part || 0 });
    scrollTo(0, 0);
    byId("results").focus({ preventScroll: true });  // the button that was pressed is gone soon
  },
};

function options() {
  return Object.fromEntries(OPTIONS.map((id) => [id, byId(id).value.trim()]));
}

function addressOf(query) {
  const asked = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...query, ...options() })) {
    const usual = { ...USUAL, part: 0 }[name];
    if (name !== "image" && value !== undefined && value !== usual) asked.set(name, value);
  }
  return asked.size ? `?${asked}` : location.pathname;
}

// Start a search (or none) as a new step of the history.
function go(query) {
  history.pushState({ image: query.image }, "", addressOf(query));
  show();
}

function queryOf() {
  const asked = new URLSearchParams(location.search);
  const image = history.state?.image;
  const words = asked.get("q") ? { q: asked.get("q") } : {};
  if (image !== undefined && images[image]) return { ...words, image };
  if (asked.has("like")) return { ...words, like: asked.get("like"), part: Number(asked.get("part") || 0) };
  return words;
}

async function fetchJson(path, init = {}) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  const response = await fetch(path, { ...init, signal: mine.signal });
  const type = response.headers.get("content-type") || "";
  const document_ = type.includes("json") ? await response.json() : null;
  if (response.ok && document_) return document_;
  throw Object.assign(new Error("refused"), {
    problem: document_ ?? { title: `HTTP ${response.status}`, detail: (await response.text()) || "No explanation was given." },
  });
}

function askedFor(query) {
  const given = { ...options(), q: query.q ?? "" };
  const asked = new URLSearchParams(Object.entries(given).filter(([, value]) => value !== ""));
  if (query.like !== undefined) {
    asked.set("part", query.part);
    return fetchJson(`/api/similar/${encodeURIComponent(query.like)}?${asked}`);
  }
  if (query.image === undefined) return fetchJson(`/api/search?${asked}`);
  const file = images[query.image];
  return fetchJson(`/api/search/image?${asked}`, {
    method: "POST", body: file, headers: { "content-type": file.type || "application/octet-stream" },
  });
}

// Fill the form from the address and show what it asks for.
async function show() {
  const asked = new URLSearchParams(location.search);
  const query = queryOf();
  byId("text").value = query.q || "";
  for (const id of OPTIONS) byId(id).value = asked.get(id) ?? USUAL[id];
  if (OPTIONS.some((id) => asked.has(id))) byId("options").open = true;
  showExample(query);
  document.title = `${query.q || "Search"} - ${stats?.name ?? "mmedge"}`;
  const browsing = Object.keys(query).length === 0;
  busy(browsing ? "" : "Searching");
  try {
    if (browsing) await browse();
    else found(await askedFor(query));
    busy(null);
  } catch (error) {
    if (error.name !== "AbortError") failed(error);
  }
}

function busy(words) {
  byId("results").classList.toggle("stale", words !== null);
  byId("status").classList.toggle("busy", Boolean(words));
  if (words !== null) byId("status").textContent = words;
}

function found({ results, timing }) {
  const parts = [`search ${milliseconds(timing.search_ms)}`];
  if (timing.encode_ms !== null) parts.unshift(`encoding ${milliseconds(timing.encode_ms)}`);
  byId("status").textContent = `${count(results.length, "result")} in ${milliseconds(timing.total_ms)} (${parts.join(", ")})`;
  showProblem(null);
  showItems(results, actions);
  if (results.length) showEmpty(null);
  else showEmpty("Nothing found", options().where ? "No item passes the filter. Loosen it under “Filter and options”." : "The index holds no other item.");
  more(null);
}

async function browse(after = null) {
  const where = options().where;
  const asked = new URLSearchParams({ k: PAGE, ...(after ? { after } : {}), ...(where ? { where } : {}) });
  const { items, next } = await fetchJson(`/api/items?${asked}`);
  showProblem(null);
  showItems(items, actions, { keep: after !== null });
  byId("status").textContent = stats?.items ? (where ? "Items that pass the filter" : "Items of the index") : "";
  if (stats && !stats.items) showEmpty("This index is empty", ["Add items with ", element("code", { textContent: "mmedge index add" }), " and reload."]);
  else if (!byId("results").childElementCount) showEmpty("Nothing found", "No item passes the filter.");
  else showEmpty(null);
  more(next);
}

// The button below the items that shows further ones.
function more(next) {
  byId("more")?.remove();
  if (next === null) return;
  const button = element("button", { id: "more", type: "button", textContent: "Show more" });
  button.addEventListener("click", async () => {
    const before = byId("results").childElementCount;
    try {
      await browse(next);
      document.querySelectorAll("#results .open")[before]?.focus();
    } catch (error) {
      if (error.name !== "AbortError") failed(error);
    }
  });
  byId("results").after(button);
}

// Show why nothing is found. A request that is still waited for must not replace the explanation.
function failed(error) {
  running?.abort();
  busy(null);
  byId("status").textContent = "";
  showEmpty(null);
  showItems([], actions);
  more(null);
  showProblem(error.problem ?? { title: "The server cannot be reached", detail: "Check that mmedge serve is running, then search again." });
}

function showExample(query) {
  if (exampleUrl) URL.revokeObjectURL(exampleUrl);
  exampleUrl = null;
  const given = query.image !== undefined || query.like !== undefined;
  byId("example").hidden = !given;
  if (!given) return;
  const image = byId("example-image");
  image.hidden = false;
  image.onerror = () => { image.hidden = true; };
  if (query.image !== undefined) {
    const file = images[query.image];
    exampleUrl = URL.createObjectURL(file);
    image.src = exampleUrl;
    byId("example-label").textContent = file.name || "image";
  } else {
    image.src = `/api/thumbnails/${encodeURIComponent(query.like)}?side=96`;
    byId("example-label").textContent = `like ${query.like.split("/").pop()}`;
  }
}

function searchByImage(file) {
  if (!stats?.searchable_by.includes("image")) {
    failed({ problem: { title: "No search by image", detail: "This index has no image encoder." } });
  } else if (!file.type.startsWith("image/") && file.type !== "") {
    failed({ problem: { title: "Not an image", detail: `${file.name || "The file"} is of type ${file.type}. Expected an image file.` } });
  } else if (file.size > stats.max_image_bytes) {
    failed({ problem: { title: "The image is too large", detail: `It has ${Math.ceil(file.size / 2 ** 20)} MiB, and at most ${Math.floor(stats.max_image_bytes / 2 ** 20)} MiB are taken. Scale it down first.` } });
  } else {
    go({ image: images.push(file) - 1 });
  }
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const { q: _, ...example } = queryOf();
    const q = byId("text").value.trim();
    go(q ? { ...example, q } : example);
  });
  byId("example-clear").addEventListener("click", () => {
    const { q } = queryOf();
    go(q ? { q } : {});
    byId("text").focus();
  });
  byId("choose").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", (event) => {
    if (event.target.files[0]) searchByImage(event.target.files[0]);
    event.target.value = "";
  });
  byId("home").addEventListener("click", (event) => {
    event.preventDefault();
    for (const id of OPTIONS) byId(id).value = USUAL[id];
    go({});
  });
  for (const id of ["k", "recall", "distinct"]) byId(id).addEventListener("change", () => byId("form").requestSubmit());
  byId("detail-close").addEventListener("click", () => byId("detail").close());
  byId("detail").addEventListener("click", (event) => { if (event.target === byId("detail")) byId("detail").close(); });
  byId("results").addEventListener("keydown", moveByArrows);
  addEventListener("popstate", show);
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName);
    if (event.key === "/" && !typing && !byId("detail").open && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      byId("text").focus();
    }
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    searchByImage(file);
  });
  listenForDrops();
}

function listenForDrops() {
  const withFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;  // dragenter and dragleave come from every element that is passed
  const over = (inside) => byId("drop").classList.toggle("over", inside);
  document.addEventListener("dragenter", (event) => { if (withFiles(event)) over(++depth > 0); });
  document.addEventListener("dragleave", (event) => { if (withFiles(event)) over(--depth > 0); });
  document.addEventListener("dragover", (event) => { if (withFiles(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    depth = 0;
    over(false);
    if (!withFiles(event)) return;
    event.preventDefault();
    searchByImage(event.dataTransfer.files[0]);
  });
}

function describe() {
  byId("name").textContent = stats.name;
  byId("facts").textContent = count(stats.items, "item");
  const byText = stats.searchable_by.includes("text");
  const byImage = stats.searchable_by.includes("image");
  byId("text").disabled = !byText;
  byId("text").placeholder = byText ? "Describe what you look for" : byImage ? "This index is searched by image" : "This index has no model: start from one of its items";
  byId("choose").hidden = !byImage;
  byId("without").parentElement.hidden = !byText;
  const help = byId("where-help");
  help.replaceChildren("Fields: ", stats.fields.join(", "), ". Example: ", element("code", { textContent: 'time > 2026-01-01 and source = "front"' }), ".");
}

async function start() {
  try {
    stats = await fetchJson("/api/stats");
  } catch (error) {
    failed(error);
    return;
  }
  describe();
  listen();  // only now: what an image may be is among the stats
  await show();
  if (!byId("text").disabled && !document.activeElement?.closest("main")) byId("text").focus({ preventScroll: true });
}

start();
