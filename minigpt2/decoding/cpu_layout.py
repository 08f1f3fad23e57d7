"""The model's matrices, laid out once for the CPU's product routines: same numbers, sooner.

Decoding reads every weight once a token, so its speed is that of memory, if the routine keeps up.
torch's float32 product (MKL) does not for one row or a few. oneDNN's does, from a matrix that was
reordered for it once; FBGEMM's reads int8 as it is. Both are part of torch's wheels for x86, so
nothing is compiled and nothing is waited for. Where one is missing the module stays as it was: the
plain path is always there, and this one equals it (float32 up to the order of sums, int8 up to
`SPLIT`, below).

For decoding only: a packed model cannot be trained, moved or saved.

Letters: M rows, N outputs of a Linear, K its inputs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..equivalences import WAYS
from ..formats.hugging_face import StoredLinear
from ..model import GPT2
from .c_products import CLinear, c_works
from .c_step import can_step, step_in_c
from .int8 import Int8Linear, probe, round_rows, swap_linears

logger = logging.getLogger(__name__)
ROWS = 8  # the layout is chosen for products of about so many rows; it is fast for one, too

# FBGEMM multiplies unsigned by signed bytes and adds pairs of products in 16 bits, which hold them
# while the unsigned ones stay below 128. So an activation is cut into two digits of -63 to 63: its
# rounded value, and the rest 126 times larger. Together they are off by at most 1 / (126 * 126) of
# the row's largest, and the sums of their products are whole numbers without any rounding.
DIGIT, SPLIT, ZERO_POINT = 63, 126, 64


class PackedLinear(nn.Module):
    """A float32 Linear in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedInt8Linear(nn.Module):
    """An int8 Linear in FBGEMM's own layout."""

    def __init__(self, linear: Int8Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        n_rows = len(linear.weight)
        with warnings.catch_warnings():
            # torch plans to drop its quantized tensors; the day it does, the plain path stays
            warnings.simplefilter("ignore")
            matrix = torch._make_per_channel_quantized_tensor(  # pyright: ignore[reportPrivateImportUsage]
                linear.weight, linear.scale.double(), torch.zeros(n_rows, dtype=torch.int64), 0
            )
            engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
            try:
                self.packed = torch.ops.quantized.linear_prepack(matrix, None)
            finally:
                torch.backends.quantized.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        rows = x.flatten(0, -2)  # (M, K)
        step = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / DIGIT  # (M, 1)
        scaled = rows / step
        first = scaled.round()
        digits = torch.cat((first, (scaled - first) * SPLIT))  # (2M, K), rounded by the product
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        first, second = product(digits, 1.0, ZERO_POINT, self.packed).chunk(2)  # (M, N) each
        y = torch.add(first, second, alpha=1 / SPLIT).mul_(step)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


def pack(model: GPT2, *, compiled: bool = False) -> None:
    """Lay out the Linears and the head of a model on the CPU for speed, in place; what cannot be
    stays plain. With `compiled`, products of few rows and the decode step are made in C.

    Raises InputError for a model with adapters.
    """
    model.eval()
    if model.ln_f.weight.device.type != "cpu" or model.ln_f.weight.dtype != torch.float32:
        return
    rounded = any(isinstance(module, Int8Linear) for module in model.modules())
    if compiled and c_works(torch.int8 if rounded else torch.float32):
        _in_c(model)
    elif rounded:
        _pack_int8(model)
    elif works(PackedLinear, _example(), "packed float32"):
        swap_linears(model, nn.Linear, PackedLinear, "packed float32")
    model.eval()  # the new parts, too: modes that differ are set at every token


def _in_c(model: GPT2) -> None:
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        swap_linears(model, Int8Linear, lambda x: CLinear(x.weight, x.scale, x.bias), "int8 in C")
    else:
        halves = _are_half(model) and c_works(torch.float16)

        def in_c(linear: nn.Linear) -> CLinear:
            table = model.wte.weight
            weight = linear.as_stored() if isinstance(linear, StoredLinear) else linear.weight
            weight = weight if halves else weight.to(table.dtype)
            same = (weight.shape, weight.dtype) == (table.shape, table.dtype)
            return CLinear(table if same and weight.equal(table) else weight, None, linear.bias)

        swap_linears(model, nn.Linear, in_c, "float16 in C" if halves else "float32 in C")
    if can_step(model):
        step_in_c(model)


def _are_half(model: GPT2) -> bool:
    """Whether all matrices lie in a file as float16."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return all(isinstance(x, StoredLinear) and x.stored_dtype == torch.float16 for x in linears)


def _pack_int8(model: GPT2) -> None:
    linear = _example()
    if works(PackedInt8Linear, Int8Linear(*round_rows(linear.weight), linear.bias), "packed int8"):
        swap_linears(model, Int8Linear, PackedInt8Linear, "packed int8")


def works(kind: Callable[[Any], nn.Module], plain: nn.Module, way: str) -> bool:
    """Whether this torch, on this processor, has what `kind` needs, and computes with it what the
    plain module computes; with a notice where it computes something else.
    """
    try:
        fast = kind(plain)
        same = all(WAYS[way].agrees(fast(x), plain(x)) for x in probe().rows)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    if not same:
        logger.warning("%s computes something else on this machine: going on without it", way)
    return same


def _example() -> nn.Linear:
    weight, bias, _ = probe()
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return linear
