"""Token files as text again, byte for byte, so that they can become those of another vocabulary.

What is held out, cut, dropped or cleaned was decided before, and stays as it is. Knows ids and what
they spell, nothing of the files that they came from.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Protocol

import numpy as np

from ..formats.chat import OPEN, coded, unshielded
from .sources.rows import Chunk
from .token_file import PARTS, TokenFile
from .tokenizing import SEPARATOR, cut_at_words

BLOCK = 2**18  # ids that are spelled at once
LONGEST = 4  # bytes of a character
FIRST_PART, LAST_PART = 1, 2  # of a document that is cut: indices into PARTS
assert len(PARTS) == 3
NAMES_BEGIN = re.compile(f"[{SEPARATOR[0]}{OPEN}]")


class Spelling(Protocol):
    """What is needed of the tokenizer that made a token file, GPT-2's or the first of its tokens:
    byte-level, so that its ids are exactly the text, and with no special token but end-of-text.
    """

    @property
    def eot(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def token_bytes(self, id: int, /) -> bytes: ...


def written_again(
    file: TokenFile, tokenizer: Spelling, *, begun: bytes = b""
) -> Iterator[tuple[int, Chunk]]:
    """The documents of a token file in chunks, each with its document's number from 0, without the
    end-of-text behind them. Texts are shielded, as those of chats are (formats/chat.py): of the
    names of end-of-text in them, those are tokens that were.

    Where a document was cut inside a character, all of that belongs to its last part: `begun` are
    the bytes that the first part has of it (`begun_in`).
    """
    spelled = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    ends, (borders, prompts) = file.documents["end"].tolist(), _runs(file)
    number, run, decoder = 0, 0, codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(file.tokens), BLOCK):
        ids = file.block(start, start + BLOCK)
        at, end_of_block = start, start + len(ids)
        while at < end_of_block:
            record, border = file.documents[number], borders[run]
            stop = min(border, end_of_block)
            is_last, is_cut = stop == ends[number], bool(record["part"] == FIRST_PART)
            some = ids[at - start : stop - start - (is_last and not is_cut)]
            if record["part"] == LAST_PART:
                decoder.decode(begun)  # which is no whole character
                begun = b""
            text = _shielded(some, spelled, tokenizer.eot, decoder)
            if stop == border and not (is_last and is_cut):
                assert not decoder.getstate()[0], "a run ends inside a character"
            if is_last:
                decoder.reset()
            if text or is_last:
                position = stop * file.tokens.itemsize
                yield number, Chunk(text, int(record["row"]), is_last, position, prompts[run], True)
            number, run, at = number + is_last, run + (stop == border), stop


def _runs(file: TokenFile) -> tuple[list[int], list[bool]]:
    """Where runs of tokens end that are prompts, or are none, and go over no document's end; which
    of them are prompts.
    """
    spans = file.prompts
    borders = np.unique(np.concatenate([file.documents["end"], spans["start"], spans["end"]]))
    borders = borders[borders > 0]
    starts = np.concatenate([[0], borders[:-1]])
    owners = np.searchsorted(spans["start"], starts, side="right") - 1
    if not len(spans):
        return borders.tolist(), [False] * len(borders)
    return borders.tolist(), ((owners >= 0) & (starts < spans["end"][owners])).tolist()


def _shielded(
    ids: np.ndarray, spelled: list[bytes], eot: int, decoder: codecs.IncrementalDecoder
) -> str:
    """The text of ids, in which only end-of-text that is a token has its name."""
    texts, start = [], 0
    for end in [*np.flatnonzero(ids == eot).tolist(), len(ids)]:
        text = decoder.decode(b"".join([spelled[id] for id in ids[start:end].tolist()]))
        texts.append(NAMES_BEGIN.sub(lambda found: coded(found[0]), text))
        start = end + 1
    return SEPARATOR.join(texts)


def begun_in(file: TokenFile, tokenizer: Spelling) -> bytes:
    """The bytes of a character in the middle of which a document's first part ends, if one does."""
    for number in np.flatnonzero(file.documents["part"] == FIRST_PART):
        end = int(file.documents["end"][number])
        start = max(end - LONGEST, int(file.documents["end"][number - 1]) if number else 0)
        data = b"".join(map(tokenizer.token_bytes, file.block(start, end).tolist()))
        whole = len(data.decode("utf-8", errors="ignore").encode())
        lead = len(data) - len(data.lstrip(bytes(range(0x80, 0xC0))))  # of a character before
        return data[lead + whole :]
    return b""


def texts_of(file: TokenFile, tokenizer: Spelling, *, size: int) -> Iterator[str]:
    """The text of all documents in parts of about `size` characters, cut between pieces, whose
    pieces are those of the documents; of end-of-text that is a token, nothing.
    """
    chunks = written_again(file, tokenizer)
    for _, together in groupby(chunks, key=lambda pair: (pair[0], pair[1].prompt)):
        for part in cut_at_words((chunk.text for _, chunk in together), size):
            yield from filter(None, map(unshielded, part.split(SEPARATOR)))
