"""Blocks that train in C (assets/train.c): all that lies between the products of a step.

Between two products a step does little with much: each of torch's operations goes once through
numbers that do not fit the cache. Here one function does all that is to be done between two
products, and for attention the small products as well, head by head. Masks are not kept: whether a
number is dropped follows from a seed and its place, and is found out again in the backward pass.

Where there is no C compiler, or where it computes something else, everything stays as it was. Knows
blocks, nothing of runs.

Letters as in model.py; N tokens, F the width of the MLP.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from ..decoding.c_library import training_library
from ..equivalences import WAYS, difference, swap
from ..formats.activations import ACTIVATIONS
from ..model import GPT2, MLP, Block, CausalSelfAttention, GPT2Config
from .c_functions import (
    Attention,
    Dropout,
    added,
    attend,
    attend_gradient,
    biased_gelu,
    biased_gelu_gradient,
    drawn,
    dropped,
    layer_norm,
    layer_norm_gradient,
    like_tokens,
)
from .dropout import attention_in_parts

logger = logging.getLogger(__name__)
WAY = "training in C"
Forward = Callable[..., Tensor]


def swap_in_c(model: GPT2) -> None:
    """Let a float32 model on the CPU train in C, where `c_trains`."""
    for name, module in [*model.named_modules()]:
        if type(module) is nn.Dropout:
            swap(model, name, lambda plain: CDropout(plain.p).train(plain.training), WAY)
    for i, block in enumerate(model.h):
        attention = functools.partial(functools.partial, _softmax_attention, block.attn)
        swap(model, f"h.{i}.attn.softmax_attention", attention, WAY)
        forward = functools.partial(functools.partial, _block, block)
        swap(model, f"h.{i}.forward", forward, WAY)


@functools.cache
def c_trains() -> bool:
    """Whether there are the C functions, and they compute what torch does; with a notice where they
    compute something else.
    """
    if training_library() is None:
        return False
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        same = _same_as_torch()
    if not same:
        logger.warning("%s computes something else on this machine: going on without it", WAY)
    return same


def _same_as_torch() -> bool:
    """Whether a block computes and learns the same in C: its rows are some whole vectors and more,
    its tokens some groups of queries and more.
    """
    generator = torch.Generator().manual_seed(0)
    config = GPT2Config(vocab_size=2, block_size=37, n_embd=74, n_head=2, n_layer=1, n_inner=39)
    plain = GPT2(config, generator=generator)
    for parameter in plain.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    x = torch.randn(3, 37, 74, generator=generator)
    plain.set_dropout(0.0)
    expected = _results(plain.h[0], x)
    for rarely in (0.0, 1e-12):  # a rate at which nothing is dropped
        ours = copy.deepcopy(plain)
        ours.set_dropout(rarely)
        swap_in_c(ours)
        if not all(map(_alike, _results(ours.h[0], x), expected)):
            return False
    return True


def _results(block: nn.Module, x: Tensor) -> list[Tensor]:
    """What a block gives, and its gradients."""
    y = block(x.requires_grad_(), None, None)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def _alike(ours: Tensor, plain: Tensor) -> bool:
    return difference(ours, plain) <= WAYS[WAY].tolerance


class CDropout(nn.Dropout):
    """nn.Dropout in C."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (...), the same in evaluation mode."""
        if not self.training or self.p == 0:
            return input
        if input.dtype != torch.float32:
            return super().forward(input)
        return _Drop.apply(input, drawn(self.p))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout) -> Tensor:
        """x (...) -> (...)."""
        ctx.dropout = dropout
        return dropped(x, dropout)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradient is dropped out alike."""
        return dropped(grad_outputs[0], ctx.dropout), None


def _block(block: Block, plain: Forward, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """`forward` of a block, each half of it in C where it can be; `plain` where nothing is learned,
    in other numbers, and beside a cache. Where documents are kept apart, the first half is as
    model.py has it.
    """
    plainly = not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    if plainly or x.dtype != torch.float32 or cache is not None:
        return plain(x, mask, cache)
    attn, mlp = cast(CausalSelfAttention, block.attn), cast(MLP, block.mlp)
    parts = block.ln_1, attn.c_attn, attn.c_proj, attn.resid_dropout
    if mask is None and _are_plain(attn, parts):
        # seeds are drawn in the order of model.py: what a hook makes plain drops the same
        x = _Gather.apply(x, *_weights(parts), attn.n_head, _how(attn), *_after(parts))
    else:
        x = x + attn(block.ln_1(x), mask, None)
    parts = block.ln_2, mlp.c_fc, mlp.c_proj, mlp.dropout
    if _are_plain(mlp, parts) and mlp.act is ACTIVATIONS["gelu_new"]:
        return _Think.apply(x, *_weights(parts), *_after(parts))
    return x + mlp(block.ln_2(x))


Parts = tuple[nn.LayerNorm, nn.Linear, nn.Linear, nn.Dropout]  # of half a block
KINDS = nn.LayerNorm, nn.Linear, nn.Linear, CDropout
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def _are_plain(half: nn.Module, parts: Parts) -> bool:
    """Whether these are what a model is made of, and no hook waits for what one of them gives."""
    if _has_any_global_hook():
        return False
    return tuple(map(type, parts)) == KINDS and not any(
        vars(module)[hooks] for module in (half, *parts) for hooks in HOOKS
    )


def _weights(parts: Parts) -> Iterator[Tensor]:
    """Six: weight and bias of the layer norm and of both Linears."""
    for part in parts[:3]:
        yield from (part.weight, part.bias)


def _after(parts: Parts) -> tuple[float, Dropout]:
    """The layer norm's epsilon, and how what is added to the residual stream is dropped out."""
    norm, _, _, dropout = parts
    return norm.eps, drawn(dropout.p if dropout.training else 0.0)


