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
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..equivalences import swap, ways_of
from ..errors import InputError
from ..model import GPT2

Linear = TypeVar("Linear", bound=nn.Module)
LARGEST = 127  # -128 is left out: a row is as far from zero on either side
ROWS_AT_ONCE = 256  # of a matrix, that are rounded


class Int8Linear(nn.Module):
    """y = (x weight^T) * scale + bias, with weight (N, K) int8 and scale (N,)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
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
    stay zeros. Some rows at a time, so that no second copy in float is made.
    """
    steps = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    for first in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        scale[rows] = weight[rows].abs().amax(dim=1).float() / LARGEST
        size = scale[rows].clamp_min(torch.finfo(torch.float32).tiny)
        steps[rows] = (weight[rows] / size[:, None]).round_()
    return steps, scale


def quantize(model: GPT2) -> None:
    """Replace every Linear and the head by int8 ones, in place. The token embedding keeps its
    precision: of it, a token reads one row. Raises InputError for a model with adapters.
    """
    model.eval()
    swap_linears(model, nn.Linear, _rounded, "int8")


class Probe(NamedTuple):
    """A product to try a routine on: weight (N, K), which lies transposed in memory as in a file,
    bias (N,), and inputs (M, K) of 1, 2, 3 and 9 rows.
    """

    weight: Tensor
    bias: Tensor
    rows: list[Tensor]


def probe(n: int = 67, k: int = 131) -> Probe:
    """The same numbers every time, drawn from no generator."""
    weight = torch.linspace(-30, 50, n * k).sin().view(k, n).T
    rows = [torch.linspace(-20, 30, m * k).sin().view(m, k) for m in (1, 2, 3, 9)]
    return Probe(weight, torch.linspace(-1, 1, n), rows)


def _rounded(linear: nn.Linear) -> Int8Linear:
    bias = None if linear.bias is None else linear.bias.detach()
    return Int8Linear(*round_rows(linear.weight), bias)


def swap_linears(
    model: GPT2,
    kind: type[Linear],
    change: Callable[[Linear], nn.Module],
    way: str | Callable[[Linear], str],
) -> None:
    """Replace every module of one kind, the head included, by what `change` makes of it; `way` is
    the row of the table of equivalences, of all or of each.

    The largest goes first and each is let go before the next is changed, so that memory does not
    grow beyond that of before or after. Raises InputError for a model with adapters, which `change`
    would leave out.
    """
    check_no_adapters(model)
    _untie(model, way)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    names = sorted(
        found, key=lambda name: -sum(t.numel() for t in found[name].state_dict().values())
    )
    found.clear()
    for name in names:
        swap(model, name, change, _way(way, model.get_submodule(name)))


def check_no_adapters(model: GPT2) -> None:
    """Raise InputError for a model with adapters."""
    if any(ways[-1] == "LoRA beside" for ways in ways_of(model).values()):
        raise InputError("the model has LoRA adapters: fold them into it first, with lora.merge")


def _way(way: str | Callable[[Any], str], linear: nn.Module) -> str:
    return way if isinstance(way, str) else way(linear)


def _untie(model: GPT2, way: str | Callable[[Any], str]) -> None:
    """Give a tied model a head of its own, on the same memory, so that it can be replaced."""
    if not model.config.tie_word_embeddings:
        return
    head = nn.Linear(model.config.n_embd, model.config.vocab_size, False, device="meta")
    head.weight = model.wte.weight
    swap(model, "lm_head", lambda _: head, _way(way, head))
    model.config = replace(model.config, tie_word_embeddings=False)
