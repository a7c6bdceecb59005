// Colours and patterns of experts, and what is drawn on canvases.

// --------------------------------------------------------------------------------- colours
// From 64 on colours and patterns come again, with a light mark, then a larger one; plain colours then have a mark too.
const patternOf = (expert) => (expert + (expert >> 3)) % 8 || (expert < 64 ? 0 : 8);
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
    () => { rising(); falling(); }, () => { across(); upright(); }, () => { pen.fillRect(0, 0, size / 2, size / 2); pen.fillRect(size / 2, size / 2, size / 2, size / 2); }][patternOf(expert)]();
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
