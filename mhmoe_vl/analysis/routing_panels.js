// A panel for every checkpoint: picture, words, the selection at every block, loads of experts.

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
