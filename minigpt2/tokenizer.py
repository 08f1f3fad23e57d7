"""Text to token ids and back: GPT-2's byte-level BPE. Knows bytes, merges and ids, not models.

A text is cut into pieces (words, numbers, punctuation, whitespace). Each piece starts as its UTF-8
bytes; then, over and over, the two neighbours are joined whose union stands first in the list of
tokens. tiktoken does that part. Radford et al. 2019, section 2.2; openai/gpt-2 src/encoder.py.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import re
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken

from . import files, hub
from .errors import InputError, NotFoundError

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PUBLIC_MODELS = re.compile(
    r"(openai-community/)?gpt2(-medium|-large|-xl)?|(distilbert/)?distilgpt2"
)
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
# GPT-2's pieces, in a form that never backtracks (++), so that time is linear in the text.
PIECES = "|".join(
    [
        r"'(?:s|t|re|ve|m|ll|d)",  # English endings
        r" ?\p{L}++",  # a word, with the space before it
        r" ?\p{N}++",  # digits
        r" ?[^\s\p{L}\p{N}]++",  # punctuation
        r"\s++$",  # whitespace up to the end of the text
        r"\s+(?!\S)",  # whitespace but for its last character, which the next word may take
        r"\s",
    ]
)
# What \s means in PIECES; Python's own \s has U+001C to U+001F too.
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONGEST_RUN = 100_000  # tiktoken gives up at about 1,000,000 whitespace characters


def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in vocab.json and merges.txt, in order of GPT-2's ids.

    Printable bytes stand for themselves; the other 68 get U+0100 and on, so a space is "Ġ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _alphabet()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


class Tokenizer:
    """A byte-level BPE vocabulary: every text has ids, which decode to the same text."""

    eot: int
    """The id of <|endoftext|>, which separates documents; no text encodes to it."""
    vocab_size: int
    """One more than the largest id."""

    def __init__(
        self, tokens: Sequence[bytes], ids: Sequence[int], special: Mapping[str, int], eot: str
    ) -> None:
        """`tokens`: the 256 bytes and what is merged from them, in the order of merging, and their
        `ids`. `special`: the ids that no text encodes to; `eot` names one of them.
        """
        self._tokens, self._ids, self._special = list(tokens), list(ids), dict(special)
        self._bytes = dict(zip(ids, tokens)) | {id: name.encode() for name, id in special.items()}
        self._ids_are_ranks = self._ids == list(range(len(tokens)))
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._bpe = tiktoken.Encoding(
            "minigpt2", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={}
        )
        self.eot = special[eot]
        self.vocab_size = max(self._bytes) + 1

    @classmethod
    def gpt2(cls, vocab_size: int = 50257) -> Tokenizer:
        """GPT-2's own tokenizer, or its first vocab_size - 1 tokens and <|endoftext|> as last id.

        Every token is made of earlier ones, so the first part of the list is a tokenizer too. Needs
        neither network nor folder. Raises InputError unless 257 <= vocab_size <= 50257.
        """
        tokens = _gpt2_tokens()
        if not 257 <= vocab_size <= len(tokens) + 1:
            raise InputError(f"vocab_size is {vocab_size}, allowed is 257 to {len(tokens) + 1}")
        n = vocab_size - 1
        return cls(tokens[:n], range(n), {END_OF_TEXT: n}, END_OF_TEXT)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Tokenizer:
        """The tokenizer of a Hub id, a Hugging Face folder or a run folder.

        All revisions of OpenAI's models and distilgpt2 share the one that is part of this package:
        no network is needed. Raises what `hub.model_folder` and `from_folder` raise.
        """
        if PUBLIC_MODELS.fullmatch(str(source)) and not Path(source).is_dir():
            return cls.gpt2()
        return cls.from_folder(hub.model_folder(source, revision))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read vocab.json and merges.txt, or else tokenizer.json, with the ids that they give.

        Added tokens count as special, and the eos_token of tokenizer_config.json as end-of-text.
        Raises InputError or NotFoundError for what is missing, damaged or not GPT-2's kind of BPE.
        """
        folder = Path(folder)
        try:
            vocab, merges, added, eot = _read_folder(folder)
            tokens = _spelled_tokens(merges, folder)
            special = _special_tokens(tokens, vocab, added, eot, folder)
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise InputError(
                f"{folder}: the tokenizer files are not as transformers writes them: {problem!r}"
            ) from problem
        return cls(list(tokens.values()), [vocab[name] for name in tokens], special, eot)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; "<|endoftext|>" in it is text like any other, seven tokens in GPT-2.

        Raises InputError for a lone surrogate, which is not valid Unicode, with its position.
        """
        _refuse_surrogates(text)
        ranks: list[int] = []
        for part in split_long_whitespace(text, LONGEST_RUN):
            ranks += self._bpe.encode(part, disallowed_special=())
        return ranks if self._ids_are_ranks else [self._ids[rank] for rank in ranks]

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `encode` as uint32: the faster way for long texts."""
        import numpy as np

        _refuse_surrogates(text)
        parts = split_long_whitespace(text, LONGEST_RUN)
        ranks = [self._bpe.encode_to_numpy(part, disallowed_special=()) for part in parts]
        whole = ranks[0] if len(ranks) == 1 else np.concatenate(ranks)
        return whole if self._ids_are_ranks else self._id_array[whole]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. InputError for an unknown id."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token, perhaps part of a character only. InputError for an unknown id."""
        if id not in self._bytes:
            raise InputError(f"token id {id} is not in the vocabulary of {self.vocab_size:,} ids")
        return self._bytes[id]

    def written_bytes(self) -> list[bytes]:
        """What each of the vocab_size ids adds to a text: nothing for end-of-text."""
        ids = range(self.vocab_size)
        return [b"" if id == self.eot else self._bytes.get(id, b"") for id in ids]

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether every id means the same bytes in both, and end-of-text has the same id."""
        return self._bytes == other._bytes and self.eot == other.eot

    @cached_property
    def _id_array(self) -> np.ndarray:
        import numpy as np

        return np.array(self._ids, np.uint32)

    @property
    def identity(self) -> str:
        """SHA-256, in hexadecimal, of tokens, order and ids: the same for equal tokenizers only."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        tokens = [(token.hex(), id) for token, id in zip(self._tokens, self._ids)]
        content = json.dumps([tokens, sorted(self._special.items()), self.eot])
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: Path, *, model_max_length: int | None = None) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, as `from_folder` reads them.

        So does transformers' AutoTokenizer, beside a config.json of model_type "gpt2". Other
        tokenizer files in the folder are removed: it would prefer them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
            (folder / name).unlink(missing_ok=True)
        vocab = {_spelling(token): id for token, id in zip(self._tokens, self._ids)} | self._special
        by_id = dict(sorted(vocab.items(), key=lambda item: item[1]))
        files.write_text(folder / "vocab.json", json.dumps(by_id))
        lines = (" ".join(map(_spelling, parts)) + "\n" for parts in self._merges)
        files.write_text(folder / "merges.txt", "".join(["#version: 0.2\n", *lines]))
        eot = next(name for name, id in self._special.items() if id == self.eot)
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), eot),
            "added_tokens_decoder": {
                str(id): {"content": name, **plain, "special": True}
                for name, id in self._special.items()
            },
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        files.write_json(folder / "tokenizer_config.json", config)

    @cached_property
    def _merges(self) -> list[list[bytes]]:
        return merges_of(self._tokens)


