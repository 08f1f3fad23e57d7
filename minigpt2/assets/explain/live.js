// GPT-2 in plain JavaScript, to be read: from a typed text to the scores of the next token. It is
// minigpt2/tokenizer.py and minigpt2/model.py once more, on the weights that the page carries.
// A matrix is a Float32Array, row after row. Letters: T tokens, C width, H heads, D head size.

// ---- text to ids: byte-level BPE -----------------------------------------------------------------

// The bytes of a text as a text of as many characters, each from U+0000 to U+00FF.
function bytesOf(text) {
  return Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");
}

// A tokenizer of its tokens (byte texts, in the order of merging), their ids, the pattern of the
// pieces, whether every text begins with a space, the words that were added, the longest first,
// and whether those that are special count.
function makeTokenizer({ tokens, ids, pattern, prefixSpace, words, readSpecial, space }) {
  const ranks = new Map(tokens.map((token, rank) => [token, rank]));
  const idOf = (token) => (ids ? ids[ranks.get(token)] : ranks.get(token));
  const passes = [false, true].map((last) => words.filter((word) => word.normalized === last));
  return { ranks, idOf, pattern: new RegExp(pattern, "gu"), prefixSpace, readSpecial, passes,
    space: new RegExp(space) };
}

const isText = (part) => typeof part === "string"; // else it is the id of an added word

// A text as its pieces, and added words as their ids.
function piecesOf(tokenizer, text) {
  const { passes, prefixSpace, pattern } = tokenizer;
  let parts = [text];
  for (const words of passes)
    parts = parts.flatMap((part) => (isText(part) ? splitAtWords(tokenizer, words, part) : part));
  return parts.flatMap((part) => (!isText(part) ? part
    : (prefixSpace && !part.startsWith(" ") ? " " + part : part).match(pattern) ?? []));
}

// The text between words, and the words as their ids (minigpt2/formats/added_words.py).
function splitAtWords({ readSpecial, space }, words, text) {
  const escaped = words.map(({ name }) => name.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  const named = new Map(words.map((word) => [word.name, word])), parts = [];
  let start = 0;
  for (const found of words.length ? text.matchAll(new RegExp(escaped.join("|"), "gu")) : []) {
    const word = named.get(found[0]);
    let left = found.index, right = left + found[0].length;
    if (word.special && !readSpecial) continue;
    const before = [...text.slice(Math.max(0, left - 2), left)].at(-1) ?? "";
    const after = [...text.slice(right, right + 2)][0] ?? "";
    if (word.single_word && (IN_WORD.test(before) || IN_WORD.test(after))) continue;
    if (word.lstrip) {
      while (left > start && space.test(text[left - 1])) left--;
      left = Math.max(left, start); // an earlier word may have taken it
    }
    while (word.rstrip && right < text.length && space.test(text[right])) right++;
    if (start < left) parts.push(text.slice(start, left));
    if (left < right) parts.push(word.id);
    start = right;
  }
  if (start < text.length) parts.push(text.slice(start));
  return parts;
}
// a letter, mark, digit, connector or joiner
const IN_WORD = /[\p{L}\p{M}\p{Nl}\p{Nd}\p{Pc}\u24b6-\u24e9\u{1f130}-\u{1f189}\u200c\u200d]/u;

// A piece as its bytes, then after every merge: over and over, the two neighbours are joined whose
// union stands first in the list of tokens.
function mergeSteps({ ranks }, piece, keep = true) {
  let parts = [...bytesOf(piece)];
  const steps = [parts];
  for (;;) {
    let at = -1, best = Infinity;
    for (let i = 0; i + 1 < parts.length; i++) {
      const rank = ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
      if (rank < best) [at, best] = [i, rank];
    }
    if (at < 0) return steps;
    parts = [...parts.slice(0, at), parts[at] + parts[at + 1], ...parts.slice(at + 2)];
    if (keep) steps.push(parts);
    else steps[0] = parts;
  }
}

function encode(tokenizer, text) {
  return piecesOf(tokenizer, text).flatMap((piece) =>
    (isText(piece) ? mergeSteps(tokenizer, piece, false)[0].map(tokenizer.idOf) : piece));
}

// ---- ids to scores: the network ------------------------------------------------------------------

// x (T, n_in) times a matrix stored as (n_out, n_in), plus a bias (n_out) if there is one.
// Four rows at once, as this is where the time goes: each number of x is fetched once for them.
function linear(x, weight, bias, nIn, nOut) {
  const nTokens = x.length / nIn, y = new Float32Array(nTokens * nOut);
  const wide = new Float64Array(x); // as JavaScript computes
  for (let out = 0; out < nOut; out += 4) {
    const rows = [0, 1, 2, 3].map((i) => Math.min(out + i, nOut - 1)); // the last more than once
    const [w0, w1, w2, w3] = rows.map((row) => weight.subarray(row * nIn, (row + 1) * nIn));
    for (let t = 0; t < nTokens; t++) {
      let sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
      for (let i = 0, from = t * nIn; i < nIn; i++) {
        const value = wide[from + i];
        sum0 += w0[i] * value;
        sum1 += w1[i] * value;
        sum2 += w2[i] * value;
        sum3 += w3[i] * value;
      }
      const sums = [sum0, sum1, sum2, sum3];
      for (let i = 0; i < 4; i++) y[t * nOut + rows[i]] = sums[i] + (bias ? bias[rows[i]] : 0);
    }
  }
  return y;
}

// Every token's vector with mean 0 and standard deviation 1, then scaled and moved.
function layerNorm(x, weight, bias, epsilon) {
  const width = weight.length, y = new Float32Array(x.length);
  for (let from = 0; from < x.length; from += width) {
    let mean = 0, variance = 0;
    for (let i = 0; i < width; i++) mean += x[from + i] / width;
    for (let i = 0; i < width; i++) variance += (x[from + i] - mean) ** 2 / width;
    const scale = 1 / Math.sqrt(variance + epsilon);
    for (let i = 0; i < width; i++) y[from + i] = (x[from + i] - mean) * scale * weight[i] + bias[i];
  }
  return y;
}

const ACTIVATIONS = {
  gelu_new: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  relu: (x) => Math.max(x, 0),
  silu: (x) => x / (1 + Math.exp(-x)),
};

function erf(x) { // Abramowitz and Stegun 7.1.26, within 1.5e-7
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t
    + 0.254829592) * t;
  return Math.sign(x) * (1 - p * Math.exp(-x * x));
}

