// What draws the gallery from the JSON in its page; visu/gallery.py puts it into gallery.html.
"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const clusters = page.clusters;
const $ = (id) => document.getElementById(id);
const AT_ONCE = 20;  // clusters that are drawn in one go; more follow when the reader gets near the end
const TILE = Math.min(120, Math.max(72, page.side));  // pixels; as many fill a row as fit
const COLUMNS = Math.max(3, Math.floor((Math.min(innerWidth, 1500) - 34) / (TILE + 6)));
const FIRST_TILES = COLUMNS * (COLUMNS > 5 ? 2 : 3);  // whole rows
const MIDDLE = page.hasDistances ? "Nearest" : "First";

// ---------------------------------------------------------------- small things

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);  // strings become text: nothing in a file name is ever read as HTML
  return element;
}

const number = (n) => n.toLocaleString("en");
const images = (n) => `${number(n)} image${n === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(share < 1 && share > 0.995 ? 1 : 0)} %`;

// Bytes that are no UTF-8 arrive as lone surrogates U+DC80 to U+DCFF (Python's surrogateescape).
const isByte = (code) => code >= 0xdc80 && code <= 0xdcff;
const hex = (code) => (code & 0xff).toString(16).padStart(2, "0");

function shown(name) {  // a name as text on one line
  return Array.from(name, (c) => {
    const code = c.codePointAt(0);
    return isByte(code) || code < 0x20 || code === 0x7f ? `\\x${hex(code)}` : c;
  }).join("");
}

function address(name) {  // where the original lies, seen from this page
  const encoded = name.split("/").map((part) => Array.from(part, (c) => {
    return isByte(c.codePointAt(0)) ? `%${hex(c.codePointAt(0))}` : encodeURIComponent(c);
  }).join("")).join("/");
  return name.startsWith("/") ? `file://${encoded}` : page.base + encoded;
}

const fold = (text) => text.normalize("NFC").toLowerCase();

function withMarks(text, query) {  // the text with what was searched for marked
  const at = query ? fold(text).indexOf(query) : -1;
  if (at < 0 || fold(text).length !== text.length) return [text];
  const end = at + query.length;
  return [text.slice(0, at), make("mark", {}, text.slice(at, end)), text.slice(end)];
}

// ---------------------------------------------------------------- order and search

const bySize = (a, b) => b.size - a.size || a.id - b.id;
const by = (field, sign) => (a, b) => sign * (a[field] - b[field]) || bySize(a, b);
const superCluster = (cluster) => Math.floor(cluster.id / page.fine);
const ORDERS = [
  ...(page.fine ? [["super", "By super-cluster", (a, b) => superCluster(a) - superCluster(b) || bySize(a, b)]] : []),
  ["largest", "Largest first", bySize],
  ["smallest", "Smallest first", by("size", 1)],
  ...(page.hasDistances
    ? [["compact", "Most compact first", by("spread", 1)], ["loose", "Least compact first", by("spread", -1)]] : []),
  ...(page.classes
    ? [["pure", "Purest first", by("purity", -1)], ["mixed", "Least pure first", by("purity", 1)]] : []),
  ["id", "By number", (a, b) => a.id - b.id],
];
const view = { query: "", random: false, list: [], drawn: 0 };

function find(query) {  // the clusters with images whose name holds the query; .hits: which of their names
  const wanted = /^#\d+$/.test(query) ? Number(query.slice(1)) : null;
  for (const cluster of clusters) {
    cluster.hits = null;
    if (!query || wanted !== null) continue;
    cluster.folded ??= cluster.names.map((name) => fold(shown(name)));
    cluster.hits = [];
    cluster.folded.forEach((name, i) => { if (name.includes(query)) cluster.hits.push(i); });
  }
  if (wanted !== null) return clusters.filter((cluster) => cluster.id === wanted);
  return query ? clusters.filter((cluster) => cluster.hits.length) : clusters.slice();
}

function update() {
  view.query = fold($("search").value.trim());
  view.list = find(view.query).sort(ORDERS.find(([key]) => key === $("sort").value)[2]);
  const found = view.list.reduce((sum, cluster) => sum + (cluster.hits?.length ?? 0), 0);
  const where = `${number(view.list.length)} cluster${view.list.length === 1 ? "" : "s"}`;
  $("status").textContent = !view.query || view.list.some((cluster) => !cluster.hits) ? where
    : found ? `${images(found)} in ${where}` : "Nothing found";
  view.drawn = 0;
  $("clusters").replaceChildren();
  drawMore();
}

