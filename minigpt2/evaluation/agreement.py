"""How far a text is from the one a model would write: for tests and benchmarks of fast paths.

The plain model is the oracle for every other way to compute it. Never changes the model, its mode,
gradients or any random state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import GPT2
from .score import scored_logits


@torch.no_grad()
def shortfall(
    model: GPT2, prompt: Sequence[int], added: Sequence[int], *, vocab_size: int | None = None
) -> float:
    """How far the scores of added tokens are below the best ones there, at most, as a share of the
    largest score: 0 for the text that the model itself adds greedily, and about the rounding of
    another way to compute for the text that it adds.

    Every token is judged by what `decode` has read before it, also past the window.
    """
    if not added:
        return 0.0
    logits = _scores(model, prompt, added, vocab_size)
    chosen = logits.gather(-1, torch.tensor(added, device=logits.device)[:, None])[:, 0]
    return float((logits.amax(-1) - chosen).max() / logits.abs().max())


@torch.no_grad()
def logprob_error(
    model: GPT2,
    prompt: Sequence[int],
    added: Sequence[int],
    logprobs: Sequence[float],
    *,
    vocab_size: int | None = None,
) -> float:
    """How far log-probabilities that were reported for added tokens are from those that the model
    gives them, at most, as a share of the largest score; NaN where one is not a number.

    Unlike `shortfall` it judges tokens that were drawn in any way.
    """
    assert len(added) == len(logprobs), "a log-probability for every token"
    if not added:
        return 0.0
    logits = _scores(model, prompt, added, vocab_size)
    ids = torch.tensor(added, device=logits.device)[:, None]
    expected = logits.log_softmax(-1).gather(-1, ids)[:, 0]
    found = torch.tensor(logprobs, device=logits.device)
    return float((found - expected).abs().max() / logits.abs().max())


def _scores(
    model: GPT2, prompt: Sequence[int], added: Sequence[int], vocab_size: int | None
) -> Tensor:
    """The scores (T, V) from which each of T added tokens was chosen, without a cache: `decode`
    (generate.py) reads windows that are half of block_size apart, and so do these.
    """
    text = [*prompt[-model.config.block_size :], *added]
    n_read = len(text) - len(added)
    found: dict[int, Tensor] = {}
    for places, logits in scored_logits(model, [text], vocab_size=vocab_size):
        found |= {at: row.clone() for (_, at), row in zip(places, logits) if at >= n_read}
    return torch.stack([found[at] for at in range(n_read, len(text))])
