"use strict";
// Asks for what is new once a second, and draws the part of the picture that is on the screen.

const POLL_MS = 1000, CURVE_SECONDS = 600, NAME_WIDTH = 300, SIZE_WIDTH = 150;
const FIELDS = ["node", "path", "size", "cached", "dirty", "hits", "misses", "rate", "cells", "ages", "cellPages", "time"];
const ORDERS = {
  name: (a, b) => (a.path === null) - (b.path === null) || (a.path < b.path ? -1 : a.path > b.path ? 1 : 0),
  cached: (a, b) => b.cached - a.cached, hot: (a, b) => b.rate - a.rate,
  hits: (a, b) => b.hits - a.hits, dirty: (a, b) => b.dirty - a.dirty,
};
const at = id => document.getElementById(id);
const page = { files: new Map(), shown: [], samples: [], look: null, head: null, version: "", clock: 0, draws: 0 };
window.cachefs = page;  // for tests and the curious

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1024; i++; }
  return (n >= 100 || Number.isInteger(n) ? n.toFixed(0) : n.toFixed(1)) + " " + units[i];
}

function duration(s) {
  if (s < 60) return s.toFixed(s < 10 ? 1 : 0) + " s";
  if (s < 3600) return Math.floor(s / 60) + " m " + Math.floor(s % 60) + " s";
  return Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " m";
}

// --- what the daemon says

async function poll() {
  const last = page.samples.length ? page.samples[page.samples.length - 1][0] : -1;
  try {
    const answer = await fetch("/picture.json?" + new URLSearchParams({ since: page.version, time: last }));
    if (!answer.ok) throw new Error(await answer.text());
    take(await answer.json());
    at("trouble").hidden = true;
  } catch (error) {
    at("trouble").textContent = "no answer: " + error.message;
    at("trouble").hidden = false;
  }
  setTimeout(poll, document.hidden ? 5 * POLL_MS : POLL_MS);
}

function take(news) {
  if (news.all) {
    page.files.clear();
    page.look = { states: news.states, colours: news.colours, ages: news.ages, steps: news.age_steps, most: news.most_cells };
    page.columns = Object.fromEntries(news.fields.map((name, i) => [name, i]));  // of a sample
    legend();
  }
  news.gone.forEach(node => page.files.delete(node));
  for (const strip of news.strips) {
    const file = Object.fromEntries(FIELDS.map((name, i) => [name, strip[i]]));
    page.files.set(file.node, file);
  }
  page.samples.push(...news.samples);
  while (page.samples.length && page.samples[0][0] < news.time - CURVE_SECONDS) page.samples.shift();
  page.version = news.version;
  page.head = news;
  page.clock = news.time - performance.now() / 1000;
  choose();
  figures();
}

const now = () => page.clock + performance.now() / 1000;  // seconds since the mount

function choose() {
  const part = at("filter").value;
  page.shown = [...page.files.values()].filter(file => !part || (file.path || "").includes(part)).sort(ORDERS[at("sort").value]);
  at("count").textContent = page.shown.length + " files";
  draw();
}

function figures() {
  const dirty = page.columns.dirty_bytes, head = page.head, reads = head.page_hits + head.page_misses;
  at("mount").textContent = head.mountpoint + " ← " + head.source;
  document.title = "cachefs " + head.mountpoint;
  at("figures").textContent = `${bytes(head.resident_bytes)} of ${bytes(head.capacity_bytes)} cached, ` +
    `${bytes(head.pinned_bytes)} pinned, ${head.policy}, ` +
    `${reads ? (100 * head.page_hits / reads).toFixed(1) : "-"} % of ${reads} pages hit since the mount`;
  curve("hits", rates(), 1);
  curve("unwritten", page.samples.map(sample => [sample[0], sample[dirty]]), head.dirty_limit_bytes);
  const last = page.samples[page.samples.length - 1], latest = rates().pop();
  at("rate").textContent = latest ? (100 * latest[1]).toFixed(1) + " %" : "";
  at("dirty").textContent = last ? `${bytes(last[dirty])} of at most ${bytes(head.dirty_limit_bytes)}` : "";
}

function rates() {
  const found = [], { page_hits, page_misses } = page.columns;
  for (let i = 1; i < page.samples.length; i++) {
    const [before, after] = page.samples.slice(i - 1, i + 1);
    const hits = after[page_hits] - before[page_hits], misses = after[page_misses] - before[page_misses];
    if (hits + misses) found.push([after[0], hits / (hits + misses)]);
  }
  return found;
}

// --- drawing

function prepare(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function curve(id, points, top) {
  const canvas = at(id), width = canvas.clientWidth, height = canvas.clientHeight, context = prepare(canvas, width, height);
  const from = now() - CURVE_SECONDS;
  context.strokeStyle = page.look.colours[id === "hits" ? 5 : 0];
  context.lineWidth = 1.5;
  context.beginPath();
  let before = -Infinity;
  for (const [time, value] of points) {
    const x = (time - from) / CURVE_SECONDS * width, y = height - 2 - Math.min(1, value / top) * (height - 4);
    if (time - before > 5) context.moveTo(x - 1, y);
    context.lineTo(x, y);
    before = time;
  }
  context.stroke();
}

function measures(width) {
  if (at("view").value === "all") {
    const strip = page.look.most + 6;
    return { columns: Math.max(1, Math.floor((width - 12) / strip)), cell: 1, row: 4, left: 0, strip };
  }
  const cell = Math.max(1, Math.min(8, Math.floor((width - NAME_WIDTH - SIZE_WIDTH) / page.look.most)));
  return { columns: 1, cell, row: 18, left: NAME_WIDTH, strip: width };
}

let asked = false;
function draw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; if (page.look) paint(); });
}

