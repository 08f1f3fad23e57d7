"""Speculative decoding: draft tokens, all checked by the model in one forward pass.

A forward pass over five tokens costs hardly more than one over a single token: the weights are read
once either way. So a cheap drafter guesses, the model computes its scores at all draft tokens at
once, and rejection sampling (`accept` in sampling.py) decides how many are accepted. The text has
exactly the distribution of plain decoding, at every temperature; at temperature 0 it is the same
text, unless two tokens are as likely up to rounding.

Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. Guessing from the text
itself: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.

Letters: B rows, K draft tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..model import GPT2, evaluation_mode
from ..sampling import (
    NOTHING,
    Drafter,
    Guess,
    SamplingConfig,
    draw,
    probabilities,
    row_generator,
    without,
)
from ..tokenizer import Tokenizer
from .options import SampleOptions
from .ready import load_with_tokenizer
from .text import drawable

DRAFT_GUESSES = 4  # a drafting model's own time grows with them, and the chance of the last falls
ROWS_AT_ONCE = 8  # rows that are decoded together


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
        self, rows: Sequence[int], texts: Sequence[list[int]], limits: Sequence[int]
    ) -> Sequence[Guess]:
        """What followed the newest earlier occurrence of each text's end."""
        return [
            Guess(self._continuation(text, min(self.n_guesses, limit)))
            for text, limit in zip(texts, limits)
        ]

    def _continuation(self, text: list[int], n: int) -> list[int]:
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            end = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                # comparing one number first spares most slices
                if text[start] == end[0] and text[start : start + size] == end:
                    return _repeated(text[start + size :], n)
        return []


def _repeated(ids: list[int], n: int) -> list[int]:
    """n tokens of ids, again and again: a text that repeats itself may do so twice."""
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
        unused: Sequence[int] = (),
    ) -> None:
        """generators[r] makes the random numbers of row r's guesses; they must not be those that
        the checking draws from. Ids from vocab_size on, the padding of some models, and those that
        are `unused`, are no guesses.
        """
        self._model, self._sampling, self._generators = model, sampling, generators
        self._n_guesses, self._vocab_size, self._unused = n_guesses, vocab_size, unused
        self._rows: dict[int, _DraftRow] = {}
        self._evaluating = evaluation_mode(model)

    @torch.no_grad()
    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], limits: Sequence[int]
    ) -> Sequence[Guess]:
        """Each row's guesses, drawn one after the other."""
        with self._evaluating:
            return [
                self._guess(row, text, min(self._n_guesses, limit))
                for row, text, limit in zip(rows, texts, limits)
            ]

    def _guess(self, row: int, text: list[int], n: int) -> Guess:
        ids: list[int] = []
        probs: list[Tensor] = []
        if row not in self._rows:
            self._rows[row] = _DraftRow(self._model)
        for _ in range(n):
            logits = self._rows[row].logits(text + ids)[:, : self._vocab_size]
            n_missing = (self._vocab_size or 0) - logits.shape[-1]  # rows that the model has not
            logits = F.pad(logits, (0, max(0, n_missing)), value=float("-inf"))
            logits = without(logits, self._unused)
            probs.append(probabilities(logits, self._sampling, [text + ids])[0])
            ids.append(int(draw(probs[-1][None], [self._generators[row]])))
        return Guess(ids, torch.stack(probs)) if ids else NOTHING


class _DraftRow:
    """One growing text under a model, with its cache: a forward pass over what is new only."""

    def __init__(self, model: GPT2) -> None:
        self._model, self._cache = model, model.make_cache(1)
        self._start, self._cached = 0, []  # the cache holds these tokens, from this one of the text

    def logits(self, text: list[int]) -> Tensor:
        """Logits (1, V) after the text; beyond the window, after the last half window of it."""
        window = self._model.config.block_size
        wanted = text[self._start :]
        kept = _common_length(self._cached, wanted[:-1])  # the last one anew: for its logits
        if not kept or len(wanted) > window:
            self._start = 0 if len(text) <= window else len(text) - max(1, window // 2)
            kept, wanted = 0, text[self._start :]
        self._cache.truncate([kept])
        idx = torch.tensor([wanted[kept:]], device=self._cache.keys.device)
        self._cached = wanted
        return self._model.head(self._model.hidden(idx, self._cache)[:, -1]).float()


def _common_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class CountingDrafter:
    """A drafter that counts the forward passes that checked its drafts, and the new tokens that
    these brought.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._lengths: dict[int, int] = {}
        self.forward_passes = self.tokens = 0

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], limits: Sequence[int]
    ) -> Sequence[Guess]:
        """What the drafter proposes."""
        for row, text in zip(rows, texts):
            grown = len(text) - self._lengths.get(row, len(text))
            if grown > 0:  # otherwise it is another text
                self.forward_passes += 1
                self.tokens += grown
            self._lengths[row] = len(text)
        return self._drafter.propose(rows, texts, limits)


class DrafterFactory:
    """A drafter for each text, as --guess and --draft say: what a sample is does not depend on
    others.
    """

    def __init__(
        self, options: SampleOptions, tokenizer: Tokenizer, model: GPT2 | None = None
    ) -> None:
        """Loads the model of --draft, to guess for `model`. Raises InputError when it has other
        tokens.
        """
        self._options, self._drawable = options, drawable(tokenizer, model)
        self._draft_model: GPT2 | None = None
        self._made: list[CountingDrafter] = []
        if options.draft is None:
            return

        def check_tokens(other: Tokenizer) -> None:
            if not other.same_tokens(tokenizer):
                raise InputError(
                    f"--draft {options.draft} has other tokens than --model {options.model}: "
                    "use a model with the same tokenizer"
                )

        self._draft_model, _ = load_with_tokenizer(
            options.draft,
            device=options.device,
            dtype=options.dtype,
            compiled=options.compile,
            cpu_routine=options.cpu_routine,
            accept=check_tokens,
        )

    @property
    def rows_at_once(self) -> int:
        """How many texts to decode together, each drafted for as if it were alone."""
        return 1 if self._draft_model or self._options.guess else ROWS_AT_ONCE

    @property
    def forward_passes(self) -> int:
        """Those of the model that checked draft tokens."""
        return sum(drafter.forward_passes for drafter in self._made)

    @property
    def tokens(self) -> int:
        """The new tokens that these forward passes brought."""
        return sum(drafter.tokens for drafter in self._made)

    def of(self, row: int) -> CountingDrafter | None:
        """A drafter for a text with the random numbers of this row; None without --guess and
        --draft.
        """
        options = self._options
        if self._draft_model is not None:
            # a stream of its own: drafts must not be drawn with the numbers that check them
            drafter: Drafter = ModelDrafter(
                self._draft_model,
                options.sampling,
                [row_generator(~options.seed, row)],
                n_guesses=options.guess or DRAFT_GUESSES,
                **self._drawable,
            )
        elif options.guess:
            drafter = NGramDrafter(options.guess)
        else:
            return None
        self._made.append(CountingDrafter(drafter))
        return self._made[-1]
