"""Guess several tokens ahead, check them all in one reading, keep what the model agrees with.

Reading five tokens costs hardly more than reading one: the weights are read once either way. So a
cheap drafter proposes, the model reads the proposal in one pass, and rejection sampling decides how
much of it stays. The text has exactly the distribution of plain decoding, at every temperature; at
temperature 0 it is the same text.

Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. Guessing from the text
itself: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.

Letters: B rows, K guesses, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import InputError
from .model import GPT2, evaluation_mode
from .options import SamplingConfig
from .sampling import draw, probabilities


class Guess(NamedTuple):
    """Tokens that may follow one row, and the distributions (K, V) they were drawn from; None says
    that they were not drawn: each had probability 1.
    """

    ids: list[int]
    probs: Tensor | None = None


NOTHING = Guess([])
DRAFT_GUESSES = 4  # a drafting model's own time grows with them, and the chance of the last falls


class Drafter(Protocol):
    """Whatever can guess ahead."""

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], limit: int
    ) -> Sequence[Guess]:
        """At most `limit` guesses for each text; rows[b] is the number that text b has had since
        the beginning.
        """
        ...


def accept(
    guesses: Sequence[Guess], probs: Tensor, generators: Sequence[torch.Generator]
) -> list[list[int]]:
    """The next tokens of every row: the accepted guesses and one more.

    probs (B, 1 + K, V): row b's distributions after its newest token and after each of its guesses;
    those beyond its own are not read.
    """
    if not any(guess.ids for guess in guesses):
        return [[token] for token in draw(probs[:, 0], generators).tolist()]
    return [_accept(*row) for row in zip(guesses, probs, generators)]


def _accept(guess: Guess, probs: Tensor, generator: torch.Generator) -> list[int]:
    """A guess of probability q under the drafter and p under the model stays with probability
    min(1, p / q); the token that replaces the first to fall is drawn from what p has beyond q.
    """
    for i, token in enumerate(guess.ids):
        q = torch.zeros_like(probs[i]) if guess.probs is None else guess.probs[i]
        if guess.probs is None:
            q[token] = 1
        chance = float(torch.rand(1, generator=generator, dtype=torch.float64))
        if chance * float(q[token]) < float(probs[i, token]):
            continue
        beyond = (probs[i] - q).clamp_(min=0)
        left = beyond if float(beyond.sum()) > 0 else probs[i]  # p = q up to rounding
        return [*guess.ids[:i], int(draw(left[None], [generator]))]
    return [*guess.ids, int(draw(probs[len(guess.ids)][None], [generator]))]


@dataclass(frozen=True)
class NGramDrafter:
    """Guesses that what followed the last few tokens before will follow them again: for text that
    repeats itself, such as code, tables, and edits of a text in the prompt.
    """

    n_guesses: int = 8
    longest: int = 4  # tokens that have to agree; the longest agreement counts
    shortest: int = 2

    def __post_init__(self) -> None:
        if self.n_guesses < 1 or not 1 <= self.shortest <= self.longest:
            raise InputError(
                f"{self}: guesses are 1 or more, and agreeing tokens from 1, shortest first"
            )

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], limit: int
    ) -> Sequence[Guess]:
        """What followed the newest earlier occurrence of each text's end."""
        n = min(self.n_guesses, limit)
        return [Guess(self._continuation(text, n)) for text in texts]

    def _continuation(self, text: list[int], n: int) -> list[int]:
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            end = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                # comparing one number first spares most slices
                if text[start] == end[0] and text[start : start + size] == end:
                    return _repeated(text[start + size :], n)
        return []


def _repeated(ids: list[int], n: int) -> list[int]:
    """n tokens of ids, again and again: a text that repeats itself may be in its second round."""
    return list(itertools.islice(itertools.cycle(ids), n))


class ModelDrafter:
    """Guesses with a smaller model that has the same vocabulary."""

    def __init__(
        self,
        model: GPT2,
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator],
        *,
        n_guesses: int = DRAFT_GUESSES,
        vocab_size: int | None = None,
    ) -> None:
        """generators[r] makes the random numbers of row r's guesses; they must not be those that
        the checking draws from.
        """
        self._model, self._sampling, self._generators = model, sampling, generators
        self._n_guesses, self._vocab_size = n_guesses, vocab_size
        self._readers: dict[int, _Reader] = {}

    @torch.no_grad()
    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], limit: int
    ) -> Sequence[Guess]:
        """Each row's guesses, drawn one after the other."""
        n = min(self._n_guesses, limit)
        with evaluation_mode(self._model):
            return [self._guess(row, text, n) for row, text in zip(rows, texts)]

    def _guess(self, row: int, text: list[int], n: int) -> Guess:
        ids: list[int] = []
        probs: list[Tensor] = []
        if row not in self._readers:
            self._readers[row] = _Reader(self._model)
        for _ in range(n):
            logits = self._readers[row].logits(text + ids)
            if self._vocab_size is not None:
                logits[:, self._vocab_size :] = float("-inf")
            probs.append(probabilities(logits, self._sampling, [text + ids])[0])
            ids.append(int(draw(probs[-1][None], [self._generators[row]])))
        return Guess(ids, torch.stack(probs)) if ids else NOTHING


class Tally:
    """A drafter that counts how many tokens each reading brings with its guesses."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._lengths: dict[int, int] = {}
        self.readings = self.tokens = 0

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], limit: int
    ) -> Sequence[Guess]:
        """What the drafter proposes."""
        for row, text in zip(rows, texts):
            grown = len(text) - self._lengths.get(row, len(text))
            if grown > 0:  # otherwise it is another text
                self.readings += 1
                self.tokens += grown
            self._lengths[row] = len(text)
        return self._drafter.propose(rows, texts, limit)


class _Reader:
    """One growing text under a model: reads only what is new since it was asked before."""

    def __init__(self, model: GPT2) -> None:
        self._model, self._cache = model, model.make_cache(1)
        self._start, self._held = 0, []  # the cache holds these tokens, from this place of the text

    def logits(self, text: list[int]) -> Tensor:
        """Logits (1, V) after the text. Of a text beyond the window the last half of it is read."""
        window = self._model.config.block_size
        wanted = text[self._start :]
        kept = _common_length(self._held, wanted[:-1])  # the last one is read anew: it has logits
        if not kept or len(wanted) > window:
            self._start = 0 if len(text) <= window else len(text) - max(1, window // 2)
            kept, wanted = 0, text[self._start :]
        self._cache.truncate([kept])
        idx = torch.tensor([wanted[kept:]], device=self._cache.keys.device)
        self._held = wanted
        return self._model.head(self._model.hidden(idx, self._cache)[:, -1]).float()


def _common_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
