"""The files of a vocabulary of GPT-2's kind, and the table of GPT-2's own, which needs no file.

vocab.json has the ids, merges.txt what is merged, tokenizer.json both; tokenizer_config.json,
special_tokens_map.json and added_tokens.json say what was added and what is special. Reads them as
transformers' AutoTokenizer does, strictly, and writes them so that it reads the same back. Knows
bytes, merges, ids and settings; nothing is encoded here.
"""

from __future__ import annotations

import json
import logging
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import InputError, NotFoundError
from ..hub.folders import MODEL_FILES, model_folder
from ..hub.pins import public_model
from ..hub.snapshot import TOKENIZER_FILES
from ..system import files
from . import fields
from .added_words import AddedWord
from .bases import base_folder, base_name, is_adapter

logger = logging.getLogger(__name__)
END_OF_TEXT = "<|endoftext|>"
# all that is fetched from the Hub
VOCAB, MERGES, VOCAB_AND_MERGES, CONFIG, ADDED, SPECIAL, CHAT = TOKENIZER_FILES
MORE_CHATS = "additional_chat_templates"  # a folder, as transformers writes it
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")  # settings that name several
DECODER = "added_tokens_decoder"  # the setting that has all added words, where there is one
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


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
    with their ids; what no merge makes, by name; and which of that is end-of-text.

    `words` are the added ones, most of which are in `special`. `settings` are those of
    tokenizer_config.json, `frame` what a tokenizer.json has besides tokens and added words, and
    `templates` the files of chat templates, by path: what is read is kept, and written again.
    """

    tokens: Sequence[bytes]
    ids: Sequence[int]
    special: Mapping[str, int]
    eot: str
    words: Sequence[AddedWord] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    frame: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefix_space(self) -> bool:
        """Whether every text, and every part between added words, begins with a space."""
        if self.settings.get("tokenizer_class") in GPT2_CLASSES:
            return bool(self.settings.get("add_prefix_space"))
        return bool((self.frame.get("pre_tokenizer") or {}).get("add_prefix_space"))

    @property
    def is_gpt2s(self) -> bool:
        """Whether what is merged is GPT-2's own, with its ids, whatever words were added."""
        return tuple(self.tokens) == gpt2_tokens() and [*self.ids] == [*range(len(self.tokens))]

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


def with_vocabulary(source: str | Path, folder: Path) -> tuple[str | Path, Path]:
    """A source and its folder, or, of adapters without a vocabulary, those of their base, which is
    said.
    """
    found = folder
    while is_adapter(found) and not has_vocabulary(found):
        source, found = base_name(found), base_folder(found, with_weights=False)
    if found != folder:
        logger.info("%s has no tokenizer: that of its base %s is used", folder, source)
    return source, found


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file with ids or merges."""
    return any((folder / name).exists() for name in (VOCAB, MERGES, VOCAB_AND_MERGES))


def read_at_one_moment(folder: Path) -> Vocabulary:
    """`read_vocabulary`, again where a file of the model changed meanwhile."""
    return files.at_one_moment(folder, MODEL_FILES, lambda: read_vocabulary(folder))


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read tokenizer.json, or else vocab.json and merges.txt, with the ids that they give, and what
    the other files of a tokenizer say of added words, roles and settings.

    End-of-text is the eos_token, by default <|endoftext|>. Raises InputError or NotFoundError for
    what is missing, damaged or not GPT-2's kind of BPE.
    """
    try:
        settings = _read_settings(folder)
        vocab, merges, frame = _read_merged(folder, settings)
        tokens = _spelled_tokens(merges, folder)
        words = _added_words(folder, settings, vocab, frame.pop("added_tokens", None) or [])
        names = {**vocab, **{word.name: word.id for word in words}}
        settings = _with_plain_roles(settings, names)
        eot = _end_of_text(folder, settings, {n: id for n, id in names.items() if n not in tokens})
        special = _special_tokens(tokens, vocab, words, eot, folder)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise InputError(
            f"{folder}: the tokenizer files are not as transformers writes them: {problem!r}"
        ) from problem
    ids = [vocab[name] for name in tokens]
    templates = dict(_read_templates(folder))
    return Vocabulary(list(tokens.values()), ids, special, eot, words, settings, frame, templates)


