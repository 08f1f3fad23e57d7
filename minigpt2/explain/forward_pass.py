"""One forward pass, with everything on the way from tokens to scores kept to be looked at.

The model is watched from outside, by hooks on its own modules, which are gone afterwards, also
after an error; it, its mode, gradients and random state stay as they were.

Letters: B batch, T tokens, C n_embd, H heads, D head size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from ..arguments import refuse, require_loaded
from ..equivalences import ways_of
from ..errors import InputError
from ..model import GPT2, CausalSelfAttention, attention_probs, evaluation_mode

LOOKED_INTO = {"LoRA beside", "LoRA folded"}  # every other way is a model laid out for speed


@dataclass(frozen=True)
class LayerTrace:
    """What one block read and wrote.

    The residual stream is `before` the block, `middle` after attention has added `attn` to it, and
    `after` when the MLP has added `mlp`: all (B, T, C). Queries `q`, keys `k` and values `v` are
    (B, H, T, D).
    """

    before: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attn: Tensor
    mlp: Tensor
    scale: float  # of the products of queries and keys
    upcast: bool  # these are taken in float32 at least

    @property
    def middle(self) -> Tensor:
        """The residual stream (B, T, C) that the MLP reads."""
        return self.before + self.attn

    @property
    def after(self) -> Tensor:
        """The residual stream (B, T, C) that the next block reads."""
        return self.middle + self.mlp

    @property
    def probs(self) -> Tensor:
        """How much each token attends to every token: (B, H, T, T), each row of which sums to 1.

        Computed from queries and keys when asked for: kept for all layers, they would be most of a
        trace.
        """
        return self._probs(self.q, self.k)

    def probs_at(self, row: int, position: int) -> Tensor:
        """How much one token attends to those before it and itself: (H, position + 1)."""
        here, seen = slice(position, position + 1), slice(position + 1)
        return self._probs(self.q[row : row + 1, :, here], self.k[row : row + 1, :, seen])[0, :, 0]

    def _probs(self, q: Tensor, k: Tensor) -> Tensor:
        if self.upcast:
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k = q.to(wide), k.to(wide)
        return attention_probs(q, k, None, self.scale)


@dataclass(frozen=True)
class Trace:
    """One forward pass of token ids `idx` (B, T): embeddings, layers, scores.

    `token_embedding` (B, T, C) and `position_embedding` (1, T, C) make the stream that the first
    block reads; `hidden` (B, T, C) is the last block's stream after the final layer norm, and the
    `logits` (B, T, V) are the scores of every next token.
    """

    idx: Tensor
    token_embedding: Tensor
    position_embedding: Tensor
    layers: tuple[LayerTrace, ...]
    hidden: Tensor
    logits: Tensor

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """The residual stream (B, T, C) before every block and, L + 1 in all, after the last."""
        return (*(layer.before for layer in self.layers), self.layers[-1].after)


@torch.no_grad()
def trace(model: GPT2, idx: Tensor) -> Trace:
    """One forward pass of idx (B, T) int64 by a model, kept step by step.

    Takes as much memory as it returns: (6 L + 2) C + V numbers a token, 0.44 GB for 1,024 tokens
    of 124M in float32, and 50 MB for a layer's `probs` while they are looked at. Raises
    InputError for a model that was packed, rounded or compiled for decoding, for no tokens, and for
    ids that `model` refuses.
    """
    require_plain(model)
    require_tokens(idx)
    kept: dict[str, Tensor] = {}
    with evaluation_mode(model), _watched(model, kept):
        logits = model(idx)
    layers = tuple(_layer(model, n, kept) for n in range(len(model.h)))
    embeddings = kept["wte"], kept["wpe"]
    return Trace(idx, *embeddings, layers, kept["ln_f"], logits)


def require_plain(model: GPT2) -> None:
    """Raise InputError for what is no model, or one whose parts were replaced by faster ones."""
    require_loaded("model", model, "GPT2", "hidden")
    fast = sorted({way for ways in ways_of(model).values() for way in ways} - LOOKED_INTO)
    if fast:
        raise InputError(
            f"this model is laid out for speed ({', '.join(fast)}), and its parts cannot be looked "
            "into: load it with GPT2.from_pretrained"
        )


def require_tokens(idx: Tensor) -> None:
    """Raise InputError for what is no tensor of rows (B, T), or has no token."""
    if not isinstance(idx, Tensor):
        raise refuse("idx", idx, "an int64 tensor of ids (B, T)")
    if idx.ndim != 2 or not idx.numel():
        raise InputError(
            f"idx has the shape {tuple(idx.shape)}, allowed is (B, T), at least (1, 1)"
        )


@contextmanager
def _watched(model: GPT2, kept: dict[str, Tensor]) -> Iterator[None]:
    """Keep what the modules of a model compute, under their names, inside the `with`."""
    handles = []
    try:
        for name, module in model.named_modules():
            if _is_kept(name):
                handles.append(module.register_forward_hook(partial(_keep, kept, name)))
        for n, block in enumerate(model.h):
            before = partial(_keep_input, kept, f"h.{n}")
            handles.append(block.register_forward_pre_hook(before))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_kept(name: str) -> bool:
    whole = name in ("wte", "wpe", "ln_f")
    return whole or name.split(".")[2:] in (["attn"], ["attn", "c_attn"], ["mlp"])


def _keep(kept: dict[str, Tensor], name: str, _: nn.Module, __: object, output: Tensor) -> None:
    kept[name] = output


def _keep_input(kept: dict[str, Tensor], name: str, _: nn.Module, inputs: tuple) -> None:
    kept[name] = inputs[0]


def attention_of(model: GPT2, n: int) -> CausalSelfAttention:
    """The attention of layer n."""
    attn = model.h[n].get_submodule("attn")
    assert isinstance(attn, CausalSelfAttention)
    return attn


def _layer(model: GPT2, n: int, kept: dict[str, Tensor]) -> LayerTrace:
    attn = attention_of(model, n)
    heads = kept[f"h.{n}.attn.c_attn"].unflatten(-1, (3, attn.n_head, -1))  # (B, T, 3, H, D)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    written = kept[f"h.{n}.attn"], kept[f"h.{n}.mlp"]
    return LayerTrace(kept[f"h.{n}"], q, k, v, *written, attn.scale, attn.upcast)
