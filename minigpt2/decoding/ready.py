"""A model as decoding wants it: loaded, rounded if asked for, and laid out for this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..arguments import require
from ..hub.folders import MODEL_FILES, model_folder, revision_of
from ..model import GPT2
from ..system.files import at_one_moment
from ..system.precision import pick_device, pick_dtype
from ..tokenizer import Tokenizer
from .cpu_layout import pack
from .cuda_graphs import fix_shapes
from .int8 import quantize
from .text import check_fits


def load(
    source: str | Path,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    compiled: bool = False,
    cpu_routine: str = "auto",
) -> GPT2:
    """A model that only decodes, frozen, as fast as this machine can without waiting for anything.

    dtype is "auto", "int8" or one of precision.py's. With `compiled`, also what has to be compiled
    first: torch.compile on CUDA, decode.c on the CPU. `cpu_routine` says how float32 matrices are
    multiplied on the CPU: "auto" is what a short measurement chose there, see routines.py. Raises
    InputError for what is not there or not supported.
    """
    read = _reader(device, dtype, compiled, cpu_routine)
    folder = model_folder(source)
    return at_one_moment(folder, MODEL_FILES, lambda: read(folder))


def load_with_tokenizer(
    source: str | Path,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    compiled: bool = False,
    cpu_routine: str = "auto",
    accept: Callable[[Tokenizer], None] | None = None,
) -> tuple[GPT2, Tokenizer]:
    """A model as `load` gives it, and the tokenizer that lies beside it: both of one commit, and of
    one moment.

    `accept` is asked about the tokenizer before weights are downloaded, and may raise. Raises what
    `load` raises, and InputError when the two do not fit together.
    """
    read_model = _reader(device, dtype, compiled, cpu_routine)
    folder = model_folder(source, with_weights=accept is None)
    if accept is not None:
        accept(Tokenizer.of_model(source, folder))
        folder = model_folder(source, revision_of(source, folder))

    def read() -> tuple[GPT2, Tokenizer]:
        tokenizer = Tokenizer.of_model(source, folder)
        if accept is not None:
            accept(tokenizer)
        model = read_model(folder)
        check_fits(tokenizer, model)
        return model, tokenizer

    return at_one_moment(folder, MODEL_FILES, read)


def _reader(
    device: torch.device | str, dtype: torch.dtype | str, compiled: bool, cpu_routine: str
) -> Callable[[Path], GPT2]:
    """From a folder to a model ready to decode; what this machine lacks is said at once."""
    where = pick_device(device)
    number = pick_dtype("auto" if dtype == "int8" else dtype, where, training=False)
    has_routines = where.type == "cpu" and number == torch.float32 and dtype != "int8"
    kind = "int8" if dtype == "int8" else str(number).removeprefix("torch.")
    allowed = f"auto for {kind} on {where.type}: others are for float32 on the CPU"
    require("cpu_routine", cpu_routine, has_routines or cpu_routine == "auto", allowed)
    allowed = "auto beside compiled, by which products are made in C"
    require("cpu_routine", cpu_routine, not compiled or cpu_routine == "auto", allowed)

    def read(folder: Path) -> GPT2:
        model = GPT2.from_pretrained(folder, device=where, dtype=number, deferred=True)
        if dtype == "int8":
            quantize(model)
        if where.type == "cpu":
            pack(model, compiled=compiled, cpu_routine=cpu_routine)
        elif where.type == "cuda":
            fix_shapes(model, compiled=compiled)
        return model.requires_grad_(False)  # gradients of what was laid out would be wrong

    return read