def write_vocabulary(
    folder: Path, vocabulary: Vocabulary, *, model_max_length: int | None = None
) -> None:
    """Write vocab.json, merges.txt, tokenizer.json, which has both, and tokenizer_config.json, as
    `read_vocabulary` reads them; `model_max_length` is for settings that have none.

    transformers' AutoTokenizer reads the same, beside a config.json of model_type "gpt2". Other
    tokenizer files in the folder are removed: it would prefer them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stale = [folder / name for name in (VOCAB_AND_MERGES, ADDED, SPECIAL)]
    stale += [folder / name for name, _ in _read_templates(folder)]
    for path in stale:
        path.unlink(missing_ok=True)
    spelled = [_spelling(token) for token in vocabulary.tokens]
    merged = dict(zip(spelled, vocabulary.ids))
    by_id = dict(sorted({**merged, **vocabulary.special}.items(), key=lambda item: item[1]))
    merges = [[_spelling(part) for part in parts] for parts in vocabulary.merges]
    settings = _settings_to_write(vocabulary)
    if model_max_length is not None:
        settings.setdefault("model_max_length", model_max_length)
    files.write_text(folder / VOCAB, json.dumps(by_id, allow_nan=False))
    lines = (" ".join(pair) + "\n" for pair in merges)
    files.write_text(folder / MERGES, "".join(["#version: 0.2\n", *lines]))
    frame = vocabulary.frame or _new_frame(vocabulary)
    # pairs as texts, which every version of tokenizers reads
    pairs = [" ".join(pair) for pair in merges]
    model = {**frame["model"], "vocab": by_id, "merges": pairs}
    words = [_described(word, id=word.id) for word in _words(vocabulary)]
    whole = {**frame, "added_tokens": words, "model": model}
    text = json.dumps(whole, ensure_ascii=False, allow_nan=False)
    files.write_text(folder / VOCAB_AND_MERGES, text)
    for name, template in vocabulary.templates.items():
        (folder / name).parent.mkdir(exist_ok=True)
        files.write_text(folder / name, template)
    files.write_json(folder / CONFIG, settings)


def _words(vocabulary: Vocabulary) -> Sequence[AddedWord]:
    return vocabulary.words or [AddedWord(name, id) for name, id in vocabulary.special.items()]


def _new_frame(vocabulary: Vocabulary) -> dict[str, Any]:
    """What a tokenizer.json of GPT-2's kind has besides tokens and added words."""
    bytewise = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    bpe |= {"byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": {**bytewise, "add_prefix_space": vocabulary.prefix_space},
        "post_processor": _beginning(vocabulary)
        or {**bytewise, "add_prefix_space": True, "trim_offsets": False},
        "decoder": {**bytewise, "add_prefix_space": True},
        "model": {**bpe, "continuing_subword_prefix": "", "end_of_word_suffix": ""},
    }