// Every head of one layer: each token gathers from itself and the tokens before it. qkv (T, 3 C)
// -> mixed (T, C), with the scores and probabilities of all heads, (H, T (T + 1) / 2) each.
function attend(qkv, nHead, width, scale) {
  const nTokens = qkv.length / (3 * width), size = width / nHead;
  const nPairs = (nTokens * (nTokens + 1)) / 2;
  const scores = new Float32Array(nHead * nPairs), probs = new Float32Array(nHead * nPairs);
  const mixed = new Float32Array(nTokens * width);
  for (let head = 0, pair = 0; head < nHead; head++) {
    for (let t = 0; t < nTokens; t++, pair += t) {
      const q = t * 3 * width + head * size;
      for (let s = 0; s <= t; s++) { // causal: the tokens after t are not looked at
        const k = s * 3 * width + width + head * size;
        let product = 0;
        for (let i = 0; i < size; i++) product += qkv[q + i] * qkv[k + i];
        scores[pair + s] = product * scale;
      }
      probs.set(softmax(scores.subarray(pair, pair + t + 1)), pair);
      for (let s = 0; s <= t; s++) {
        const v = s * 3 * width + 2 * width + head * size, into = t * width + head * size;
        for (let i = 0; i < size; i++) mixed[into + i] += probs[pair + s] * qkv[v + i];
      }
    }
  }
  return { scores, probs, mixed };
}

const added = (x, y) => x.map((value, i) => value + y[i]);

// One forward pass, with all on the way kept. model = {config, weights}, ids (T).
function forward({ config, weights: w }, ids) {
  const width = config.n_embd, inner = config.n_inner, act = ACTIVATIONS[config.activation];
  const tokens = new Float32Array(ids.length * width);
  ids.forEach((id, t) => tokens.set(w.wte.subarray(id * width, (id + 1) * width), t * width));
  const positions = w.wpe.slice(0, ids.length * width);
  let x = added(tokens, positions);
  const layers = [];
  for (let n = 0; n < config.n_layer; n++) {
    const named = (name) => w[`h.${n}.${name}`], before = x;
    const norm1 = layerNorm(x, named("ln_1.weight"), named("ln_1.bias"), config.epsilon);
    const qkv = linear(norm1, named("attn.c_attn.weight"), named("attn.c_attn.bias"), width,
      3 * width);
    const { scores, probs, mixed } = attend(qkv, config.n_head, width, config.scales[n]);
    const attn = linear(mixed, named("attn.c_proj.weight"), named("attn.c_proj.bias"), width,
      width);
    const middle = added(x, attn);
    const norm2 = layerNorm(middle, named("ln_2.weight"), named("ln_2.bias"), config.epsilon);
    const hidden = linear(norm2, named("mlp.c_fc.weight"), named("mlp.c_fc.bias"), width, inner)
      .map(act);
    const mlp = linear(hidden, named("mlp.c_proj.weight"), named("mlp.c_proj.bias"), inner, width);
    x = added(middle, mlp);
    layers.push({ before, norm1, qkv, scores, probs, attn, middle, norm2, hidden, mlp, mixed });
  }
  return { tokens, positions, layers, last: x, logits: scoresOf({ config, weights: w }, x) };
}

// What a stream (T, C) would say next if the model ended there: logits (T, V).
function scoresOf({ config, weights: w }, x) {
  const normed = layerNorm(x, w["ln_f.weight"], w["ln_f.bias"], config.epsilon);
  return linear(normed, w.lm_head ?? w.wte, null, config.n_embd, config.vocab_size);
}
