"use strict";
// What the page shows: a sequence and settings go in, `model` makes every number from them by attention.js, `render` puts it into the document.
// Each cell of a heat map carries its number as data-value.

const { vector, matrix, dot } = Attention;
const D = 8;                                    // features of queries, keys and values
const $ = id => document.getElementById(id);

// --- a sequence becomes q, k and v ----------------------------------------------------------------------------------------------------

function normals(seed) {                        // standard normal numbers from a seed: mulberry32, then Box and Muller
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6D2B79F5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return (((x ^ (x >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}

// The code of a character: one axis of a random basis of eight, so that the codes of a … h are perpendicular, those of i … p too, and so on.
function code(character, seed) {
  const number = character.codePointAt(0) - 97, group = Math.floor(number / D), normal = normals(seed * 65537 + group);
  const axes = [];
  while (axes.length <= number - group * D) {
    let x = vector(D, normal);
    for (const axis of axes) x = x.map((value, i) => value - dot(vector(D, j => axis[j]), x) * axis[i]);
    axes.push(Attention.UNIT.forward(x));
  }
  return axes.at(-1);
}

const BEFORE = "\0";                            // what stands before the first character
const place = t => vector(D, i => (i % 2 ? Math.sin : Math.cos)(Math.PI * ((i >> 1) + 1) * t / LONGEST) / Math.sqrt(D / 2));
const sharpened = (x, s) => Attention.UNIT.forward(x).map(value => Math.sqrt(s) * value);
const askFor = (character, t, { place: share, sharpness }) =>
  sharpened(code(character, 1).map((value, i) => value + share * place(t)[i]), sharpness);

// A height between 0 and 1, shared between the two nearest of D levels; height(levels(h)) = h
const levels = h => vector(D, m => Math.max(0, 1 - Math.abs(h * (D - 1) - m)));
const height = x => x.reduce((sum, value, m) => sum + value * m / (D - 1), 0);

function sequence(settings) {
  if (settings.mode === "curve") {
    const q = Array.from(settings.curve, (_, t) => sharpened(place(t), settings.sharpness));
    return { labels: Array.from(settings.curve, (_, t) => String(t + 1)), q, k: q, v: Array.from(settings.curve, levels) };
  }
  const labels = Array.from(settings.text);
  return {
    labels, q: labels.map((c, t) => askFor(c, t, settings)), k: labels.map((c, t) => askFor(t ? labels[t - 1] : BEFORE, t, settings)),
    v: labels.map(c => code(c, 2)),
  };
}

// --- every number of the page -----------------------------------------------------------------------------------------------------------

const hasDecay = rule => rule.startsWith("gated"), hasBeta = rule => rule.endsWith("delta");

function model(settings) {
  const { labels, q, k, v } = sequence(settings), { mechanism, map, unit, t } = settings;
  const rule = mechanism === "attention" ? "linear" : mechanism;
  const F = Attention.FEATURE_MAPS[map].forward(vector(D)).length, N = q.length;
  // one decay for all channels, or for channel d the part (d + 1)/F of its logarithm
  const decays = settings.channels ? vector(F, d => Math.log(settings.decay) * (d + 1) / F) : vector(1, () => Math.log(settings.decay));
  const g = hasDecay(rule) ? Array(N).fill(decays) : null, beta = hasBeta(rule) ? vector(N, () => settings.beta) : null;
  const softmax = Attention.softmaxAttention(q, k, v, { scale: 1 });
  const attention = Attention.linearAttention(q, k, v, { map });
  const ruled = Attention.ruleAttention(q, k, v, g, beta, { map, unit });
  const chosen = mechanism === "attention" ? attention : ruled;
  // the loss is ½|o_i|², so do_i = o_i, or one feature of o_i
  const cotangent = out => matrix(N, D, (i, m) =>
    (i !== settings.focus - 1 ? 0 : settings.cotangent === "self" ? out[i][m] : Number(m === Number(settings.cotangent))));
  const gradients = chosen.backward(cotangent(chosen.out)), softmaxGradients = softmax.backward(cotangent(softmax.out));
  const ask = x => (mechanism === "attention" ? Attention.askLinear(x, attention.steps, t - 1, { map })
    : Attention.askRule(x, ruled.steps, t - 1, { map, unit }));
  const askSoftmax = x => Attention.askSoftmax(x, k, v, t - 1, { scale: 1 });
  const distinct = [...new Set(labels)];
  const answers = of => distinct.map(c => vector(distinct.length, j => dot(of(askFor(c, t - 1, settings)), code(distinct[j], 2))));
  const text = settings.mode === "text";
  return {
    labels, q, k, v, g, beta, rule, softmax, attention, ruled, chosen, gradients, softmaxGradients, distinct,
    answers: text && answers(ask), softmaxAnswers: text && answers(askSoftmax),
    remembered: !text && q.map(x => height(ask(x))), softmaxRemembered: !text && q.map(x => height(askSoftmax(x))),
    // the character whose code o_t reaches furthest, for each position
    expected: text && chosen.out.map(o => distinct.map(c => [dot(o, code(c, 2)), c]).reduce((best, next) => (next[0] > best[0] ? next : best))),
  };
}

// --- heat maps ---------------------------------------------------------------------------------------------------------------------------

const element = (name, attributes = {}, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

const visible = character => (character === " " ? "␣" : character);
const number = x => {
  const scientific = Math.abs(x) >= 1e4 || Math.abs(x) < 1e-3;
  const text = x === 0 ? "0" : !Number.isFinite(x) ? String(x) : scientific ? x.toExponential(1) : x.toPrecision(3);
  return text.replace("-", "−").replace("e+", "e");
};

const size = x => (Number.isFinite(x) ? Math.abs(x) : 0);
const largest = (...matrices) => Math.max(0, ...matrices.flatMap(X => X.flatMap(row => Array.from(row, size))));

const dark = matchMedia("(prefers-color-scheme: dark)");
let palette;
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim().match(/\w\w/g).map(part => parseInt(part, 16));
  palette = { empty: colour("--empty"), positive: colour("--positive"), negative: colour("--negative") };
}

function fill(value, range) {                   // in proportion between the colour of nothing and that of the range's end
  const part = range ? Math.min(Math.abs(value) / range, 1) : 0, end = value < 0 ? palette.negative : palette.positive;
  return `rgb(${palette.empty.map((from, i) => Math.round(from + (end[i] - from) * part)).join(" ")})`;
}

// X (rows, columns) drawn into `host`, an element that is kept between calls; a NaN leaves its cell out. options: name of X, range of the colours,
// tall (how high a cell is, of a width of 10), rows and columns (labels), frame (a row, a column, or both), later (the first row or column that is
// not yet reached), cut (a column with colours of its own range, behind a line), strongest (frame the largest of each row).
function heat(host, X, options) {
  const { name, range, tall = 10, rows = null, columns = null, frame = {}, later = {}, cut = null, strongest = false, legend = true } = options;
  const n = X.length, m = X[0].length, cell = 10, fontSize = Math.min(7.5, 3.8 + 0.16 * m);
  const left = rows ? cell : 0, top = columns ? cell : 0, shape = [n, m, tall, !!rows, !!columns].join();
  let svg = host.querySelector("svg");
  if (host.dataset.shape !== shape) {
    host.dataset.shape = shape;
    svg?.remove();
    host.querySelector(".scale")?.remove();
    svg = element("svg", { viewBox: `0 0 ${left + m * cell} ${top + n * tall}`, role: "img", tabindex: 0 });
    svg.style.maxWidth = `${(left + m * cell) * 3.4}px`;                       // a few large cells say no more than a few small ones
    svg.append(element("g"));
    for (let i = 0; i < n; i++) for (let j = 0; j < m; j++) {
      const place = { x: left + j * cell, y: top + i * tall, width: cell, height: tall };
      svg.firstChild.append(element("rect", { class: "cell", ...place, "data-row": i, "data-column": j }));
    }
    svg.append(element("g"), element("rect", { class: "frame cursor", hidden: "" }));
    host.append(svg);
    if (legend) host.insertAdjacentHTML("beforeend", '<div class="scale"><span></span><i></i><span></span></div>');
  }
  const [cells, marks] = svg.children;
  const isLater = (i, j) => i >= (later.row ?? Infinity) || j >= (later.column ?? Infinity);
  const cutRange = cut === null ? range : largest(X.map(row => row.slice(cut)));
  let at = 0;
  for (let i = 0; i < n; i++) for (let j = 0; j < m; j++) {
    const rect = cells.children[at++], value = X[i][j];
    rect.dataset.value = value;
    rect.setAttribute("fill", Number.isNaN(value) ? "none" : fill(value, cut === j ? cutRange : range));
    rect.classList.toggle("later", isLater(i, j));
  }
  marks.replaceChildren();
  const label = (text, x, y, strong) => marks.append(element("text", { x, y, "font-size": fontSize, class: strong ? "strong" : "" }, visible(text)));
  rows?.forEach((text, i) => label(text, cell / 2 - 1, top + (i + 0.5) * tall, i === frame.row));
  columns?.forEach((text, j) => label(text, left + (j + 0.5) * cell, cell / 2 - 1, j === frame.column));
  const box = (i, j, high, wide) =>
    marks.append(element("rect", { class: "frame", x: left + j * cell, y: top + i * tall, width: wide * cell, height: high * tall }));
  if (frame.row !== undefined) box(frame.row, 0, 1, m);
  if (frame.column !== undefined) box(0, frame.column, n, 1);
  if (strongest) X.forEach((row, i) => largest([row]) > 0 && box(i, row.indexOf(Math.max(...row)), 1, 1));
  if (cut !== null) marks.append(element("line", { class: "cut", x1: left + cut * cell, x2: left + cut * cell, y1: top, y2: top + n * tall }));
  svg.dataset.name = name;
  svg.setAttribute("aria-label", `${name}, ${n} by ${m}, largest size ${number(largest(X))}; arrow keys read its cells`);
  const ends = host.querySelectorAll(".scale span");
  if (legend) [ends[0].textContent, ends[1].textContent] = [number(-range), number(range)];
  return svg;
}

function read(rect) {                           // says the cell's number in the panel that it stands in
  const svg = rect.closest("svg"), output = rect.closest(".panel").querySelector(".readout"), { row, column, value } = rect.dataset;
  output.textContent = `${svg.dataset.name} [${Number(row) + 1}, ${Number(column) + 1}] = ${Number(value)}`.replaceAll("-", "−");
  const cursor = svg.querySelector(".cursor");
  cursor.removeAttribute("hidden");
  for (const key of ["x", "y", "width", "height"]) cursor.setAttribute(key, rect.getAttribute(key));
  svg.dataset.at = `${row},${column}`;
}

const hosts = Object.fromEntries(Array.from(document.querySelectorAll("[data-heat]"), host => [host.dataset.heat, host]));
for (const block of document.querySelectorAll(".block")) {
  block.insertAdjacentHTML("beforeend", '<div class="vectors"><div class="corner"></div><div class="top"><small></small></div>'
    + '<div class="left"></div><div class="matrix heat"></div></div>');
}

// --- the document ------------------------------------------------------------------------------------------------------------------------

const mechanismName = mechanism => (mechanism === "attention" ? "linear attention" : `rule ${mechanism}`);
const across = X => matrix(X[0].length, X.length, (i, j) => X[j][i]);            // positions from left to right

const START = {
  mode: "text", text: "abracadabra", curve: vector(LONGEST, t => 0.5 + Math.sin(t / 3.1) * (t < 15 ? 0.36 : 0.13) + (t > 16 ? 0.2 : 0)),
  mechanism: "attention", map: "elu1", unit: true, decay: 0.8, channels: false, beta: 1, sharpness: 4, place: 0,
  t: 1, focus: 1, follow: true, cotangent: "self",
};
let settings = { ...START };

function showState(made) {
  const { chosen } = made, { mechanism, t } = settings, { P, write, S, u } = chosen.steps[t - 1];
  const normalised = mechanism === "attention", corrects = hasBeta(mechanism), key = chosen.phiK[t - 1], query = chosen.phiQ[t - 1];
  const values = rows => rows.map(row => row.slice(0, D)), range = largest(...chosen.steps.map(step => values(step.S)));
  const cut = normalised ? D : null, tall = Math.min(10, 160 / S.length), writes = chosen.steps.map(step => step.u);
  const k = normalised ? `φ(${K_T})` : K_T, q = normalised ? `φ(${Q_T})` : Q_T;
  const given = normalised ? `(${V_T}, 1)` : `${sub("u")} = ${V_T}`, error = `${sub("u")} = β (${V_T} − ${P_T}${T}${K_T})`;
  const read = Float64Array.from([...chosen.out[t - 1], ...(normalised ? [NaN] : [])]);
  // a matrix, the vector at its left and the one above: under what, and what is written or read
  const blocks = {
    kept: { X: P, name: "P", under: [key, k, chosen.phiK], above: [Attention.fromLeft(key, P), "Pᵀk", writes, `${P_T}${T}${K_T}, known already`] },
    written: { X: write, name: "k uᵀ", under: [key, k, chosen.phiK], above: [u, "u", writes, corrects ? error : given] },
    state: { X: S, name: "S", under: [query, q, chosen.phiQ], above: [read, "o", chosen.out, `${sub("o")}, what is read`] },
  };
  for (const [id, { X, name, under, above }] of Object.entries(blocks)) {
    const vectors = document.querySelector(`[data-block=${id}] .vectors`), [corner, top, left, host] = vectors.children;
    vectors.style.gridTemplateColumns = `minmax(0, 1fr) minmax(0, ${X[0].length}fr)`;                       // cells of one size
    heat(host, X, { name, range, cut, tall });
    heat(left, Array.from(under[0], value => [value]), { name: id === "state" ? "q" : "k", range: largest(under[2]), tall, legend: false });
    heat(top, [above[0]], { name: above[1], range: largest(above[2]), cut: id === "written" ? cut : null, legend: false });
    corner.innerHTML = `<small>${under[1]}</small>`;
    top.firstChild.innerHTML = above[3];
    for (const vector of [corner, top, left]) vector.style.visibility = id !== "kept" || corrects ? "" : "hidden";
  }
  [$("state-equation").innerHTML, $("state-look").innerHTML] = EQUATIONS[mechanism];
  const [before, now] = [made.labels[t - 2] ?? "start", made.labels[t - 1]], step = corrects && settings.beta * dot(key, key);
  const facts = [
    settings.mode === "curve" ? `Position ${t} writes the height ${number(settings.curve[t - 1])}.`
      : `Position ${t} writes “${now}” under “${before}” and asks for “${now}”.`,
    `|S| = ${number(Math.sqrt(S.reduce((sum, row) => sum + dot(row, row), 0)))}, ${S.length} × ${S[0].length} numbers, whatever t.`,
    corrects ? `β|k|² = ${number(step)}${step > 2 + 1e-9 ? ", more than 2: errors grow" : ""}.` : "",
  ];
  $("facts").textContent = facts.join(" ");
}

function showChips(made) {
  const chips = $("chips");
  while (chips.children.length > made.labels.length) chips.lastChild.remove();
  while (chips.children.length < made.labels.length) {
    const button = document.createElement("button");
    button.type = "button";
    button.innerHTML = "<b></b><span></span><small></small>";
    const at = chips.children.length + 1;
    button.addEventListener("click", () => set({ t: at }));
    chips.append(button);
  }
  made.labels.forEach((label, i) => {
    const button = chips.children[i], [score, next] = made.expected[i];
    const [character, expected, size] = button.children;
    [character.textContent, expected.textContent, size.textContent] = [visible(label), visible(next), score.toFixed(2).replace("-", "−")];
    Object.assign(button.dataset, { expected: next, value: score });
    button.setAttribute("aria-label", `Position ${i + 1}, ${label}, expects ${next}, ${number(score)}`);
    button.classList.toggle("later", i >= settings.t);
    if (i === settings.t - 1) button.setAttribute("aria-current", "step");
    else button.removeAttribute("aria-current");
  });
}

const PAD = { height: 200, margin: 20 };
const padY = h => PAD.height - PAD.margin - h * (PAD.height - 2 * PAD.margin);
function showPad(made) {
  const pad = $("pad"), wide = pad.clientWidth, padX = t => (t + 0.5) * wide / LONGEST, line = (name, values) => element("polyline", {
    class: name, "data-values": JSON.stringify(values), points: values.map((h, t) => `${padX(t)},${padY(Math.max(-1, Math.min(2, h)))}`).join(" "),
  });
  const circle = (h, t) => element("circle", { class: t < settings.t ? "drawn" : "drawn later", cx: padX(t), cy: padY(h), r: 4.5, "data-value": h });
  pad.setAttribute("viewBox", `0 0 ${wide} ${PAD.height}`);
  pad.replaceChildren(
    element("line", { class: "now", x1: padX(settings.t - 1), x2: padX(settings.t - 1), y1: 0, y2: PAD.height }),
    line("softmax", made.softmaxRemembered), line("remembered", made.remembered),
    ...Array.from(settings.curve, circle));
}

function showHeats(made) {
  const { labels, softmax, attention, ruled, gradients, softmaxGradients, rule } = made, { t, focus, mechanism } = settings;
  const text = settings.mode === "text", names = text ? labels : null, row = { row: t - 1 }, rowLater = { row: t };
  const map = (host, X, name) => heat(hosts[host], X, { name, range: largest(X), rows: names, columns: names, frame: row, later: rowLater });
  map("map-softmax", softmax.weights, "softmax weight");
  map("map-attention", attention.weights, "linear attention weight");
  map("map-rule", ruled.weights, "A");
  const ruleWords = mechanism === "attention" ? "rule linear, not divided" : mechanismName(rule);
  $("map-rule-name").textContent = $("out-rule-name").textContent = ruleWords;
  const columns = (host, X, name, range, at, after) =>
    heat(hosts[host], X, { name, range, tall: 5.5, columns: names, frame: { column: at }, later: { column: after } });
  const range = largest(made.v, softmax.out, attention.out);
  columns("values", across(made.v), "v", range, t - 1, t);
  columns("out-softmax", across(softmax.out), "softmax o", range, t - 1, t);
  columns("out-attention", across(attention.out), "linear attention o", range, t - 1, t);
  columns("out-rule", across(ruled.out), "o", largest(ruled.out), t - 1, t);
  for (const name of ["dq", "dk", "dv"]) {
    columns(name, across(gradients[name]), name, largest(gradients[name]), focus - 1);
    columns(`${name}-softmax`, across(softmaxGradients[name]), `softmax ${name}`, largest(softmaxGradients[name]), focus - 1);
  }
  hosts.dg.hidden = !gradients.dg;
  hosts.dbeta.hidden = !gradients.dbeta;
  if (gradients.dg) columns("dg", across(gradients.dg), "dg", largest(gradients.dg), focus - 1);
  if (gradients.dbeta) columns("dbeta", [gradients.dbeta], "dβ", largest([gradients.dbeta]), focus - 1);
  $("gradient-equation").innerHTML = equation(...(mechanism === "attention" ? GRADIENTS.attention
    : [...GRADIENTS[hasBeta(rule) ? "correct" : "add"], ...(hasDecay(rule) ? GRADIENTS.fade : [])]));
  $("focus-name").textContent = focus;
  if (text) {
    for (const [host, X, name] of [["answers-softmax", made.softmaxAnswers, "softmax answer"], ["answers", made.answers, "answer"]]) {
      heat(hosts[host], X, { name, range: largest(X), rows: made.distinct, columns: made.distinct, strongest: true });
    }
  }
}

const RANGES = { beta: "beta", decay: "decay", sharpness: "sharpness", place: "place", position: "t", focus: "focus" };
function showControls(made) {
  const { mechanism, mode } = settings;
  $("position").max = $("focus").max = made.labels.length;
  for (const [id, key] of Object.entries(RANGES)) {
    $(id).value = settings[key];
    $(`${id}-value`).textContent = id === "position" || id === "focus" ? `${settings[key]} of ${made.labels.length}` : settings[key];
  }
  for (const id of ["mechanism", "map", "cotangent"]) $(id).value = settings[id];
  for (const id of ["unit", "channels", "follow"]) $(id).checked = settings[id];
  $(`mode-${mode}`).checked = true;
  if ($("text").value !== settings.text && document.activeElement !== $("text")) $("text").value = settings.text;
  const [decays, corrects] = [hasDecay(mechanism), hasBeta(mechanism)];
  const used = { unit: mechanism !== "attention", beta: corrects, decay: decays, channels: decays, place: mode === "text" };
  for (const [id, needed] of Object.entries(used)) {
    $(id).disabled = !needed;
    $(`${id}-label`).classList.toggle("off", !needed);
  }
  $("text-input").hidden = $("answers-panel").hidden = mode !== "text";
  $("curve-input").hidden = mode !== "curve";
  for (const name of document.querySelectorAll(".mechanism")) name.textContent = mechanismName(mechanism);
  const playing = player !== null;
  $("play").querySelector("path").setAttribute("d", playing ? "M3 2h4v12H3zM9 2h4v12H9z" : "M4 2v12l10-6z");
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
}

function render() {
  const made = model(settings);
  showControls(made);
  showState(made);
  showHeats(made);
  if (settings.mode === "text") showChips(made);
  else showPad(made);
  return made;
}

// --- what the reader does ------------------------------------------------------------------------------------------------------------------

const positions = () => (settings.mode === "text" ? Array.from(settings.text).length : LONGEST);

function set(changes) {
  settings = { ...settings, ...changes };
  const within = t => Math.min(Math.max(1, t), positions());
  settings.t = within(settings.t);
  settings.focus = within(settings.follow ? settings.t : settings.focus);
  return render();
}

let player = null;
function play(on) {
  clearInterval(player);
  player = on ? setInterval(() => (settings.t < positions() ? set({ t: settings.t + 1 }) : play(false)), 700) : null;
  if (on && settings.t === positions()) set({ t: 1 });
  else render();
}

const pressed = (id, f) => $(id).addEventListener("click", f);
pressed("start", () => set({ t: 1 }));
pressed("back", () => set({ t: settings.t - 1 }));
pressed("step", () => set({ t: settings.t + 1 }));
pressed("play", () => play(player === null));
for (const [id, key] of Object.entries(RANGES)) {
  $(id).addEventListener("input", event => set({ [key]: Number(event.target.value), ...(id === "focus" && { follow: false }) }));
}
for (const id of ["mechanism", "map", "cotangent"]) $(id).addEventListener("change", event => set({ [id]: event.target.value }));
for (const id of ["unit", "channels", "follow"]) $(id).addEventListener("change", event => set({ [id]: event.target.checked }));
for (const mode of ["text", "curve"]) $(`mode-${mode}`).addEventListener("change", () => set({ mode, t: mode === "curve" ? LONGEST : 1 }));
$("text").addEventListener("input", event => {
  const text = Array.from(event.target.value).slice(0, LONGEST).join("");
  if (text) set({ text, t: LONGEST });
});
$("text").addEventListener("blur", event => { event.target.value = settings.text; });

for (let m = 0; m < D; m++) $("cotangent").append(new Option(`feature ${m + 1} of oᵢ`, m));
for (const [title, changes, note] of EXPERIMENTS) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = title;
  button.addEventListener("click", () => {
    play(false);
    set({ ...START, curve: settings.curve, ...changes });
    $("note").textContent = note;
    for (const other of $("experiments").children) other.setAttribute("aria-pressed", other === button);
  });
  $("experiments").append(button);
}

// drawing: all positions between the last point of the pointer and this one get the height of the line between both
let pen = null;
function draw(event) {
  const box = $("pad").getBoundingClientRect(), x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height * PAD.height;
  const at = Math.min(LONGEST - 1, Math.max(0, Math.floor(x * LONGEST)));
  const h = Math.min(1, Math.max(0, (PAD.height - PAD.margin - y) / (PAD.height - 2 * PAD.margin)));
  const from = pen ?? { at, h }, curve = Float64Array.from(settings.curve);
  for (let t = Math.min(at, from.at); t <= Math.max(at, from.at); t++) {
    curve[t] = at === from.at ? h : from.h + (h - from.h) * (t - from.at) / (at - from.at);
  }
  pen = { at, h };
  set({ curve });
}
$("pad").addEventListener("pointerdown", event => { $("pad").setPointerCapture(event.pointerId); draw(event); });
$("pad").addEventListener("pointermove", event => pen && draw(event));
for (const end of ["pointerup", "pointercancel"]) $("pad").addEventListener(end, () => { pen = null; });
$("pad").addEventListener("keydown", event => {
  const along = { ArrowLeft: -1, ArrowRight: 1 }[event.key], up = { ArrowUp: 0.05, ArrowDown: -0.05 }[event.key];
  if (!along && !up) return;
  event.preventDefault();
  if (along) set({ t: settings.t + along });
  else set({ curve: settings.curve.map((h, t) => (t === settings.t - 1 ? Math.min(1, Math.max(0, h + up)) : h)) });
});

document.addEventListener("pointerover", event => event.target.matches("rect.cell") && read(event.target));
document.addEventListener("keydown", event => {
  const svg = event.target, move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!move || !svg.matches?.("svg[data-name]")) return;
  event.preventDefault();
  const [i, j] = svg.dataset.at ? svg.dataset.at.split(",").map(Number) : [0, 0], first = !svg.dataset.at;
  const next = svg.querySelector(`[data-row="${i + (first ? 0 : move[0])}"][data-column="${j + (first ? 0 : move[1])}"]`);
  if (next) read(next);
});
dark.addEventListener("change", () => { readPalette(); render(); });
addEventListener("resize", render);

readPalette();
$("experiments").firstChild.click();
