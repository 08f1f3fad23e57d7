// The page: draws what was measured (the JSON in #data), and, for small models, what is typed
// (reader.js). Texts enter the page as text nodes only, never as markup.

// ---- elements and arrays -------------------------------------------------------------------------

function el(tag, attributes = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (value === true) found.setAttribute(name, "");
    else if (value !== false && value != null) found.setAttribute(name, value);
  }
  found.append(...children.flat().filter((child) => child != null));
  return found;
}

// The number of an array at these places; of a row, its part of the array.
function get({ shape, data }, ...places) {
  let at = 0;
  places.forEach((place, i) => (at = at * shape[i] + place));
  return data[at];
}
function row({ shape, data }, ...places) {
  let at = 0, size = 1;
  places.forEach((place, i) => (at = at * shape[i] + place));
  for (const length of shape.slice(places.length)) size *= length;
  return data.subarray(at * size, (at + 1) * size);
}
const pairAt = (t, s) => (t * (t + 1)) / 2 + s; // in a lower triangle

// ---- tokens as texts -----------------------------------------------------------------------------

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const ESCAPES = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };
// controls, what turns or joins text unseen, and what is no character
const UNSEEN = /[\p{C}\p{Zl}\p{Zp}]/gu;

// Bytes as people can read them: a space is ␣, what cannot be seen is escaped, and so are bytes
// that are part of a character only.
function shownBytes(bytes) {
  try {
    const text = strict.decode(bytes).replace(UNSEEN, (c) => ESCAPES[c] ?? escapeOf(c));
    return text.replaceAll(" ", "␣");
  } catch {
    return [...bytes].map((b) => (b > 0x20 && b < 0x7f ? String.fromCharCode(b)
      : b === 0x20 ? "␣" : hexOf(b))).join("");
  }
}
const shownText = (text) => text.replace(UNSEEN, escapeOf);
const hexOf = (byte) => "\\x" + byte.toString(16).padStart(2, "0");
const escapeOf = (c) => "\\u{" + c.codePointAt(0).toString(16).padStart(4, "0") + "}";

const written = (number, digits = 3) =>
  !Number.isFinite(number) ? "–" : Math.abs(number) < 0.5 * 10 ** -digits ? (0).toFixed(digits)
    : Math.abs(number) >= 1e4 ? number.toLocaleString("en-US", { maximumFractionDigits: 0 })
      : number.toFixed(digits);
const percent = (p) => (p > 1.0005 ? (100 * p).toFixed(0) + " %" : p >= 0.9995 ? "100 %"
  : p >= 0.0995 ? (100 * p).toFixed(1) + " %"
  : p >= 0.00005 ? (100 * p).toFixed(2) + " %" : p > 0 ? "< 0.01 %" : "0 %");
const grouped = (number) => Math.round(number).toLocaleString("en-US");

// ---- the state: which token, layer and head are looked at ----------------------------------------

const data = unpacked(JSON.parse(document.getElementById("data").textContent));
const state = { token: data.ids.length - 1, layer: 0, head: 0, attention: "probs" };
const sampler = { temperature: 1, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1 };
let scene = { text: data.prompt, ids: data.ids, pieces: data.pieces, models: data.models,
  differences: data.differences, name: (id) => bytesSpelled(data.names[id] ?? "") };
let updates = [];

function look(changes) {
  Object.assign(state, changes);
  for (const update of updates) update();
}

const tokenText = (id) => shownBytes(scene.name(id));
const tokenEl = (id) => el("bdi", { class: "token" }, tokenText(id));
const placeText = (t) => `${t}: ${tokenText(scene.ids[t])}`;

// Draw a part anew into a box each time the state changes.
function drawn(box, draw) {
  const update = () => box.replaceChildren(...[draw()].flat().filter((part) => part != null));
  update();
  updates.push(update);
  return box;
}

// The same for every model of the page, side by side where there are two.
function forModels(draw, { live = true } = {}) {
  const boxes = scene.models.map((model) => {
    const inner = el("div");
    if (live) drawn(inner, () => draw(model));
    else inner.append(...[draw(model)].flat());
    const title = scene.models.length > 1 ? el("h3", {}, el("bdi", {}, model.name)) : null;
    return el("div", { class: "model" }, title, inner);
  });
  return el("div", { class: scene.models.length > 1 ? "models" : "" }, boxes);
}

// ---- tables --------------------------------------------------------------------------------------

// A table: columns as texts, rows of cells, of which the first heads its row.
function table(caption, columns, rows, { marked = -1 } = {}) {
  const cell = (value, i) => (value instanceof Cell ? value.element(i)
    : el(i ? "td" : "th", i ? {} : { scope: "row" }, value));
  const scroll = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", { "aria-label": caption },
      el("thead", {}, el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows.map((cells, n) =>
        el("tr", { class: n === marked ? "marked" : null }, cells.map(cell))))));
  return el("div", { class: "table" }, el("p", { class: "caption" }, caption), scroll);
}