function paint() {
  const scroll = at("scroll"), width = scroll.clientWidth, height = scroll.clientHeight, m = measures(width);
  const rows = Math.ceil(page.shown.length / m.columns);
  at("room").style.height = Math.max(height, rows * m.row) + "px";
  const canvas = at("picture");
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  const context = prepare(canvas, width, height), first = Math.floor(scroll.scrollTop / m.row);
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (let row = first; row < Math.min(rows, first + Math.ceil(height / m.row) + 1); row++) {
    for (let column = 0; column < m.columns; column++) {
      const file = page.shown[column * rows + row];
      if (file) strip(context, file, column * m.strip, row * m.row - scroll.scrollTop, m);
    }
  }
  page.draws++;
}

function strip(context, file, x, y, m) {
  const whole = m.row - (m.left ? 4 : 1);
  if (m.left) {
    context.fillStyle = "#d7dae0";
    context.fillText(shorten(context, file.path === null ? `(removed, inode ${file.node})` : file.path), x + 10, y + m.row / 2);
    context.fillStyle = "#8b93a1";
    context.fillText(`${bytes(file.cached)} of ${bytes(file.size)}`, x + m.left + m.cell * page.look.most + 10, y + m.row / 2);
  }
  context.fillStyle = "#20252d";
  context.fillRect(x + m.left, y + 2, file.cells.length * m.cell, whole);
  for (let i = 0; i < file.cells.length;) {
    let stop = i + 1;
    while (stop < file.cells.length && same(file, i, stop)) stop++;
    const cell = look(file, i);
    if (cell) {
      const tall = m.left ? Math.max(2, whole * cell.share) : whole;
      context.globalAlpha = m.left ? cell.alpha : cell.alpha * (0.4 + 0.6 * cell.share);
      context.fillStyle = cell.colour;
      context.fillRect(x + m.left + i * m.cell, y + 2 + whole - tall, (stop - i) * m.cell - (m.cell > 3 && m.left ? 0.5 : 0), tall);
    }
    i = stop;
  }
  context.globalAlpha = 1;
}

const same = (file, a, b) => file.cells[a] === file.cells[b] && (file.ages.length === 1 || file.ages[a] === file.ages[b]);

function look(file, i) {  // state, share, age and colour of a cell; null if nothing is there
  if (file.cells[i] === ".") return null;
  const code = file.cells.charCodeAt(i) - 65, step = page.look.ages.indexOf(file.ages.length === 1 ? file.ages : file.ages[i]);
  const age = 2 ** (step / page.look.steps) - 1 + Math.max(0, now() - file.time);
  const old = Math.min(1, Math.log2(1 + age) / Math.log2(3601));
  const state = code >> 2;
  return { state: page.look.states[state], colour: page.look.colours[state], share: ((code & 3) + 1) / 4, age, alpha: 1 - 0.65 * old };
}
page.cell = look;

function shorten(context, text) {
  if (context.measureText(text).width < NAME_WIDTH - 20) return text;
  let from = Math.max(1, text.length - 45);
  while (from < text.length && context.measureText("…" + text.slice(from)).width > NAME_WIDTH - 20) from++;
  return "…" + text.slice(from);
}

function legend() {
  at("legend").replaceChildren(...page.look.states.flatMap((state, i) => {
    const square = document.createElement("i");
    square.style.background = page.look.colours[i];
    return [square, state];
  }));
}

// --- one file

function fileAt(x, y) {  // in the coordinates of the canvas
  const scroll = at("scroll"), m = measures(scroll.clientWidth), rows = Math.ceil(page.shown.length / m.columns);
  return page.shown[Math.min(m.columns - 1, Math.floor(x / m.strip)) * rows + Math.floor((y + scroll.scrollTop) / m.row)];
}

async function details(file) {
  const answer = await fetch("/file.json?" + new URLSearchParams({ inode: file.node }));
  const facts = answer.ok ? await answer.json() : { path: file.path, size: file.size, extents: [], more: false };
  at("name").textContent = facts.path === null ? `(removed, inode ${file.node})` : facts.path;
  at("about").textContent = `${facts.size} bytes; ${file.hits} page hits, ${file.misses} misses; ` +
    `a cell is ${bytes(4096 * file.cellPages)}${facts.more ? `; the first ${facts.extents.length} extents` : ""}`;
  at("extents").replaceChildren(...facts.extents.map(([offset, length, state, age, reader]) => {
    const row = document.createElement("tr");
    row.append(...[offset, length, state, duration(age), reader || "-"].map(text => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
  at("details").hidden = false;
  draw();
}

at("picture").addEventListener("click", event => {
  const file = fileAt(event.offsetX, event.offsetY);
  if (file) details(file);
});
at("picture").addEventListener("mousemove", event => {
  const file = fileAt(event.offsetX, event.offsetY);
  at("picture").title = file ? `${file.path}: ${bytes(file.cached)} of ${bytes(file.size)} cached, ${file.hits} hits` : "";
});
at("close").addEventListener("click", () => { at("details").hidden = true; draw(); });
at("scroll").addEventListener("scroll", draw);
for (const id of ["view", "sort", "filter"]) at(id).addEventListener("input", () => { if (page.look) choose(); });
window.addEventListener("resize", draw);
poll();
