// What the page shows of a forward pass that it made itself (live.js): the same measures, in the
// same form, as minigpt2/explain/inside.py makes of the library's. An array is {shape, data}.

const MOST_SHOWN = 5, NEURONS = 8, COMPONENTS = 8;

const array = (shape, values) => ({ shape, data: Float32Array.from(values) });

function inside(model, ids) {
  const found = forward(model, ids), { config } = model, width = config.n_embd;
  const streams = [...found.layers.map((layer) => layer.before), found.last];
  const at = (x, t) => x.subarray(t * width, (t + 1) * width);
  const lengths = (x) => ids.map((_, t) => Math.hypot(...at(x, t)));
  const begins = (x) => ids.flatMap((_, t) => [...at(x, t).subarray(0, COMPONENTS)]);
  const shown = [found.tokens, found.positions, found.layers[0].before];
  const nTokens = ids.length, nLayers = streams.length, begun = Math.min(COMPONENTS, width);
  const last = onlyUsed(model, found.logits.slice((nTokens - 1) * config.vocab_size));
  return {
    found,
    embeddings: {
      norms: array([3, nTokens], shown.flatMap(lengths)),
      begins: array([3, nTokens, begun], shown.flatMap(begins)),
    },
    layers: found.layers.map((layer) => layerInside(layer, config, lengths, begins, ids)),
    streams: array([nLayers, nTokens], streams.flatMap(lengths)),
    lens: lensOf(model, found, streams, nTokens),
    ...headScores(found.layers, config, ids),
    attribution: attributionOf(model, found, ascending(last).at(-1)),
    logits: array([last.length], last),
    nats: natsOf(model, found.logits, ids),
  };
}

function layerInside(layer, config, lengths, begins, ids) {
  const { n_head: nHead, n_embd: width, n_inner: inner } = config, nTokens = ids.length;
  const nPairs = layer.probs.length / nHead, size = width / nHead;
  const values = [];
  for (let head = 0; head < nHead; head++) {
    for (let t = 0; t < nTokens; t++) {
      const from = t * 3 * width + 2 * width + head * size;
      values.push(Math.hypot(...layer.qkv.subarray(from, from + size)));
    }
  }
  const rows = ids.map((_, t) => layer.hidden.subarray(t * inner, (t + 1) * inner));
  const strongest = rows.map((row) => largestIds(row.map(Math.abs), NEURONS));
  const each = strongest[0].length;
  return {
    probs: array([nHead, nPairs], layer.probs),
    scores: array([nHead, nPairs], layer.scores),
    values: array([nHead, nTokens], values),
    norm_1: normInside(layer.before, layer.norm1, width, begins),
    norm_2: normInside(layer.middle, layer.norm2, width, begins),
    attn: array([nTokens], lengths(layer.attn)),
    mlp: array([nTokens], lengths(layer.mlp)),
    neurons: array([nTokens, each], strongest.flat()),
    activations: array([nTokens, each],
      strongest.flatMap((found, t) => found.map((id) => rows[t][id]))),
    active: array([nTokens], rows.map((row) => row.filter((x) => x > 0).length / inner)),
  };
}

function normInside(before, after, width, begins) {
  const means = [], deviations = [];
  for (let from = 0; from < before.length; from += width) {
    const x = before.subarray(from, from + width);
    const mean = x.reduce((sum, value) => sum + value, 0) / width;
    means.push(mean);
    deviations.push(Math.sqrt(x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / width));
  }
  const nTokens = means.length, begun = [...begins(before), ...begins(after)];
  return {
    moments: array([2, nTokens], [...means, ...deviations]),
    begins: array([2, nTokens, begun.length / 2 / nTokens], begun),
  };
}

// Logits without the ids that no token has.
function onlyUsed({ config, unused }, logits) {
  const found = logits.slice(0, config.n_ids);
  for (const id of unused) found[id] = -Infinity;
  return found;
}

function lensOf(model, found, streams, nTokens) {
  const size = model.config.vocab_size, ids = [], probs = [];
  const each = Math.min(MOST_SHOWN, model.config.n_ids);
  for (const stream of streams) {
    const logits = stream === found.last ? found.logits : scoresOf(model, stream); // (T, V)
    for (let t = 0; t < nTokens; t++) {
      const likely = softmax(onlyUsed(model, logits.subarray(t * size, (t + 1) * size)));
      for (const id of largestIds(likely, each)) {
        ids.push(id);
        probs.push(likely[id]);
      }
    }
  }
  const shape = [streams.length, nTokens, each];
  return { ids: array(shape, ids), probs: array(shape, probs) };
}

// The ids of the n largest values, the largest first.
function largestIds(values, n) {
  const found = [];
  for (let id = 0; id < values.length; id++) {
    if (found.length === n && values[id] <= values[found[n - 1]]) continue;
    let place = found.length;
    while (place > 0 && values[found[place - 1]] < values[id]) place--;
    found.splice(place, 0, id);
    if (found.length > n) found.pop();
  }
  return found;
}

