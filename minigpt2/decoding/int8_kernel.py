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
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from ..equivalences import WAYS
from ..errors import InputError
from ..system.files import ASSETS, cache_folder, exposed, own_folder, replace_file
from .int8 import Int8Linear, probe, round_rows

logger = logging.getLogger(__name__)

SOURCE = ASSETS / "int8.c"
# -native: the function is for this processor only. Sums may be made in any order; what is not a
# number has to stay so.
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC"]
FEW = 2  # rows; from three on FBGEMM's blocks are as fast
SECONDS = 60  # that a compiler may take
DTYPES = (
    torch.float32,
    torch.int8,
    torch.float32,
    torch.float32,
    torch.float32,
)  # x w scale bias y

Product = Callable[[Tensor, Int8Linear], Tensor]


class _CompilerError(OSError):
    """The compiler says no."""


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
        product = functools.partial(_call, _library().int8_rows)
        if not _computes_the_same(product):
            raise OSError("what it built computes something else")
    except (OSError, AttributeError, subprocess.SubprocessError) as problem:
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)
        logger.warning("the int8 kernel is not used (%s): going on without it", reason)
        return None
    return product


def _computes_the_same(product: Product) -> bool:
    weight, bias, rows = probe()
    linear = Int8Linear(*round_rows(weight), bias)
    return all(WAYS["int8 kernel"].agrees(product(x, linear), linear(x)) for x in rows[:FEW])


def _call(function: Callable, x: Tensor, linear: Int8Linear) -> Tensor:
    """The C function reads memory as it lies. Raises InputError for anything but contiguous int8
    weights, float32 numbers, and the CPU: of a model that was moved or cast after it was made
    ready.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(len(rows), len(linear.scale))
    tensors = (rows, linear.weight, linear.scale, linear.bias, y)
    for tensor, dtype in zip(tensors, DTYPES):
        if tensor is not None and not (
            tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()
        ):
            raise InputError(
                f"the int8 kernel got {tensor.dtype} on {tensor.device} with strides "
                f"{tensor.stride()}, it takes contiguous {dtype} on the CPU: load the model anew"
            )
    function(
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
        *(ctypes.c_long(n) for n in (len(rows), y.shape[1], rows.shape[1])),
    )
    return y.view(*x.shape[:-1], -1)


def _library() -> ctypes.CDLL:
    """The library for this source, compiler and processor, from the cache or made now.

    Whoever can write what is loaded here can do all that the user can. So what lies where others
    can write is not loaded: the library is built where only the user can write, and not kept.
    Raises OSError or SubprocessError.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or os.name != "posix":
        raise OSError("there is no C compiler: install one, such as gcc")
    made_of = [SOURCE.read_text(), *FLAGS, compiler, platform.platform(), _processor()]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    path = cache_folder("kernels") / f"int8-{name}.so"
    if (problem := _keep(path, compiler)) is None:
        return ctypes.CDLL(str(path.absolute()))
    logger.warning(
        "the int8 kernel is built for this process alone (%s): set MINIGPT2_CACHE to a folder that "
        "only you can write to, and it is built once",
        problem,
    )
    with tempfile.TemporaryDirectory(prefix="minigpt2-") as folder:
        if problem := exposed(Path(folder)):
            raise OSError(f"{problem}: set TMPDIR to another folder")
        return ctypes.CDLL(str(_compile(compiler, Path(folder))))


def _keep(path: Path, compiler: str) -> str | None:
    """See to it that the library is in the cache; why it cannot be kept or trusted there."""
    try:
        if problem := own_folder(path.parent):
            return problem
        if path.exists():
            if path.is_file() and (problem := exposed(path)) is None:
                return None
            logger.warning("%s: building the int8 kernel anew", problem or f"{path} is no file")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            built = _compile(compiler, Path(folder))
            replace_file(path, lambda temporary: _copy(built, temporary), mode=0o600)
    except _CompilerError:
        raise
    except OSError as problem:
        return f"{path.parent}: {problem.strerror or problem}"
    return None


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _compile(compiler: str, folder: Path) -> Path:
    """The library, built in a folder of the user's, its compiler's own temporary files as well."""
    object_file, library = folder / "int8.o", folder / "int8.so"
    _run([compiler, *FLAGS, "-c", str(SOURCE), "-o", str(object_file)], folder)
    # linked without an OpenMP of its own, it finds torch's, so that both share their threads
    _run([compiler, "-shared", str(object_file), "-o", str(library)], folder)
    library.chmod(0o600)
    return library


def _run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=SECONDS, env=environment
    )
    if done.returncode:
        raise _CompilerError(f"{command[0]} failed: {' '.join(done.stderr.split())[:200]}")


def _processor() -> str:
    """What the processor can do: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
