"""Parts of a training step in C (assets/train.c): GELU, dropout, and attention with dropout.

Between two products a step does little with much: each of torch's operations goes once through
numbers that do not fit the cache. Here one function does all that is to be done between two
products. Masks are not kept: whether a number is dropped follows from a seed and its place, and is
found out again in the backward pass.

Where there is no C compiler, or where it computes something else, everything stays as it was. Knows
blocks, nothing of runs.

Letters as in model.py; N tokens, F the width of the MLP.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..decoding.c_library import training_library
from ..equivalences import WAYS, difference, swap
from ..formats.activations import ACTIVATIONS
from ..model import GPT2, MLP
from .dropout import attention_in_parts, heads, parts

logger = logging.getLogger(__name__)
WAY = "training in C"
LEVELS = 2**32  # of a random number, one of which is the rate
RARELY = 1e-12
MOST_SEED = 2**62


class _Dropout(ctypes.Structure):
    """How numbers are dropped, as train.c has it."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("dropped", ctypes.c_uint32),
        ("factor", ctypes.c_float),
    ]


class _Part(ctypes.Structure):
    """Some queries of some heads, as train.c has them."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_rows", "n_keys", "queries", "first")),
        ("scale", ctypes.c_float),
    ]


def swap_in_c(model: GPT2) -> None:
    """Let a float32 model on the CPU compute these parts in C, where `c_trains`."""
    for name, module in [*model.named_modules()]:
        if type(module) is nn.Dropout:
            swap(model, name, lambda plain: CDropout(plain.p), WAY)
    for i, block in enumerate(model.h):
        attn, mlp = functools.partial(_attention_of, block.attn), cast(MLP, block.mlp)
        swap(model, f"h.{i}.attn.softmax_attention", attn, WAY)
        linears = type(mlp.c_fc) is type(mlp.c_proj) is nn.Linear
        if linears and mlp.act is ACTIVATIONS["gelu_new"]:
            swap(model, f"h.{i}.mlp.forward", functools.partial(_mlp_of, mlp), WAY)


@functools.cache
def c_trains() -> bool:
    """Whether there are the C functions, and they compute what torch does; with a notice where they
    compute something else.
    """
    if training_library() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x, w_fc, w_proj, b_fc, b_proj = (
        torch.randn(*shape, generator=generator)
        for shape in ((37, 5), (23, 5), (5, 23), (23,), (5,))
    )
    given = [part.requires_grad_() for part in (x, w_fc, b_fc, w_proj, b_proj)]
    plain = F.gelu(x @ w_fc.T + b_fc, approximate="tanh") @ w_proj.T + b_proj
    same = _alike(_MLP.apply(*given), plain, given)
    # at a rate at which nothing is dropped
    q, k, v = (torch.randn(3, 2, 7, 5, generator=generator).requires_grad_() for _ in range(3))
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    same = same and _alike(_Attention.apply(q, k, v, 0.5, RARELY, 0), plain, [q, k, v])
    if not same:
        logger.warning("%s computes something else on this machine: going on without it", WAY)
    return same


def _alike(ours: Tensor, plain: Tensor, given: list[Tensor]) -> bool:
    """Whether two results and their gradients are the same."""
    found = ([y, *torch.autograd.grad(y.square().sum(), given)] for y in (ours, plain))
    return all(difference(a, b) <= WAYS[WAY].tolerance for a, b in zip(*found))


def _functions() -> ctypes.CDLL:
    found = training_library()
    assert found is not None, "whoever swaps asks c_trains before"
    return found


def _address(x: Tensor) -> ctypes.c_void_p:
    assert x.is_contiguous() and x.dtype == torch.float32 and x.device.type == "cpu"
    return ctypes.c_void_p(x.data_ptr())


def _how(seed: int, p: float) -> Any:
    dropped = min(max(1, round(p * LEVELS)), LEVELS - 1)
    return ctypes.byref(_Dropout(seed, dropped, 1 / (1 - dropped / LEVELS)))


def drawn_seed() -> int:
    """One from torch's global generator, whose state is kept where blocks are computed twice."""
    return int(torch.randint(MOST_SEED, ()))


