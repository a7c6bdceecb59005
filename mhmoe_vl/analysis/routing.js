"use strict";
(() => {
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
            if (isDropped(tokens, i)) continue;
            weights.set(expert, (weights.get(expert) || 0) + gateAt(tokens, i) / data.units / tokens.S);
            if (word !== null) {
              totals.set(word, (totals.get(word) || 0) + 1);
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

  // --------------------------------------------------------------------------------- colours
  const patternOf = (expert) => (expert + (expert >> 3)) % 8;
  // From 64 on colours and patterns come again, with a light mark, then a larger one.
  const markOf = (expert) => (expert >> 6) % 2 ? "#ffffff" : "#14181f";

  function dress(node, expert) {
    node.classList.add("q" + patternOf(expert));
    node.style.setProperty("--fill", COLORS[expert % 8]);
    node.style.setProperty("--mark", markOf(expert));
    if (expert >= 128) node.style.backgroundSize = "12px 12px";
    return node;
  }

  const patterns = new Map();
  function patternFor(context, expert) {
    if (patterns.has(expert)) return patterns.get(expert);
    const size = expert >= 128 ? 18 : 12, tile = make("canvas", {width: size, height: size}), pen = tile.getContext("2d");
    pen.fillStyle = COLORS[expert % 8];
    pen.fillRect(0, 0, size, size);
    pen.strokeStyle = pen.fillStyle = markOf(expert) + "b0";
    pen.lineWidth = 2;
    const line = (...points) => { pen.beginPath(); pen.moveTo(points[0], points[1]); pen.lineTo(points[2], points[3]); pen.stroke(); };
    const rising = () => { line(-2, size + 2, size + 2, -2); line(-2, 2, 2, -2); line(size - 2, size + 2, size + 2, size - 2); };
    const falling = () => { line(-2, -2, size + 2, size + 2); line(size - 2, -2, size + 2, 2); line(-2, size - 2, 2, size + 2); };
    const across = () => line(0, size / 2, size, size / 2), upright = () => line(size / 2, 0, size / 2, size);
    [() => {}, rising, () => { pen.beginPath(); pen.arc(size / 2, size / 2, 2.2, 0, 7); pen.fill(); }, across, falling, upright,
      () => { rising(); falling(); }, () => { across(); upright(); }][patternOf(expert)]();
    patterns.set(expert, context.createPattern(tile, "repeat"));
    return patterns.get(expert);
  }

  function rampColor(share) {
    const x = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(x), RAMP.length - 2);
    return "rgb(" + RAMP[i].map((low, c) => Math.round(low + (RAMP[i + 1][c] - low) * (x - i))).join(",") + ")";
  }

  // The value of a token under the colours chosen: what to write, and its share of the scale.
  function valueOf(m, s, part, n, sub) {
    const tokens = tokensAt(m, state.blocks[m], s, part), layer = models[m].layers[layerAt(m, state.blocks[m], s, part)];
    if (!tokens) return null;
    const reach = Math.min(layer.num_experts, tokens.S * tokens.K);
    const over = (value, top) => ({share: top > 1 ? (value - 1) / (top - 1) : 0});
    if (state.mode === "divergence") return {text: String(divergence(tokens, n)), ...over(divergence(tokens, n), reach)};
    if (state.mode === "mean divergence") {
      const value = meanDivergence(m, s, part, n);
      return {text: value.toFixed(2), ...over(value, reach)};
    }
    if (state.mode === "expert") {
      const i = at(tokens, n, Math.max(sub, 0), 0);
      return {text: String(tokens.experts[i]), expert: tokens.experts[i], dropped: isDropped(tokens, i)};
    }
    const entropy = state.mode === "entropy", subs = sub < 0 ? [...Array(tokens.S).keys()] : [sub];
    const values = subs.map((j) => entropy ? tokens.entropy[n * tokens.S + j] : gateAt(tokens, at(tokens, n, j, 0)));
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    return {text: units(mean), share: mean / data.units / (entropy ? Math.log(layer.num_experts) : 1)};
  }

  // Sub-tokens that a patch shows: one, or all beside each other where colours are experts.
  function shownSubtokens(m) {
    const S = models[m].layers[0].num_subtokens;
    return state.mode === "expert" && state.subtokens[m] < 0 ? [...Array(S).keys()] : [state.subtokens[m]];
  }

  // -------------------------------------------------------------------------------- pictures
  const loaded = new Map();
  function pictureOf(s) {
    if (loaded.has(s)) return loaded.get(s);
    const picture = new Image();
    picture.src = samples[s].picture;
    const ready = picture.decode().then(() => picture, () => null);
    loaded.set(s, ready);
    if (loaded.size > 60) loaded.delete(loaded.keys().next().value);
    return ready;
  }

  // The patch, outlined, with what is around it.
  function drawCrop(canvas, m, s, n) {
    const [rows, columns] = models[m].grid, size = 2 * 56;
    canvas.width = canvas.height = size;
    pictureOf(s).then((picture) => {
      if (!picture) return;
      const w = samples[s].width / columns, h = samples[s].height / rows, x = (n % columns) * w, y = Math.floor(n / columns) * h;
      const side = Math.min(2.4 * Math.max(w, h), samples[s].width, samples[s].height), k = size / side;
      const left = Math.min(Math.max(x + w / 2 - side / 2, 0), samples[s].width - side);
      const top = Math.min(Math.max(y + h / 2 - side / 2, 0), samples[s].height - side);
      const pen = canvas.getContext("2d");
      pen.drawImage(picture, -left * k, -top * k, samples[s].width * k, samples[s].height * k);
      for (const [width, color] of [[6, "#000"], [3, "#fff"]]) {
        pen.lineWidth = width;
        pen.strokeStyle = color;
        pen.strokeRect((x - left) * k, (y - top) * k, w * k, h * k);
      }
    });
    return canvas;
  }

  // ----------------------------------------------------------------------------------- panels
  const panels = models.map((model, m) => {
    const parts = {
      controls: make("div", {class: "controls"}),
      image: make("img", {alt: "", draggable: "false"}),
      canvas: make("canvas", {"aria-hidden": "true"}),
      tokens: make("div", {class: "tokens", role: "toolbar"}),
      numbers: make("details", {}, make("summary", {}, "Numbers of this map")),
      inspector: make("section", {class: "card selection", "aria-label": "Selected patch or word"}),
      expert: make("section", {class: "card", "aria-label": "Chosen expert", hidden: true}),
      loads: make("section", {class: "card", "aria-label": "Experts in this picture"}),
    };
    parts.picture = make("div", {class: "picture", tabindex: "0", role: "application", "aria-roledescription": "patch grid",
      "aria-describedby": "live"}, parts.image, parts.canvas);
    parts.root = make("article", {class: "panel", "data-model": m},
      make("div", {class: "column"}, make("section", {class: "card"},
        models.length > 1 ? theirs(model.name, "h3") : null, parts.controls, parts.picture, parts.tokens, parts.numbers)),
      make("div", {class: "column"}, parts.inspector, parts.expert, parts.loads));
    const patchAt = (event) => {
      const box = parts.canvas.getBoundingClientRect(), [rows, columns] = model.grid;
      const row = Math.floor(((event.clientY - box.top) / box.height) * rows), column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      return row >= 0 && row < rows && column >= 0 && column < columns ? {m, part: "patch", n: row * columns + column} : null;
    };
    parts.canvas.addEventListener("click", (event) => { const place = patchAt(event); if (place) select(place); });
    parts.canvas.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") hover(patchAt(event)); });
    parts.canvas.addEventListener("pointerleave", () => hover(null));
    parts.picture.addEventListener("keydown", (event) => moveOnGrid(event, m));
    parts.tokens.addEventListener("keydown", (event) => moveOnTokens(event, m));
    parts.numbers.addEventListener("toggle", () => drawNumbers(m));
    new ResizeObserver(() => drawMap(m)).observe(parts.picture);
    byId("panels").append(parts.root);
    return parts;
  });
  byId("panels").className = models.length > 1 ? "two" : "one";

  function choice(title, options, isChosen, choose, disabled = () => false) {
    return make("div", {class: "choice", role: "group", "aria-label": title}, make("span", {}, title), options.map(([value, label]) =>
      make("button", {type: "button", "aria-pressed": String(isChosen(value)), disabled: disabled(value), "data-choice": title, "data-value": value,
        onclick: () => choose(value)}, label)));
  }

  function setBlock(m, block) {
    const linked = models.length > 1 && String(blocksOf[0]) === String(blocksOf[1]);
    models.forEach((_, other) => { if (other === m || linked) state.blocks[other] = block; });
    if (state.expert && (linked || state.expert.m === m)) state.expert = null;
    draw();
  }

  function setSubtoken(m, sub) {
    const linked = models.length > 1 && models[0].layers[0].num_subtokens === models[1].layers[0].num_subtokens;
    models.forEach((_, other) => { if (other === m || linked) state.subtokens[other] = sub; });
    draw();
  }

  function drawControls(m) {
    const S = models[m].layers[0].num_subtokens, grouped = state.mode.endsWith("divergence");
    const subs = [[-1, "all"], ...Array.from({length: S}, (_, sub) => [sub, String(sub)])];
    panels[m].controls.replaceChildren(
      choice("Block", blocksOf[m].map((block) => [block, String(block)]), (b) => b === state.blocks[m], (b) => setBlock(m, b), () => state.mode === "mean divergence"),
      ...(S > 1 ? [choice("Sub-token", subs, (sub) => sub === state.subtokens[m], (sub) => setSubtoken(m, sub), () => grouped)] : []));
  }

  function drawToolbar() {
    const slider = make("input", {type: "range", min: "0", max: "1", step: "0.05", value: state.opacity, id: "opacity",
      oninput: (event) => { state.opacity = Number(event.target.value); models.forEach((_, m) => drawMap(m)); }});
    const S = models[0].layers[0].num_subtokens, K = models[0].layers[0].top_k, E = models[0].layers[0].num_experts;
    const ends = {divergence: ["1", String(Math.min(E, S * K))], "mean divergence": ["1", String(Math.min(E, S * K))],
      entropy: ["0", Math.log(E).toFixed(2) + " nats"], gate: ["0", "1"]}[state.mode];
    byId("toolbar").replaceChildren(
      choice("Colour by", MODES.map((mode) => [mode, mode]), (mode) => mode === state.mode, (mode) => { state.mode = mode; draw(); }),
      make("label", {for: "opacity"}, "Strength", slider),
      ...(ends ? [make("span", {class: "scale"}, ends[0], make("i"), ends[1])] : []));
  }

  function drawMap(m) {
    const {canvas, picture} = panels[m], s = state.sample;
    if (!samples[s].picture || !picture.clientWidth) return;
    const [rows, columns] = models[m].grid, ratio = window.devicePixelRatio || 1;
    const width = picture.clientWidth, height = picture.clientHeight, w = width / columns, h = height / rows;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const subs = shownSubtokens(m), across = Math.ceil(Math.sqrt(subs.length)), down = Math.ceil(subs.length / across);
    const page = getComputedStyle(document.body).backgroundColor, clear = clearness(m, "patch");
    for (let n = 0; n < rows * columns; n++) {
      const x = (n % columns) * w, y = Math.floor(n / columns) * h;
      subs.forEach((sub, j) => {
        const value = valueOf(m, s, "patch", n, sub);
        if (!value) return;
        const cell = [x + ((j % across) * w) / across, y + (Math.floor(j / across) * h) / down, w / across, h / down];
        pen.globalAlpha = state.opacity;
        pen.fillStyle = value.expert === undefined ? rampColor(value.share) : patternFor(pen, value.expert);
        pen.fillRect(...cell);
        pen.globalAlpha = 1;
        if (state.opacity > 0) drawValue(pen, value, ...cell);
      });
      pen.globalAlpha = 0.88 * (1 - clear(n));
      pen.fillStyle = page;
      pen.fillRect(x, y, w, h);
      pen.globalAlpha = 0.55;
      pen.lineWidth = 1;
      pen.strokeStyle = "#fff";
      pen.strokeRect(x + 0.5, y + 0.5, w, h);
      pen.globalAlpha = 1;
    }
    const outline = (place, widths) => {
      if (!place || place.part !== "patch") return;
      const n = placeIn(m, place), x = (n % columns) * w, y = Math.floor(n / columns) * h;
      for (const [line, color] of widths) {
        pen.lineWidth = line;
        pen.strokeStyle = color;
        pen.strokeRect(x + 1, y + 1, w - 2, h - 2);
      }
    };
    outline(state.selection, [[6, "#000"], [3, "#fff"]]);
    outline(state.hover, [[4, "#000"], [1.5, "#fff"]]);
  }

  function drawValue(pen, value, x, y, w, h) {
    if (value.dropped) {
      pen.lineWidth = 2;
      pen.strokeStyle = "#000";
      pen.beginPath(); pen.moveTo(x + 3, y + 3); pen.lineTo(x + w - 3, y + h - 3); pen.moveTo(x + w - 3, y + 3); pen.lineTo(x + 3, y + h - 3);
      pen.stroke();
    }
    const text = value.text.includes(".") ? Number(value.text).toFixed(1) : value.text, size = Math.min(15, h * 0.5, (w / text.length) * 1.3);
    if (size < 7) return;
    pen.font = "600 " + size + "px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.lineJoin = "round";
    pen.lineWidth = 3;
    pen.strokeStyle = "#fff";
    pen.strokeText(text, x + w / 2, y + h / 2 + 1);
    pen.fillStyle = "#14181f";
    pen.fillText(text, x + w / 2, y + h / 2 + 1);
  }

  function drawTokens(m) {
    const s = state.sample, pieces = models[m].samples[s].pieces, place = state.selection;
    const all = [...(samples[s].picture ? [["class", 0, "class token"]] : []), ...pieces.map((piece, n) => ["text", n, piece.trim() || "␣"])];
    const had = panels[m].tokens.contains(document.activeElement);
    const chosen = place.part === "patch" ? null : place.part + placeIn(m, place);
    const clear = {class: clearness(m, "class"), text: clearness(m, "text")};
    panels[m].tokens.setAttribute("aria-label", "Class token and text, arrows move");
    panels[m].tokens.replaceChildren(...all.map(([part, n, label], position) => {
      const marks = make("span", {class: "marks"}, shownSubtokens(m).map((sub) => {
        const value = valueOf(m, s, part, n, sub);
        if (!value) return null;
        const mark = make("i", {}, make("b", {}, value.text + (value.dropped ? "×" : "")));
        if (value.expert !== undefined) return dress(mark, value.expert);
        mark.style.setProperty("--fill", rampColor(value.share));
        return mark;
      }));
      const isChosen = chosen === part + n, special = part === "class" || n === 0 || n === pieces.length - 1;
      const button = make("button", {type: "button", class: special ? "special" : "", "aria-pressed": String(isChosen),
        tabindex: isChosen || (chosen === null && position === 0) ? "0" : "-1", "data-part": part, "data-token": n,
        onclick: () => select({m, part, n}), onpointerenter: (event) => { if (event.pointerType === "mouse") hover({m, part, n}); },
        onpointerleave: () => hover(null)}, theirs(label), marks);
      button.style.opacity = 0.2 + 0.8 * clear[part](n);
      return button;
    }));
    if (had) (panels[m].tokens.querySelector("[aria-pressed=true]") || panels[m].picture).focus();
  }

  function badge(m, layer, expert) {
    const chosen = state.expert && state.expert.m === m && state.expert.layer === layer && state.expert.expert === expert;
    return dress(make("button", {type: "button", class: "badge", "aria-pressed": String(Boolean(chosen)), "aria-label": "expert " + expert,
      title: "everything expert " + expert + " takes", "data-expert": expert,
      onclick: () => chooseExpert(chosen ? null : {m, layer, expert})}, make("b", {}, String(expert))), expert);
  }

  function drawInspector(m) {
    const place = current(), n = placeIn(m, place), s = state.sample, part = place.part;
    const S = models[m].layers[0].num_subtokens, title = make("p", {}, make("b", {}, ...describe(m, part, n)));
    const rows = blocksOf[m].map((block) => {
      const tokens = tokensAt(m, block, s, part), layer = layerAt(m, block, s, part);
      if (!tokens) return null;
      const cells = Array.from({length: S}, (_, sub) => make("td", {}, Array.from({length: tokens.K}, (_, k) => {
        const i = at(tokens, n, sub, k);
        return make("div", {"data-gate": true}, badge(m, layer, tokens.experts[i]), units(gateAt(tokens, i)),
          isDropped(tokens, i) ? make("span", {class: "dropped"}, "dropped") : null);
      }), make("div", {}, make("small", {}, "H " + units(tokens.entropy[n * S + sub])))));
      const pool = models[m].layers[layer].pool, name = pool === "joint" ? String(block) : block + " " + pool;
      return make("tr", {class: block === state.blocks[m] ? "now" : "", "data-block": block},
        make("th", {scope: "row"}, make("button", {type: "button", onclick: () => setBlock(m, block)}, name)), cells,
        make("td", {"data-divergence": true}, String(divergence(tokens, n))));
    });
    const heads = ["block", ...Array.from({length: S}, (_, sub) => S > 1 ? "sub-token " + sub : "expert, gate"), "distinct"];
    const mean = make("p", {class: "note"}, "Mean over blocks: " + meanDivergence(m, s, part, n).toFixed(2)
      + " distinct experts. Numbers beside experts are gates, H is the router’s entropy in nats.");
    panels[m].inspector.replaceChildren(
      make("div", {class: "what"}, part === "patch" ? drawCrop(make("canvas"), m, s, n) : null, title),
      make("div", {class: "wide"}, make("table", {}, make("thead", {}, make("tr", {}, heads.map((head) => make("th", {scope: "col"}, head)))),
        make("tbody", {}, rows))), mean);
  }

  // Choices of every expert of a pool in the sample shown.
  function loadsIn(m, s, layerIndex) {
    const layer = models[m].layers[layerIndex], loads = Array.from({length: layer.num_experts}, () => [0, 0]);
    let dropped = 0;
    for (const [part, tokens] of Object.entries(choicesOf(m, s)[layerIndex])) {
      tokens.experts.forEach((expert, i) => {
        if (tokens.gates[i] & COPY) return;
        loads[expert][part === "text" ? 1 : 0]++;
        dropped += isDropped(tokens, i) ? 1 : 0;
      });
    }
    return {loads, dropped};
  }

  const poolsAt = (m, s) => models[m].layers.map((layer, index) => [layer, index])
    .filter(([layer, index]) => layer.block === state.blocks[m] && models[m].samples[s].passes[index]);

  function drawLoads(m) {
    const found = poolsAt(m, state.sample).map(([layer, index]) => {
      const {loads, dropped} = loadsIn(m, state.sample, index), total = loads.flat().reduce((a, b) => a + b, 0);
      const most = Math.max(1, ...loads.map(([image, text]) => image + text));
      const items = loads.map(([image, text], expert) => {
        const bar = make("span", {class: "bar"}, make("i"), make("i"));
        bar.children[0].style.width = (100 * image) / most + "%";
        bar.children[1].style.width = (100 * text) / most + "%";
        return make("li", {"data-load": image + text}, badge(m, index, expert), bar, make("span", {}, count(image + text)));
      });
      const note = count(total) + " choices = " + count(total / layer.top_k) + (layer.num_subtokens > 1 ? " sub-tokens" : " tokens") + " × top " + layer.top_k + "; of ";
      return make("div", {class: "pool"}, make("h3", {}, "Block " + layer.block + (layer.pool === "joint" ? "" : ", " + layer.pool + " experts") + (samples[state.sample].picture ? " in this picture" : " in this text")),
        make("ul", {class: "loads"}, items),
        make("p", {class: "note"}, note, make("i", {class: "key"}), " image, ", make("i", {class: "key of-text"}), " text",
          dropped ? make("span", {class: "dropped"}, " " + count(dropped) + " dropped by capacity factor " + models[m].capacity) : null));
    });
    panels[m].loads.replaceChildren(...found);
  }

  function drawNumbers(m) {
    const details = panels[m].numbers, s = state.sample;
    details.hidden = !samples[s].picture;
    while (details.children.length > 1) details.lastChild.remove();
    if (!details.open || details.hidden) return;
    const [rows, columns] = models[m].grid;
    details.append(make("div", {class: "wide numbers"}, make("table", {}, make("tbody", {}, Array.from({length: rows}, (_, row) =>
      make("tr", {}, Array.from({length: columns}, (_, column) =>
        make("td", {}, shownSubtokens(m).map((sub) => valueOf(m, s, "patch", row * columns + column, sub)).filter(Boolean).map((value) => value.text).join(" ")))))))));
  }

  // ------------------------------------------------------------------------------ contact sheets
  function crops(m, patches) {
    return make("div", {class: "crops"}, patches.map(({s, n, weight}) => make("button", {type: "button", "data-sample": s, "data-patch": n,
      title: percent(weight) + " of this patch", "aria-label": "patch " + n + " of picture " + s, onclick: () => show(s, {m, part: "patch", n})},
      drawCrop(make("canvas", {"aria-hidden": "true"}), m, s, n))));
  }

  function words(m, entries) {
    return make("div", {class: "words"}, entries.map(({word, choices, of, s, n}) => make("button", {type: "button",
      title: choices + " of the " + of + " choices that this word’s sub-tokens make", onclick: () => show(s, {m, part: "text", n})},
      theirs(word || "␣"), make("small", {}, choices + "/" + of))));
  }

  function summary(m, layerIndex, expert) {
    const layer = models[m].layers[layerIndex], found = survey(m, layerIndex)[expert];
    const all = layer.num_rows * layer.top_k, modality = found.choices ? percent(found.image / found.choices) + " image" : "nothing";
    return count(found.choices) + " of " + count(all) + " choices (" + percent(found.choices / all) + "), " + modality;
  }

  function drawExpert(m) {
    const chosen = state.expert && state.expert.m === m ? state.expert : null;
    panels[m].expert.hidden = !chosen;
    if (!chosen) return panels[m].expert.replaceChildren();
    const layer = models[m].layers[chosen.layer], found = survey(m, chosen.layer)[chosen.expert];
    const here = {patch: 0, text: 0};
    for (const part of ["patch", "text"]) {
      const tokens = choicesOf(m, state.sample)[chosen.layer][part];
      for (let n = 0; tokens && n < tokens.length; n++) here[part] += sayOf(tokens, n, chosen.expert) > 0 ? 1 : 0;
    }
    panels[m].expert.replaceChildren(
      make("div", {class: "sheet-head"}, badge(m, chosen.layer, chosen.expert),
        make("b", {}, "Everything expert " + chosen.expert + " of block " + layer.block + " takes"),
        make("button", {type: "button", class: "close", onclick: () => chooseExpert(null)}, "close")),
      make("p", {class: "note"}, "Here: sub-tokens of " + here.patch + " patches and " + here.text + " text tokens; the less veiled, the more it has to say. "
        + (samples.length > 1 ? "Over all " + samples.length + ": " : "In all: ") + summary(m, chosen.layer, chosen.expert) + "."),
      crops(m, varied(found.patches, CROPS * MORE)), words(m, found.words.slice(0, WORDS * MORE)));
  }

  function drawSheet() {
    const sections = models.flatMap((model, m) => model.layers.map((layer, index) => [layer, index])
      .filter(([layer]) => layer.block === state.blocks[m]).map(([layer, index]) => {
        const found = survey(m, index), order = found.map((_, expert) => expert);
        if (order.length > SHEETS) order.sort((a, b) => found[b].choices - found[a].choices || a - b);
        const cards = order.slice(0, state.sheets).map((expert) => make("section", {class: "card", "aria-label": "Expert " + expert, "data-sheet": expert},
          make("div", {class: "sheet-head"}, badge(m, index, expert), make("span", {}, summary(m, index, expert))),
          crops(m, varied(found[expert].patches, CROPS)), words(m, found[expert].words.slice(0, WORDS))));
        const pool = layer.pool === "joint" ? "" : " of the " + layer.pool + " pool";
        return [make("h2", {}, "What each expert" + pool + " takes in block " + layer.block, ...(models.length > 1 ? [": ", theirs(model.name)] : [])),
          make("p", {class: "note"}, "The patches (outlined) that an expert has most say in, and the words it takes most of: choices that went to it / all choices of the word’s sub-tokens"
            + (samples.length > 1 ? ", over all " + samples.length + " shown here." : ".")),
          make("div", {class: "sheets"}, cards),
          ...(state.sheets < order.length ? [make("button", {type: "button", class: "more", onclick: () => { state.sheets *= 3; drawSheet(); }},
            "more of the " + order.length + " experts")] : [])];
      }));
    byId("sheet").replaceChildren(...sections.flat());
  }

  // -------------------------------------------------------------------------------------- samples
  const strip = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(({target}) => {
    strip.unobserve(target);
    target.append(make("img", {src: samples[Number(target.dataset.sample)].picture, alt: "", decoding: "async"}));
  }), {root: byId("samples"), rootMargin: "300px"});

  function buildStrip() {
    byId("samples").hidden = samples.length < 2;
    samples.forEach((sample, s) => {
      const button = make("button", {type: "button", "data-sample": s, onclick: () => show(s), "aria-label": "show " + sample.name}, sample.picture ? null : theirs(sample.text.slice(0, 40)));
      byId("samples").append(button);
      if (sample.picture) strip.observe(button);
    });
  }

  function drawSample() {
    const sample = samples[state.sample];
    for (const button of byId("samples").children) button.setAttribute("aria-pressed", String(Number(button.dataset.sample) === state.sample));
    byId("sample").replaceChildren(
      ...(sample.text ? [theirs(sample.text, "b")] : []), theirs(sample.name), ...(sample.label ? [theirs(sample.label)] : []),
      ...(samples.length > 1 ? [make("span", {class: "note"}, (state.sample + 1) + " of " + samples.length)] : []));
    models.forEach((model, m) => {
      const {picture, image} = panels[m];
      picture.hidden = !sample.picture;
      if (!sample.picture) return image.removeAttribute("src");
      if (image.src !== sample.picture) image.src = sample.picture;
      picture.style.aspectRatio = sample.width + " / " + sample.height;
      picture.style.width = "min(100%, " + (560 * sample.width) / sample.height + "px)";
      picture.setAttribute("aria-label", "patches, " + model.grid[0] + " rows of " + model.grid[1] + ", arrows move");
    });
  }

  // ---------------------------------------------------------------------------------- actions
  function say() {
    const {m, part, n} = state.selection, tokens = tokensAt(m, state.blocks[m], state.sample, part);
    const text = part === "text" ? "token " + models[m].samples[state.sample].pieces[n].trim() : describe(m, part, n).join("");
    byId("live").textContent = !tokens ? text : text + ", block " + state.blocks[m] + ": " + Array.from({length: tokens.S}, (_, sub) =>
      "expert " + tokens.experts[at(tokens, n, sub, 0)] + " gate " + units(gateAt(tokens, at(tokens, n, sub, 0)))).join(", ");
  }

  function drawSelection() {
    models.forEach((_, m) => { drawMap(m); drawInspector(m); });
  }

  function draw() {
    drawSample();
    drawToolbar();
    models.forEach((_, m) => { drawControls(m); drawMap(m); drawTokens(m); drawInspector(m); drawExpert(m); drawLoads(m); drawNumbers(m); });
    drawSheet();
    say();
  }

  function select(place) {
    state.selection = place;
    state.hover = null;
    models.forEach((_, m) => drawTokens(m));
    drawSelection();
    say();
  }

  function hover(place) {
    if (JSON.stringify(place) === JSON.stringify(state.hover)) return;
    state.hover = place;
    drawSelection();
  }

  function show(s, place = null) {
    state.sample = (s + samples.length) % samples.length;
    state.hover = null;
    state.selection = place || firstSelection(state.sample);
    const button = byId("samples").children[state.sample];
    byId("samples").scrollTo({left: button.offsetLeft - byId("samples").clientWidth / 2});
    draw();
  }

  function chooseExpert(expert) {
    state.expert = expert;
    state.hover = null;
    models.forEach((_, m) => { drawMap(m); drawTokens(m); drawInspector(m); drawExpert(m); drawLoads(m); });
    drawSheet();
    if (expert) byId("live").textContent = "expert " + expert.expert + " of block " + models[expert.m].layers[expert.layer].block + ": " + summary(expert.m, expert.layer, expert.expert);
  }

  function next(list, value, step) {
    return list[(list.indexOf(value) + step + list.length) % list.length];
  }

  function moveOnGrid(event, m) {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!step) return;
    event.preventDefault();
    const [rows, columns] = models[m].grid, n = state.selection.part === "patch" ? placeIn(m, state.selection) : 0;
    const row = Math.min(Math.max(Math.floor(n / columns) + step[0], 0), rows - 1), column = Math.min(Math.max((n % columns) + step[1], 0), columns - 1);
    select({m, part: "patch", n: row * columns + column});
  }

  function moveOnTokens(event, m) {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], buttons = [...panels[m].tokens.children];
    if (!step || !buttons.length) return;
    event.preventDefault();
    const target = buttons[Math.min(Math.max(buttons.indexOf(document.activeElement) + step, 0), buttons.length - 1)];
    select({m, part: target.dataset.part, n: Number(target.dataset.token)});
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
    const {m, part, n} = state.selection, step = event.shiftKey ? -1 : 1, S = models[m].layers[0].num_subtokens;
    const layer = layerAt(m, state.blocks[m], state.sample, part);
    const actions = {
      b: () => setBlock(m, next(blocksOf[m], state.blocks[m], step)),
      s: () => setSubtoken(m, next([-1, ...Array(S).keys()], state.subtokens[m], step)),
      c: () => { state.mode = next(MODES, state.mode, step); draw(); },
      n: () => show(state.sample + 1),
      p: () => show(state.sample - 1),
      e: () => {
        const tokens = tokensAt(m, state.blocks[m], state.sample, part), expert = tokens && tokens.experts[at(tokens, n, Math.max(state.subtokens[m], 0), 0)];
        if (tokens) chooseExpert(state.expert && state.expert.expert === expert ? null : {m, layer, expert});
      },
      t: () => {
        const tokens = panels[m].tokens, onTokens = tokens.contains(document.activeElement), button = tokens.querySelector("[tabindex='0']");
        if (!onTokens && button) select({m, part: button.dataset.part, n: Number(button.dataset.token)});
        (onTokens && samples[state.sample].picture ? panels[m].picture : tokens.querySelector("[aria-pressed=true]") || panels[m].picture).focus();
      },
      escape: () => chooseExpert(null),
    };
    const action = actions[event.key.toLowerCase()];
    if (action) { event.preventDefault(); action(); }
  }

  // ------------------------------------------------------------------------------------- start
  models.forEach((model, m) => {
    const layer = model.layers[0], several = layer.num_subtokens > 1;
    const about = ": " + layer.num_experts + " experts in blocks " + blocksOf[m].join(", ") + ", top " + layer.top_k + " of each "
      + (several ? "of " + layer.num_subtokens + " sub-tokens" : "token") + (model.capacity === null ? "" : ", capacity factor " + model.capacity) + (m < models.length - 1 ? "; " : "");
    byId("about").append(theirs(model.name, "b"), about);
  });
  document.addEventListener("keydown", keys);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => models.forEach((_, m) => drawMap(m)));
  buildStrip();
  show(0);
})();
