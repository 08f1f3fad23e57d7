"""From scores to the next token: its options, pure filters on logits (B, V), one draw per row.

A filter takes logits and a number and returns new logits with the unwanted tokens at minus
infinity. It leaves its input alone, always keeps at least one token, and is the identity at its
neutral value. `probabilities` applies them in GPT-2's order (openai/gpt-2 sample.py), and what
reads the text before them. Greedy decoding is not another path: at temperature 0 the probabilities
are a one-hot row.

A new filter is a field of SamplingConfig, a function, and a line in `probabilities`.

At the end: how draft tokens are checked, by rejection sampling. Whoever drafts them (a `Drafter`,
see decoding/drafters.py), the text has the distribution of plain decoding. Leviathan et al. 2022,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.

Letters: B rows, K draft tokens, V vocabulary. Knows nothing of models and text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .arguments import check_types, require, whole
from .errors import InputError

if TYPE_CHECKING:  # filters are methods of tensors: --help reads the fields below without torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Divides the logits: below 1 is bolder, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Make tokens already in the text less likely by this factor; 1 changes nothing."""
    no_repeat_ngram: int = 0
    """Never write the same n tokens in a row twice, the prompt's included; 0 is off."""

    def __post_init__(self) -> None:
        check_types(self)
        self._check("temperature", 0 <= self.temperature < float("inf"), "0 or more")
        self._check("top_k", self.top_k >= 0, "0 (off) or more")
        self._check("top_p", 0 <= self.top_p <= 1, "from 0 to 1")
        self._check("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        self._check("repetition_penalty", 0.01 <= penalty <= 100, "from 0.01 to 100")
        self._check("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 (off) or more")

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        require(name, getattr(self, name), ok, allowed)


def without(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Logits (..., V) in which these ids never come."""
    if not ids:
        return logits
    logits = logits.clone()
    logits[..., list(ids)] = float("-inf")
    return logits


def repetition_penalty(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make the tokens of each row's text less likely: positive logits / penalty, negative *
    penalty.

    Each distinct token counts once. Keskar et al. 2019, arXiv:1909.05858.
    """
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, text in zip(logits, texts):
        ids = list(set(text))
        seen = row[ids]
        row[ids] = (seen / penalty).where(seen > 0, seen * penalty)
    return logits


def no_repeat_ngram(logits: Tensor, texts: Sequence[Sequence[int]], n: int) -> Tensor:
    """Drop the tokens that would end a sequence of n tokens that the row's text has already.

    A row in which no token would be left stays as it is. n = 0 drops none. Paulus et al. 2017,
    arXiv:1705.04304, section 2.5, for n = 3.
    """
    if n == 0:
        return logits
    logits = logits.clone()
    for row, text in zip(logits, texts):
        start = list(text[len(text) - n + 1 :])  # the n - 1 tokens that are there
        followed = range(len(text) - n + 1)
        ids = {text[i + n - 1] for i in followed if list(text[i : i + n - 1]) == start}
        left = row.clone()
        left[list(ids)] = float("-inf")
        if left.isfinite().any():
            row.copy_(left)
    return logits


def temperature(logits: Tensor, t: float) -> Tensor:
    """Sharpen (t < 1) or flatten (t > 1) the distribution by dividing the logits; t must be above
    0.
    """
    if t >= 0.01:
        return logits / t
    # Measured from the largest, which softmax does not see, a tiny t cannot overflow; below 1e-30,
    # where the choice is greedy anyway, t would be 0 in float32.
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(t, 1e-30)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits; ties with the k-th are kept too. k = 0 or k >= V keeps all.

    Fan et al. 2018, arXiv:1805.04833.
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches p, the one that crosses p
    included.

    p = 1 keeps all, and the likeliest token always stays; of equally likely ones at the border the
    larger ids do, as in Hugging Face's. Holtzman et al. 2019, arXiv:1904.09751.
    OpenAI's own sampler leaves out the token that crosses p; this is the paper's rule, and Hugging
    Face's.
    """
    if p == 1:
        return logits
    ascending, order = logits.sort(dim=-1, stable=True)
    # from the unlikely end: a tail is dropped while its sum stays within 1 - p; small numbers add
    # up exactly there
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped[..., -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def min_p(logits: Tensor, p: float) -> Tensor:
    """Drop tokens whose probability is below p times that of the likeliest; p = 0 keeps all.

    Nguyen et al. 2024, arXiv:2407.01082.
    """
    if p == 0:
        return logits
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), float("-inf"))


def probabilities(
    logits: Tensor,
    config: SamplingConfig,
    texts: Sequence[Sequence[int]] | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """The distribution the next token is drawn from: logits (B, V) -> probs (B, V), float32 at
    least.

    `texts` are the ids already in each row, without which nothing counts as repeated; `banned`
    (B, V) bool marks tokens that must not come.
    """
    logits = logits if logits.element_size() >= 4 else logits.float()
    if banned is not None:  # first, so that no_repeat_ngram sees what would be left
        logits = logits.masked_fill(banned, float("-inf"))
    if texts is not None:
        logits = repetition_penalty(logits, texts, config.repetition_penalty)
        logits = no_repeat_ngram(logits, texts, config.no_repeat_ngram)
    if config.temperature == 0 or config.top_k == 1 or config.top_p == 0:
        return logits.new_zeros(logits.shape).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1)
    logits = temperature(logits, config.temperature)
    logits = top_k(logits, config.top_k)
    logits = top_p(logits, config.top_p)
    logits = min_p(logits, config.min_p)
    return logits.softmax(dim=-1)


def draw(probs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token per row, row b with generators[b]: probs (B, V) -> (B,) int64.

    By the inverse of the cumulative distribution: one uniform number a row, made on the CPU, so a
    row's numbers are the same in any batch and on any device.
    """
    import torch

    if probs.device.type == "mps":
        return draw(probs.cpu(), generators).to(probs.device)  # MPS has no float64
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    if int(probs.count_nonzero()) == len(probs):  # nothing to choose: saves the sums
        return probs.argmax(dim=-1)
    cumulative = probs.double().cumsum(dim=-1)
    # the first token whose cumulative probability exceeds the target: never one of probability 0
    target = uniform.to(probs.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random numbers of row `row` under `seed`: they do not depend on how many rows there
    are.
    """
    import torch

    seed, row = whole("seed", seed, least=None), whole("row", row)
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Guess(NamedTuple):
    """Draft tokens of one row, and the distributions (K, V) they were drawn from; None says that
    they were not drawn: each had probability 1.
    """

    ids: list[int]
    probs: Tensor | None = None


NOTHING = Guess([])


class Drafter(Protocol):
    """Whatever can draft tokens."""

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], limits: Sequence[int]
    ) -> Sequence[Guess]:
        """At most limits[b] draft tokens for text b, which depend on no other text; rows[b] is the
        number that text b has had since the beginning.
        """
        ...


def accept(
    guesses: Sequence[Guess], probs: Tensor, generators: Sequence[torch.Generator]
) -> list[list[int]]:
    """The next tokens of every row: the accepted draft tokens and one more.

    probs (B, 1 + K, V): row b's distributions after its newest token and after each of its draft
    tokens; those beyond its own are not read. Raises InputError for drafts over another vocabulary.
    """
    if not any(guess.ids for guess in guesses):
        return [[token] for token in draw(probs[:, 0], generators).tolist()]
    for guess in guesses:
        if guess.probs is not None and guess.probs.shape[-1] != probs.shape[-1]:
            raise InputError(
                f"the drafter chooses among {guess.probs.shape[-1]} tokens, the model among "
                f"{probs.shape[-1]}: give the tokenizer's vocab_size to both"
            )
    return [_accept(*row) for row in zip(guesses, probs, generators)]


def _accept(guess: Guess, probs: Tensor, generator: torch.Generator) -> list[int]:
    """A draft token of probability q under the drafter and p under the model is accepted with
    probability min(1, p / q); the token in the place of the first that is not is drawn from what p
    has beyond q.
    """
    import torch

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
