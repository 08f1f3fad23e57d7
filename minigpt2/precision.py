"""Where the computation runs and in which number format. Knows devices and dtypes, nothing of
models.

Weights, gradients and optimizer state are float32 always; bfloat16 and float16 are used inside
matrix products (autocast), and float16, whose small gradients would vanish, is trained with a loss
scaler.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: auto takes CUDA, else MPS, else the CPU. Raises InputError if it is
    not there.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device is {name!r}, allowed are auto, cpu, cuda, cuda:N and mps")
    if device.type == "cuda" and not has_cuda:
        raise InputError("--device is cuda, but there is no CUDA device: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = ", ".join(
            f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
        )
        raise InputError(f"--device is {name}, there are only {there}")
    if device.type == "mps" and not has_mps:
        raise InputError("--device is mps, but there is no Apple GPU for PyTorch: use --device cpu")
    return device


def describe_device(device: torch.device) -> str:
    """The device as a person would name it."""
    if device.type != "cuda":
        return device.type
    return f"{device} ({torch.cuda.get_device_name(device)})"


def pick_dtype(name: str, device: torch.device, *, training: bool) -> torch.dtype:
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
    if name not in supported:
        use = "training" if training else "sampling"
        raise InputError(
            f"--dtype is {name}, {use} on {device.type} supports {', '.join(supported)}"
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


def ran_out_of_memory(problem: BaseException) -> bool:
    """Whether this is the device's memory, or the machine's, having come to its end."""
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)
