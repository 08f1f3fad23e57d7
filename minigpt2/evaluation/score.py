"""What every token of a text costs a model: texts of any length, in overlapping windows.

Never changes the model, its mode, gradients or any random state.

Letters: W windows, T tokens in this call, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arguments import id_rows, require_loaded
from ..errors import InputError
from ..loss import MOST_LOGITS
from ..model import GPT2, evaluation_mode, unknown_ids
from ..sampling import without
from ..tokenizer import Tokenizer
from .windows import Windows, checked_stride, groups_of

MOST_TOKENS = 4096  # read at once, unless one window alone is longer
Place = tuple[int, int]  # the number of a row, and that of a token in it
ReadIds = Callable[[int, int], np.ndarray]
"""The ids from one place to before another, of any integer dtype."""


@dataclass(frozen=True)
class Scores:
    """A text as its tokens, and what each costs a model.

    `tokens` are what `Tokenizer.token_text` makes of the ids. `nats` are the negative
    log-likelihoods: minus the natural logarithm of the model's probability for the token after
    those before it; None for the first, which nothing precedes.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    nats: tuple[float | None, ...]

    @property
    def total(self) -> float:
        """Nats of all scored tokens together: 0 where there are none."""
        return math.fsum(nats for nats in self.nats if nats is not None)

    @property
    def mean(self) -> float:
        """Nats per scored token, the logarithm of the perplexity: NaN where there are none."""
        n_scored = len(self.nats) - self.nats.count(None)
        return self.total / n_scored if n_scored else math.nan


def score(model: GPT2, tokenizer: Tokenizer, text: str, *, stride: int | None = None) -> Scores:
    """What each token of a text costs a model, in nats; an empty text has no tokens.

    `stride` is how far one window is behind another, from 1 to block_size; None is half of
    block_size, rounded up: then each token is scored after what `complete` would have read before
    it. Ids that the tokenizer has not, the padding of some vocabularies, have no probability, as
    when decoding. Raises InputError for what is no text, and OptionError for another stride.
    """
    require_loaded("tokenizer", tokenizer, "Tokenizer", "eot")
    require_loaded("model", model, "GPT2", "hidden")
    ids = tokenizer.encode(text)
    n_ids, unused = possible_ids(model, tokenizer)
    (nats,) = score_ids(model, [ids], stride=stride, vocab_size=n_ids, unused=unused)
    return Scores(tuple(ids), tuple(map(tokenizer.token_text, ids)), tuple(nats))


def possible_ids(model: GPT2, tokenizer: Tokenizer) -> tuple[int, list[int]]:
    """What can be drawn: ids below this number, but for these."""
    n_ids = min(tokenizer.vocab_size, model.config.vocab_size)
    return n_ids, tokenizer.ids_without_token(n_ids)


@torch.no_grad()
def score_ids(
    model: GPT2,
    rows: Sequence[Sequence[int]],
    *,
    stride: int | None = None,
    vocab_size: int | None = None,
    unused: Sequence[int] = (),
) -> list[list[float | None]]:
    """What each token of every row costs a model, in nats, None for the first: `score` for ids.

    Rows may differ in length and be empty; their windows are read together, and each row has the
    numbers that it has alone, up to rounding. Ids from vocab_size on and `unused` ones, which can
    only be read, cost inf. All are NaN where the model's scores are not finite.
    """
    require_loaded("model", model, "GPT2", "hidden")
    rows = id_rows("rows", rows)
    nats: list[list[float | None]] = [[None] * len(row) for row in rows]
    found_logits = scored_logits(model, rows, stride=stride, vocab_size=vocab_size, unused=unused)
    for places, logits in found_logits:
        targets = torch.tensor([rows[row][at] for row, at in places], device=logits.device)
        for (row, at), value in zip(places, nats_of(logits, targets).tolist()):
            nats[row][at] = value
    return nats