class Cell {
  constructor(content, { share = null, bar = null, class: name = null } = {}) {
    Object.assign(this, { content, share, bar, name });
  }
  element(i) {
    const found = el(i ? "td" : "th", { class: this.name, scope: i ? null : "row" });
    if (this.share !== null) {
      found.classList.add("shade");
      found.style.setProperty("--share", Math.round(100 * Math.min(1, Math.abs(this.share))) + "%");
      if (this.share < 0) found.classList.add("below");
    }
    if (this.bar !== null) {
      const bar = el("span", { class: "bar" + (this.bar < 0 ? " below" : ""), "aria-hidden": "true" });
      bar.style.width = Math.max(0, Math.min(100, 100 * Math.abs(this.bar))) + "%";
      found.classList.add("barred");
      found.append(bar);
    }
    found.append(...[this.content].flat());
    return found;
  }
}

// What stands behind a picture: made when it is opened.
function behind(summary, make) {
  const body = el("div");
  const details = el("details", { ontoggle: () => details.open && !body.firstChild
    && body.append(...[make()].flat()) }, el("summary", {}, summary), body);
  return details;
}

const vectorColumns = (n) => Array.from({ length: n }, (_, i) => String(i));
function vectorCells(values) {
  const most = Math.max(...[...values].map(Math.abs), 1e-9);
  return [...values].map((x) => new Cell(written(x, 2), { share: x / most / 2 }));
}

// ---- 1: tokens -----------------------------------------------------------------------------------

function tokensView() {
  const chips = el("div", { class: "chips", role: "group", "aria-label": "The tokens of the prompt" });
  drawn(chips, () => scene.ids.map((id, t) => el("button", { type: "button", class: "chip",
    "aria-pressed": String(t === state.token), onclick: () => lookAt(chips, t) },
  el("bdi", {}, tokenText(id)), el("small", {}, String(id)))));
  roving(chips, () => state.token);
  const rows = () => scene.ids.map((id, t) => [String(t), el("bdi", {}, tokenText(id)), String(id),
    [...scene.name(id)].map((byte) => byte.toString(16).padStart(2, "0")).join(" ")]);
  return [
    el("p", { class: "note" }, `${scene.ids.length} tokens. The number below each is its id. `
      + "Choose one: the page looks at it from here on."),
    data.special === null ? null : el("p", { class: "note" }, "Special tokens that stand in the text, "
      + "such as ", el("bdi", {}, shownText(data.special)), ", are read as tokens."),
    chips,
    behind("Tokens and their bytes as a table",
      () => table("Tokens and their bytes", ["place", "token", "id", "bytes"], rows())),
    mergesView(),
  ];
}

function lookAt(group, t) {
  look({ token: t });
  group.children[t]?.focus();
}

// One tab stop for a group of buttons; arrows move between them.
function roving(group, current, columns = () => 1) {
  const settle = () => [...group.querySelectorAll("button")].forEach((button, i) =>
    (button.tabIndex = i === current() ? 0 : -1));
  settle();
  updates.push(settle);
  group.addEventListener("keydown", (event) => {
    const buttons = [...group.querySelectorAll("button")], at = buttons.indexOf(event.target);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
    const next = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : at + step;
    if (at < 0 || !(next >= 0 && next < buttons.length)) return;
    event.preventDefault();
    buttons[next].click();
    group.querySelectorAll("button")[next]?.focus();
  });
}

// How the bytes of a chosen piece were merged.
function mergesView() {
  const longest = scene.pieces.reduce((best, piece, i) =>
    (piece.steps.length > scene.pieces[best].steps.length ? i : best), 0);
  const steps = el("ol", { class: "steps" });
  const textOf = (step) => shownBytes(bytesSpelled(step.replaceAll(" ", "")));
  const choose = el("select", { id: "piece", onchange: () => draw(Number(choose.value)) },
    scene.pieces.map((piece, i) => el("option", { value: i, selected: i === longest },
      textOf(piece.steps[0]))));
  function draw(i) {
    const piece = scene.pieces[i];
    let before = null;
    steps.replaceChildren(...piece.steps.map((step) => {
      const parts = step.split(" ");
      const merged = before ? parts.findIndex((part, k) => part !== before[k]) : -1;
      before = parts;
      return el("li", {}, parts.map((part, k) => el("bdi",
        { class: "part" + (k === merged ? " merged" : "") }, shownBytes(bytesSpelled(part)))));
    }));
  }
  draw(longest);
  return el("figure", {}, el("figcaption", {}, el("label", { for: "piece" }, "How a piece was merged: "),
    choose, " Underlined is what each step has joined."), steps);
}

