"use strict";
const data = JSON.parse(document.getElementById("look").textContent);
const $ = (id) => document.getElementById(id);
const count = data.tokens.length, next = count; // the step after the last token is `next`
const make = (tag, text, kind) => {
  const one = document.createElement(tag);
  if (text !== undefined) one.textContent = text;
  if (kind) one.className = kind;
  return one;
};
const piece = (token) => data.pieces[token];
const textOf = (token) => piece(token)[0].trim() ? piece(token)[0] : piece(token)[0].replaceAll(" ", "␣") || "∅";
const nameOf = (at) => at === next ? "what comes next" : textOf(data.tokens[at]);
const percent = (p) => p >= 0.0995 ? (100 * p).toFixed(0) + "%" : p >= 0.001 ? (100 * p).toFixed(1) + "%" : p > 0 ? "<0.1%" : "0%";
const tint = (name, share) => share > 0.004 ? `rgba(var(--${name}),calc(${Math.min(1, share).toFixed(3)}*var(--top)))` : "transparent";
const unpack = async (text) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};

// State: the step that is looked at (the token that it predicts, 1 to `next`), the layer and the head.
let step = data.open, layer = data.attention.layer, head = data.attention.head, rows = null, saliency = null, whole = false;
const heads = new Map();
const headOf = (l, h) => {
  const key = l + "." + h;
  if (!heads.has(key)) heads.set(key, unpack(data.attention.held[l][h]));
  return heads.get(key);
};
const weight = (bytes, i, j) => j > i ? 0 : (bytes[i * (i + 1) / 2 + j] / 255) ** 2;

// ------------------------------------------------------------------------------------------------ strips of tokens
function strip(place, label) {
  const box = $(place);
  if (!box) return null;
  box.replaceChildren();
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", label);
  const chips = [];
  for (let at = 0; at <= count; at++) {
    const chip = make("button", at === next ? "▸ next" : piece(data.tokens[at])[0] || "∅");
    chip.type = "button";
    chip.tabIndex = -1;
    if (at === next || piece(data.tokens[at])[1]) chip.classList.add("special");
    if (at === 0) chip.classList.add("first");
    chip.addEventListener("click", () => go(at, false));
    box.append(chip);
    if (at < count && piece(data.tokens[at])[2]) box.append(make("br"));
    chips.push(chip);
  }
  box.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -1e9, End: 1e9 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    go(step + moves[event.key], false);
    chips[step].focus();
  });
  return chips;
}
const strips = { loss: strip("loss", "tokens by loss"), look: strip("seen", "tokens by attention"), gain: strip("gain", "tokens by saliency") };
const each = (chips, paint) => chips && chips.forEach((chip, at) => {
  const [colour, share, title] = paint(at);
  chip.style.backgroundColor = tint(colour, share);
  chip.title = title;
  chip.setAttribute("aria-label", nameOf(at) + (title ? ": " + title : ""));
});

function paintLoss() {
  const most = Math.max(...data.loss.filter((v) => v !== null), 1e-9);
  each(strips.loss, (at) => at === 0 ? ["loss", 0, "the first token: nothing stands before it"] : at === next ? ["loss", 0, ""]
    : ["loss", data.loss[at] / most, `loss ${data.loss[at].toFixed(2)} nats, rank ${data.rank[at].toLocaleString("en")}`]);
  $("lossmost").textContent = most.toFixed(1) + " nats";
}

function guesses(place, depth, at, own) {
  const box = $(place);
  box.replaceChildren();
  data.lens.ids[depth][at].forEach((token, i) => {
    const p = data.lens.p[depth][at][i];
    const line = make("div", undefined, "guess" + (token === own ? " own" : ""));
    const bar = make("i");
    bar.style.width = Math.max(0.5, 100 * p) + "%";
    const name = make("span", textOf(token), piece(token)[1] ? "special" : "");
    name.title = textOf(token);
    line.append(name, bar, make("em", percent(p)));
    box.append(line);
  });
}

