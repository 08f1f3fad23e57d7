"""From scores to the next token: pure filters on logits (B, V), then one draw per row.

A filter takes logits and a number and returns new logits with the unwanted tokens at minus
infinity. It leaves its input alone, always keeps at least one token, and is the identity at its
neutral value. `probabilities` applies them in GPT-2's order (openai/gpt-2 sample.py): repetition
penalty, temperature, top-k, top-p; then min-p. Greedy decoding is not another path: at temperature
0 the probabilities are a one-hot row.

Letters: B rows, V vocabulary. Knows nothing of models and text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import SamplingConfig

__all__ = ["SamplingConfig", "draw", "probabilities", "row_generator"]


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens marked in `seen` (B, V) bool less likely: positive logits / penalty, negative
    * penalty.

    Each distinct token counts once, the prompt's included. Keskar et al. 2019, arXiv:1909.05858.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: Tensor, t: float) -> Tensor:
    """Sharpen (t < 1) or flatten (t > 1) the distribution by dividing the logits; t must be above
    0.
    """
    if t >= 0.01:
        return logits / t
    # Measured from the largest, which softmax does not see, a tiny t cannot overflow; below 1e-30,
    # where the choice is greedy anyway, t would be 0 in float32.
    return (logits - logits.max(dim=-1, keepdim=True).values) / max(t, 1e-30)


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

    p = 1 keeps all, and the likeliest token always stays. Holtzman et al. 2019, arXiv:1904.09751.
    OpenAI's own sampler leaves out the token that crosses p; this is the paper's rule, and Hugging
    Face's.
    """
    if p == 1:
        return logits
    ascending, order = logits.sort(dim=-1)
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
    return logits.masked_fill(probs < p * probs.max(dim=-1, keepdim=True).values, float("-inf"))


def probabilities(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """The distribution the next token is drawn from: logits (B, V) -> probs (B, V), float32 at
    least.

    `seen` (B, V) bool marks the tokens already in each row; without it there is no repetition
    penalty.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seen is not None:
        logits = repetition_penalty(logits, seen, config.repetition_penalty)
    if config.temperature == 0 or config.top_k == 1 or config.top_p == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
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
    if probs.device.type == "mps":
        return draw(probs.cpu(), generators).to(probs.device)  # MPS has no float64
    cumulative = probs.double().cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    # the first token whose cumulative probability exceeds the target: never one of probability 0
    target = uniform.to(probs.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random numbers of row `row` under `seed`: they do not depend on how many rows there
    are.
    """
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