// ---- 2: embeddings -------------------------------------------------------------------------------

function embeddingsView() {
  return forModels(({ inside }) => {
    const { norms, begins } = inside.embeddings, t = state.token;
    const names = [["row ", String(scene.ids[t]), " of wte, for ", tokenEl(scene.ids[t])],
      [`row ${t} of wpe, for the place`], ["their sum, the residual stream"]];
    const rows = names.map((name, i) => [el("span", {}, name), written(get(norms, i, t), 2),
      ...vectorCells(row(begins, i, t))]);
    return table(`The vectors of token ${placeText(t)}: length, and the first numbers`,
      ["vector", "length", ...vectorColumns(begins.shape[2])], rows);
  });
}

// ---- 3: attention --------------------------------------------------------------------------------

function attentionView() {
  const choice = (value, label) => el("label", {}, el("input", { type: "radio", name: "attention",
    value, checked: value === state.attention, onchange: () => look({ attention: value }) }), " ", label);
  return [
    forModels((model) => normTable(model, "norm_1", "attention")),
    el("fieldset", { class: "choices" }, el("legend", {}, "The map shows"),
      choice("probs", "shares, after mask and softmax"),
      choice("scores", "scores, query times key")),
    el("p", { class: "note" }, "The darker, the more; of scores, within each row, from its least to its "
      + "most. What is hatched comes later and is masked. The choice holds for the large map below all "
      + "heads, too."),
    forModels((model) => matrix(model), { live: false }),
    forModels(gatherTable),
  ];
}

function normTable(model, which, reader) {
  const { moments, begins } = model.inside.layers[state.layer][which], t = state.token;
  return table(`Layer norm before the ${reader} of layer ${state.layer}, at token ${placeText(t)}`,
    ["stream", "mean", "deviation", ...vectorColumns(begins.shape[2])],
    [["before", written(get(moments, 0, t)), written(get(moments, 1, t)),
      ...vectorCells(row(begins, 0, t))],
    ["after", "", "", ...vectorCells(row(begins, 1, t))]]);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The attention map of a head, large: hover it, or move over it by arrow keys.
function matrix(model) {
  const n = scene.ids.length, at = { t: state.token, s: state.token };
  const canvas = el("canvas", { class: "matrix", tabindex: 0, role: "application",
    "aria-roledescription": "attention map", onmousemove: point, onclick: (event) => {
      point(event);
      look({ token: at.t });
    }, onkeydown: move });
  const told = el("p", { class: "told-cell", role: "status" });
  const values = () => row(model.inside.layers[state.layer][state.attention], state.head);

  function point(event) {
    const box = canvas.getBoundingClientRect();
    at.t = Math.min(n - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * n)));
    at.s = Math.min(n - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * n)));
    show();
  }
  function move(event) {
    const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1],
      ArrowLeft: [0, -1], Home: [0, -n], End: [0, n], PageUp: [-n, 0], PageDown: [n, 0] }[event.key]
      ?? [0, 0];
    if (event.key === "Enter" || event.key === " ") look({ token: at.t });
    else if (!down && !right) return;
    event.preventDefault();
    at.t = Math.min(n - 1, Math.max(0, at.t + down));
    at.s = Math.min(n - 1, Math.max(0, at.s + right));
    show();
  }
  function show() {
    paintMap(canvas, values(), n, Math.max(4, Math.floor(640 / n)),
      { scores: state.attention === "scores", cell: at });
    told.replaceChildren(...tell());
  }
  function tell() {
    const from = [el("bdi", { class: "token" }, placeText(at.t))];
    const to = el("bdi", { class: "token" }, placeText(at.s));
    if (at.s > at.t) return [...from, " may not look at ", to, ": it comes later, and is masked."];
    const layer = model.inside.layers[state.layer], pair = pairAt(at.t, at.s);
    return [...from, " looks at ", to, ": score ", written(row(layer.scores, state.head)[pair]),
      ", share ", percent(row(layer.probs, state.head)[pair]), "."];
  }
  let seen = state.token;
  const update = () => {
    if (seen !== state.token) [at.t, at.s, seen] = [state.token, state.token, state.token];
    canvas.setAttribute("aria-label", `What each token looks at in head ${state.head} of layer `
      + `${state.layer}: rows look at columns; arrow keys move, enter chooses the row's token`);
    show();
  };
  update();
  updates.push(update);
  const whole = () => table(`Layer ${state.layer}, head ${state.head}: shares in percent`,
    ["looks from, at", ...scene.ids.map((_, s) => placeText(s))],
    scene.ids.map((_, t) => [placeText(t), ...scene.ids.map((_, s) => (s > t ? "" : (100 *
      row(model.inside.layers[state.layer].probs, state.head)[pairAt(t, s)]).toFixed(1)))]));
  const details = el("div");
  drawn(details, () => behind("The whole map as a table", whole));
  const framed = el("div", { class: "framed" }, el("span", { class: "corner" }, "this token ↓"),
    el("span", {}, "looks at →"), axis("across"), axis("down"), canvas);
  return [el("figure", { class: "map" }, framed, told), details];
}

