"""What parts of texts cost a model, and the means of such figures with their standard errors.

Never changes the model, its mode, gradients or any random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from ...model import GPT2
from ...tokenizer import Tokenizer
from ..score import nats_of, possible_ids, scored_logits

ROWS_AT_ONCE = 256  # whose windows are read together, and between which progress is told
Progress = Callable[[int, int], object]  # how many rows are scored, and of how many


class Row(NamedTuple):
    """Token ids, of which the last n_scored are scored after those before them."""

    ids: Sequence[int]
    n_scored: int


@dataclass(frozen=True)
class Cost:
    """What the scored tokens of a row cost together, and whether the model would have chosen them
    greedily: all of them, and the last one.
    """

    nats: float
    greedy: bool
    last_greedy: bool


@dataclass(frozen=True)
class Judge:
    """A model and its tokenizer, by which texts are scored."""

    model: GPT2
    tokenizer: Tokenizer
    progress: Progress | None = None

    @property
    def block_size(self) -> int:
        """How many tokens the model reads at most."""
        return self.model.config.block_size

    def continued(self, context: str, continuation: str) -> Row:
        """A row in which a continuation is scored after its context.

        Both are tokenised as one text, blanks at the end of the context belong to the
        continuation, an empty context is end-of-text, and of a long context the end is read. So
        does lm-evaluation-harness.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if kept:
            ids = self.tokenizer.encode(kept + continuation)
            n_scored = max(0, len(ids) - len(self.tokenizer.encode(kept)))
        else:
            ids = [self.tokenizer.eot, *self.tokenizer.encode(continuation)]
            n_scored = len(ids) - 1
        return Row(ids[-max(self.block_size, n_scored) - 1 :], n_scored)

    def rolling(self, text: str) -> list[Row]:
        """A text after end-of-text, in rows of which each token is scored in one: they do not
        overlap, but that the last one begins as early as the model can read. So does
        lm-evaluation-harness.
        """
        tokens, length = [self.tokenizer.eot, *self.tokenizer.encode(text)], self.block_size
        rows = []
        for first in range(0, len(tokens) - 1, length):
            end = min(first + length, len(tokens) - 1)
            rows.append(Row(tokens[max(0, end - length) : end + 1], end - first))
        return rows

    def costs(self, rows: Iterable[Row], n_rows: int) -> list[Cost]:
        """What each of n_rows rows costs; they are made as they are needed."""
        found, waiting = [], iter(rows)
        while group := list(islice(waiting, ROWS_AT_ONCE)):
            found += self._costs(group)
            if self.progress:
                self.progress(len(found), n_rows)
        return found

    @torch.no_grad()
    def _costs(self, rows: Sequence[Row]) -> list[Cost]:
        n_ids, unused = possible_ids(self.model, self.tokenizer)
        nats = [[0.0] * len(row.ids) for row in rows]
        greedy = [[True] * len(row.ids) for row in rows]
        all_ids = [row.ids for row in rows]
        for places, logits in scored_logits(self.model, all_ids, vocab_size=n_ids, unused=unused):
            targets = torch.tensor([all_ids[row][at] for row, at in places], device=logits.device)
            best = (logits.argmax(dim=1) == targets).tolist()
            cost = nats_of(logits, targets).tolist()
            for (row, at), value, is_best in zip(places, cost, best):
                nats[row][at], greedy[row][at] = value, is_best
        return [
            _cost(nats[number], greedy[number], row.n_scored) for number, row in enumerate(rows)
        ]


def _cost(nats: list[float], greedy: list[bool], n_scored: int) -> Cost:
    scored = slice(len(nats) - n_scored, None)
    return Cost(math.fsum(nats[scored]), all(greedy[scored]), all(greedy[-1:]))


class Estimate(NamedTuple):
    """A figure and its standard error, None where one sample says nothing of it."""

    value: float
    error: float | None


def mean(values: Sequence[float]) -> Estimate:
    """The mean of samples."""
    n = len(values)
    value = math.fsum(values) / n
    if n == 1:
        return Estimate(value, None)
    spread = math.fsum((x - value) ** 2 for x in values) / (n - 1)
    return Estimate(value, math.sqrt(spread / n))


def ratio(amounts: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """The sum of amounts, such as nats, over that of sizes, such as words; its error by
    linearisation, as if the pairs were drawn at random.
    """
    n, total = len(amounts), math.fsum(sizes)
    value = math.fsum(amounts) / total
    if n == 1:
        return Estimate(value, None)
    spread = math.fsum((x - value * size) ** 2 for x, size in zip(amounts, sizes)) / (n - 1)
    return Estimate(value, math.sqrt(n * spread) / total)