// ------------------------------------------------------------------------------------------------------- the lens
function paintLens() {
  const table = $("lens"), deep = data.lens.ids.length;
  const from = Math.max(1, Math.min(step - 20, next - 40)), to = Math.min(next, from + 40);
  const top = make("tr");
  top.append(make("th", "after layer"));
  for (let t = from; t <= to; t++) {
    const cell = make("th", t === next ? "▸ next" : nameOf(t), t === step ? "here" : "");
    cell.scope = "col";
    top.append(cell);
  }
  const lines = [top];
  for (let d = deep - 1; d >= 0; d--) {
    const line = make("tr"), name = make("th", d === 0 ? "(none)" : d === deep - 1 ? `${d - 1} (last)` : String(d - 1));
    name.scope = "row";
    line.append(name);
    for (let t = from; t <= to; t++) {
      const token = data.lens.ids[d][t - 1][0], p = data.lens.p[d][t - 1][0];
      const cell = make("td", textOf(token), (token === data.tokens[t] ? "hit " : "") + (t === step ? "here" : ""));
      cell.style.backgroundColor = tint("look", p);
      cell.title = `${textOf(token)} ${percent(p)}` + (t < next ? `; ${nameOf(t)} ${percent(data.lens.own[d][t - 1])}, rank ${data.lens.rank[d][t - 1].toLocaleString("en")}` : "");
      cell.addEventListener("click", () => go(t, false));
      line.append(cell);
    }
    lines.push(line);
  }
  table.replaceChildren(...lines);
  const here = table.querySelector(".here"), box = table.parentElement;
  if (here) box.scrollLeft = here.offsetLeft - box.clientWidth / 2;
  const path = $("path");
  path.replaceChildren();
  for (let d = deep - 1; d >= 0; d--) {
    const token = data.lens.ids[d][step - 1][0], own = step < next ? data.lens.own[d][step - 1] : data.lens.p[d][step - 1][0];
    const line = make("div", undefined, "guess" + (token === data.tokens[step] ? " own" : ""));
    const bar = make("i");
    bar.style.width = Math.max(0.5, 100 * own) + "%";
    line.append(make("span", (d === 0 ? "none" : d - 1) + "  " + textOf(token)), bar,
      make("em", step < next ? percent(own) + " · " + data.lens.rank[d][step - 1].toLocaleString("en") : percent(own)));
    path.append(line);
  }
  $("pathsaid").textContent = step < next ? `After each layer: its likeliest token; the bar is the probability of “${nameOf(step)}”, with its rank.`
    : "After each layer: its likeliest token and how likely it is.";
}