// ---------------------------------------------------------------- drawing

function drawMore() {
  const next = view.list.slice(view.drawn, view.drawn + AT_ONCE);
  $("clusters").append(...next.map(section));
  view.drawn += next.length;
  watcher.unobserve($("end"));  // so that it reports again if the end is still near
  if (view.drawn < view.list.length) watcher.observe($("end"));
}

const watcher = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) drawMore();
}, { rootMargin: "1500px" });

function section(cluster) {
  const element = make("section", { class: "cluster", id: `cluster-${cluster.id}`, "aria-labelledby": `title-${cluster.id}` });
  const facts = [make("span", { class: "fact" }, make("b", {}, number(cluster.size)), cluster.size === 1 ? " image" : " images")];
  if (page.fine) facts.push(make("span", { class: "fact" }, `in super-cluster ${superCluster(cluster)}`));
  if (cluster.purity !== null) {
    facts.push(make("span", { class: "fact purity" }, "purity ", make("b", {}, percent(cluster.purity)),
      ` ${shown(page.classes[cluster.majority])}`));
  }
  if (cluster.spread !== null) {
    facts.push(make("span", { class: "fact spread", title: "Compactness: mean squared distance to the centroid" },
      "mean sq. distance ", make("b", {}, cluster.spread.toPrecision(3))));
  }
  const random = { on: view.random };
  const head = make("header", {}, make("h2", { id: `title-${cluster.id}` }, `Cluster ${cluster.id}`), ...facts);
  if (!cluster.hits && cluster.size > 1) {
    const toggle = make("button", { class: "push toggle", type: "button", "aria-pressed": random.on }, "Random");
    toggle.setAttribute("aria-label", `Random images of cluster ${cluster.id}`);
    toggle.addEventListener("click", () => {
      random.on = !random.on;
      toggle.setAttribute("aria-pressed", random.on);
      fill(element, cluster, random.on, FIRST_TILES);
    });
    head.append(toggle);
  }
  element.append(head);
  fill(element, cluster, random.on, FIRST_TILES);
  return element;
}

function fill(element, cluster, random, limit) {  // (re)draw the tiles of a cluster
  element.querySelector(".grid")?.remove();
  element.querySelector(".more")?.remove();
  const items = cluster.hits ?? (random ? cluster.random : cluster.near);
  const label = cluster.hits ? "Found" : random ? "Random" : MIDDLE;
  const grid = make("div", { class: "grid", role: "group", "aria-label": `${label} images of cluster ${cluster.id}` });
  grid.append(...items.slice(0, limit).map((i, place) => tile(cluster, i, items, place)));
  grid.addEventListener("keydown", walk);
  if (grid.firstChild) grid.firstChild.tabIndex = 0;  // one stop for Tab; the arrows move on
  else grid.append(make("span", { class: "fact" }, "No thumbnail of this cluster is in the page."));
  element.append(grid);
  if (items.length > limit) {
    const more = make("button", { class: "push more", type: "button" }, `Show all ${number(items.length)}`);
    more.addEventListener("click", () => {
      fill(element, cluster, random, items.length);
      element.querySelectorAll(".tile")[limit].focus();
    });
    element.append(more);
  }
}

function tile(cluster, i, items, place) {
  const name = shown(cluster.names[i]);
  const element = make("button", { class: "tile", type: "button", tabindex: -1, title: name, "aria-label": name });
  const thumb = source(cluster, i);
  element.append(thumb ? make("img", { src: thumb, alt: "", loading: "lazy", decoding: "async" })
    : make("span", { class: "none" }, "no thumbnail"));
  if (cluster.hits) {
    element.classList.add("hit");
    element.append(make("span", { class: "name" }, ...withMarks(name, view.query)));
  }
  element.addEventListener("click", () => enlarge(cluster, items, place, element.parentElement));
  element.addEventListener("focus", () => {
    for (const other of element.parentElement.children) other.tabIndex = other === element ? 0 : -1;
  });
  return element;
}

function source(cluster, i) {
  return cluster.thumbs[i] ? `data:${page.mime};base64,${cluster.thumbs[i]}` : null;
}