// A dozen tokens at most along a side of the map, each at its row or column.
function axis(side) {
  const n = scene.ids.length, step = Math.ceil(n / 12);
  const labels = scene.ids.map((id, t) => el("bdi", {}, tokenText(id)));
  labels.forEach((label, t) => label.style.setProperty("--at", `${(100 * (t + 0.5)) / n}%`));
  return el("div", { class: `axis ${side}`, "aria-hidden": "true" },
    labels.filter((_, t) => t % step === 0));
}

// A lower triangle of shares, or of scores (each row from its least to its most), as a picture.
function paintMap(canvas, values, n, size, { scores = false, cell = null } = {}) {
  if (canvas.width !== n * size) canvas.width = canvas.height = n * size;
  const context = canvas.getContext("2d");
  context.fillStyle = colour("--card");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = colour("--map");
  for (let t = 0; t < n; t++) {
    const line = values.subarray(pairAt(t, 0), pairAt(t, t) + 1);
    const most = scores ? Math.max(...line) : 1, least = scores ? Math.min(...line) : 0;
    for (let s = 0; s <= t; s++) {
      const part = most > least ? Math.max(0, (line[s] - least) / (most - least)) : 1;
      // the least score of a row is no masked one
      context.globalAlpha = scores ? 0.15 + 0.85 * part : Math.sqrt(part);
      context.fillRect(s * size, t * size, size, size);
    }
  }
  context.globalAlpha = 1;
  if (!cell) return;
  context.strokeStyle = colour("--faint");
  context.beginPath(); // what is masked is hatched
  for (let t = 0; t < n; t++)
    for (let s = t + 1; s < n; s++) {
      context.moveTo(s * size + size * 0.3, t * size + size * 0.7);
      context.lineTo(s * size + size * 0.7, t * size + size * 0.3);
    }
  context.stroke();
  context.lineWidth = Math.max(2, size / 12);
  context.strokeStyle = colour("--val");
  context.strokeRect(cell.s * size, cell.t * size, size, size);
}

// A lower triangle of shares with one pixel for each.
function paintSmall(canvas, values, n) {
  canvas.width = canvas.height = n;
  const [empty, full] = ["--card", "--map"].map((name) => [1, 3, 5].map((at) =>
    parseInt(colour(name).slice(at, at + 2), 16)));
  const context = canvas.getContext("2d"), image = context.createImageData(n, n);
  for (let t = 0; t < n; t++) {
    for (let s = 0; s < n; s++) {
      const share = s > t ? 0 : Math.sqrt(values[pairAt(t, s)]);
      const mixed = empty.map((value, i) => value + share * (full[i] - value));
      image.data.set([...mixed, 255], 4 * (t * n + s));
    }
  }
  context.putImageData(image, 0, 0);
}

// What the chosen token gathers, and from where.
function gatherTable(model) {
  const layer = model.inside.layers[state.layer], t = state.token;
  const probs = row(layer.probs, state.head), scores = row(layer.scores, state.head);
  const places = scene.ids.slice(0, t + 1).map((_, s) => s);
  const weight = (s) => probs[pairAt(t, s)];
  places.sort((a, b) => weight(b) - weight(a) || a - b);
  const rows = (some) => some.map((s) => [el("bdi", {}, placeText(s)), written(scores[pairAt(t, s)], 2),
    new Cell(percent(weight(s)), { bar: weight(s) }), written(get(layer.values, state.head, s), 2),
    written(weight(s) * get(layer.values, state.head, s))]);
  const columns = ["from", "score", "share", "length of value", "share × length"];
  const caption = `What token ${placeText(t)} gathers by head ${state.head} of layer ${state.layer}`;
  const first = table(`${caption}: the largest shares`, columns, rows(places.slice(0, 8)));
  const whole = places.length > 8
    ? behind(`All ${places.length}`, () => table(caption, columns, rows(places))) : null;
  return [first, whole];
}

// ---- 4: the MLP ----------------------------------------------------------------------------------

