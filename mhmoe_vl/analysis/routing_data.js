// The data of the page, what was chosen in it, and what follows from both. routing_page.py joins these files.

const data = JSON.parse(document.getElementById("data").textContent);
const PARTS = ["class", "patch", "text"];
const MODES = ["expert", "divergence", "mean divergence", "entropy", "gate"];
const COPY = 1 << 14, DROPPED = 1 << 15, GATE = COPY - 1;
const COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7b5cc0"];
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const CROPS = 8, WORDS = 8, MORE = 4, SHEETS = 12, PER_PICTURE = 3;

const models = data.models, samples = data.samples;
const state = {
  sample: 0, mode: "expert", opacity: 0.6, expert: null, hover: null, sheets: SHEETS,
  blocks: models.map(() => 0), subtokens: models.map((model) => model.layers[0].num_subtokens > 1 ? -1 : 0),
  selection: null,
};

// ------------------------------------------------------------------------------------ document
// Text of any origin goes through here: children that are no nodes become text, never markup.
function make(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const byId = (id) => document.getElementById(id);
const theirs = (text, tag = "span") => make(tag, {class: "theirs", dir: "auto"}, text);
const count = (value) => value.toLocaleString("en-US");
const units = (value) => (value / data.units).toFixed(String(data.units).length - 1);
const percent = (value) => (100 * value).toFixed(1) + " %";

// ---------------------------------------------------------------------------------------- data
function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes.buffer;
}

const numPatches = (model) => model.grid ? model.grid[0] * model.grid[1] : 0;

// The layout is described in routing_page.py.
function unpack(model, sample) {
  const buffer = bytesOf(sample.choices), lengths = {class: 1, patch: numPatches(model), text: sample.pieces.length};
  let at = 0;
  const take = (kind, number) => {
    const end = at + number * kind.BYTES_PER_ELEMENT, array = new kind(buffer.slice(at, end));
    at = end;
    return array;
  };
  return model.layers.map((layer, index) => {
    const found = {};
    PARTS.forEach((part, bit) => {
      if (!(sample.passes[index] & (1 << bit))) return;
      const rows = lengths[part] * layer.num_subtokens, choices = rows * layer.top_k;
      const experts = take(layer.num_experts <= 256 ? Uint8Array : Uint16Array, choices);
      found[part] = {length: lengths[part], S: layer.num_subtokens, K: layer.top_k, experts,
        gates: take(Uint16Array, choices), entropy: take(Uint32Array, rows)};
    });
    return found;
  });
}

const unpacked = models.map(() => new Map());
function choicesOf(m, s) {
  if (!unpacked[m].has(s)) unpacked[m].set(s, unpack(models[m], models[m].samples[s]));
  return unpacked[m].get(s);
}

const blocksOf = models.map((model) => [...new Set(model.layers.map((layer) => layer.block))]);
state.blocks = blocksOf.map((blocks) => blocks[Math.floor(blocks.length / 2)]);

// The pool that tokens of a kind pass in a block; -1 where the sample has none.
function layerAt(m, block, s, part) {
  const bit = 1 << PARTS.indexOf(part), passes = models[m].samples[s].passes;
  return models[m].layers.findIndex((layer, index) => layer.block === block && passes[index] & bit);
}

function tokensAt(m, block, s, part) {
  const layer = layerAt(m, block, s, part);
  return layer < 0 ? null : choicesOf(m, s)[layer][part];
}

const at = (tokens, n, sub, k) => (n * tokens.S + sub) * tokens.K + k;
const gateAt = (tokens, i) => tokens.gates[i] & GATE;
const isDropped = (tokens, i) => (tokens.gates[i] & DROPPED) !== 0;

function divergence(tokens, n) {
  const reached = new Set();
  for (let i = at(tokens, n, 0, 0); i < at(tokens, n + 1, 0, 0); i++)
    if (!isDropped(tokens, i)) reached.add(tokens.experts[i]);
  return reached.size;
}

function meanDivergence(m, s, part, n) {
  const found = blocksOf[m].map((block) => tokensAt(m, block, s, part)).filter(Boolean);
  return found.reduce((sum, tokens) => sum + divergence(tokens, n), 0) / found.length;
}

// The say of an expert in a token: its kept gates, summed over sub-tokens and divided by their number.
function sayOf(tokens, n, expert) {
  let sum = 0;
  for (let i = at(tokens, n, 0, 0); i < at(tokens, n + 1, 0, 0); i++)
    if (tokens.experts[i] === expert && !isDropped(tokens, i)) sum += gateAt(tokens, i);
  return sum / data.units / tokens.S;
}

// How much of a token of the sample shown is to be seen: 1, or with a chosen expert its say, against the largest one.
function clearness(m, part) {
  const chosen = state.expert && state.expert.m === m ? state.expert : null;
  if (!chosen) return () => 1;
  const found = choicesOf(m, state.sample)[chosen.layer], says = (tokens) => Array.from({length: tokens.length}, (_, n) => sayOf(tokens, n, chosen.expert));
  const most = Math.max(1e-9, ...["patch", "text"].flatMap((kind) => found[kind] ? says(found[kind]) : []));
  return (n) => found[part] ? Math.min(1, sayOf(found[part], n, chosen.expert) / most) : 0;
}

