// From scores to the next token, as minigpt2/sampling.py has it: the same filters in the same
// order, in float32 wherever torch computes in float32. Logits are a Float32Array (V); a filter
// returns new ones, with unwanted tokens at minus infinity.

const f32 = Math.fround;

function repetitionPenalty(logits, text, penalty) {
  if (penalty === 1) return logits;
  const found = logits.slice();
  for (const id of new Set(text)) {
    const seen = logits[id];
    found[id] = seen > 0 ? seen / f32(penalty) : seen * f32(penalty);
  }
  return found;
}

function temperature(logits, t) {
  if (t >= 0.01) return logits.map((x) => x / f32(t));
  const most = largest(logits), small = f32(Math.max(t, 1e-30));
  return logits.map((x) => f32(x - most) / small);
}

function topK(logits, k) {
  if (k === 0 || k >= logits.length) return logits;
  const smallestKept = logits.slice().sort()[logits.length - k];
  return logits.map((x) => (x < smallestKept ? -Infinity : x)); // ties with the k-th stay
}

function topP(logits, p) {
  if (p === 1) return logits;
  const order = ascending(logits), probs = softmax(logits), found = logits.slice();
  let sum = 0;
  for (const id of order.subarray(0, -1)) { // the likeliest always stays
    sum += probs[id];
    if (f32(sum) > f32(1 - p)) break;
    found[id] = -Infinity;
  }
  return found;
}

function minP(logits, p) {
  if (p === 0) return logits;
  const probs = softmax(logits), least = f32(f32(p) * largest(probs));
  return logits.map((x, id) => (probs[id] < least ? -Infinity : x));
}

// What sampling.py calls `probabilities`: how = {temperature, topK, topP, minP, repetitionPenalty}.
function probabilities(logits, how, text) {
  logits = repetitionPenalty(logits, text, how.repetitionPenalty);
  if (how.temperature === 0 || how.topK === 1 || how.topP === 0) {
    const onlyOne = new Float32Array(logits.length);
    onlyOne[logits.indexOf(largest(logits))] = 1;
    return onlyOne;
  }
  logits = temperature(logits, how.temperature);
  logits = topK(logits, how.topK);
  logits = topP(logits, how.topP);
  return softmax(minP(logits, how.minP));
}

function largest(values) {
  let most = -Infinity;
  for (const value of values) if (value > most) most = value;
  return most;
}

// The ids from the smallest value to the largest; of equal ones the smaller id first.
function ascending(values) {
  const order = new Uint32Array(values.length).map((_, id) => id);
  return order.sort((a, b) => values[a] - values[b] || a - b);
}

function softmax(values) {
  const most = largest(values), powers = values.map((x) => Math.exp(f32(x - most)));
  let sum = 0;
  for (const power of powers) sum += power;
  return powers.map((power) => power / f32(sum));
}
