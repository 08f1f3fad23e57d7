"""The loss of a language model over a large vocabulary, without ever holding all of its logits.

A batch of 8 x 1024 tokens has 1.65 GB of logits over GPT-2's 50,257 tokens, and as much again of
their gradient. Here they are made for a few hundred tokens at a time and turned at once into the
gradient of what they came from. Knows vectors and targets, nothing of models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # torch's ignore_index: a target that is not scored
MOST_LOGITS = 2**25  # at once: 128 MiB in float32, 667 tokens of GPT-2's vocabulary


def summed_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | float = 1.0,
    *,
    most: int = MOST_LOGITS,
) -> Tensor:
    """scale * sum of cross_entropy(x @ weight.T, targets) over the scored targets, in float32 or
    better.

    x (..., C), weight (V, C) and targets (...) -> (). `scale` is applied before any gradient is
    rounded to 16 bits. At most `most` logits exist at once. The matrix products follow autocast;
    softmax and sum never do: in bfloat16 the same logits can give 15.375 instead of 15.302.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    scale = torch.as_tensor(scale, dtype=exact, device=x.device)
    return _SummedLoss.apply(x.flatten(0, -2), weight, targets.flatten(), scale, most)


def perplexity(loss: float) -> float:
    """exp(loss): how many equally likely tokens the model hesitates between; inf beyond float's
    range.
    """
    return math.exp(loss) if not loss >= 700 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats a token as bits a byte of its text: unlike perplexity it can be compared where
    tokenizers differ.
    """
    return loss / math.log(2) / bytes_per_token


class _SummedLoss(torch.autograd.Function):
    """The gradient is known as soon as the loss is, so the forward pass computes both, chunk by
    chunk, and the backward pass hands it out.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, most: int
    ) -> Tensor:
        """x (N, C), weight (V, C), targets (N,), scale () -> ()."""
        kind, wants_x, wants_weight = x.device.type, *ctx.needs_input_grad[:2]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        head = weight.to(dtype)
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        total = torch.zeros((), dtype=scale.dtype, device=x.device)
        with torch.autocast(kind, enabled=False):
            n_rows = max(1, most // len(weight))
            for start in range(0, len(x), n_rows):
                rows = slice(start, start + n_rows)
                part, target = x[rows].to(dtype), targets[rows, None]
                scored = target != IGNORE
                target = target.where(scored, 0)
                # in place from here: logits, their exponentials, the softmax, its gradient
                probs = (part @ head.T).to(scale.dtype)
                probs -= probs.amax(-1, keepdim=True)
                chosen = probs.gather(-1, target)
                norm = probs.exp_().sum(-1, keepdim=True)
                total += (norm.log() - chosen).where(scored, 0).sum()
                if grad_x is None and grad_weight is None:
                    continue
                grad = probs.div_(norm).scatter_add_(-1, target, -torch.ones_like(norm))
                grad = grad.mul_(scale * scored).to(dtype)
                if grad_x is not None:
                    grad_x[rows] = grad @ head
                if grad_weight is not None and grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad.T, part)
                elif grad_weight is not None:
                    grad_weight += grad.T @ part
        ctx.gradients = grad_x, grad_weight
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x and weight, which are handed out once."""
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients were handed out already"
        return (
            *(None if part is None else part.mul_(grad_outputs[0]) for part in gradients),
            None,
            None,
            None,
        )