// ------------------------------------------------------------------------------------------------------- attention
const rgb = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).split(",").map(Number);
function draw(canvas, bytes, size) {
  canvas.width = canvas.height = size;
  const paint = canvas.getContext("2d"), image = paint.createImageData(size, size), [r, g, b] = rgb("look");
  const shown = new Uint8Array(size * size);
  for (let i = 0, k = 0; i < count; i++) for (let j = 0; j <= i; j++, k++) {
    const at = Math.floor(i * size / count) * size + Math.floor(j * size / count);
    if (bytes[k] > shown[at]) shown[at] = bytes[k];
  }
  for (let k = 0; k < shown.length; k++) image.data.set([r, g, b, shown[k]], 4 * k);
  paint.putImageData(image, 0, 0);
}
async function paintHead() {
  if (!$("map")) return;
  rows = await headOf(layer, head);
  draw($("map"), rows, count);
  $("layer").value = layer;
  $("head").value = head;
  for (const thumb of document.querySelectorAll(".thumb")) thumb.setAttribute("aria-pressed", thumb.dataset.at === layer + "." + head);
  paintSeen();
}
function paintSeen() {
  if (!rows) return;
  const i = step - 1, row = Array.from({ length: i + 1 }, (_, j) => weight(rows, i, j)), most = Math.max(...row, 1e-9);
  each(strips.look, (at) => at <= i ? ["look", Math.sqrt(row[at] / most) * Math.min(1, 0.35 + most), percent(row[at])] : ["look", 0, at === step ? "is predicted" : ""]);
  const order = row.map((w, j) => [w, j]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  const box = $("seentop");
  box.replaceChildren();
  for (const [w, j] of order) {
    const line = make("div", undefined, "guess"), bar = make("i");
    bar.style.width = Math.max(0.5, 100 * w) + "%";
    line.append(make("span", `${j}  ${nameOf(j)}`), bar, make("em", percent(w)));
    box.append(line);
  }
  $("seensaid").textContent = `Head ${head} of layer ${layer}, at “${nameOf(i)}”, which predicts ${step === next ? "what comes next" : "“" + nameOf(step) + "”"}:`;
}
function makeHeads() {
  const box = $("grid");
  if (!box) return;
  const layers = Object.keys(data.attention.held).map(Number), many = data.attention.held[layers[0]].length;
  box.style.gridTemplateColumns = `auto repeat(${Math.max(...layers.map((l) => data.attention.held[l].length))}, 42px)`;
  for (const l of layers) {
    $("layer").append(new Option(String(l), l));
    box.append(make("span", String(l)));
    data.attention.held[l].forEach((_, h) => {
      const thumb = make("button", undefined, "thumb"), canvas = make("canvas");
      thumb.type = "button";
      thumb.dataset.at = l + "." + h;
      thumb.style.gridColumn = h + 2;
      thumb.title = `layer ${l}, head ${h}`;
      thumb.setAttribute("aria-label", thumb.title);
      thumb.append(canvas);
      thumb.addEventListener("click", () => { layer = l; head = h; paintHead(); });
      box.append(thumb);
    });
  }
  const fill = () => {
    const last = data.attention.held[layer].length - 1;
    head = Math.min(head, last);
    $("head").replaceChildren(...Array.from({ length: last + 1 }, (_, h) => new Option(String(h), h)));
  };
  fill();
  $("layer").addEventListener("change", (event) => { layer = Number(event.target.value); fill(); paintHead(); });
  $("head").addEventListener("change", (event) => { head = Number(event.target.value); paintHead(); });
  const map = $("map");
  const spot = (event) => {
    const box = map.getBoundingClientRect();
    return [Math.floor((event.clientY - box.top) / box.height * count), Math.floor((event.clientX - box.left) / box.width * count)];
  };
  map.addEventListener("mousemove", (event) => {
    const [i, j] = spot(event);
    if (rows && i >= 0 && i < count && j >= 0 && j < count) $("tip").textContent = j > i ? `“${nameOf(j)}” comes after “${nameOf(i)}”: not seen`
      : `“${nameOf(i)}” (${i}) takes ${percent(weight(rows, i, j))} from “${nameOf(j)}” (${j})`;
  });
  map.addEventListener("click", (event) => go(Math.min(count, spot(event)[0] + 1), false));
}
async function paintThumbs() {
  for (const thumb of document.querySelectorAll(".thumb")) {
    const [l, h] = thumb.dataset.at.split(".");
    draw(thumb.firstChild, await headOf(l, h), Math.min(count, 40));
  }
}

// -------------------------------------------------------------------------------------------------------- saliency
async function readSaliency() {
  if (!strips.gain) return;
  const bytes = new Int8Array((await unpack(data.saliency.rows)).buffer);
  saliency = (group, at) => bytes[group * count + at] / 127 * data.saliency.scale[group];
  paintGain();
}
function paintGain() {
  if (!saliency) return;
  const single = data.saliency.count > 1 && !whole, group = single ? step : 0, most = data.saliency.scale[group];
  each(strips.gain, (at) => {
    if (at === next) return ["plus", 0, ""];
    const value = saliency(group, at);
    return [value < 0 ? "minus" : "plus", Math.abs(value) / most, `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(2)} nats`];
  });
  $("gainsaid").textContent = !single ? "What each token adds to the log-likelihood of the whole text:"
    : `What each token adds to the log-likelihood of ${step === next ? `“${textOf(data.lens.ids.at(-1)[count - 1][0])}”, the likeliest next token` : "“" + nameOf(step) + "”"}:`;
  $("gainmost").textContent = most.toPrecision(2) + " nats";
}

// ------------------------------------------------------------------------------------------------------- all of it
function go(to, focus) {
  step = Math.max(1, Math.min(next, to));
  for (const chips of Object.values(strips)) if (chips) chips.forEach((chip, at) => {
    chip.setAttribute("aria-pressed", at === step);
    chip.tabIndex = at === step ? 0 : -1;
  });
  const said = $("said");
  said.replaceChildren(make("b", step === next ? "▸ next" : nameOf(step)));
  const more = step === next ? ` after ${count.toLocaleString("en")} tokens, likeliest: “${textOf(data.lens.ids.at(-1)[count - 1][0])}” ${percent(data.lens.p.at(-1)[count - 1][0])}`
    : ` ${step} · loss ${data.loss[step].toFixed(2)} · rank ${data.rank[step].toLocaleString("en")} · ${percent(Math.exp(-data.loss[step]))}`;
  said.append(more);
  $("back").disabled = step === 1;
  $("on").disabled = step === next;
  $("guessed").textContent = step === next ? "What the model expects next:" : `What the model expected in the place of “${nameOf(step)}”:`;
  guesses("guesses", data.lens.ids.length - 1, step - 1, data.tokens[step]);
  paintLens();
  paintSeen();
  paintGain();
  if (focus) strips.loss[step].focus();
}
$("back").addEventListener("click", () => go(step - 1, false));
$("on").addEventListener("click", () => go(step + 1, false));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select,input,.strip")) return;
  if (event.key === "j" || event.key === "ArrowRight") go(step + 1, false);
  else if (event.key === "k" || event.key === "ArrowLeft") go(step - 1, false);
  else return;
  event.preventDefault();
});
if ($("whole")) $("whole").addEventListener("change", (event) => { whole = event.target.checked; paintGain(); });
matchMedia("(prefers-color-scheme:dark)").addEventListener("change", () => { paintHead(); paintThumbs(); });
makeHeads();
paintLoss();
go(step, false);
paintHead();
paintThumbs();
readSaliency();