class CDropout(nn.Dropout):
    """nn.Dropout in C."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (...), the same in evaluation mode."""
        if not self.training or self.p == 0:
            return input
        if input.dtype != torch.float32:
            return super().forward(input)
        return _Drop.apply(input, self.p, drawn_seed())


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        """x (...) -> (...)."""
        ctx.options = p, seed
        return dropped(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradient is dropped out alike."""
        return dropped(grad_outputs[0], *ctx.options), None, None


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x (...) without what is dropped at the rate p > 0, the rest grown by as much."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _functions().drop(_address(x), _address(y), ctypes.c_int64(x.numel()), _how(seed, p))
    return y


def _mlp_of(mlp: MLP, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`forward` of a module; `plain` where nothing is learned, in other numbers, and where hooks
    wait for what its Linears give.
    """

    def forward(x: Tensor) -> Tensor:
        plainly = not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if plainly or _is_watched(mlp.c_fc) or _is_watched(mlp.c_proj):
            return plain(x)
        matrices = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias
        return mlp.dropout(_MLP.apply(x.flatten(0, -2), *matrices).view(x.shape))

    return forward


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _MLP(torch.autograd.Function):
    """gelu(x w_fc^T + b_fc) w_proj^T + b_proj, of which what goes into GELU is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor
    ) -> Tensor:
        """x (N, C), w_fc (F, C), w_proj (C, F) -> (N, C)."""
        u = torch.addmm(b_fc, x, w_fc.T)  # (N, F)
        y = torch.empty_like(u)
        _functions().gelu(_address(u), _address(y), ctypes.c_int64(u.numel()))
        ctx.save_for_backward(x, w_fc, w_proj, u)
        return torch.addmm(b_proj, y, w_proj.T)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Those of x, w_fc, b_fc, w_proj and b_proj, of which some may not be wanted."""
        (grad_out,), (x, w_fc, w_proj, u) = grad_outputs, ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad, y = grad_out @ w_proj, torch.empty_like(u)  # (N, F)
        size = ctypes.c_int64(u.numel())
        _functions().gelu_gradient(_address(grad), _address(u), _address(y), size)
        return (
            grad @ w_fc if wanted[0] else None,
            grad.T @ x if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
            grad_out.T @ y if wanted[3] else None,
            grad_out.sum(0) if wanted[4] else None,
        )


def _attention_of(attn: Any, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`softmax_attention` of a module: `plain` where nothing is dropped, or in other numbers."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        p = attn.attn_pdrop if attn.training else 0.0
        if p == 0 or q.dtype != torch.float32:
            return plain(q, k, v, mask)
        if mask is not None:  # documents are kept apart
            return attention_in_parts(q, k, v, mask, attn.scale, p)
        return _Attention.apply(q, k, v, attn.scale, p, drawn_seed())

    return attention


class _Attention(torch.autograd.Function):
    """softmax(q k^T * scale, causal), dropped out, times v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, seed: int
    ) -> Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        y = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # as c_proj takes it
        logs = []
        for number, (rows, queries) in enumerate(parts(*q.shape[:3])):
            seen = slice(queries.stop)
            scores = torch.bmm(heads(q, rows, queries), heads(k, rows, seen).transpose(1, 2))
            logs.append(scores.new_empty(scores.shape[:2]))
            _functions().softmax_dropped(
                _address(scores), _address(logs[-1]), _part(scores, queries, scale),
                _how(seed + (number << 32), p),
            )  # fmt: skip
            part = torch.bmm(scores, heads(v, rows, seen))
            y[rows, :, queries] = part.unflatten(0, (-1, q.shape[1]))
        ctx.save_for_backward(q, k, v, y, *logs)
        ctx.options = scale, p, seed
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """grad_y (B, H, T, D) -> those of q, k and v."""
        (q, k, v, y, *logs), (scale, p, seed) = ctx.saved_tensors, ctx.options
        (grad_y,), shape = grad_outputs, (-1, q.shape[1])
        grad_q, grad_k, grad_v = (torch.zeros(q.shape) for _ in range(3))
        # of every query, the sum of its probabilities times their gradients
        dots = (grad_y * y).sum(-1, keepdim=True)
        for number, ((rows, queries), log) in enumerate(zip(parts(*q.shape[:3]), logs)):
            seen = slice(queries.stop)
            part_q, part_k = heads(q, rows, queries), heads(k, rows, seen)
            probs = torch.bmm(part_q, part_k.transpose(1, 2))
            grad, part_dots = (heads(x, rows, queries).contiguous() for x in (grad_y, dots))
            scores = torch.bmm(grad, heads(v, rows, seen).transpose(1, 2))
            _functions().softmax_dropped_gradient(
                _address(probs), _address(scores), _address(log), _address(part_dots),
                _part(probs, queries, scale), _how(seed + (number << 32), p),
            )  # fmt: skip
            grad_q[rows, :, queries] = (scores @ part_k).unflatten(0, shape)
            grad_k[rows, :, seen] += (scores.transpose(1, 2) @ part_q).unflatten(0, shape)
            grad_v[rows, :, seen] += (probs.transpose(1, 2) @ grad).unflatten(0, shape)
        return grad_q, grad_k, grad_v, None, None, None


def _part(scores: Tensor, queries: slice, scale: float) -> Any:
    n_heads, n_queries, n_keys = scores.shape
    return ctypes.byref(_Part(n_heads * n_queries, n_keys, n_queries, queries.start, scale))
