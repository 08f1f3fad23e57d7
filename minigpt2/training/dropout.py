"""Dropout on the CPU, whose masks cost a quarter: four numbers are decided by 64 random bits.

torch's own draws one random number after the other for each of them, and leaves its fused attention
where the probabilities are dropped out, too. Here attention goes through its scores in parts that
stay near the processor, keeps a byte of each and makes the rest again in the backward pass.

Srivastava et al. 2014, "Dropout"; the parts of attention as in Dao et al. 2022, arXiv:2205.14135,
without its running sums: a part has whole rows of scores. Knows blocks, nothing of runs.

Letters as in model.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..equivalences import swap
from ..model import GPT2, attention_probs

WAY = "16-bit dropout"
LEVELS = 2**16  # of a random number, one of which is the rate
AT_ONCE = 2**20  # scores: 4 MiB in float32
QUERIES = 128  # of a part: of the scores that nobody may see only those in a part's corner are made


def swap_dropout(model: GPT2) -> None:
    """Let a model on the CPU drop out in this way, wherever it does, at whatever rate."""
    for name, module in [*model.named_modules()]:
        if type(module) is nn.Dropout:
            swap(model, name, lambda plain: Dropout(plain.p).train(plain.training), WAY)
    for i, block in enumerate(model.h):
        drop = functools.partial(_attention_of, block.attn)
        swap(model, f"h.{i}.attn.softmax_attention", drop, WAY)


def kept(shape: tuple[int, ...], p: float) -> Tensor:
    """Which numbers are kept at the rate p > 0: a bool mask from torch's global generator."""
    count = math.prod(shape)
    words = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(shape)  # -LEVELS / 2 to LEVELS / 2 - 1
    return bits >= _dropped(p) - LEVELS // 2


def kept_share(p: float) -> float:
    """The share that `kept` keeps, which is 1 - p up to 1 / LEVELS."""
    return 1 - _dropped(p) / LEVELS


def _dropped(p: float) -> int:
    """How many of the LEVELS are dropped: some, and never all."""
    return min(max(1, round(p * LEVELS)), LEVELS - 1)


class Dropout(nn.Dropout):
    """nn.Dropout with these masks."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (...), the same in evaluation mode."""
        if not self.training or self.p == 0:
            return input
        factors = kept(input.shape, self.p).to(input.dtype).div_(kept_share(self.p))
        return input * factors


def _attention_of(attn: Any, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`softmax_attention` of a module: `plain` where nothing is dropped, and beside a cache."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        p = attn.attn_pdrop if attn.training else 0.0
        if p == 0 or q.shape != k.shape or torch.promote_types(q.dtype, torch.float32) != q.dtype:
            return plain(q, k, v, mask)  # products of 16 bits are torch's to choose
        return attention_in_parts(q, k, v, mask, attn.scale, p)

    return attention


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, p: float
) -> Tensor:
    """What `attention_in_parts` computes, with all masks at once, to be read and to compare with:
    q, k, v (B, H, T, D), mask (B, 1, T, T) -> (B, H, T, D).
    """
    probs = attention_probs(q, k, mask, scale)  # (B, H, T, T)
    masks = torch.zeros_like(probs)
    for rows, queries in parts(*q.shape[:3]):
        place = masks[rows, :, queries, : queries.stop]
        place.copy_(kept(place.flatten(0, 1).shape, p).view(place.shape))
    return probs * masks / kept_share(p) @ v


def attention_in_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, p: float
) -> Tensor:
    """`plain_attention`, of whose scores only a part is there at any time."""
    return _Attention.apply(q, k, v, mask, scale, p)


def parts(n_rows: int, n_head: int, n_tokens: int) -> Iterator[tuple[slice, slice]]:
    """The rows and the queries of each part of (B, H, T, T) scores; their keys are those up to the
    last query.
    """
    n_queries = min(QUERIES, n_tokens)
    at_once = max(1, AT_ONCE // (n_head * n_queries * n_tokens))
    for row in range(0, n_rows, at_once):
        for first in range(0, n_tokens, n_queries):
            yield slice(row, row + at_once), slice(first, min(first + n_queries, n_tokens))


class _Attention(torch.autograd.Function):
    """softmax(q k^T * scale, where visible), dropped out, times v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, p: float
    ) -> Tensor:
        """q, k, v (B, H, T, D), mask (B, 1, T, T) -> (B, H, T, D)."""
        y = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # as c_proj takes it
        masks = []
        for rows, queries in parts(*q.shape[:3]):
            probs = _probs(q, k, mask, scale, rows, queries)
            masks.append(kept(probs.shape, p))
            part = probs.mul_(masks[-1]) @ _heads(v, rows, slice(queries.stop))
            y[rows, :, queries] = part.div_(kept_share(p)).unflatten(0, (-1, q.shape[1]))
        ctx.save_for_backward(q, k, v, mask, y, *masks)
        ctx.options = scale, p
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """grad_y (B, H, T, D) -> those of q, k and v."""
        (q, k, v, mask, y, *masks), (scale, p) = ctx.saved_tensors, ctx.options
        (grad_y,), shape = grad_outputs, (-1, q.shape[1])
        grad_q, grad_k, grad_v = (torch.zeros(q.shape, dtype=q.dtype) for _ in range(3))
        # of every query, the sum of its probabilities times their gradients (Dao et al., eq. 4)
        sums = (grad_y * y).sum(-1, keepdim=True)
        for (rows, queries), mask_of in zip(parts(*q.shape[:3]), masks):
            seen = slice(queries.stop)
            probs, factors = _probs(q, k, mask, scale, rows, queries), mask_of.to(q.dtype)
            grad = _heads(grad_y, rows, queries) / kept_share(p)
            found_v = (probs * factors).transpose(1, 2) @ grad
            scores = (grad * scale) @ _heads(v, rows, seen).transpose(1, 2)
            minus = _heads(sums, rows, queries) * -scale
            torch.addcmul(minus, scores, factors, out=scores).mul_(probs)
            found_k = scores.transpose(1, 2) @ _heads(q, rows, queries)
            grad_q[rows, :, queries] = (scores @ _heads(k, rows, seen)).unflatten(0, shape)
            grad_k[rows, :, seen] += found_k.unflatten(0, shape)
            grad_v[rows, :, seen] += found_v.unflatten(0, shape)
        return grad_q, grad_k, grad_v, None, None, None


def _heads(x: Tensor, rows: slice, tokens: slice) -> Tensor:
    """A part of x (B, H, T, D), as products of many matrices take it."""
    return x[rows, :, tokens].flatten(0, 1)


def _probs(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, rows: slice, queries: slice
) -> Tensor:
    """What the queries of a part look at, before anything is dropped: (rows * H, queries, keys)."""
    seen = slice(queries.stop)
    scores = (_heads(q, rows, queries) * scale) @ _heads(k, rows, seen).transpose(1, 2)
    if mask is None:  # only keys among the queries may be hidden
        corner = scores[:, :, queries]
        corner += torch.full(corner.shape[1:], -math.inf, dtype=scores.dtype).triu_(1)
    else:
        hidden = ~mask[rows, :, queries, seen]
        scores.unflatten(0, (-1, q.shape[1])).masked_fill_(hidden, -math.inf)
    return torch.softmax(scores, -1, out=scores)