def _how(attn: CausalSelfAttention) -> Attention:
    return Attention(attn.scale, drawn(attn.attn_pdrop if attn.training else 0.0))


class _Gather(torch.autograd.Function):
    """x + dropout(c_proj(attention(c_attn(ln_1(x))))): the first half of a block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ln: Tensor,
        b_ln: Tensor,
        w_attn: Tensor,
        b_attn: Tensor,
        w_proj: Tensor,
        b_proj: Tensor,
        n_head: int,
        how: Attention,
        epsilon: float,
        after: Dropout,
    ) -> Tensor:
        """x (B, T, C), w_attn (3C, C), w_proj (C, C) -> (B, T, C)."""
        flat, shape = x.contiguous().flatten(0, 1), (*x.shape[:2], n_head, x.shape[2] // n_head)
        h, moments = layer_norm(flat, w_ln, b_ln, epsilon)  # (N, C)
        qkv = h @ w_attn.T  # (N, 3C)
        bias = b_attn.view(3, *shape[2:])
        q, k, v = _by_heads(qkv, shape)
        y, logs = attend(q, k, v, how, bias)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C)
        ctx.save_for_backward(flat, moments, w_ln, h, w_attn, bias, qkv, y, logs, w_proj)
        ctx.options = shape, how, after
        return added(y @ w_proj.T, b_proj, flat, after)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Those of x and of the weights, of which some may not be wanted."""
        x, moments, w_ln, h, w_attn, bias, qkv, y, logs, w_proj = ctx.saved_tensors
        shape, how, after = ctx.options
        grad = grad_outputs[0].contiguous().flatten(0, 1)  # (N, C)
        grad_out = dropped(grad, after) if after.p else grad
        grad_y, grad_qkv = (grad_out @ w_proj).view(shape).transpose(1, 2), torch.empty_like(qkv)
        (q, k, v), grads = (_by_heads(tensor, shape) for tensor in (qkv, grad_qkv))
        of_bias = attend_gradient(q, k, v, grad_y, logs, grads, how, bias)
        grad_h, wanted = grad_qkv @ w_attn, ctx.needs_input_grad
        grad_x, *of_norm = layer_norm_gradient(grad_h, x, moments, w_ln, grad)
        return (
            grad_x.view(grad_outputs[0].shape),
            *of_norm,
            grad_qkv.T @ h if wanted[3] else None,
            of_bias.flatten(),
            grad_out.T @ y.flatten(0, 1) if wanted[5] else None,
            grad_out.sum(0),
            *4 * [None],
        )