class TextStream:
    """Ids in, text out as soon as it is certain: whole characters, and no part of a stop text.

    What `push` and `finish` return, put together, is the decoded text of all ids up to the first
    place where one of the `stop` texts begins.
    """

    stopped: bool
    """A stop text was found: nothing follows."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise InputError("a stop text is empty: leave it out or give it a character")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, id: int) -> str:
        """Take one more id; return the text that it makes certain."""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(id)))

    def finish(self) -> str:
        """The text held back; a last character that is not whole becomes U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, new: str, *, final: bool = False) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        found = min((held.find(s) for s in self._stop if s in held), default=len(held) + 1)
        # A longer stop text may have begun before the one found: the next ids decide.
        begins = [] if final else [_begun(held, s) for s in self._stop]
        begun = min(begins, default=len(held))
        self.stopped = found <= begun
        certain = min(found, begun)
        self._held = held[certain:]
        return held[:certain]


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise InputError(
            f"the text has the lone surrogate {text[problem.start]!r} at character "
            f"{problem.start:,}: it is not valid Unicode, replace or remove it"
        ) from None


def _begun(text: str, stop: str) -> int:
    """Where a text ends in the beginning of a stop text, but not in all of it; else its length."""
    starts = range(max(0, len(text) - len(stop) + 1), len(text))
    return next((at for at in starts if stop.startswith(text[at:])), len(text))


