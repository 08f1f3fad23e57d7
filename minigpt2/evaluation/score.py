"""What every token of a text costs a model: texts of any length, in windows that overlap.

A model reads block_size tokens at most. So a longer text is read in windows, each of which begins
`stride` tokens behind the one before it, and scores the tokens that no earlier one has scored: all
of the first window's, the last `stride` of any other's. Every token but a text's first is scored
once, after at least block_size - stride + 1 tokens where the text has them. With a stride of
block_size the windows do not overlap, as in the held-out loss of a training run; with 1 every
token is scored after all that the model can read, in a forward pass of its own.

Never changes the model, its mode, gradients or any random state.

Letters: B windows, T tokens in this call, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import id_rows, refuse, require_loaded, whole
from ..errors import InputError
from ..loss import MOST_LOGITS
from ..model import GPT2, evaluation_mode, unknown_ids
from ..sampling import without
from ..tokenizer import Tokenizer

MOST_TOKENS = 4096  # read at once, unless one window alone is longer
Place = tuple[int, int]  # the number of a row, and that of a token in it


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
    n_ids = min(tokenizer.vocab_size, model.config.vocab_size)
    unused = tokenizer.ids_without_token(n_ids)
    (nats,) = score_ids(model, [ids], stride=stride, vocab_size=n_ids, unused=unused)
    return Scores(tuple(ids), tuple(map(tokenizer.token_text, ids)), tuple(nats))


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
        n_ids = logits.shape[1]
        chosen = logits.gather(1, targets.clamp(max=n_ids - 1)[:, None])[:, 0]
        found = logits.logsumexp(dim=1) - chosen.masked_fill(targets >= n_ids, -math.inf)
        for (row, at), value in zip(places, found.tolist()):
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
    stride = _checked_stride(model, stride)
    for number, row in enumerate(rows):
        if row and not 0 <= min(row) <= max(row) < model.config.vocab_size:
            raise InputError(unknown_ids(f"row {number}", row, model.config))
    windows = [
        window
        for number, row in enumerate(rows)
        for window in _windows(number, len(row), model.config.block_size, stride)
    ]
    windows.sort(key=lambda window: window.end - window.start)  # neighbours need little padding
    n_tokens = max(1, MOST_LOGITS // model.config.vocab_size)
    evaluating = evaluation_mode(model)
    while windows:
        n_windows = max(1, MOST_TOKENS // (windows[-1].end - windows[-1].start))
        batch, windows = windows[-n_windows:], windows[:-n_windows]
        places = [(window.row, at) for window in batch for at in range(window.first, window.end)]
        with evaluating:
            x = _before_scored(model, rows, batch)  # (N, C)
        for start in range(0, len(places), n_tokens):
            part = slice(start, start + n_tokens)
            with evaluating:
                logits = model.head(x[part])[:, :vocab_size]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            yield places[part], without(logits, unused)


class _Window(NamedTuple):
    """Tokens start to end - 2 of a row are read, and tokens first to end - 1 scored."""

    row: int
    start: int
    first: int
    end: int


def _windows(row: int, n_tokens: int, block_size: int, stride: int) -> Iterator[_Window]:
    start, first = 0, 1
    while first < n_tokens:
        end = min(start + block_size + 1, n_tokens)
        yield _Window(row, start, first, end)
        start, first = start + stride, end


def _before_scored(
    model: GPT2, rows: Sequence[Sequence[int]], windows: Sequence[_Window]
) -> Tensor:
    """The hidden states (N, C) at the tokens before those that the windows score, in order.

    Windows are padded on the right, where a causal model cannot see it.
    """
    longest = max(window.end - 1 - window.start for window in windows)
    idx = torch.zeros(len(windows), longest, dtype=torch.int64)  # (B, T)
    for b, window in enumerate(windows):
        read = rows[window.row][window.start : window.end - 1]
        idx[b, : len(read)] = torch.tensor(read)
    hidden = model.hidden(idx.to(model.ln_f.weight.device))  # (B, T, C)
    return torch.cat(
        [
            hidden[b, window.first - 1 - window.start : window.end - 1 - window.start]
            for b, window in enumerate(windows)
        ]
    )


def _checked_stride(model: GPT2, stride: int | None) -> int:
    block_size = model.config.block_size
    if stride is None:
        return block_size - block_size // 2
    stride = whole("stride", stride, least=None)
    if not 1 <= stride <= block_size:
        raise refuse("stride", stride, f"from 1 to the model's block_size, {block_size}")
    return stride