function headScores(layers, { n_head: nHead }, ids) {
  const previous = [], induction = [], nTokens = ids.length;
  const after = []; // [t, s]: the token before place s is that at place t
  for (let t = 0; t < nTokens; t++)
    for (let s = 1; s <= t; s++) if (ids[s - 1] === ids[t]) after.push([t, s]);
  const asked = new Set(after.map(([t]) => t)).size;
  for (const { probs } of layers) {
    const nPairs = probs.length / nHead;
    for (let head = 0; head < nHead; head++) {
      const prob = (t, s) => probs[head * nPairs + (t * (t + 1)) / 2 + s];
      let before = 0, repeated = 0;
      for (let t = 1; t < nTokens; t++) before += prob(t, t - 1);
      for (const [t, s] of after) repeated += prob(t, s);
      previous.push(before / (nTokens - 1));
      induction.push(repeated / asked);
    }
  }
  const shape = [layers.length, nHead];
  return { previous: array(shape, previous), induction: array(shape, induction) };
}

// What moved the score of a token after the last place: parts that add up to it.
function attributionOf({ config, weights: w }, found, token) {
  const { n_embd: width, n_head: nHead, n_layer: nLayer } = config, size = width / nHead;
  const at = (x) => x.subarray(x.length - width);
  const unembedding = (w.lm_head ?? w.wte).subarray(token * width, (token + 1) * width);
  const last = at(found.last), mean = last.reduce((sum, x) => sum + x, 0) / width;
  const variance = last.reduce((sum, x) => sum + (x - mean) ** 2, 0) / width;
  const scale = 1 / Math.sqrt(variance + config.epsilon);
  const way = unembedding.map((x, i) => x * w["ln_f.weight"][i] * scale);
  const wayMean = way.reduce((sum, x) => sum + x, 0) / width;
  const moved = (x) => x.reduce((sum, value, i) => sum + value * (way[i] - wayMean), 0);
  const heads = [], biases = [], mlps = [];
  for (let n = 0; n < nLayer; n++) {
    const c_proj = w[`h.${n}.attn.c_proj.weight`], mixed = at(found.layers[n].mixed);
    for (let head = 0; head < nHead; head++) {
      const alone = mixed.map((x, i) => (Math.floor(i / size) === head ? x : 0));
      heads.push(moved(linear(alone, c_proj, null, width, width)));
    }
    biases.push(moved(w[`h.${n}.attn.c_proj.bias`]));
    mlps.push(moved(at(found.layers[n].mlp)));
  }
  return {
    token,
    logit: found.logits[found.logits.length - config.vocab_size + token],
    token_embedding: moved(at(found.tokens)),
    position_embedding: moved(at(found.positions)),
    final_bias: w["ln_f.bias"].reduce((sum, x, i) => sum + x * unembedding[i], 0),
    heads: array([nLayer, nHead], heads),
    attn_biases: array([nLayer], biases),
    mlps: array([nLayer], mlps),
  };
}

// How two forward passes of one text differ, as compared.py has it.
function differencesOf([a, b], models) {
  const [logsA, logsB] = [a, b].map(({ logits }, i) => logProbs(logits, models[i].config.vocab_size));
  const size = models[0].config.vocab_size, width = models[0].config.n_embd;
  const divergence = [], streams = [], nTokens = a.logits.length / size;
  for (let t = 0; t < nTokens; t++) {
    let sum = 0;
    for (let i = t * size; i < (t + 1) * size; i++)
      sum += Math.exp(logsA[i]) * (logsA[i] - logsB[i]);
    divergence.push(sum);
  }
  const [streamsA, streamsB] = [a, b].map((found) =>
    [...found.layers.map((layer) => layer.before), found.last]);
  streamsA.forEach((x, depth) => {
    for (let t = 0; t < nTokens; t++) {
      const from = x.subarray(t * width, (t + 1) * width);
      const moved = from.map((value, i) => streamsB[depth][t * width + i] - value);
      streams.push(Math.hypot(...moved) / Math.hypot(...from));
    }
  });
  return { divergence: array([nTokens], divergence),
    streams: array([streamsA.length, nTokens], streams) };
}

function logProbs(logits, size) {
  const found = new Float64Array(logits.length);
  for (let from = 0; from < logits.length; from += size) {
    const line = logits.subarray(from, from + size), most = largest(line);
    const total = Math.log(line.reduce((sum, x) => sum + Math.exp(x - most), 0));
    for (let i = 0; i < size; i++) found[from + i] = line[i] - most - total;
  }
  return found;
}

// Multiplications of the token after n others, by part: all again, and with a cache (costs.py).
function costsOf({ vocab_size, n_embd: width, n_inner: inner, n_layer }, n, names) {
  const parts = (fresh, cached) => {
    const each = n_layer * fresh, pairs = each * (fresh + cached) * width;
    return [each * 3 * width ** 2, pairs, pairs, each * width ** 2, each * 2 * width * inner,
      vocab_size * width];
  };
  const again = parts(n + 1, 0), cached = parts(1, n);
  return { parts: names.map((name, i) => [name, again[i], cached[i]]),
    numbers: 2 * n_layer * width * n };
}

function natsOf(model, logits, ids) {
  const size = model.config.vocab_size;
  return ids.map((id, t) =>
    t ? -Math.log(softmax(onlyUsed(model, logits.subarray((t - 1) * size, t * size)))[id]) : null);
}
