"""Where the computation runs and in which number format.

Weights, gradients and optimizer state are float32 always; bfloat16 and float16 are used inside
matrix products (autocast), and float16, whose small gradients would vanish, is trained with a loss
scaler. Knows devices and dtypes, nothing of models.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import refuse
from ..errors import OptionError
from .files import own_folder

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
DEVICES = "auto, cpu, cuda, cuda:N or mps"


def as_device(value: torch.device | str = "auto") -> torch.device:
    """A device, or the one with this name: auto takes CUDA, else MPS, else the CPU. Raises
    InputError if it is not there.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if value == "auto":
        value = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        raise refuse("device", value, DEVICES) from None
    if device.type == "cuda" and not has_cuda:
        raise OptionError("device is cuda, but there is no CUDA device: use device cpu", "device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = ", ".join(
            f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
        )
        raise OptionError(f"device is {value}, there are only {there}", "device")
    if device.type == "mps" and not has_mps:
        raise OptionError("device is mps, but PyTorch finds no Apple GPU: use device cpu", "device")
    return device


def as_dtype(value: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype, or the one with this name. Raises InputError for anything else."""
    dtype = by_name(value)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise refuse("dtype", value, "float32, bfloat16, float16 or float64")
    return dtype


def by_name(value: Any) -> Any:
    """The dtype with this name; what names none as it is."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return dtype if isinstance(dtype, torch.dtype) else value


def pick_device(name: torch.device | str = "auto") -> torch.device:
    """`as_device` for those that models compute on."""
    device = as_device(name)
    if device.type not in ("cpu", "cuda", "mps"):
        raise refuse("device", str(name), DEVICES)
    return device


def describe_device(device: torch.device) -> str:
    """The device as a person would name it."""
    if device.type != "cuda":
        return device.type
    return f"{device} ({torch.cuda.get_device_name(device)})"


def guard_compiler_cache() -> None:
    """Let torch.compile keep its code where nobody else can put theirs.

    torch takes /tmp/torchinductor_USER, which belongs to whoever makes it first, and runs what is
    in it. Where that is not this user's alone, this process gets a folder of its own, with a
    notice. A folder that TORCHINDUCTOR_CACHE_DIR names is left to who named it.
    """
    if COMPILER_CACHE in os.environ:
        return
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        problem = own_folder(Path(default_cache_dir()))
    except (ImportError, OSError) as unknown:
        problem = str(unknown)
    if problem:
        folder = tempfile.mkdtemp(prefix="minigpt2-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[COMPILER_CACHE] = folder
        logger.warning(
            "torch.compile compiles for this process alone (%s): set %s to a folder that only you "
            "can write to, and it is done once",
            problem,
            COMPILER_CACHE,
        )


def pick_dtype(name: torch.dtype | str, device: torch.device, *, training: bool) -> torch.dtype:
    """The dtype called `name`: auto takes bfloat16 on CUDA (float16 on cards without it), else
    float32.

    Raises InputError for what the device cannot do; for training that includes float16 anywhere but
    on CUDA.
    """
    supported = ["float32"]
    if device.type == "cuda":
        supported += ["bfloat16"] * torch.cuda.is_bf16_supported(including_emulation=False) + [
            "float16"
        ]
    elif device.type == "cpu":
        supported += ["bfloat16"] if training else ["bfloat16", "float16"]
    elif not training:
        supported += ["float16"]
    if name == "auto":
        name = supported[1] if device.type == "cuda" else "float32"
    name = str(name).removeprefix("torch.")
    if name not in supported:
        use = "training" if training else "sampling"
        raise OptionError(
            f"dtype is {name}, {use} on {device.type} supports {', '.join(supported)}", "dtype"
        )
    return DTYPES[name]


@dataclass(frozen=True)
class Precision:
    """How one training step computes: the autocast dtype, and the loss scaler that float16
    needs.
    """

    device: torch.device
    dtype: torch.dtype
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        # disabled, a scaler passes everything through: one path for all dtypes
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        object.__setattr__(self, "scaler", scaler)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute matrix products in `dtype`; for the forward pass only, never around backward."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def loss_scale(self) -> Tensor:
        """What the loss is multiplied by before the backward pass: 1, unless float16 needs more."""
        return self.scaler.scale(torch.ones((), device=self.device))

    def release_memory(self) -> None:
        """Give back what the allocator keeps of tensors that are gone."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def to_device(self, batch: Tensor) -> Tensor:
        """Move a batch; to CUDA from pinned memory, so that the copy overlaps with computation."""
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Whatever is seeded and drawn inside, the caller's random state is as before afterwards: the
    CPU's and the device's.
    """
    # torch.random.fork_rng does not know Apple's
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        if apple is not None:
            torch.mps.set_rng_state(apple)


def ran_out_of_memory(problem: BaseException) -> bool:
    """Whether this is the device's memory, or the machine's, having come to its end."""
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)
