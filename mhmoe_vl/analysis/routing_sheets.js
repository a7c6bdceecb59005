// What experts take over all pictures, and the strip of pictures.

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

// The experts that take a word in the blocks shown, most first: choices that went to each / all of the word's choices.
function drawFound() {
  const word = byId("word").value.trim().toLowerCase();
  const lines = models.flatMap((model, m) => model.layers.map((layer, index) => [layer, index])
    .filter(([layer, index]) => layer.block === state.blocks[m] && survey(m, index).some(({text}) => text)).map(([layer, index]) => {
      const takers = survey(m, index).map(({words}, expert) => ({expert, ...words.find((entry) => entry.word.toLowerCase() === word)}))
        .filter(({choices}) => choices).sort((a, b) => b.choices - a.choices || a.expert - b.expert);
      return make("p", {}, make("span", {}, "Block " + layer.block, ...(models.length > 1 ? [" of ", theirs(model.name)] : []), ":"),
        takers.length ? takers.map(({expert, choices, of}) => make("span", {}, badge(m, index, expert), choices + "/" + of)) : "not among the words shown here");
    }));
  byId("found").replaceChildren(...(word ? lines : []));
}

let sheetShown = "";
function drawSheet() {
  const key = JSON.stringify([state.blocks, state.expert, state.sheets]);
  if (key === sheetShown) return;  // going from picture to picture changes nothing here
  sheetShown = key;
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
  drawFound();
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
