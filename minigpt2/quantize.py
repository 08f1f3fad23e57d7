"""int8 weights: a quarter of the memory, and of what every new token has to read.

Each row of a matrix is divided by its largest magnitude / 127 and rounded, so that a row is 127
steps to either side of zero and one scale. Biases, layer norms and positions keep their precision,
and so do the activations: the product is that of the input with the rounded matrix. It acts on a
model from outside, for decoding only: rounded weights cannot be trained or saved.

Dettmers et al. 2022, arXiv:2208.07339, section 2 (row-wise absmax quantization).

Letters: N outputs of a Linear, K its inputs, C n_embd, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .model import GPT2

Linear = TypeVar("Linear", bound=nn.Module)
LARGEST = 127  # -128 is left out: a row is as far from zero on either side


class Int8Linear(nn.Module):
    """y = (x weight^T) * scale + bias, with weight (N, K) int8 and scale (N,)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        # the cast is of the whole matrix: slow as it stands, free where torch.compile fuses it
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) and float32 scales (N,), weight ~ int8 * scale; rows of zeros
    stay zeros.
    """
    scale = weight.abs().amax(dim=1).float() / LARGEST
    steps = weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round_().to(torch.int8), scale


def quantize(model: GPT2) -> None:
    """Replace every Linear and the head by int8 ones, in place. The token embedding keeps its
    precision: of it, a token reads one row.
    """
    model.eval()
    untie(model)
    swap(model, nn.Linear, _rounded)


def _rounded(linear: nn.Linear) -> Int8Linear:
    bias = None if linear.bias is None else linear.bias.detach()
    return Int8Linear(*round_rows(linear.weight), bias)


def untie(model: GPT2) -> None:
    """Give a tied model a head of its own, on the same memory, so that it can be replaced."""
    if not model.config.tie_word_embeddings:
        return
    head = nn.Linear(1, 1, bias=False, device="meta")
    head.weight = model.wte.weight
    model.lm_head = head
    model.config = replace(model.config, tie_word_embeddings=False)


def swap(root: nn.Module, kind: type[Linear], change: Callable[[Linear], nn.Module]) -> None:
    """Replace every module of one kind below `root` by what `change` makes of it.

    The largest goes first and each is let go before the next is changed, so that memory does not
    grow beyond that of before or after.
    """
    found = {name: module for name, module in root.named_modules() if isinstance(module, kind)}
    names = sorted(
        found, key=lambda name: -sum(t.numel() for t in found[name].state_dict().values())
    )
    found.clear()
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = root.get_submodule(name)
        assert isinstance(module, kind)
        setattr(root.get_submodule(parent), leaf, change(module))