@torch.no_grad()
def scored_logits(
    model: GPT2,
    rows: Sequence[Sequence[int]],
    *,
    stride: int | None = None,
    vocab_size: int | None = None,
    unused: Sequence[int] = (),
) -> Iterator[tuple[list[Place], Tensor]]:
    """Yield the logits (N, V), in float32 at least, from which every token but the first of each
    row would be drawn, and the places of these tokens; MOST_LOGITS at once, in any order.

    Raises OptionError for a stride that is not allowed, and InputError for ids that are none.
    """
    block_size = model.config.block_size
    stride = checked_stride(stride, block_size)
    for number, row in enumerate(rows):
        if row and not 0 <= min(row) <= max(row) < model.config.vocab_size:
            raise InputError(unknown_ids(f"row {number}", row, model.config))
    ids = np.array([id for row in rows for id in row], np.int64)
    ends = np.array([len(row) for row in rows], np.int64).cumsum()
    begins = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    groups = groups_of([(begins, ends)], block_size, stride)
    reading = Reading(model, lambda start, end: ids[start:end], vocab_size, tuple(unused))
    for part in reading.scored(groups):
        row = ends.searchsorted(part.positions, side="right")
        places = zip(row.tolist(), (part.positions - begins[row]).tolist())
        yield [*places], part.logits


def nats_of(logits: Tensor, targets: Tensor) -> Tensor:
    """What targets (N,) cost after logits (N, V), which it overwrites: (N,), inf for targets from V
    on.
    """
    n_ids = logits.shape[1]
    chosen = logits.gather(1, targets.clamp(max=n_ids - 1)[:, None])[:, 0]
    chosen = chosen.masked_fill(targets >= n_ids, -math.inf)
    largest = logits.amax(1)
    return logits.sub_(largest[:, None]).exp_().sum(1).log_() + (largest - chosen)


class Scored(NamedTuple):
    """Some tokens, and what they would be drawn from."""

    positions: np.ndarray  # (N,) int64, in the ids
    targets: Tensor  # (N,) int64: the tokens
    logits: Tensor  # (N, V), in float32 at least


@dataclass(frozen=True, eq=False)
class Reading:
    """A model that reads windows of ids; of what it may draw, `score_ids` says more.

    Tokens with the id `unscored` are read, and not scored.
    """

    model: GPT2
    read: ReadIds
    vocab_size: int | None = None
    unused: tuple[int, ...] = ()
    unscored: int = -1

    @torch.no_grad()
    def scored(self, groups: Iterable[Windows]) -> Iterator[Scored]:
        """Yield the tokens that windows score, MOST_LOGITS at once, each group in any order.

        Raises InputError for ids that the model has not.
        """
        n_logits, evaluating = self.model.config.vocab_size, evaluation_mode(self.model)
        n_tokens = max(1, MOST_LOGITS // n_logits)
        for windows in groups:
            origin = int(windows.start.min())
            ids = self.read(origin, int(windows.end.max())).astype(np.int64)
            if not 0 <= ids.min() <= ids.max() < n_logits:
                raise InputError(unknown_ids("the text", ids.tolist(), self.model.config))
            for batch in _batches(windows):
                idx, targets, places, positions = self._rows(batch, ids, origin)
                with evaluating:
                    hidden = self.model.hidden(idx)  # (W, T, C)
                x = hidden.flatten(0, 1)[places]
                for start in range(0, len(x), n_tokens):
                    part = slice(start, start + n_tokens)
                    with evaluating:
                        logits = self.model.head(x[part])[:, : self.vocab_size]
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    yield Scored(positions[part], targets[part], without(logits, self.unused))

    def _rows(
        self, windows: Windows, ids: np.ndarray, origin: int
    ) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """What windows read, idx (W, T), padded on the right, where a causal model cannot see it;
        and of their scored tokens the targets (N,), where the tokens before them are in idx
        flattened, and their positions.

        `ids` are those of the windows, from `origin` on.
        """
        longest = int((windows.end - windows.start).max())
        positions = windows.start[:, None] + np.arange(longest)  # (W, T + 1)
        there = positions < windows.end[:, None]
        rows = np.where(there, ids[np.where(there, positions - origin, 0)], 0)
        scored = there & (positions >= windows.first[:, None]) & (rows != self.unscored)
        scored = scored[:, 1:]
        device = self.model.ln_f.weight.device
        idx = torch.from_numpy(rows[:, :-1].copy())
        targets = torch.from_numpy(rows[:, 1:][scored])
        places = torch.from_numpy(np.flatnonzero(scored))
        return (
            idx.to(device),
            targets.to(device),
            places.to(device),
            positions[:, 1:][scored],
        )


def _batches(windows: Windows) -> Iterator[Windows]:
    """The windows of a group that are read at once, the longest first; neighbours need little
    padding.
    """
    n_read = windows.end - 1 - windows.start
    order = np.argsort(-n_read, kind="stable")
    while len(order):
        n_windows = max(1, MOST_TOKENS // int(n_read[order[0]]))
        yield windows[order[:n_windows]]
        order = order[n_windows:]
