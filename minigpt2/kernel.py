"""int8 products of one row or two at the speed of memory: a C function that is compiled once.

FBGEMM's int8 product works on rounded activations, and spends more time on one row than reading its
weights takes. assets/int8.c multiplies the activations as they are. It is built with the machine's
C compiler in a fraction of a second when it is first asked for, and kept; where there is none, or
what it built does not give the plain path's numbers, everything stays as it was.

Letters: M rows, N outputs of a Linear, K its inputs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from .files import cache_folder, replace_file
from .quantize import Int8Linear

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "assets" / "int8.c"
# -native: the function is for this processor only. Sums may be made in any order; what is not a
# number has to stay so.
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC"]
FEW = 2  # rows; from three on FBGEMM's blocks are as fast
SECONDS = 60  # that a compiler may take

Product = Callable[[Tensor, Int8Linear], Tensor]


class FewRows(nn.Module):
    """An int8 Linear that computes up to FEW rows with the C function, more with another module."""

    def __init__(self, linear: Int8Linear, product: Product, many: nn.Module) -> None:
        super().__init__()
        self.linear, self.many, self._product = linear, many, product

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        if x.numel() > FEW * x.shape[-1]:
            return self.many(x)
        return self._product(x, self.linear)


@functools.cache
def int8_product() -> Product | None:
    """The C function, built if need be; None, with a notice, where it cannot be had."""
    try:
        library = ctypes.CDLL(str(_built()))
        product = functools.partial(_call, library.int8_rows)
        linear = Int8Linear(
            torch.arange(-60, 60, dtype=torch.int8).view(3, 40), torch.rand(3), torch.rand(3)
        )
        x = torch.linspace(-1, 1, 80).view(2, 40)
        if not torch.allclose(product(x, linear), linear(x), atol=1e-3):
            raise OSError("what it built computes something else")
    except (OSError, AttributeError, subprocess.SubprocessError) as problem:
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)
        logger.warning("the int8 kernel is not used (%s): going on without it", reason)
        return None
    return product


def _call(function: Callable, x: Tensor, linear: Int8Linear) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(len(rows), len(linear.scale))
    tensors = (rows, linear.weight, linear.scale, linear.bias, y)
    function(
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
        *(ctypes.c_long(n) for n in (len(rows), y.shape[1], rows.shape[1])),
    )
    return y.view(*x.shape[:-1], -1)


def _built() -> Path:
    """The library for this source, compiler and processor, from the cache or made now.

    It is linked without an OpenMP of its own and finds torch's, so that both share their threads.
    Raises OSError or SubprocessError.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or os.name != "posix":
        raise OSError("there is no C compiler: install one, such as gcc")
    made_of = [SOURCE.read_text(), *FLAGS, compiler, platform.platform(), _processor()]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    path = cache_folder("kernels") / f"int8-{name}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, functools.partial(_compile, compiler))
    return path


def _compile(compiler: str, path: Path) -> None:
    object_file = path.with_suffix(".o")
    try:
        _run([compiler, *FLAGS, "-c", str(SOURCE), "-o", str(object_file)])
        _run([compiler, "-shared", str(object_file), "-o", str(path)])
    finally:
        object_file.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {' '.join(done.stderr.split())[:200]}")


def _processor() -> str:
    """What the processor can do: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
