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
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import regex
import tiktoken

from .arguments import id_list, refuse, texts, whole
from .errors import InputError
from .formats.added_words import SPACES, AddedWord, AddedWords
from .formats.chat import TEMPLATE, ChatTemplate, Message, find_template, unshielded
from .formats.vocabulary import (
    CHAT,
    END_OF_TEXT,
    ROLES,
    Vocabulary,
    gpt2_tokens,
    is_gpt2s,
    read_at_one_moment,
    read_vocabulary,
    vocabulary_folder,
    with_vocabulary,
    with_words,
    write_vocabulary,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

logger = logging.getLogger(__name__)
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
LONGEST_PIECE = 1_000_000  # characters: tiktoken takes a hundred times the memory of a piece
LONGEST_RUN = 100_000  # tiktoken gives up at about 1,000,000 whitespace characters


class Tokenizer:
    """A byte-level BPE vocabulary: every text has ids, which decode to the same text."""

    eot: int
    """The id of <|endoftext|>, or what a folder has in its place: it separates documents."""
    vocab_size: int
    """One more than the largest id."""

    def __init__(
        self, tokens: Sequence[bytes], ids: Sequence[int], special: Mapping[str, int], eot: str
    ) -> None:
        """`tokens`: the 256 bytes and what is merged from them, in the order of merging, and their
        `ids`. `special`: the ids that plain text never encodes to; `eot` names one of them.
        """
        words = [AddedWord(name, id) for name, id in special.items()]
        self._use(Vocabulary(list(tokens), list(ids), dict(special), eot, words))

    def _use(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, tokens = vocabulary, vocabulary.tokens
        named = {id: name.encode() for name, id in vocabulary.special.items()}
        self._bytes = dict(zip(vocabulary.ids, tokens)) | named
        self._ids_are_ranks = vocabulary.ids == list(range(len(tokens)))
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._bpe = tiktoken.Encoding(
            "minigpt2", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={}
        )
        self._words, self._noticed = AddedWords(vocabulary.words), set[str]()
        self.eot = vocabulary.special[vocabulary.eot]
        self.vocab_size = max(self._bytes) + 1

    @classmethod
    def gpt2(cls, vocab_size: int = 50257) -> Tokenizer:
        """GPT-2's own tokenizer, or its first vocab_size - 1 tokens and <|endoftext|> as last id.

        Every token is made of earlier ones, so the first part of the list is a tokenizer too. Needs
        neither network nor folder. Raises InputError unless 257 <= vocab_size <= 50257.
        """
        tokens, vocab_size = gpt2_tokens(), whole("vocab_size", vocab_size, least=None)
        if not 257 <= vocab_size <= len(tokens) + 1:
            raise refuse("vocab_size", vocab_size, f"257 to {len(tokens) + 1}")
        n = vocab_size - 1
        return cls(tokens[:n], range(n), {END_OF_TEXT: n}, END_OF_TEXT)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Tokenizer:
        """The tokenizer of a Hub id, a Hugging Face folder or a run folder.

        All revisions of OpenAI's models and distilgpt2 share the one that is part of this package:
        no network is needed. Raises what `model_folder` and `from_folder` raise.
        """
        if is_gpt2s(source):
            return cls.gpt2()
        return cls.of_model(source, vocabulary_folder(source, revision))

    @classmethod
    def of_model(cls, source: str | Path, folder: Path) -> Tokenizer:
        """The tokenizer of a source whose files were found in this folder (`model_folder`), all
        of one moment; of adapters without one, that of their base. Raises what `from_folder`
        raises.
        """
        source, folder = with_vocabulary(source, folder)
        return cls.gpt2() if is_gpt2s(source) else cls._of(read_at_one_moment(folder))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, or else vocab.json and merges.txt, with the ids that they give, and
        what the other files say of added words and of what is special (formats/vocabulary.py).

        Raises InputError or NotFoundError for what is missing, damaged or not GPT-2's kind of BPE.
        """
        return cls._of(read_vocabulary(Path(folder)))

    def with_words(self, words: Sequence[str]) -> Tokenizer:
        """The same tokenizer, and a token for each of these words, in every text.

        Raises InputError for what is a token already, and for what is no text.
        """
        for word in words:
            _check_text(word)
        return self._of(with_words(self._vocabulary, words))

    @classmethod
    def _of(cls, found: Vocabulary) -> Tokenizer:
        tokenizer = cls.__new__(cls)
        tokenizer._use(found)
        return tokenizer

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text. "<|endoftext|>" in it is text like any other, seven tokens in GPT-2;
        with `special` it and its like are tokens, as in transformers.

        Words that were added and are not special are tokens always. More than a million letters,
        numbers, other signs or whitespace characters in a row are cut after each million
        (`LONGEST_PIECE`). Raises InputError for what is no text, and for a lone surrogate, which is
        not valid Unicode, with its position.
        """
        _check_text(text)
        if not special:
            self._notice(text)
        ids: list[int] = []
        for part in self._words.split(text, special=special):
            ids += [part] if isinstance(part, int) else self._merged(part)
        return ids

    def _merged(self, text: str) -> list[int]:
        ranks: list[int] = []
        for part in _tractable(self._prefixed(text)):
            ranks += self._bpe.encode(part, disallowed_special=())
        return ranks if self._ids_are_ranks else [self._vocabulary.ids[rank] for rank in ranks]

    def encode_array(
        self, text: str, *, special: bool = False, shielded: bool = False
    ) -> np.ndarray:
        """The ids of `encode` as uint32: the faster way for long texts. Gives no notice of what is
        read as plain text: `special_in` counts it. With `shielded` the text is of a chat
        (`ChatTemplate.shielded`): all tokens' names in it are tokens but for those that messages
        say.
        """
        import numpy as np

        _check_text(text)
        parts = self._words.split(text, special=special or shielded)
        if shielded:
            parts = (part if isinstance(part, int) else unshielded(part) for part in parts)
        arrays = [
            np.array([part], np.uint32) if isinstance(part, int) else self._merged_array(part)
            for part in parts
        ]
        return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, np.uint32), *arrays])

    def _merged_array(self, text: str) -> np.ndarray:
        import numpy as np

        parts = _tractable(self._prefixed(text))
        ranks = [self._bpe.encode_to_numpy(part, disallowed_special=()) for part in parts]
        whole = ranks[0] if len(ranks) == 1 else np.concatenate(ranks)
        return whole if self._ids_are_ranks else self._id_array[whole]

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a chat, by default up to where the next answer begins: what the template
        writes is encoded as tokens where it has them, and what messages say as plain text.

        A message has a role (system, user, assistant) and a content. Each answer is encoded by
        itself, as a model writes it. Raises InputError for other messages, and what the template
        refuses.
        """
        parts = self.chat.parts(messages, add_generation_prompt=add_generation_prompt)
        arrays = [self.encode_array(part.text, shielded=True) for part in parts]
        return [id for array in arrays for id in array.tolist()]

    @property
    def chat(self) -> ChatTemplate:
        """How chats become a text: the template that came with this tokenizer, or our own."""
        return self._chat

    @cached_property
    def _chat(self) -> ChatTemplate:
        found = self._vocabulary
        source = self._own_template or TEMPLATE
        settings = found.settings or dict.fromkeys(("bos_token", "unk_token"), found.eot)
        names = {k: v for k, v in settings.items() if k in ROLES and isinstance(v, str)}
        words = [word for word in found.words if word.special or word.name in source]
        return ChatTemplate(
            source,
            tuple(sorted({**names, "eos_token": found.eot}.items())),
            tuple(word.name for word in words),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template came with it."""
        return self._own_template is not None

    @cached_property
    def _own_template(self) -> str | None:
        return find_template(self._vocabulary.settings, self._vocabulary.templates.items())

    def with_chat_template(self) -> Tokenizer:
        """The same tokenizer, which keeps our chat template if it has none."""
        if self.has_chat_template:
            return self
        templates = {**self._vocabulary.templates, CHAT: TEMPLATE}
        return self._of(replace(self._vocabulary, templates=templates))

    def pieces(self, text: str, *, special: bool = False) -> list[str | int]:
        """What a text is cut into before anything is merged, and added words as their ids, with
        `special` the special ones too.

        What `encode` makes of the text is what it makes of the pieces, one after the other (but
        for `LONGEST_PIECE`). Raises InputError for what is no text.
        """
        _check_text(text)
        found: list[str | int] = []
        for part in self._words.split(text, special=special):
            if isinstance(part, int):
                found.append(part)
            else:
                found += regex.findall(PIECES, self._prefixed(part))
        return found

    def merge_steps(self, piece: str) -> list[list[bytes]]:
        """A piece as its bytes, then after every merge, at last as its tokens: byte-level BPE
        written out to be read. Its time grows with the square of the length.
        """
        ranks, parts = self._ranks, [bytes([byte]) for byte in piece.encode()]
        steps = [parts]
        while unions := [left + right for left, right in pairwise(parts)]:
            first = min(unions, key=lambda union: ranks.get(union, len(ranks)))
            if first not in ranks:
                break
            at = unions.index(first)
            parts = [*parts[:at], first, *parts[at + 2 :]]
            steps.append(parts)
        return steps

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        return {token: rank for rank, token in enumerate(self._vocabulary.tokens)}

    @property
    def vocabulary(self) -> Vocabulary:
        """What it was made of: tokens in the order of merging, ids, added words, settings."""
        return self._vocabulary

    def _prefixed(self, text: str) -> str:
        """The text with the space in front that some vocabularies want (add_prefix_space)."""
        wanted = self._vocabulary.prefix_space and text and not text.startswith(" ")
        return f" {text}" if wanted else text

    def special_in(self, text: str) -> dict[str, int]:
        """How often the special tokens stand in a text, by name, those that do."""
        names = (word.name for word in self._vocabulary.words if word.special and word.name)
        return {name: text.count(name) for name in names if name in text}

    def _notice(self, text: str) -> None:
        """Say, once for each, which special tokens a text holds that are read as plain text."""
        if found := self.special_in(text).keys() - self._noticed:
            self._noticed |= found
            one = len(found) == 1
            logger.warning(
                "%s in a text %s read as plain text: --special-tokens, or special=True, reads %s",
                ", ".join(sorted(found)),
                "is" if one else "are",
                "it as a token" if one else "them as tokens",
            )

    @property
    def uncut(self) -> tuple[str, ...]:
        """Texts behind which whitespace may belong to the same token: no place to cut a text."""
        return self._words.before_space

    @property
    def added_names(self) -> tuple[str, ...]:
        """The words that were added, special ones too."""
        return tuple(word.name for word in self._vocabulary.words)

    @property
    def cut_before(self) -> str:
        """The whitespace before which a text can be cut elsewhere, changing no id."""
        return " " if self._vocabulary.prefix_space else " \t\r\n"

    def decode(self, ids: Sequence[int] | Tensor | np.ndarray | int) -> str:
        """The text of ids: a list, a tensor or an array of them, or one alone. Bytes that are not
        UTF-8 become U+FFFD. InputError for an unknown id.
        """
        return b"".join(map(self.token_bytes, id_list("ids", ids))).decode(
            "utf-8", errors="replace"
        )

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token, perhaps part of a character only. InputError for an unknown id."""
        if id not in self._bytes:
            raise InputError(f"token id {id} is not in the vocabulary of {self.vocab_size:,} ids")
        return self._bytes[id]

    def token_text(self, id: int) -> str:
        """A token by itself, for people: bytes that are not a whole character are U+FFFD, and an id
        that means nothing is empty. Put together, the tokens of a text are the text wherever no
        character is cut between two of them.
        """
        return self._bytes.get(id, b"").decode("utf-8", errors="replace")

    def written_bytes(self, n_ids: int | None = None) -> list[bytes]:
        """What each of the first n_ids ids, by default vocab_size, adds to a text: nothing for
        end-of-text, and for ids without a token.
        """
        ids = range(self.vocab_size if n_ids is None else n_ids)
        return [b"" if id == self.eot else self._bytes.get(id, b"") for id in ids]

    def written_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """How many bytes and how many characters each id adds to a text: (vocab_size,) int64 both.

        A character counts where its first byte is, so the tokens of a text add up to its size,
        whatever they cut.
        """
        import numpy as np

        written = self.written_bytes()
        n_bytes = np.array([len(token) for token in written], np.int64)
        first = np.frombuffer(b"".join(written), np.uint8) & 0xC0 != 0x80
        n_before = np.concatenate([np.zeros(1, np.int64), first.cumsum(dtype=np.int64)])
        ends = n_bytes.cumsum()
        return n_bytes, n_before[ends] - n_before[ends - n_bytes]

    @property
    def merged_size(self) -> int:
        """One more than the largest id of text without added words."""
        return max(self._vocabulary.ids) + 1

    def ids_without_token(self, n_ids: int) -> list[int]:
        """Those of the first n_ids ids, or of the first vocab_size, that no token has."""
        if len(self._bytes) == self.vocab_size:
            return []
        return [id for id in range(min(n_ids, self.vocab_size)) if id not in self._bytes]

    def ids_below(self, n_rows: int) -> list[int]:
        """The ids of tokens that a model of so many rows has a row for."""
        return sorted(id for id in self._bytes if id < n_rows)

    def words_from(self, n_rows: int) -> list[str]:
        """The added words for which it has none."""
        return [word.name for word in self._vocabulary.words if word.id >= n_rows]

    def roles(self) -> dict[str, int]:
        """The ids of the tokens that begin and end texts and fill rows up, by config.json's names:
        where nothing else begins a text, end-of-text does.
        """
        settings = self._vocabulary.settings
        ids: dict[object, int] = {word.name: word.id for word in self._vocabulary.words}
        roles = {"bos_token_id": ids.get(settings.get("bos_token"), self.eot)}
        roles["eos_token_id"] = self.eot
        pad = ids.get(settings.get("pad_token"))
        return roles if pad is None else {**roles, "pad_token_id": pad}

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether every id means the same bytes in both, and end-of-text has the same id."""
        return self._bytes == other._bytes and self.eot == other.eot

    @cached_property
    def _id_array(self) -> np.ndarray:
        import numpy as np

        return np.array(self._vocabulary.ids, np.uint32)

    @property
    def is_gpt2s(self) -> bool:
        """Whether what is merged is GPT-2's own, with its ids, whatever words were added."""
        return self._vocabulary.is_gpt2s

    @property
    def identity(self) -> str:
        """SHA-256, in hexadecimal, of all that decides the ids of a plain text: the same for equal
        tokenizers only.
        """
        return self._identity

    @cached_property
    def _identity(self) -> str:
        found = self._vocabulary
        tokens = [(token.hex(), id) for token, id in zip(found.tokens, found.ids)]
        parts: list[object] = [tokens, sorted(found.special.items()), self.eot]
        default = {
            AddedWord(word.name, word.id, normalized=word.normalized) for word in found.words
        }
        if not default.issuperset(found.words):
            parts.append([astuple(word) for word in found.words])
        if found.prefix_space:
            parts.append("prefix space")
        content = json.dumps(parts, allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: Path, *, model_max_length: int | None = None) -> None:
        """Write vocab.json, merges.txt, tokenizer_config.json and what else there was, as
        `from_folder` reads it; `model_max_length` is for settings that have none.

        transformers' AutoTokenizer reads the same, beside a config.json of model_type "gpt2". Other
        tokenizer files in the folder are removed: it would prefer them.
        """
        write_vocabulary(folder, self._vocabulary, model_max_length=model_max_length)


