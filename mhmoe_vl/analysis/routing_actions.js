// What clicks and keys do; the start.

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
byId("find").hidden = !samples.some((sample) => sample.text);
byId("word").addEventListener("input", drawFound);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => models.forEach((_, m) => drawMap(m)));
buildStrip();
show(0);
