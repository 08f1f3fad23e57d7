"""The files of a vocabulary of GPT-2's kind, and the table of GPT-2's own, which needs no file.

vocab.json has the ids, merges.txt what is merged, tokenizer.json both; tokenizer_config.json and
added_tokens.json say what is special. Reads them strictly, and writes them so that transformers'
AutoTokenizer reads them back. Knows bytes, merges and ids; nothing is encoded here.
"""

from __future__ import annotations

import json
import logging
from binascii import a2b_base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

from ..arguments import shown
from ..errors import InputError, NotFoundError
from ..hub.folders import MODEL_FILES, model_folder
from ..hub.pins import public_model
from ..hub.snapshot import TOKENIZER_FILES
from ..system import files

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
VOCAB, MERGES, VOCAB_AND_MERGES, CONFIG, ADDED = TOKENIZER_FILES  # all that is fetched from the Hub
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")


def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in vocab.json and merges.txt, in order of GPT-2's ids.

    Printable bytes stand for themselves; the other 68 get U+0100 and on, so a space is "Ġ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _alphabet()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


@dataclass(frozen=True)
class Vocabulary:
    """What makes a tokenizer: the 256 bytes and what is merged from them, in the order of merging,
    with their ids; what no text encodes to, by name; and which of that is end-of-text.
    """

    tokens: Sequence[bytes]
    ids: Sequence[int]
    special: Mapping[str, int]
    eot: str

    @cached_property
    def merges(self) -> list[list[bytes]]:
        """`merges_of` the tokens."""
        return merges_of(self.tokens)


@cache
def gpt2_tokens() -> tuple[bytes, ...]:
    """GPT-2's tokens but end-of-text, in the order of merging, which is that of their ids."""
    lines = (files.ASSETS / "gpt2.tiktoken").read_bytes().splitlines()
    return tuple(a2b_base64(line.split()[0]) for line in lines)


def is_gpt2s(source: str | Path) -> bool:
    """Whether a source is one of the public models that all have GPT-2's own vocabulary."""
    return public_model(str(source)) is not None and not Path(source).is_dir()


def vocabulary_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder with the vocabulary of a Hub id or folder, as `model_folder` finds it, without
    weights.
    """
    return model_folder(source, revision, with_weights=False)


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file with ids or merges."""
    return any((folder / name).exists() for name in (VOCAB, MERGES, VOCAB_AND_MERGES))


def read_at_one_moment(folder: Path) -> Vocabulary:
    """`read_vocabulary`, again where a file of the model changed meanwhile."""
    return files.at_one_moment(folder, MODEL_FILES, lambda: read_vocabulary(folder))


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read vocab.json and merges.txt, or else tokenizer.json, with the ids that they give.

    Added tokens count as special, and the eos_token of tokenizer_config.json as end-of-text.
    Raises InputError or NotFoundError for what is missing, damaged or not GPT-2's kind of BPE.
    """
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
    return Vocabulary(list(tokens.values()), [vocab[name] for name in tokens], special, eot)


def write_vocabulary(
    folder: Path, vocabulary: Vocabulary, *, model_max_length: int | None = None
) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, as `read_vocabulary` reads them.

    So does transformers' AutoTokenizer, beside a config.json of model_type "gpt2". Other tokenizer
    files in the folder are removed: it would prefer them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (VOCAB_AND_MERGES, ADDED, "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    spelled = map(_spelling, vocabulary.tokens)
    vocab = dict(zip(spelled, vocabulary.ids)) | dict(vocabulary.special)
    by_id = dict(sorted(vocab.items(), key=lambda item: item[1]))
    files.write_text(folder / VOCAB, json.dumps(by_id, allow_nan=False))
    lines = (" ".join(map(_spelling, parts)) + "\n" for parts in vocabulary.merges)
    files.write_text(folder / MERGES, "".join(["#version: 0.2\n", *lines]))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), vocabulary.eot),
        "added_tokens_decoder": {
            str(id): {"content": name, **plain, "special": True}
            for name, id in vocabulary.special.items()
        },
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    files.write_json(folder / CONFIG, config)


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
    if in_order == gpt2_tokens()[: len(in_order)]:
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
    config = _read_optional(folder / CONFIG)
    if config.get("add_prefix_space"):
        raise InputError(f"{folder}: add_prefix_space in tokenizer_config.json is not supported")
    older = _read_optional(folder / ADDED)
    added = [{"content": name, "id": id} for name, id in older.items()]
    decoder = config.get("added_tokens_decoder", {})
    added += [{**token, "id": int(id)} for id, token in decoder.items()]
    vocab_path, merges_path = folder / VOCAB, folder / MERGES
    kind = config.get("tokenizer_class")
    if kind in GPT2_CLASSES and vocab_path.is_file() and merges_path.is_file():
        vocab, merges = files.read_json(vocab_path), _read_merges(merges_path)
    elif (folder / VOCAB_AND_MERGES).is_file():
        vocab, merges, more = _read_tokenizer_json(folder / VOCAB_AND_MERGES)
        added += more
    elif kind not in GPT2_CLASSES:
        raise InputError(f"{folder} has a {kind}, supported is GPT2Tokenizer only")
    else:
        raise NotFoundError(f"{folder} has no vocab.json with merges.txt, and no tokenizer.json")
    if words := [token["content"] for token in added if not token.get("special", True)]:
        logger.warning("%s: text never encodes to the added tokens %s", folder, shown(words))
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
    model, pre = data["model"], data["pre_tokenizer"] or {}
    pieces = (pre.get("type"), pre.get("add_prefix_space"), pre.get("use_regex", True))
    changes = [data.get("normalizer"), model.get("dropout")]
    changes += [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model.get("type", "BPE") != "BPE" or pieces != ("ByteLevel", False, True) or any(changes):
        raise InputError(
            f"{path} is {model.get('type')} with {pre.get('type')} pieces, supported is byte-level "
            "BPE with GPT-2's own pieces and no other steps"
        )
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"], merges, data.get("added_tokens") or []