function mlpView() {
  return forModels((model) => {
    const layer = model.inside.layers[state.layer], t = state.token;
    const found = row(layer.activations, t), most = Math.max(...[...found].map(Math.abs), 1e-9);
    return [
      normTable(model, "norm_2", "MLP"),
      table(`The most active neurons of layer ${state.layer} at token ${placeText(t)}; `
        + `${percent(get(layer.active, t))} of all are above zero`, ["neuron", "activation"],
      [...row(layer.neurons, t)].map((neuron, i) =>
        [String(neuron), new Cell(written(found[i]), { bar: found[i] / most })])),
      el("p", { class: "note" }, `Attention added a vector of length ${written(get(layer.attn, t), 2)} `
        + `to the stream, the MLP one of ${written(get(layer.mlp, t), 2)}.`),
    ];
  });
}

// ---- 5: all heads --------------------------------------------------------------------------------

function headsView() {
  return forModels((model) => {
    const { nLayer, nHead, inside } = model, n = scene.ids.length;
    const grid = el("div", { class: "heads", role: "group", "aria-label": "All heads" });
    grid.style.setProperty("--heads", nHead);
    const buttons = [];
    for (let layer = 0; layer < nLayer; layer++) {
      for (let head = 0; head < nHead; head++) {
        const canvas = el("canvas", { "aria-hidden": "true" });
        const label = `layer ${layer}, head ${head}: ${written(get(inside.previous, layer, head), 2)} `
          + `on the token before`;
        buttons.push(el("button", { type: "button", class: "head", "aria-label": label, title: label,
          onclick: () => look({ layer, head }) }, canvas));
      }
    }
    grid.append(...buttons);
    const paint = () => buttons.forEach((button, i) => paintSmall(button.firstChild,
      row(inside.layers[Math.floor(i / nHead)].probs, i % nHead), n));
    const mark = () => buttons.forEach((button, i) => button.setAttribute("aria-pressed",
      String(i === state.layer * nHead + state.head)));
    mark();
    whenSeen(grid, paint);
    updates.push(mark);
    roving(grid, () => state.layer * nHead + state.head, () => nHead);
    const rows = (which) => Array.from({ length: nLayer }, (_, layer) => [`layer ${layer}`,
      ...[...row(inside[which], layer)].map((x) => new Cell(written(x, 2), { share: x }))]);
    const columns = ["", ...Array.from({ length: nHead }, (_, head) => `head ${head}`)];
    return [el("div", { class: "scroll" }, grid),
      el("p", { class: "note" }, "Rows are layers, from the first to the last; columns are heads. "
        + "The chosen one is large below."),
      ...matrix(model),
      behind("Scores of all heads as tables", () => [
        table("Share on the token before, on average", columns, rows("previous")),
        table("Share on what came after the same token earlier (– where no token repeats)", columns,
          rows("induction"))])];
  }, { live: false });
}

// Paint now if it can be seen, else when it comes into view; again when light and dark change.
function whenSeen(element, paint) {
  let seen = false;
  const watcher = new IntersectionObserver((entries) => {
    if (seen || !entries.some((entry) => entry.isIntersecting)) return;
    seen = true;
    paint();
  }, { rootMargin: "400px" });
  watcher.observe(element);
  repaints.push(({ unseen = false } = {}) => {
    if (seen || unseen) paint();
    seen ||= unseen;
  });
}
let repaints = [];

// ---- 6: the stream and the lens ------------------------------------------------------------------

function streamView() {
  return [forModels(lensTable), forModels(lensGrid, { live: false }), forModels(attributionTable,
    { live: false })];
}

const depthName = (depth, nLayer) => (depth === 0 ? "embeddings" : `after layer ${depth - 1}`
  + (depth === nLayer ? ", the end" : ""));

function lensTable({ inside, nLayer }) {
  const t = state.token, rows = [];
  for (let depth = 0; depth <= nLayer; depth++) {
    const ids = row(inside.lens.ids, depth, t), probs = row(inside.lens.probs, depth, t);
    const said = [...ids].slice(0, 3).flatMap((id, i) => [tokenEl(id), ` ${percent(probs[i])}  `]);
    rows.push([depthName(depth, nLayer), written(get(inside.streams, depth, t), 1),
      el("span", { class: "said" }, said)]);
  }
  return table(`What each depth would say after token ${placeText(t)}`,
    ["stream", "length", "likeliest next tokens"], rows);
}

function lensGrid({ inside, nLayer }) {
  const rows = [];
  for (let depth = nLayer; depth >= 0; depth--) {
    rows.push([depthName(depth, nLayer), ...scene.ids.map((_, t) =>
      new Cell(tokenEl(get(inside.lens.ids, depth, t, 0)),
        { share: get(inside.lens.probs, depth, t, 0) * 0.8 }))]);
  }
  return behind("The lens at every token", () => table(
    "The likeliest next token at every depth, the last layer first; the stronger, the more certain",
    ["after", ...scene.ids.map((_, t) => placeText(t))], rows));
}