function walk(event) {  // arrow keys among the tiles of a cluster
  const tiles = [...event.currentTarget.querySelectorAll(".tile")];
  const at = tiles.indexOf(document.activeElement);
  const columns = Math.max(1, tiles.filter((other) => other.offsetTop === tiles[0].offsetTop).length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: tiles.length - 1 - at };
  if (at < 0 || !(event.key in step)) return;
  event.preventDefault();
  tiles[at + step[event.key]]?.focus();
}

// ---------------------------------------------------------------- a picture, large

const box = { cluster: null, items: [], place: 0, grid: null };

function enlarge(cluster, items, place, grid) {
  Object.assign(box, { cluster, items, place, grid });
  show();
  $("lightbox").showModal();
}

function show() {
  const { cluster, items, place } = box;
  const i = items[place];
  const thumb = source(cluster, i);
  $("picture").hidden = !thumb;
  $("absent").hidden = Boolean(thumb);
  if (thumb) $("picture").src = thumb;
  else $("picture").removeAttribute("src");
  $("picture").alt = shown(cluster.names[i]);
  $("name").textContent = shown(cluster.names[i]);
  $("place").textContent = `${number(place + 1)} of ${number(items.length)}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === items.length - 1;
  const facts = [["Cluster", `${cluster.id} (${images(cluster.size)})`]];
  if (cluster.classes) facts.unshift(["Class", shown(page.classes[cluster.classes[i]])]);
  if (cluster.distances && cluster.distances[i] !== null) facts.push(["Squared distance", cluster.distances[i]]);
  $("facts").replaceChildren(...facts.map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, String(value)))));
  showOriginal(cluster.names[i], place);
}

function showOriginal(name, place) {  // a link to the file and, from a disk, the file itself instead of its thumbnail
  $("original").hidden = page.base === null;
  $("seen").textContent = "";
  if (page.base === null) return;
  $("link").href = address(name);
  if (location.protocol !== "file:") return;
  const original = new Image();
  const current = () => box.place === place && box.cluster?.names[box.items[place]] === name;
  original.onload = () => {
    if (!current()) return;
    $("picture").src = original.src;
    $("picture").hidden = false;
    $("absent").hidden = true;
    $("seen").textContent = `${original.naturalWidth} × ${original.naturalHeight} pixels`;
  };
  original.onerror = () => {
    if (current()) $("seen").textContent = "(could not be shown from here; this is the thumbnail)";
  };
  original.src = $("link").href;
}

function go(place) {
  if (place < 0 || place >= box.items.length || place === box.place) return;
  const button = document.activeElement;
  box.place = place;
  show();
  if (button?.disabled) $("close").focus();  // the end was reached by its button
}

$("previous").addEventListener("click", () => go(box.place - 1));
$("next").addEventListener("click", () => go(box.place + 1));
$("close").addEventListener("click", () => $("lightbox").close());
$("lightbox").addEventListener("click", (event) => {
  if (event.target === $("lightbox")) {
    const edge = $("lightbox").getBoundingClientRect();
    const inside = event.clientX >= edge.left && event.clientX <= edge.right && event.clientY >= edge.top && event.clientY <= edge.bottom;
    if (!inside) $("lightbox").close();
  }
});
$("lightbox").addEventListener("keydown", (event) => {
  const place = { ArrowLeft: box.place - 1, ArrowRight: box.place + 1, Home: 0, End: box.items.length - 1 }[event.key];
  if (place === undefined) return;
  event.preventDefault();
  go(place);
});
$("lightbox").addEventListener("close", () => {  // back to the picture that was looked at last
  const tiles = box.grid.querySelectorAll(".tile");
  const at = document.activeElement;  // somewhere else if the reader was quicker than this event
  if (at === document.body || box.grid.contains(at)) (tiles[box.place] ?? tiles[tiles.length - 1])?.focus();
  box.cluster = null;
});

// ---------------------------------------------------------------- start

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || $("lightbox").open) return;
  if (event.target.matches("input, select")) return;
  event.preventDefault();
  $("search").focus();
  $("search").select();
});
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && $("search").value) {
    event.preventDefault();
    $("search").value = "";
    update();
  }
});
let waiting = 0;
$("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(update, 120);
});
$("sort").addEventListener("change", update);
$("random").addEventListener("click", () => {
  view.random = !view.random;
  $("random").setAttribute("aria-pressed", view.random);
  update();
});
document.documentElement.style.setProperty("--tile", `${TILE}px`);
$("notes").textContent = page.notes.join(" ");
$("sort").append(...ORDERS.map(([key, label]) => make("option", { value: key }, label)));
update();