def split_long_whitespace(text: str, longest: int) -> Iterator[str]:
    """Cut a text at whitespace runs of `longest` (2 at least) and more characters, changing no id.

    GPT-2 makes one piece of such a run but for its last character, which goes with what follows,
    and one piece of a whole run at the end of a text. The cuts fall between these pieces.
    """
    start = 0
    for run in re.finditer(f"[{SPACES}]{{{longest},}}", text) if len(text) > longest else ():
        if run.end() < len(text):
            yield text[start : run.start()]
            yield text[run.start() : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def merges_of(tokens: Sequence[bytes]) -> list[list[bytes]]:
    """The parts that each token after the 256 bytes is merged from: what earlier tokens make of it.

    They are two, wherever the list came out of BPE training.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [_parts(token, ranks) for token in tokens[256:]]


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        unions = [left + right for left, right in pairwise(parts)]
        first = min(unions, key=lambda union: ranks.get(union, ranks[token]))
        if ranks.get(first, ranks[token]) >= ranks[token]:
            break
        at = unions.index(first)
        parts[at : at + 2] = [first]
    return parts


@cache
def _gpt2_tokens() -> tuple[bytes, ...]:
    lines = (Path(__file__).parent / "assets" / "gpt2.tiktoken").read_bytes().splitlines()
    return tuple(a2b_base64(line.split()[0]) for line in lines)


def _spelling(token: bytes) -> str:
    return "".join(CHAR_OF[byte] for byte in token)


def _spelled_tokens(merges: Sequence[Sequence[str]], folder: Path) -> dict[str, bytes]:
    """Spelling -> bytes of all tokens in the order of merging, if tiktoken can work with them.

    tiktoken looks for tokens, not for pairs. That is the same as long as each pair is what earlier
    merges make of its own token, as it is after BPE training; else InputError.
    """
    tokens = {char: bytes([byte]) for char, byte in BYTE_OF.items()}
    for pair in merges:
        if len(pair) != 2 or not tokens.keys() >= set(pair) or "".join(pair) in tokens:
            raise InputError(
                f"{folder}: the merge {' '.join(pair)[:80]!r} does not make a new token of two "
                "earlier ones: a tokenizer of another kind, or merges are missing"
            )
        tokens["".join(pair)] = tokens[pair[0]] + tokens[pair[1]]
    in_order = tuple(tokens.values())
    if in_order == _gpt2_tokens()[: len(in_order)]:
        return tokens
    for pair, parts in zip(merges, merges_of(in_order)):
        if [tokens[part] for part in pair] != parts:
            raise InputError(
                f"{folder}: the merge {' '.join(pair)[:80]!r} is out of order: earlier merges "
                "already take its bytes another way"
            )
    return tokens


def _special_tokens(
    tokens: Mapping[str, bytes],
    vocab: Mapping[str, int],
    added: Sequence[tuple[str, int]],
    eot: str,
    folder: Path,
) -> dict[str, int]:
    """Name -> id of what no merge makes; InputError unless vocabulary and merges fit together."""
    named = {**vocab, **dict(added)}
    special = {name: id for name, id in named.items() if name not in tokens}
    missing = [name for name in tokens if name not in vocab] + [eot] * (eot not in special)
    # A merges.txt that was cut short leaves ordinary words, which would never be used again.
    unknown = special.keys() - dict(added).keys() - {eot}
    words = sorted(name for name in unknown if not name.startswith(("<", "[")))
    if missing or words:
        raise InputError(
            f"{folder}: the vocabulary lacks {len(missing):,} tokens {missing[:1]} and has "
            f"{len(words):,} that no merge makes {words[:1]}: do the tokenizer files fit together?"
        )
    if not all(type(id) is int and id >= 0 for id in named.values()):
        raise InputError(f"{folder}: the vocabulary has an id that is not 0, 1, 2, ...")
    if not len({*vocab.items(), *added}) == len(named) == len(set(named.values())):
        raise InputError(f"{folder}: two tokens have the same id, or one token has two")
    return special


def _read_folder(
    folder: Path,
) -> tuple[dict[str, int], list[list[str]], list[tuple[str, int]], str]:
    """(vocabulary, merges, added tokens, end-of-text) as the files have them, not yet compared."""
    config = _read_optional(folder / "tokenizer_config.json")
    if config.get("add_prefix_space"):
        raise InputError(f"{folder}: add_prefix_space in tokenizer_config.json is not supported")
    older = _read_optional(folder / "added_tokens.json")
    added = [{"content": name, "id": id} for name, id in older.items()]
    decoder = config.get("added_tokens_decoder", {})
    added += [{**token, "id": int(id)} for id, token in decoder.items()]
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    kind = config.get("tokenizer_class")
    if kind in GPT2_CLASSES and vocab_path.is_file() and merges_path.is_file():
        vocab, merges = files.read_json(vocab_path), _read_merges(merges_path)
    elif (folder / "tokenizer.json").is_file():
        vocab, merges, more = _read_tokenizer_json(folder / "tokenizer.json")
        added += more
    elif kind not in GPT2_CLASSES:
        raise InputError(f"{folder} has a {kind}, supported is GPT2Tokenizer only")
    else:
        raise NotFoundError(f"{folder} has no vocab.json with merges.txt, and no tokenizer.json")
    if words := [token["content"] for token in added if not token.get("special", True)]:
        logger.warning("%s: text never encodes to the added tokens %s", folder, words)
    eot = config.get("eos_token") or END_OF_TEXT
    eot = eot["content"] if isinstance(eot, dict) else eot
    return vocab, merges, [(token["content"], token["id"]) for token in added], eot


def _read_optional(path: Path) -> dict:
    return files.read_json(path) if path.is_file() else {}


def _read_merges(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as problem:
        raise InputError(f"{path} is not UTF-8 text ({files.describe(path)})") from problem
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return [line.split(" ") for line in lines if line]


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[list[str]], list[dict]]:
    """(vocabulary, merges, added tokens) of a tokenizer.json that is byte-level BPE as in GPT-2."""
    data = files.read_json(path)
    model, cut = data["model"], data["pre_tokenizer"] or {}
    pieces = (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex", True))
    changes = [data.get("normalizer"), model.get("dropout")]
    changes += [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model.get("type", "BPE") != "BPE" or pieces != ("ByteLevel", False, True) or any(changes):
        raise InputError(
            f"{path} is {model.get('type')} with {cut.get('type')} pieces, supported is byte-level "
            "BPE with GPT-2's own pieces and no other steps"
        )
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"], merges, data.get("added_tokens") or []