function attributionTable({ inside, nLayer, nHead }) {
  const found = inside.attribution, parts = [["token embedding", found.token_embedding],
    ["position embedding", found.position_embedding]];
  for (let n = 0; n < nLayer; n++) {
    const heads = [...row(found.heads, n)].reduce((sum, x) => sum + x, 0);
    parts.push([`attention of layer ${n}`, heads + get(found.attn_biases, n)]);
    parts.push([`MLP of layer ${n}`, get(found.mlps, n)]);
  }
  parts.push(["bias of the final layer norm", found.final_bias]);
  const most = Math.max(...parts.map(([, x]) => Math.abs(x)), 1e-9);
  const signed = (x) => (x > 0 ? "+" : "") + written(x, 2);
  const rows = parts.map(([name, x]) => [name, new Cell(signed(x), { bar: x / most })]);
  rows.push(["together: its score", written(found.logit, 2)]);
  const heads = () => table("What each head added", ["",
    ...Array.from({ length: nHead }, (_, head) => `head ${head}`)],
  Array.from({ length: nLayer }, (_, n) => [`layer ${n}`, ...vectorCells(row(found.heads, n))]));
  return [table(`After the last token, ${placeText(scene.ids.length - 1)}: what moved the score of `
    + `${tokenText(found.token)}, the likeliest next token`,
    ["part", "moved it by"], rows), behind("By heads", heads)];
}

// ---- 7: the next token ---------------------------------------------------------------------------

const SLIDERS = [
  ["temperature", "temperature", 0, 2, 0.05],
  ["topK", "top-k (0 keeps all)", 0, 100, 1],
  ["topP", "top-p (1 keeps all)", 0, 1, 0.01],
  ["minP", "min-p (0 keeps all)", 0, 0.5, 0.01],
  ["repetitionPenalty", "repetition penalty (1 changes nothing)", 1, 2, 0.05],
];

function nextView() {
  const redraw = () => tables.forEach((draw) => draw());
  const tables = [];
  const sliders = SLIDERS.map(([name, label, min, max, step]) => {
    const shown = el("output", { for: `slider-${name}` }, String(sampler[name]));
    const input = el("input", { type: "range", id: `slider-${name}`, min, max, step,
      value: sampler[name], oninput: () => {
        sampler[name] = Number(input.value);
        shown.textContent = input.value;
        redraw();
      } });
    return el("div", {}, el("label", { for: `slider-${name}` }, label), input, shown);
  });
  const reset = el("button", { type: "button", class: "plain", onclick: () => {
    Object.assign(sampler, { temperature: 1, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1 });
    sliders.forEach((box, i) => {
      box.querySelector("input").value = sampler[SLIDERS[i][0]];
      box.querySelector("output").textContent = String(sampler[SLIDERS[i][0]]);
    });
    redraw();
  } }, "All off");
  const found = forModels((model) => {
    const box = el("div");
    tables.push(() => box.replaceChildren(...nextTable(model)));
    return box;
  }, { live: false });
  redraw();
  return [el("div", { class: "sliders" }, sliders, reset), found];
}

function nextTable({ inside }) {
  const probs = probabilities(inside.logits.data, sampler, scene.ids);
  const kept = probs.reduce((count, p) => count + (p > 0), 0), most = largest(probs);
  const rows = largestIds(probs, 12).filter((id) => probs[id] > 0).map((id) =>
    [tokenEl(id), String(id), written(inside.logits.data[id], 2),
      new Cell(percent(probs[id]), { bar: probs[id] / most })]);
  return [el("p", { class: "kept", role: "status" }, `${grouped(kept)} of `
    + `${grouped(probs.length)} tokens can come.`),
  table(`The likeliest tokens after the last one, ${placeText(scene.ids.length - 1)}`,
    ["token", "id", "score", "probability"], rows)];
}

// ---- 8: surprise ---------------------------------------------------------------------------------

function surpriseView() {
  return forModels(({ inside }) => {
    const nats = inside.nats, scored = nats.filter((x) => x !== null);
    if (!scored.length) return el("p", { class: "note" }, "The first token has nothing before it: "
      + "a prompt of two tokens or more has something to be surprised at.");
    const mean = scored.reduce((sum, x) => sum + x, 0) / scored.length, most = Math.max(...scored, 1);
    const columns = scene.ids.map((id, t) => {
      const bar = el("span", { class: "column" });
      bar.style.height = nats[t] === null ? "0" : Math.round((80 * nats[t]) / most) + "px";
      return el("li", { class: t === state.token ? "marked" : null }, el("small", {},
        nats[t] === null ? "–" : written(nats[t], 1)), bar, el("bdi", {}, tokenText(id)));
    });
    return [
      el("p", { class: "kept" }, `Mean ${written(mean)} nats, perplexity ${written(Math.exp(mean), 2)}.`),
      el("ol", { class: "columns", start: 0, tabindex: 0, "aria-label": "Nats of every token" }, columns),
      behind("Surprise as a table", () => table("What every token cost", ["token", "nats",
        "probability"], scene.ids.map((id, t) => [placeText(t), nats[t] === null ? "–" : written(nats[t]),
        nats[t] === null ? "–" : percent(Math.exp(-nats[t]))]))),
    ];
  });
}

