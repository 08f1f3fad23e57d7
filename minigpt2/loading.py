"""A model as decoding wants it: loaded, rounded if asked for, and laid out for this machine."""

from __future__ import annotations

from pathlib import Path

from .graphs import fix_shapes
from .model import GPT2
from .packed import pack
from .precision import pick_device, pick_dtype
from .quantize import quantize


def load(
    source: str | Path, *, device: str = "auto", dtype: str = "auto", compiled: bool = False
) -> GPT2:
    """A model that only decodes, as fast as this machine can without waiting for anything.

    dtype is "auto", "int8" or one of precision.py's. With `compiled`, also what has to be compiled
    first: torch.compile on CUDA, a small C function for int8 on the CPU. Raises InputError for what
    is not there or not supported.
    """
    where = pick_device(device)
    number = pick_dtype("auto" if dtype == "int8" else dtype, where, training=False)
    model = GPT2.from_pretrained(source, device=where, dtype=number, mapped=True)
    if dtype == "int8":
        quantize(model)
    if where.type == "cpu":
        pack(model, compiled=compiled)
    elif where.type == "cuda":
        fix_shapes(model, compiled=compiled)
    return model