class _Think(torch.autograd.Function):
    """x + dropout(c_proj(gelu(c_fc(ln_2(x))))): the second half of a block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ln: Tensor,
        b_ln: Tensor,
        w_fc: Tensor,
        b_fc: Tensor,
        w_proj: Tensor,
        b_proj: Tensor,
        epsilon: float,
        after: Dropout,
    ) -> Tensor:
        """x (B, T, C), w_fc (F, C), w_proj (C, F) -> (B, T, C)."""
        flat = x.contiguous().flatten(0, 1)
        h, moments = layer_norm(flat, w_ln, b_ln, epsilon)  # (N, C)
        u = h @ w_fc.T  # (N, F)
        y = biased_gelu(u, b_fc)
        ctx.save_for_backward(flat, moments, w_ln, h, w_fc, u, w_proj)
        ctx.after = after
        return added(y.view(*x.shape[:2], -1) @ w_proj.T, b_proj, flat, after)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Those of x and of the weights, of which some may not be wanted."""
        (x, moments, w_ln, h, w_fc, u, w_proj), after = ctx.saved_tensors, ctx.after
        grad = grad_outputs[0].contiguous().flatten(0, 1)  # (N, C)
        grad_out = dropped(grad, after) if after.p else grad
        grad_u, of_fc_bias, y = biased_gelu_gradient(grad_out @ w_proj, u)
        wanted = ctx.needs_input_grad
        of_proj = grad_out.T @ y if wanted[5] else None
        del y
        grad_x, *of_norm = layer_norm_gradient(grad_u @ w_fc, x, moments, w_ln, grad)
        return (
            grad_x.view(grad_outputs[0].shape),
            *of_norm,
            grad_u.T @ h if wanted[3] else None,
            of_fc_bias,
            of_proj,
            grad_out.sum(0),
            None,
            None,
        )


def _by_heads(qkv: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (N, 3C) as q, k and v (B, H, T, D), which lie where they lay; shape (B, T, H, D)."""
    n_rows, n_tokens, n_head, size = shape
    q, k, v = qkv.view(n_rows, n_tokens, 3, n_head, size).permute(2, 0, 3, 1, 4)
    return q, k, v


def _softmax_attention(
    attn: CausalSelfAttention,
    plain: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`softmax_attention` of a module, for blocks that have other parts; `plain` where nothing is
    learned, in other numbers, and beside a cache.
    """
    p = attn.attn_pdrop if attn.training else 0.0
    plainly = q.dtype != torch.float32 or not torch.is_grad_enabled() or q.shape != k.shape
    if plainly or (mask is not None and p == 0):
        return plain(q, k, v, mask)
    if mask is not None:  # documents are kept apart
        return attention_in_parts(q, k, v, mask, attn.scale, p)
    return _Attend.apply(q, k, v, _how(attn))


class _Attend(torch.autograd.Function):
    """softmax(q k^T * scale, causal), dropped out, times v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: Attention) -> Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        q, k, v = (_with_whole_tokens(x) for x in (q, k, v))
        y, logs = attend(q, k, v, how)
        ctx.save_for_backward(q, k, v, logs)
        ctx.how = how
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """grad_y (B, H, T, D) -> those of q, k and v."""
        q, k, v, logs = ctx.saved_tensors
        grads = [like_tokens(q) for _ in range(3)]
        attend_gradient(q, k, v, _with_whole_tokens(grad_outputs[0]), logs, grads, ctx.how)
        return *grads, None


def _with_whole_tokens(x: Tensor) -> Tensor:
    """x (B, H, T, D), with the numbers of a token side by side."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