// ---- 9: the cache --------------------------------------------------------------------------------

function cacheView() {
  return forModels(({ costs }) => {
    const total = (i) => costs.parts.reduce((sum, part) => sum + part[i], 0);
    const times = total(1) / total(2);
    const rows = costs.parts.map(([name, again, cached]) => [name, grouped(again), grouped(cached)]);
    rows.push(["together", grouped(total(1)), grouped(total(2))]);
    return [table(`The token after the ${scene.ids.length} of this prompt`,
      ["multiplications for", "all read again", "with a cache"], rows, { marked: rows.length - 1 }),
    el("p", { class: "kept" }, `The cache saves ${written(100 * (1 - 1 / times), 1)} % of the work, `
      + `${written(times, 1)} times as much, and holds ${grouped(costs.numbers)} numbers: `
      + "a key and a value for every token in every layer.")];
  }, { live: false });
}

// ---- 10: two models ------------------------------------------------------------------------------

function differencesView() {
  const found = scene.differences, [a, b] = scene.models.map((model) => model.inside);
  if (!found) return el("p", { class: "note" }, "Only the prompt that the page was made with is compared.");
  const most = Math.max(...found.divergence.data, 1e-9), depths = found.streams.shape[0];
  const names = scene.models.map((model) => model.name);
  const likeliest = (inside, t) => tokenEl(get(inside.lens.ids, depths - 1, t, 0));
  const rows = scene.ids.map((id, t) => [el("bdi", {}, placeText(t)), cost(a.nats[t]), cost(b.nats[t]),
    likeliest(a, t), likeliest(b, t),
    new Cell(significant(get(found.divergence, t)), { bar: get(found.divergence, t) / most })]);
  const shares = Math.max(...found.streams.data, 1e-9);
  const furthest = Math.max(...found.weights.map(([, x]) => x ?? 0), 1e-9);
  const streams = () => table("How far apart the streams are, as a share of the first model’s",
    ["after", ...scene.ids.map((_, t) => placeText(t))],
    Array.from({ length: depths }, (_, depth) => [depthName(depth, depths - 1),
      ...[...row(found.streams, depth)].map((x) => new Cell(written(x), { share: x / shares }))]));
  return [
    table("Token by token", ["token", `nats, ${names[0]}`, `nats, ${names[1]}`,
      `next, ${names[0]}`, `next, ${names[1]}`, "divergence (nats)"], rows),
    behind("Streams, layer by layer", streams),
    table(`The weights that moved furthest; ${found.unmoved} of ${found.tensors} tensors did not move`,
      ["tensor", "moved by"], found.weights.map(([name, x]) =>
        [name, x === null ? "from 0" : new Cell(percent(x), { bar: x / furthest })])),
  ];
}
const significant = (x) => (Math.abs(x) >= 1e-9 ? String(Number(x.toPrecision(2))) : "0");
const cost = (nats) => (nats === null ? "–" : written(nats, 2));

// ---- the whole -----------------------------------------------------------------------------------

const VIEWS = { tokens: tokensView, embeddings: embeddingsView, attention: attentionView, mlp: mlpView,
  heads: headsView, stream: streamView, next: nextView, surprise: surpriseView, cache: cacheView,
  differences: differencesView };

function drawAll() {
  [updates, repaints] = [[], []];
  drawPlace();
  for (const [name, view] of Object.entries(VIEWS)) {
    const box = document.querySelector(`#${name} .view`);
    if (box) box.replaceChildren(...[view()].flat().filter((part) => part != null));
  }
}

// Where the page looks: three lists that stay in sight.
function drawPlace() {
  const [{ nLayer, nHead }] = scene.models, count = (n) => Array.from({ length: n }, (_, i) => String(i));
  const lists = [["token", "Token", scene.ids.map((_, t) => placeText(t))],
    ["layer", "Layer", count(nLayer)], ["head", "Head", count(nHead)]];
  document.getElementById("place").replaceChildren(...lists.map(([name, label, options]) => {
    const list = el("select", { id: `look-${name}`, onchange: () => look({ [name]: Number(list.value) }) },
      options.map((text, i) => el("option", { value: i }, text)));
    const settle = () => (list.value = String(state[name]));
    settle();
    updates.push(settle);
    return el("label", { for: `look-${name}` }, label, list);
  }));
}

