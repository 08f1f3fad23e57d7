"""The decode step in as few torch operations and as little Python as there is to it.

A token of a small model is a few hundred short operations, and to start them takes a quarter of its
time: the weights that a step reads leave nothing of Python in the processor's caches. So what
model.py does for any number of tokens is done here for few that follow others: no modules, no axis
of tokens, no mask where none is needed, keys and values written as slices of the cache. The
operations that compute are model.py's own, in its order, so with the same routines the numbers are
bit for bit the same.

Letters: B rows, T tokens in this call, M = B T, C n_embd, H heads, D head size, S positions seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..cache import LayerCache
from ..equivalences import swap
from ..model import GPT2, Block

Function = Callable[[Tensor], Tensor]
FEW = 64  # tokens: from here on the products alone take time


class _Block(NamedTuple):
    """The parts of a block as functions, which are found sooner than attributes of modules."""

    ln_1: Function
    c_attn: Function
    attn_c_proj: Function
    ln_2: Function
    c_fc: Function
    act: Function
    mlp_c_proj: Function
    scale: float  # of attention scores


class TorchDecodeStep:
    """`model.read` where it reads few tokens behind others; everything else (prompts, gradients,
    training) goes the plain way. Hooks of modules are not called.
    """

    def __init__(self, model: GPT2) -> None:
        self._model, self._plain = model, model.read
        self._blocks: dict[bool, list[_Block]] = {}  # for one token, and for some

    def __call__(
        self,
        idx: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        layers: Sequence[LayerCache | None],
    ) -> Tensor:
        """See GPT2.read."""
        model, (n_rows, n_tokens) = self._model, idx.shape
        first = layers[0] if layers else None
        follows = first is not None and (mask is not None or first.n_slots > n_tokens == 1)
        if not follows or idx.numel() > FEW or torch.is_grad_enabled() or model.training:
            return self._plain(idx, positions, mask, layers)
        split = n_rows, n_tokens, 3, model.config.n_head, model.config.head_size
        x = (model.wte(idx) + model.wpe(positions)).flatten(0, 1)  # (M, C)
        for block, layer in zip(self._blocks_for(len(x)), layers):
            qkv = block.c_attn(block.ln_1(x)).view(split)
            gathered = _gather(qkv, layer, mask, block.scale).reshape(x.shape)
            x = x + block.attn_c_proj(gathered)
            x = x + block.mlp_c_proj(block.act(block.c_fc(block.ln_2(x))))
        return model.ln_f(x).view(n_rows, n_tokens, -1)

    def _blocks_for(self, n_tokens: int) -> list[_Block]:
        some = n_tokens > 1
        if some not in self._blocks:
            blocks = (block for block in self._model.h if isinstance(block, Block))
            self._blocks[some] = [_functions(block, n_tokens) for block in blocks]
        return self._blocks[some]


def can_step(model: GPT2) -> bool:
    """Whether a model is computed in one precision."""
    return not model.config.reorder_and_upcast_attn


def step_in_torch(model: GPT2) -> None:
    """Let a model read few tokens with fewer operations, in place."""
    swap(model, "read", lambda _: TorchDecodeStep(model), "decode step in torch")


def _gather(qkv: Tensor, layer: LayerCache | None, mask: Tensor | None, scale: float) -> Tensor:
    """Write the new keys and values to the cache, and let each query look at its row: qkv
    (B, T, 3, H, D) -> (B, T, H, D).
    """
    assert layer is not None
    if mask is not None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, *layer.append(k, v), attn_mask=mask, scale=scale)
        return y.transpose(1, 2)
    keys, values, _, n_slots = layer
    q, k, v = qkv.squeeze(1).unbind(1)  # (B, H, D) each
    keys.select(2, n_slots - 1).copy_(k)
    values.select(2, n_slots - 1).copy_(v)
    seen = keys.narrow(2, 0, n_slots), values.narrow(2, 0, n_slots)  # (B, H, S, D)
    return F.scaled_dot_product_attention(q.unsqueeze(2), *seen, scale=scale)


def _functions(block: Block, n_tokens: int) -> _Block:
    attn, mlp = block.attn, block.mlp
    linears = attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
    c_attn, attn_c_proj, c_fc, mlp_c_proj = (_product(linear, n_tokens) for linear in linears)
    ln_1, ln_2 = _norm(block.ln_1), _norm(block.ln_2)
    return _Block(ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp.act, mlp_c_proj, attn.scale)


def _product(linear: nn.Module, n_tokens: int) -> Function:
    """How a Linear multiplies so many tokens."""
    by_rows = getattr(linear, "for_rows", None)
    return linear.forward if by_rows is None else by_rows(n_tokens).forward


def _norm(norm: nn.LayerNorm) -> Function:
    shape, weight, bias, epsilon = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, epsilon)
