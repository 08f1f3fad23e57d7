"""The C functions of a training step (assets/train.c) as functions of tensors in float32.

What they are given lies on the CPU, whole rows side by side. Knows no models.

Letters as in model.py; N tokens, F the width of the MLP.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoding.c_library import training_library

LEVELS = 2**32  # of a random number, one of which is the rate
MOST_SEED = 2**62
ROWS = 32  # as train.c has it


class Dropout(NamedTuple):
    """The rate at which numbers are dropped, and what decides which."""

    p: float = 0.0
    seed: int = 0


def drawn(p: float) -> Dropout:
    """Masks drawn from torch's global generator, whose state is kept where blocks are computed
    twice; nothing is drawn for the rate 0.
    """
    return Dropout(p, int(torch.randint(MOST_SEED, ())) if p else 0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x (N, C) -> itself, normalized, and the moments (N, 2) that its gradient needs."""
    y, moments = torch.empty_like(x), x.new_empty(len(x), 2)
    given = *map(_address, (x, weight, bias)), ctypes.c_float(epsilon)
    _functions().normalize(*given, _address(y), _address(moments), *_sizes(x))
    return y, moments


def layer_norm_gradient(
    grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias from grad (N, C), that of what layer_norm gave.

    `residual` (N, C) is added to the first, which overwrites grad.
    """
    sums = x.new_empty(_n_parts(x), 2, x.shape[1])
    given = (_address(tensor) for tensor in (grad, x, moments, weight, residual, sums))
    _functions().normalize_gradient(*given, *_sizes(x))
    of_weight, of_bias = sums.sum(0)
    return grad, of_weight, of_bias


def biased_gelu(u: Tensor, bias: Tensor) -> Tensor:
    """gelu(u + bias) by tanh, u (N, F), which becomes u + bias."""
    y = torch.empty_like(u)
    _functions().gelu(_address(u), _address(bias), _address(y), *_sizes(u))
    return y


def biased_gelu_gradient(grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u and the bias, and gelu(u) once more; u is as biased_gelu left it.

    The first overwrites grad (N, F), that of gelu(u).
    """
    y, sums = torch.empty_like(u), u.new_empty(_n_parts(u), u.shape[1])
    _functions().gelu_gradient(*map(_address, (grad, u, y, sums)), *_sizes(u))
    return grad, sums.sum(0), y


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """x (..., C) without what is dropped, the rest grown by as much."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _drop(x, None, None, y, dropout)
    return y


def added(x: Tensor, bias: Tensor, residual: Tensor, dropout: Dropout) -> Tensor:
    """residual + (x + bias), the latter dropped out as in `dropped`; it overwrites x (..., C)."""
    _drop(x, bias, residual, x, dropout)
    return x


def _drop(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, dropout: Dropout
) -> None:
    given = (_address(tensor) for tensor in (x, bias, residual, y))
    _functions().drop(*given, *_sizes(x), _how_to_drop(dropout))


class Attention(NamedTuple):
    """How attention is computed: softmax(q k^T * scale, causal), dropped out, times v."""

    scale: float
    dropout: Dropout


def attend(
    q: Tensor, k: Tensor, v: Tensor, how: Attention, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, H, T, D) -> (B, H, T, D), and the scores' log-sum-exp (B, H, T) for its gradient.

    bias (3, H, D), where there is one, is added to all of q, k and v.
    """
    y, logs = like_tokens(q), q.new_empty(q.shape[:3])
    _functions().attend(*_qkv(q, k, v, bias), _heads(y), _address(logs), *_how_to_attend(q, how))
    return y, logs


def attend_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_y: Tensor,
    logs: Tensor,
    grads: Sequence[Tensor],
    how: Attention,
    bias: Tensor | None = None,
) -> Tensor:
    """Fill in the three `grads` (B, H, T, D) of q, k and v, and give that of the bias (3, H, D)."""
    sums = q.new_empty(len(q), 3, q.shape[1], q.shape[3])
    _functions().attend_gradient(
        *_qkv(q, k, v, bias),
        _heads(grad_y),
        _address(logs),
        *map(_heads, grads),
        _address(sums),
        *_how_to_attend(q, how),
    )
    return sums.sum(0)


def like_tokens(x: Tensor) -> Tensor:
    """Room for a (B, H, T, D) that lies in memory as c_attn gives it and c_proj takes it."""
    n_rows, n_head, n_tokens, size = x.shape
    return x.new_empty(n_rows, n_tokens, n_head, size).transpose(1, 2)


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
        ("bias", ctypes.c_void_p),
    ]


class _Attention(ctypes.Structure):
    """How attention is computed, as train.c has it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_rows", "n_heads", "n_tokens", "size")),
        ("n_threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("scratch", ctypes.c_void_p),
    ]


def _functions() -> ctypes.CDLL:
    found = training_library()
    assert found is not None, "whoever swaps asks c_trains before"
    return found


def _address(x: Tensor | None) -> ctypes.c_void_p:
    if x is None:
        return ctypes.c_void_p()
    assert x.is_contiguous() and x.dtype == torch.float32 and x.device.type == "cpu"
    return ctypes.c_void_p(x.data_ptr())


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    size = x.shape[-1]
    return ctypes.c_int64(x.numel() // max(1, size)), ctypes.c_int64(size)


def _n_parts(x: Tensor) -> int:
    return -(-len(x) // ROWS)


def _how_to_drop(dropout: Dropout) -> Any:
    p, seed = dropout
    below = min(max(1, round(p * LEVELS)), LEVELS - 1) if p else 0
    return ctypes.byref(_Dropout(seed, below, 1 / (1 - below / LEVELS)))


def _heads(x: Tensor, bias: Tensor | None = None) -> Any:
    assert x.dtype == torch.float32 and x.device.type == "cpu"
    assert x.stride(3) == 1 or x.shape[3] == 1, "the numbers of a token lie side by side"
    return ctypes.byref(_Heads(x.data_ptr(), *x.stride()[:3], _address(bias)))


def _qkv(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> list[Any]:
    return [_heads(x, part) for x, part in zip((q, k, v), (None,) * 3 if bias is None else bias)]


def _how_to_attend(q: Tensor, how: Attention) -> tuple[Any, Any]:
    n_rows, n_head, n_tokens, size = q.shape
    n_threads = min(torch.get_num_threads(), n_rows * n_head)
    count = _functions().room_to_attend
    count.restype = ctypes.c_int64
    each = count(ctypes.c_int64(n_tokens), ctypes.c_int64(size))
    scratch = q.new_empty(n_threads * each)
    shape = _Attention(*q.shape, n_threads, how.scale, scratch.data_ptr())
    shape.keeps = scratch  # alive as long as its address is
    return ctypes.byref(shape), _how_to_drop(how.dropout)
