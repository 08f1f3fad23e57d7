// Arrays and byte texts as the page carries them (minigpt2/explain/packing.py).

const NUMBERS = { f32: Float32Array, i32: Int32Array, share: Uint16Array, f16: Uint16Array };

// Every {kind, shape, data} below a value as {shape, data}, with its numbers.
function unpacked(value) {
  if (Array.isArray(value)) return value.map(unpacked);
  if (value === null || typeof value !== "object") return value;
  if (typeof value.kind === "string" && value.kind in NUMBERS) return numbersOf(value);
  return Object.fromEntries(Object.entries(value).map(([name, held]) =>
    [name, LATER.has(name) ? held : unpacked(held)]));
}
const LATER = new Set(["live", "tokenizer"]); // needed once something is typed

function numbersOf({ kind, shape, data }) {
  const text = atob(data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const raw = new NUMBERS[kind](bytes.buffer);
  if (kind !== "share" && kind !== "f16") return { shape, data: raw };
  const found = new Float32Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = kind === "share" ? raw[i] / 65535 : HALVES[raw[i]];
  return { shape, data: found };
}

// The number that 16 bits of IEEE 754 mean.
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => half(bits));

// vocab.json's characters for bytes: printable ones stand for themselves, the others begin at Ā.
const BYTE_OF = new Map();
for (let byte = 0, next = 256; byte < 256; byte++) {
  const printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  BYTE_OF.set(String.fromCharCode(printable ? byte : next++), byte);
}
const bytesSpelled = (text) => Uint8Array.from(text, (character) => BYTE_OF.get(character));
const bytesIn = (text) => Uint8Array.from(text, (character) => character.charCodeAt(0));
const CHAR_OF = new Map([...BYTE_OF].map(([character, byte]) => [byte, character]));
const spelledBytes = (bytes) => Array.from(bytes, (byte) => CHAR_OF.get(byte)).join("");