// Everything that the experts of a pool take, over all samples.
const surveys = new Map();
function survey(m, layerIndex) {
  const key = m + ":" + layerIndex;
  if (surveys.has(key)) return surveys.get(key);
  const layer = models[m].layers[layerIndex];
  const experts = Array.from({length: layer.num_experts}, () => ({choices: 0, image: 0, text: 0, patches: [], words: new Map()}));
  const totals = new Map();
  samples.forEach((_, s) => {
    for (const [part, tokens] of Object.entries(choicesOf(m, s)[layerIndex])) {
      for (let n = 0; n < tokens.length; n++) {
        const word = part === "text" ? models[m].samples[s].pieces[n].trim() : null;
        const weights = new Map();
        for (let i = at(tokens, n, 0, 0); i < at(tokens, n + 1, 0, 0); i++) {
          const expert = tokens.experts[i], found = experts[expert];
          if (!(tokens.gates[i] & COPY)) {
            found.choices++;
            found[part === "text" ? "text" : "image"]++;
          }
          if (word !== null) totals.set(word, (totals.get(word) || 0) + 1);
          if (isDropped(tokens, i)) continue;
          weights.set(expert, (weights.get(expert) || 0) + gateAt(tokens, i) / data.units / tokens.S);
          if (word !== null) {
            const entry = found.words.get(word) || {word, choices: 0, s, n};
            entry.choices++;
            found.words.set(word, entry);
          }
        }
        if (part === "patch") for (const [expert, weight] of weights) experts[expert].patches.push({s, n, weight});
      }
    }
  });
  for (const found of experts) {
    found.patches.sort((a, b) => b.weight - a.weight || a.s - b.s || a.n - b.n);
    // Share of the word's choices, drawn towards the even share where the word is rare.
    const share = (entry) => (entry.choices + 4 / layer.num_experts) / (totals.get(entry.word) + 4);
    found.words = [...found.words.values()].map((entry) => ({...entry, of: totals.get(entry.word)}));
    found.words.sort((a, b) => share(b) - share(a) || b.choices - a.choices || (a.word < b.word ? -1 : 1));
  }
  surveys.set(key, experts);
  return experts;
}

// The first patches, at most a few of each picture as long as others are left.
function varied(patches, number) {
  const seen = new Map(), first = [], rest = [];
  for (const patch of patches) {
    const times = seen.get(patch.s) || 0;
    seen.set(patch.s, times + 1);
    (samples.length === 1 || times < PER_PICTURE ? first : rest).push(patch);
    if (first.length === number) break;
  }
  return first.concat(rest).slice(0, number);
}

// ----------------------------------------------------------------------------------- selection
const lengthOf = (m, s, part) =>
  part === "text" ? models[m].samples[s].pieces.length : samples[s].picture ? (part === "class" ? 1 : numPatches(models[m])) : 0;

function firstSelection(s) {
  const grid = models[0].grid;
  if (samples[s].picture) return {m: 0, part: "patch", n: Math.floor(grid[0] / 2) * grid[1] + Math.floor(grid[1] / 2)};
  return {m: 0, part: "text", n: Math.min(1, lengthOf(0, s, "text") - 1)};
}

// The same place in checkpoint m: grids and tokenizers may differ.
function placeIn(m, place) {
  if (place.m === m || place.part === "class") return place.n;
  if (place.part === "patch") {
    const [rows, columns] = models[place.m].grid, [toRows, toColumns] = models[m].grid;
    const row = Math.floor(((Math.floor(place.n / columns) + 0.5) * toRows) / rows);
    return row * toColumns + Math.floor((((place.n % columns) + 0.5) * toColumns) / columns);
  }
  const from = models[place.m].samples[state.sample].pieces, to = models[m].samples[state.sample].pieces;
  if (from.length === to.length && from.every((piece, i) => piece === to[i])) return place.n;
  if (place.n === 0 || place.n === from.length - 1) return place.n === 0 ? 0 : to.length - 1;
  const letters = (pieces) => pieces.slice(1).map((piece) => piece.trim().length);
  let middle = letters(from).slice(0, place.n - 1).reduce((a, b) => a + b, 0) + letters(from)[place.n - 1] / 2;
  const found = letters(to).findIndex((length) => (middle -= length) < 0);
  return Math.min(found < 0 ? to.length - 1 : found + 1, to.length - 1);
}

const current = () => state.hover || state.selection;

function describe(m, part, n) {
  if (part === "class") return ["Class token"];
  if (part === "text") return ["Token " + n + " ", theirs("“" + models[m].samples[state.sample].pieces[n].trim() + "”")];
  return ["Patch, row " + Math.floor(n / models[m].grid[1]) + ", column " + (n % models[m].grid[1])];
}
