"""Parts of a training step in C (assets/train.c): GELU, dropout and attention.

Between two products a step does little with much: each of torch's operations goes once through
numbers that do not fit the cache. Here one function does all that is to be done between two
products, and for attention the small products as well, head by head. Masks are not kept: whether a
number is dropped follows from a seed and its place, and is found out again in the backward pass.

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
from .dropout import attention_in_parts

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


class _Heads(ctypes.Structure):
    """A (B, H, T, D), as train.c has it."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row", "head", "token")),
    ]


class _AttentionShape(ctypes.Structure):
    """How attention is computed, as train.c has it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_rows", "n_heads", "n_tokens", "size")),
        ("n_threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("scratch", ctypes.c_void_p),
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
    for rate in (0.0, RARELY):
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
        same = same and _alike(_Attention.apply(q, k, v, 0.5, rate, 0), plain, [q, k, v])
    if not same:
        logger.warning("%s computes something else on this machine: going on without it", WAY)
    return same


def _alike(ours: Tensor, plain: Tensor, given: list[Tensor]) -> bool:
    """Whether two results and their gradients are the same."""
    found = ([y, *torch.autograd.grad(y.square().sum(), given)] for y in (ours, plain))
    return all(difference(a, b) <= WAYS[WAY].tolerance for a, b in zip(*found))


def _room_to_attend(n_tokens: int, size: int) -> int:
    """Numbers that a thread needs to compute attention over so many tokens of a head of a size."""
    count = _functions().room_to_attend
    count.restype = ctypes.c_int64
    return count(ctypes.c_int64(n_tokens), ctypes.c_int64(size))


def _functions() -> ctypes.CDLL:
    found = training_library()
    assert found is not None, "whoever swaps asks c_trains before"
    return found


def _address(x: Tensor) -> ctypes.c_void_p:
    assert x.is_contiguous() and x.dtype == torch.float32 and x.device.type == "cpu"
    return ctypes.c_void_p(x.data_ptr())


def _how(seed: int, p: float) -> Any:
    dropped = min(max(1, round(p * LEVELS)), LEVELS - 1) if p else 0
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
        plainly = plainly or x.dtype != torch.float32
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
    """`softmax_attention` of a module: `plain` where nothing is learned, in other numbers, and
    beside a cache.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        p = attn.attn_pdrop if attn.training else 0.0
        plainly = q.dtype != torch.float32 or not torch.is_grad_enabled() or q.shape != k.shape
        if plainly or (mask is not None and p == 0):
            return plain(q, k, v, mask)
        if mask is not None:  # documents are kept apart
            return attention_in_parts(q, k, v, mask, attn.scale, p)
        return _Attention.apply(q, k, v, attn.scale, p, drawn_seed() if p else 0)

    return attention


class _Attention(torch.autograd.Function):
    """softmax(q k^T * scale, causal), dropped out, times v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, seed: int
    ) -> Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        q, k, v = (_with_whole_tokens(x) for x in (q, k, v))
        y, logs = _like(q), torch.empty(q.shape[:3])
        _functions().attend(
            *map(_heads, (q, k, v, y)), _address(logs), *_how_to_attend(q, scale, seed, p)
        )
        ctx.save_for_backward(q, k, v, logs)
        ctx.options = scale, seed, p
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """grad_y (B, H, T, D) -> those of q, k and v."""
        q, k, v, logs = ctx.saved_tensors
        grad_y = _with_whole_tokens(grad_outputs[0])  # named, so that it lives until it was read
        grads = [_like(q) for _ in range(3)]
        _functions().attend_gradient(
            *map(_heads, (q, k, v, grad_y)),
            _address(logs),
            *map(_heads, grads),
            *_how_to_attend(q, *ctx.options),
        )
        return *grads, None, None, None


def _with_whole_tokens(x: Tensor) -> Tensor:
    """x (B, H, T, D), with the numbers of a token side by side."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """Room for a (B, H, T, D) that lies in memory as c_attn gives it and c_proj takes it."""
    n_rows, n_head, n_tokens, size = x.shape
    return torch.empty(n_rows, n_tokens, n_head, size).transpose(1, 2)


def _heads(x: Tensor) -> Any:
    assert x.dtype == torch.float32 and x.device.type == "cpu"
    return ctypes.byref(_Heads(x.data_ptr(), *x.stride()[:3]))


def _how_to_attend(q: Tensor, scale: float, seed: int, p: float) -> tuple[Any, Any]:
    n_rows, n_head, n_tokens, size = q.shape
    n_threads = min(torch.get_num_threads(), n_rows * n_head)
    scratch = torch.empty(n_threads * _room_to_attend(n_tokens, size))
    shape = _AttentionShape(*q.shape, n_threads, scale, scratch.data_ptr())
    shape.keeps = scratch  # alive as long as its address is
    return ctypes.byref(shape), _how(seed, p)
