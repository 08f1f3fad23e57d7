"""What a model makes of a whole text: loss, perplexity, bits per byte and per character.

The documents stand one after the other in a long row, each behind an end-of-text, and are read in
windows (windows.py). Every token of the text is scored once; the end-of-text tokens, which are no
text, never. (The held-out loss of a training run scores them too, in windows that do not overlap:
it is another figure.) Bytes and characters are those of the tokens, so no text is needed beside its
ids.

Sums are exact, however the work is cut: over groups of windows, processes, or starts of a program.

Never changes the model, its mode, gradients or any random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ..arguments import ALLOWED, require, require_loaded, shown
from ..corpus.token_file import TokenFile
from ..errors import InputError, OptionError
from ..loss import perplexity
from ..model import GPT2
from ..system.processes import ALONE, World
from ..tokenizer import Tokenizer
from .score import ReadIds, Reading, nats_of, possible_ids
from .windows import Rows, Windows, checked_stride, groups_of

SCANNED_AT_ONCE = 2**20  # ids, for the places where documents end
FEWEST = 2  # tokens of a text that can be judged


@dataclass(frozen=True)
class Score:
    """What a model made of a text, and by which protocol.

    `nats` are the negative log-likelihoods of all scored tokens together. `standard_error` is that
    of the loss, over documents: by how much it would differ for other documents of the kind; None
    for one document.
    """

    nats: float
    tokens: int  # that were scored
    bytes: int  # of the text in UTF-8
    characters: int
    documents: int  # with text
    standard_error: float | None
    stride: int
    block_size: int
    document_mask: bool

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); inf beyond float's range."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different tokens, as loss and perplexity are not."""
        return self.nats / math.log(2) / self.bytes

    @property
    def bits_per_character(self) -> float:
        """`bits_per_byte` by characters: Unicode's code points."""
        return self.nats / math.log(2) / self.characters

    @property
    def protocol(self) -> str:
        """How the text was read and scored, in one line."""
        window, behind = f"windows of {self.block_size:,} tokens", self.stride
        if behind == self.block_size:
            read = f"{window} that do not overlap"
        else:
            begin = "that begin " + (f"{behind:,} tokens" if behind > 1 else "one token") + " apart"
            read = f"{window} {begin}"
        apart = "alone" if self.document_mask else "after those before it"
        return (
            f"{read}; each document is read {apart}, behind an end-of-text; each token is scored "
            "once, end-of-text never"
        )


class Part(NamedTuple):
    """Neighbouring tokens of one document: all of it, or what a group of windows scores of it."""

    start: int  # the place of the first
    tokens: int
    nats: float
    bytes: int
    characters: int


