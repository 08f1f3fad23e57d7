// Reads typed texts, in a worker, so that the page can be used meanwhile: from a text to all that
// the page shows of it. The worker has these scripts but page.js, and the weights.

// The models of a page and their tokenizer, unpacked.
function makeReader({ tokenizer, models, limit }) {
  const { tokens, ids, special, ...how } = tokenizer;
  const byteTexts = tokens.split(" ").map((text) => String.fromCharCode(...bytesSpelled(text)));
  const unpackedModel = ({ live }) => ({ ...live, weights: Object.fromEntries(
    Object.entries(live.weights).map(([name, packed]) => [name, numbersOf(packed).data])) });
  return { tokenizer: makeTokenizer({ ...how, tokens: byteTexts, ids }), limit,
    models: models.map(unpackedModel), name: namesOf(tokenizer) };
}

// From an id to the bytes of its token.
function namesOf({ tokens, ids, special }) {
  const texts = tokens.split(" "), rankOf = ids && new Map(ids.map((id, rank) => [id, rank]));
  return (id) => bytesSpelled(special[id] ?? texts[rankOf ? rankOf.get(id) : id] ?? "");
}

// What the page shows of any text, or, as `refused`, why there is nothing.
function read(reader, text) {
  const { tokenizer, models, limit, name } = reader, ids = encode(tokenizer, text);
  const refused = (why) => ({ text, refused: why });
  if (!ids.length) return refused("Type something: a model needs at least one token.");
  if (ids.length > limit) return refused(`${ids.length} tokens: the page reads ${limit} at most.`);
  const known = Math.min(...models.map((model) => model.config.vocab_size));
  if (Math.max(...ids) >= known) return refused("The model has no row for some of these tokens.");
  const pieces = piecesOf(tokenizer, text).map((piece) => {
    if (!isText(piece)) return { steps: [spelledBytes(name(piece))] };
    const short = bytesOf(piece).length <= 40, steps = mergeSteps(tokenizer, piece, short);
    return { steps: steps.map((parts) => parts.map((part) => spelledBytes(bytesIn(part))).join(" ")) };
  });
  const insides = models.map((model) => inside(model, ids));
  const differences = models.length > 1 ? differencesOf(insides.map(({ found }) => found), models) : null;
  // the pass itself stays here: its logits are large
  return { text, ids, pieces, differences, insides: insides.map(({ found, ...shown }) => shown) };
}

// In the worker: the page's models come first, then texts.
function answer() {
  let reader = null;
  onmessage = ({ data: given }) => {
    if (reader) postMessage(read(reader, given));
    else reader = makeReader(given);
  };
}