// ---- live: what is typed is read in a worker (reader.js) -----------------------------------------

// A worker of the scripts that are in this page: nothing is loaded from anywhere.
function startWorker(onanswer, onproblem) {
  const source = document.getElementById("engine").textContent + "\nanswer();";
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const worker = new Worker(address);
  worker.onmessage = ({ data: found }) => onanswer(found);
  worker.onerror = ({ message }) => onproblem(message);
  const models = data.models.map(({ live }) => ({ live }));
  worker.postMessage({ tokenizer: data.tokenizer, models, limit: data.limit });
  return worker;
}

// What the worker made of a text, as the page draws it.
function sceneOf({ text, ids, pieces, insides, differences }) {
  const parts = data.models[0].costs.parts.map(([name]) => name);
  const models = data.models.map((model, i) => ({ ...model, inside: insides[i],
    costs: costsOf(model.live.config, ids.length, parts) }));
  return { text, ids, pieces, models, name: nameTyped ??= namesOf(data.tokenizer),
    differences: differences && { ...data.differences, ...differences } };
}
let nameTyped = null;

const LONGEST = 50_000; // characters that are looked at: of so many, none is a text of few tokens
function drawTyping() {
  const told = el("p", { class: "note", role: "status", id: "told" }, "Type any text of up to "
    + `${data.limit} tokens: everything below follows.`);
  const rounded = data.models.map(({ name, rounding }) =>
    `${data.models.length > 1 ? name + ": " : ""}scores by ${rounding.scores.toPrecision(2)} at most, `
    + `the probabilities of the next token by ${rounding.nats.toPrecision(2)} nats of divergence`).join("; ");
  let worker = null, waiting = 0, begun = 0, reading = null; // the text that is being read
  const start = () => (worker ??= startWorker(show, (problem) => {
    [worker, reading] = [null, null];
    told.replaceChildren(`This browser could not read the text: ${problem}.`);
  }));
  const box = el("textarea", { id: "text", dir: "auto", spellcheck: "false",
    "aria-describedby": "told rounded", onfocus: start, oninput: () => {
      clearTimeout(waiting);
      waiting = setTimeout(follow, 150);
    } });
  box.value = data.prompt;
  function follow() { // one text at a time; what was typed meanwhile comes next
    if (reading !== null) return;
    if (box.value.length > LONGEST) return refuse(`${grouped(box.value.length)} characters: the page `
      + `reads ${data.limit} tokens at most.`);
    [reading, begun] = [box.value, performance.now()];
    told.replaceChildren("Reading …");
    start().postMessage(reading);
  }
  function refuse(why) {
    told.replaceChildren(`${why} What is below is still about the text before.`);
    told.classList.add("problem");
    document.body.classList.add("stale");
  }
  function show(found) {
    reading = null;
    if (found.text !== box.value) return follow();
    if (found.refused) return refuse(found.refused);
    document.body.classList.remove("stale");
    told.classList.remove("problem");
    scene = sceneOf(found);
    Object.assign(state, { token: scene.ids.length - 1 });
    drawAll();
    const took = Math.round(performance.now() - begun);
    const count = scene.ids.length === 1 ? "1 token" : `${scene.ids.length} tokens`;
    told.replaceChildren(`${count}, read in this page in ${took} ms.`);
  }
  return [el("label", { for: "text" }, "The text"), box, told,
    el("p", { class: "note", id: "rounded" }, "What is typed is read with weights rounded to float16. "
      + `On the text that the page was made with, this changes ${rounded}.`)];
}

function drawPrompt() {
  if (!data.fixed) return document.getElementById("prompt").replaceChildren(...drawTyping());
  const said = el("pre", { class: "sample", dir: "auto", tabindex: 0, "aria-label": "The text" },
    data.prompt.replace(UNSEEN, (c) => (c === "\n" || c === "\t" ? c : escapeOf(c))));
  const why = data.fixed ? el("p", { class: "note" }, `The prompt of this page is fixed: ${data.fixed}.`)
    : null;
  document.getElementById("prompt").replaceChildren(said, ...(why ? [why] : []));
}

drawPrompt();
drawAll();
addEventListener("beforeprint", () => repaints.forEach((again) => again({ unseen: true })));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const again of [...updates, ...repaints]) again();
});
document.addEventListener("click", (event) => { // a link to code opens it
  const link = event.target.closest?.("a[href^='#code-']");
  if (link) document.getElementById(link.hash.slice(1)).open = true;
});