def _beginning(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What puts bos before a text, where the settings want it: of a tokenizer.json, transformers
    looks here for it.
    """
    bos = vocabulary.settings.get("bos_token")
    wanted = vocabulary.settings.get("add_bos_token")
    if not wanted or not isinstance(bos, str) or bos not in vocabulary.special:
        return None
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], first, texts[1]],
        "special_tokens": {
            bos: {"id": bos, "ids": [vocabulary.special[bos]], "tokens": [bos]},
        },
    }


def _settings_to_write(vocabulary: Vocabulary) -> dict[str, Any]:
    new = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), vocabulary.eot),
    }
    settings = dict(vocabulary.settings or new)
    return {**settings, DECODER: {str(word.id): _described(word) for word in _words(vocabulary)}}


def _described(word: AddedWord, **more: int) -> dict[str, Any]:
    """An added word as JSON has it."""
    values = asdict(word)
    flags = {name: values[name] for name in (*FLAGS, "special")}
    return {**more, "content": word.name, **flags}


def with_words(vocabulary: Vocabulary, names: Sequence[str]) -> Vocabulary:
    """The same, and these words, which are tokens in every text.

    Raises InputError for a word that is a token already, or no word.
    """
    spelled = [_spelling(token) for token in vocabulary.tokens]
    vocab = dict(zip(spelled, vocabulary.ids)) | dict(vocabulary.special)
    found = {word.name: {"id": word.id} for word in vocabulary.words}
    words = list(vocabulary.words or (AddedWord(n, id) for n, id in vocabulary.special.items()))
    for name in names:
        if not name or name in vocab or name in found:
            raise InputError(f"{name!r:.60} cannot be added: it is a token already, or empty")
        id = _next_id(vocab, found)
        found[name] = {"id": id}
        words.append(AddedWord(name, id, special=False, normalized=True))
    special = {**vocabulary.special, **{name: found[name]["id"] for name in names}}
    return replace(vocabulary, special=special, words=words)


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
    words: Sequence[AddedWord],
    eot: str,
    folder: Path,
) -> dict[str, int]:
    """Name -> id of what no merge makes; InputError unless vocabulary and merges fit together."""
    for word in words:
        flags = (word.special, *(getattr(word, flag) for flag in FLAGS))
        if not (isinstance(word.name, str) and all(isinstance(flag, bool) for flag in flags)):
            raise InputError(
                f"{folder}: the added token {word.name!r:.60} is no text, or has a flag that is "
                "neither true nor false"
            )
    added = {word.name: word.id for word in words}
    named = {**vocab, **added}
    special = {name: id for name, id in named.items() if name not in tokens or name == eot}
    missing = [name for name in tokens if name not in vocab] + [eot] * (eot not in special)
    # A merges.txt that was cut short leaves ordinary words, which would never be used again.
    unknown = special.keys() - added.keys() - {eot}
    odd = sorted(name for name in unknown if not name.startswith(("<", "[")))
    if missing and not odd and {*missing} <= BYTE_OF.keys():
        raise InputError(
            f"{folder}: the vocabulary lacks {len(missing):,} of the 256 bytes, such as "
            f"{missing[0]!r}: texts that have them would be lost; train it with all of them"
        )
    if missing or odd:
        raise InputError(
            f"{folder}: the vocabulary lacks {len(missing):,} tokens {missing[:1]} and has "
            f"{len(odd):,} that no merge makes {odd[:1]}: do the tokenizer files fit together?"
        )
    pairs = {*vocab.items(), *((word.name, word.id) for word in words)}
    if not len(pairs) == len(named) == len(set(named.values())):
        raise InputError(f"{folder}: two tokens have the same id, or one token has two")
    return special


def _read_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, with what special_tokens_map.json says of roles: it goes
    before, unless the other one has all added words, as transformers writes it since 4.34.
    """
    settings = _read_optional(folder / CONFIG)
    source = folder / CONFIG
    if DECODER not in settings and (folder / SPECIAL).is_file():
        settings, source = {**settings, **files.read_json(folder / SPECIAL)}, folder / SPECIAL
    for role, word in _roles(settings):
        if not isinstance(_name_of(word), str):
            raise InputError(f"{source}: {role} is {shown(word)}, expected the text of a token")
    return settings


def _roles(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(setting, word) for every word that settings name as special: a text, or an object with its
    flags.
    """
    for name, value in settings.items():
        if name in ROLES and value is not None:
            yield name, value
        elif name in LISTED and isinstance(value, dict | list):
            words = value.values() if isinstance(value, dict) else value
            yield from ((name, word) for word in words)
        elif name.endswith("_token") and name not in ROLES and isinstance(_name_of(value), str):
            yield name, value


def _name_of(word: object) -> object:
    return word.get("content") if isinstance(word, dict) else word


def _with_plain_roles(settings: Mapping[str, Any], names: Mapping[str, int]) -> dict[str, Any]:
    """The settings with roles as texts, and GPT-2's own where it has such a token."""
    plain = dict(settings)
    for name, value in settings.items():
        if name in ROLES or (name.endswith("_token") and isinstance(value, dict)):
            plain[name] = _name_of(value)
        elif name in LISTED and isinstance(value, dict):
            plain[name] = {key: _name_of(word) for key, word in value.items()}
        elif name in LISTED and isinstance(value, list):
            plain[name] = [_name_of(word) for word in value]
    if settings.get("tokenizer_class") in GPT2_CLASSES:
        plain["tokenizer_class"] = settings.get("tokenizer_class") or "GPT2Tokenizer"
        for role in ("bos_token", "eos_token", "unk_token"):
            plain.setdefault(role, END_OF_TEXT if END_OF_TEXT in names else None)
    return plain


def _added_words(
    folder: Path,
    settings: Mapping[str, Any],
    vocab: Mapping[str, int],
    in_frame: Sequence[Mapping[str, Any]],
) -> list[AddedWord]:
    """The added words, as transformers collects them from added_tokens.json, tokenizer.json,
    tokenizer_config.json, and what the settings name as special; the later go before.
    """
    decoder, of_gpt2 = settings.get(DECODER), settings.get("tokenizer_class") in GPT2_CLASSES
    roles: dict[Any, Any] = {_name_of(word): word for _, word in _roles(settings)}
    lists: list[list[dict[str, Any]]] = [
        [
            {"content": name, "id": id, "special": name in roles}
            for name, id in fields.token_ids(
                _read_optional(folder / ADDED), str(folder / ADDED)
            ).items()
        ],
        [dict(word) for word in in_frame if decoder is None or not of_gpt2],
        _decoded(decoder or {}, f"{folder / CONFIG}: {DECODER}"),
    ]
    found = {word["content"]: word for words in lists for word in words}
    if any(word["id"] != found[word["content"]]["id"] for words in lists for word in words):
        raise InputError(f"{folder}: two tokens have the same id, or one token has two")
    if of_gpt2 and END_OF_TEXT in vocab:
        roles.setdefault(END_OF_TEXT, END_OF_TEXT)
    for name, word in roles.items():
        flags = word if isinstance(word, dict) else {}
        id = vocab[name] if name in vocab else _next_id(vocab, found)
        found.setdefault(name, {**flags, "id": id})["special"] = True
    return sorted((_word(name, values) for name, values in found.items()), key=lambda w: w.id)


def _decoded(decoder: object, where: str) -> list[dict[str, Any]]:
    """The added words that tokenizer_config.json lists by their ids."""
    words = []
    for id, word in fields.table(decoder, where).items():
        at = f"{where}.{id}"
        if not id.isascii() or not id.isdecimal() or len(id) > len(str(fields.MOST_ROWS)):
            raise InputError(f"{where} names the id {shown(id)}, allowed are 0, 1, 2, ...")
        words.append(fields.added_token({**fields.table(word, at), "id": int(id)}, at))
    return words


def _word(name: str, values: Mapping[str, Any]) -> AddedWord:
    special = values.get("special", False)
    flags = {flag: values.get(flag, flag == "normalized" and not special) for flag in FLAGS}
    return AddedWord(name, values["id"], special, **flags)


def _next_id(vocab: Mapping[str, int], found: Mapping[str, Mapping[str, Any]]) -> int:
    """The id that transformers gives to a word that has none, or the next that is free."""
    added = [word["id"] for word in found.values()]
    id, used = max([len(vocab) - 1, *added]) + 1, {*vocab.values(), *added}
    while id in used:
        id += 1
    return id


def _end_of_text(folder: Path, settings: Mapping[str, Any], names: Mapping[str, int]) -> str:
    """The token that the settings call end-of-text, or else <|endoftext|>, or what config.json has
    as eos_token_id.
    """
    if settings.get("eos_token") or END_OF_TEXT in names:
        return settings.get("eos_token") or END_OF_TEXT
    found = _read_optional(folder / "config.json").get("eos_token_id")
    by_id = {id: name for name, id in names.items()}
    ids = [id for id in (found if isinstance(found, list) else [found]) if type(id) is int]
    return next((by_id[id] for id in ids if id in by_id), END_OF_TEXT)


def _read_merged(
    folder: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, int], list[list[str]], dict[str, Any]]:
    """(vocabulary, merges, the rest of tokenizer.json) as the files have them, not yet compared."""
    vocab_path, merges_path = folder / VOCAB, folder / MERGES
    kind = settings.get("tokenizer_class")
    if (folder / VOCAB_AND_MERGES).is_file():
        return _read_tokenizer_json(folder / VOCAB_AND_MERGES, of_gpt2=kind in GPT2_CLASSES)
    if kind not in GPT2_CLASSES:
        raise InputError(
            f"{folder / CONFIG}: tokenizer_class is {shown(kind)}, supported is GPT2Tokenizer only"
        )
    if vocab_path.is_file() and merges_path.is_file():
        vocab = fields.token_ids(files.read_json(vocab_path), str(vocab_path))
        return vocab, _read_merges(merges_path), {}
    raise NotFoundError(f"{folder} has no vocab.json with merges.txt, and no tokenizer.json")


def _read_optional(path: Path) -> dict:
    return files.read_json(path) if path.is_file() else {}


def _read_merges(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as problem:
        raise InputError(f"{path} is not UTF-8 text ({files.describe(path)})") from problem
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return [line.split(" ") for line in lines if line]


def _read_tokenizer_json(
    path: Path, *, of_gpt2: bool
) -> tuple[dict[str, int], list[list[str]], dict[str, Any]]:
    """(vocabulary, merges, the rest) of a tokenizer.json that is byte-level BPE as in GPT-2.

    transformers' own class for GPT-2 takes add_prefix_space from tokenizer_config.json.
    """
    data = files.read_json(path)
    model = fields.table(data.get("model"), f"{path}: model")
    pre = fields.table(data.get("pre_tokenizer") or {}, f"{path}: pre_tokenizer")
    pieces = (pre.get("type"), pre.get("use_regex", True))
    changes = [data.get("normalizer"), model.get("dropout")]
    changes += [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model.get("type", "BPE") != "BPE" or pieces != ("ByteLevel", True) or any(changes):
        raise InputError(
            f"{path} is {shown(model.get('type'))} with {shown(pre.get('type'))} pieces, supported "
            "is byte-level BPE with GPT-2's own pieces and no other steps"
        )
    merges = fields.rows(model.get("merges"), f"{path}: model.merges")
    pairs = [_pair(pair, f"{path}: model.merges") for pair in merges]
    for number, word in enumerate(
        fields.rows(data.get("added_tokens") or [], f"{path}: added_tokens")
    ):
        fields.added_token(word, f"{path}: added_tokens[{number}]")
    rest = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    vocab = fields.token_ids(model.get("vocab"), f"{path}: model.vocab")
    return vocab, pairs, {**data, "model": rest}


def _pair(value: Any, where: str) -> list[str]:
    """A merge, which older files write as one text."""
    if isinstance(value, str):
        return value.split(" ")
    return [fields.text(part, where) for part in fields.rows(value, where)]


def _read_templates(folder: Path) -> Iterator[tuple[str, str]]:
    """The chat templates that lie in files of their own, by their paths in the folder."""
    for path in [folder / CHAT, *sorted((folder / MORE_CHATS).glob("*.jinja"))]:
        if path.is_file():
            try:
                yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError as problem:
                raise InputError(f"{path} is not UTF-8 text ({files.describe(path)})") from problem