class TextStream:
    """Ids in, text out as soon as it is certain: whole characters, and no part of a stop text.

    What `push` and `finish` return, put together, is the decoded text of all ids up to the first
    place where one of the `stop` texts begins.
    """

    stopped: bool
    """A stop text was found: nothing follows."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] | str = ()) -> None:
        self._tokenizer, self._stop = tokenizer, texts("stop", stop)
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


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise refuse("text", text, "one text, of type str")
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


def _tractable(text: str) -> Iterator[str]:
    """A text in parts that tiktoken can take."""
    for part in split_long_runs(text, LONGEST_PIECE):
        yield from split_long_whitespace(part, LONGEST_RUN)


def split_long_runs(text: str, longest: int) -> Iterator[str]:
    """Cut a text in runs of more than `longest` characters of one kind (letters, numbers, other
    signs, whitespace), each time after so many: a run may be one piece, or the most of one.

    Where a text goes on after a part, the parts that follow are those of what is left.
    """
    start = 0
    for begin, end in _long_runs(text, longest) if len(text) > longest else ():
        for cut in range(begin + longest, end, longest):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _long_runs(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Where they begin and end. What has whitespace now and then, as nearly all, has none."""
    repeated = f"{{{longest + 1},}}"
    for found in re.finditer(f"[{SPACES}]{repeated}|[^{SPACES}]{repeated}", text):
        if found[0].isalpha() or found[0].isspace():
            yield found.span()
            continue
        kinds = "".join(map(kind_of_character, found[0]))
        for run in re.finditer(f"L{repeated}|N{repeated}|P{repeated}", kinds):
            yield found.start() + run.start(), found.start() + run.end()


@cache
def kind_of_character(character: str) -> str:
    """L for a letter, N for a number and P for all else, as PIECES has it, but for whitespace."""
    kind = unicodedata.category(character)[0]
    return kind if kind in "LN" else "P"
