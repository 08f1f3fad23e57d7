"""Linears in C: products of few rows at the speed of memory, with weights of 32, 16 or 8 bits.

Decoding reads every weight once a token. torch's routines read float32 well for some numbers of
rows on some processors, float16 not at all, and int8 after rounding the activations. The function
`linear` of assets/decode.c reads any of them as it lies in memory, once for up to 8 rows, and
computes a row alike in whatever batch. Plain torch is asked for many rows of float32.

Letters: M rows, N outputs of a Linear, K its inputs.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..equivalences import WAYS
from ..errors import InputError
from .c_library import library
from .int8 import probe, round_rows

logger = logging.getLogger(__name__)
KINDS = {torch.float32: 0, torch.float16: 1, torch.int8: 2}  # as decode.c numbers them
FEW = 16  # rows: from here on torch's own float32 product is as fast
CHUNK = 64  # rows that are packed at once


class Matrix(ctypes.Structure):
    """A matrix as decode.c has it: where weight (N, K), scale (N) and bias (N) lie, and sizes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k", "kind")),
    ]


class CLinear(nn.Module):
    """A Linear that is multiplied in C. Its weights are float32, float16, or int8 with a scale for
    each row; inputs and outputs are float32.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        """weight (N, K), scale (N,), bias (N,). Raises RuntimeError where there is no C."""
        super().__init__()
        functions = library()
        if functions is None:
            raise RuntimeError("there are no C functions")
        self._functions = functions
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._room = functions.room_for(ctypes.c_int64(weight.shape[1]))

    def matrix(self) -> Matrix:
        """What the C functions are told. Raises InputError for anything but contiguous numbers on
        the CPU: of a model that was moved or cast after it was made ready.
        """
        tensors = {"weight": self.weight, "scale": self.scale, "bias": self.bias}
        for name, tensor in tensors.items():
            wanted = KINDS if name == "weight" else (torch.float32,)
            if tensor is not None:
                check_memory(tensor, wanted)
        n, k = self.weight.shape
        return Matrix(*map(address, tensors.values()), n, k, KINDS[self.weight.dtype])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        check_memory(rows, (torch.float32,))
        if self.weight.dtype == torch.float32 and len(rows) > FEW:
            return F.linear(x, self.weight, self.bias)
        matrix, y = self.matrix(), torch.empty(len(rows), len(self.weight))
        n_threads = torch.get_num_threads()
        work = torch.empty(n_threads * min(len(rows), CHUNK) * self._room)
        for part, into in zip(rows.split(CHUNK), y.split(CHUNK)):
            self._functions.linear(
                ctypes.byref(matrix),
                *map(address, (part, into)),
                ctypes.c_int64(len(part)),
                address(work),
                ctypes.c_int64(n_threads),
            )
        return y.view(*x.shape[:-1], -1)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor lies."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def check_memory(tensor: Tensor, dtypes: Any) -> None:
    """Raise InputError for a tensor that a C function would read wrongly."""
    if tensor.dtype in dtypes and tensor.is_cpu and tensor.is_contiguous():
        return
    allowed = ", ".join(map(str, dtypes))
    raise InputError(
        f"the C functions got {tensor.dtype} on {tensor.device} with strides {tensor.stride()}, "
        f"they take contiguous {allowed} on the CPU: load the model anew"
    )


def c_works(dtype: torch.dtype) -> bool:
    """Whether the C functions are there and compute, with weights of this dtype, what the plain
    Linear computes; with a notice where they do not.
    """
    functions = library()
    if functions is None:
        return False
    if dtype == torch.float16 and not functions.has_half():
        logger.warning("this processor does not widen float16 quickly: going on with float32")
        return False
    weight, bias, rows = probe()
    steps, scale = round_rows(weight) if dtype == torch.int8 else (weight.to(dtype), None)
    fast, plain = CLinear(steps, scale, bias), steps.float()
    plain = plain if scale is None else plain * scale[:, None]
    way = WAYS["int8 in C" if dtype == torch.int8 else "float32 in C"]
    if all(way.agrees(fast(x), F.linear(x, plain, bias)) for x in rows):
        return True
    logger.warning(
        "the C functions compute something else with %s: going on without them",
        str(dtype).removeprefix("torch."),
    )
    return False