@dataclass(frozen=True)
class Sums:
    """What the first `groups` groups of windows add up to, exactly."""

    groups: int = 0
    place: int = 0  # behind the last scored token
    bytes: int = 0
    characters: int = 0
    # of whole documents
    documents: int = 0
    tokens: int = 0
    nats: Fraction = Fraction(0)
    nats_squared: Fraction = Fraction(0)
    nats_times_tokens: Fraction = Fraction(0)
    tokens_squared: int = 0
    # of the document that may go on
    open_tokens: int = 0
    open_nats: Fraction = Fraction(0)

    def plus(self, parts: Iterable[Part]) -> Sums:
        """With one more group. Raises InputError for a cost that is not finite."""
        sums = self
        for part in parts:
            if not math.isfinite(part.nats):
                raise InputError(
                    f"the model's scores are not finite between the tokens {part.start:,} and "
                    f"{part.start + part.tokens:,}: use dtype float32, or sound weights"
                )
            if part.start != sums.place:
                sums = sums.closed()
            sums = replace(
                sums,
                place=part.start + part.tokens,
                bytes=sums.bytes + part.bytes,
                characters=sums.characters + part.characters,
                open_tokens=sums.open_tokens + part.tokens,
                open_nats=sums.open_nats + Fraction(part.nats),
            )
        return replace(sums, groups=sums.groups + 1)

    def closed(self) -> Sums:
        """With the open document as a whole one, if there is one."""
        if not self.open_tokens:
            return self
        tokens, nats = self.open_tokens, self.open_nats
        return replace(
            self,
            documents=self.documents + 1,
            tokens=self.tokens + tokens,
            nats=self.nats + nats,
            nats_squared=self.nats_squared + nats**2,
            nats_times_tokens=self.nats_times_tokens + nats * tokens,
            tokens_squared=self.tokens_squared + tokens**2,
            open_tokens=0,
            open_nats=Fraction(0),
        )

    def standard_error(self) -> float | None:
        """That of nats / tokens, a ratio of sums over documents, by linearisation (Cochran 1977,
        Sampling Techniques, section 6.4); None for fewer than two.
        """
        if self.documents < 2:
            return None
        loss = self.nats / self.tokens
        squares = self.nats_squared - 2 * loss * self.nats_times_tokens
        squares += loss**2 * self.tokens_squared
        variance = squares * Fraction(self.documents, self.documents - 1) / self.tokens**2
        return math.sqrt(variance)

    def to_json(self) -> dict[str, Any]:
        """Numbers and texts that say exactly the same."""
        return {
            name: str(value) if isinstance(value, Fraction) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sums:
        """The inverse of `to_json`. Raises ValueError or TypeError for anything else."""
        if any(not isinstance(value, (str, int)) for value in values.values()):
            raise ValueError("neither whole numbers nor fractions")
        found = {k: Fraction(v) if isinstance(v, str) else v for k, v in values.items()}
        return cls(**found)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class LongRow:
    """Documents one after the other, each behind an end-of-text, of which a part at a time is read:
    `n_tokens` ids in all.
    """

    n_tokens: int
    read: ReadIds
    eot: int

    @classmethod
    def of_documents(cls, documents: Iterable[Sequence[int] | np.ndarray], eot: int) -> LongRow:
        """Documents as ids, without end-of-text, one after the other; they may be empty."""
        parts: list[np.ndarray] = []
        for document in documents:
            parts += [np.array([eot], np.int64), np.asarray(document, np.int64)]
        ids = np.concatenate([np.empty(0, np.int64), *parts]).astype(np.uint32)
        return cls(len(ids), lambda start, end: ids[start:end], eot)

    @classmethod
    def of_file(cls, file: TokenFile, eot: int) -> LongRow:
        """A token file, in which an end-of-text stands behind every document."""

        def read(start: int, end: int) -> np.ndarray:
            ids = file.block(max(start - 1, 0), end - 1)
            return np.concatenate([np.array([eot] * (start == 0), ids.dtype), ids])

        return cls(1 + len(file.tokens), read, eot)

    def rows(self, *, document_mask: bool) -> Iterator[Rows]:
        """The whole as one row; with `document_mask` each document with its end-of-text."""
        begin = 0
        for start in range(0, self.n_tokens, SCANNED_AT_ONCE) if document_mask else ():
            ids = self.read(start, min(start + SCANNED_AT_ONCE, self.n_tokens))
            borders = start + np.flatnonzero(ids == self.eot)
            borders = borders[borders > 0]
            if len(borders):
                yield np.concatenate([[begin], borders[:-1]]), borders
                begin = int(borders[-1])
        yield np.array([begin]), np.array([self.n_tokens])


def evaluate(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    stride: int | None = None,
    document_mask: bool = False,
) -> Score:
    """What a model makes of texts, each of which is a document.

    They are read in windows that begin `stride` tokens apart, from 1 to block_size, by default half
    of block_size; windows go across documents, unless `document_mask` lets each be read alone. Ids
    that the tokenizer has not have no probability, as when decoding. Takes 4 bytes of memory a
    token beside the texts. Raises InputError for texts of fewer than two tokens together, and for
    what is no text.
    """
    require_loaded("model", model, "GPT2", "hidden")
    require_loaded("tokenizer", tokenizer, "Tokenizer", "eot")
    if isinstance(texts, str):
        raise OptionError("texts is one text, allowed are several: put it into a list", "texts")
    if not isinstance(texts, Iterable):
        raise OptionError(f"texts is {shown(texts)}, allowed are several texts", "texts")
    mask_is_bool = isinstance(document_mask, bool)
    require("document_mask", document_mask, mask_is_bool, ALLOWED[bool])
    row = LongRow.of_documents(map(tokenizer.encode, texts), tokenizer.eot)
    return evaluate_row(model, tokenizer, row, stride=stride, document_mask=document_mask)


def evaluate_row(
    model: GPT2,
    tokenizer: Tokenizer,
    row: LongRow,
    *,
    stride: int | None = None,
    document_mask: bool = False,
    world: World = ALONE,
    begun: Sums | None = None,
    on_sums: Callable[[Sums], None] = lambda sums: None,
) -> Score:
    """`evaluate` for documents as ids. The processes of a `world` share the groups of windows, and
    each has the result.

    `begun` are sums that `on_sums` was given before, of the same text, model and protocol: the rest
    is added to them, and the result is that of one go, bit for bit where the model computes the
    same numbers.
    """
    block_size = model.config.block_size
    stride = checked_stride(stride, block_size)
    sums = begun or Sums()
    judge = _Judge(model, tokenizer, row)
    groups = groups_of(row.rows(document_mask=document_mask), block_size, stride)
    groups = islice(groups, sums.groups, None)
    while each := list(islice(groups, world.size)):
        parts = judge.parts(each[world.rank]) if world.rank < len(each) else []
        for found in world.gather(parts)[: len(each)]:
            sums = sums.plus(found)
        on_sums(sums)
    whole = sums.closed()
    if whole.tokens < FEWEST:
        have = f"{whole.tokens} token{'s' * (whole.tokens != 1)}"
        raise InputError(f"the text has {have}, needs {FEWEST} to be judged: give more text")
    return Score(
        nats=float(whole.nats),
        tokens=whole.tokens,
        bytes=whole.bytes,
        characters=whole.characters,
        documents=whole.documents,
        standard_error=whole.standard_error(),
        stride=stride,
        block_size=block_size,
        document_mask=document_mask,
    )


class _Judge:
    """A model that scores groups of windows over a long row."""

    def __init__(self, model: GPT2, tokenizer: Tokenizer, row: LongRow) -> None:
        n_ids, unused = possible_ids(model, tokenizer)
        self._reading = Reading(model, row.read, n_ids, tuple(unused), unscored=row.eot)
        self._n_bytes, self._n_characters = tokenizer.written_sizes()

    def parts(self, windows: Windows) -> list[Part]:
        """What a group of windows scores, in the order of the text: the documents are the runs of
        neighbours, for there is an end-of-text, which is not scored, between any two.
        """
        found = [
            (part.positions, part.targets, nats_of(part.logits, part.targets))
            for part in self._reading.scored([windows])
        ]
        if not found:
            return []
        positions = np.concatenate([places for places, _, _ in found])
        order = positions.argsort()
        positions = positions[order]
        ids = torch.cat([targets for _, targets, _ in found]).cpu().numpy()[order]
        nats = torch.cat([nats for _, _, nats in found]).cpu().double().numpy()[order].tolist()
        starts = np.concatenate([[0], np.flatnonzero(np.diff(positions) != 1) + 1])
        n_bytes = np.add.reduceat(self._n_bytes[ids], starts).tolist()
        n_characters = np.add.reduceat(self._n_characters[ids], starts).tolist()
        ends = [*starts[1:].tolist(), len(positions)]
        return [
            Part(place, end - start, math.fsum(nats[start:end]), *sizes)
            for start, end, place, *sizes in zip(
                starts.tolist(), ends, positions[starts].tolist(), n_bytes, n_characters
            )
        ]
