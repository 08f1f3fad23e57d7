"""A model as decoding wants it: loaded, rounded if asked for, and laid out for this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from ..equivalences import swap
from ..formats.hugging_face import StoredLinear
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
) -> GPT2:
    """A model that only decodes, frozen, as fast as this machine can without waiting for anything.

    dtype is "auto", "int8" or one of precision.py's. With `compiled`, also what has to be compiled
    first: torch.compile on CUDA, a small C function for int8 on the CPU. Raises InputError for what
    is not there or not supported.
    """
    read = _reader(device, dtype, compiled=compiled)
    folder = model_folder(source)
    return at_one_moment(folder, MODEL_FILES, lambda: read(folder))


def load_with_tokenizer(
    source: str | Path,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    compiled: bool = False,
    accept: Callable[[Tokenizer], None] | None = None,
) -> tuple[GPT2, Tokenizer]:
    """A model as `load` gives it, and the tokenizer that lies beside it: both of one commit, and of
    one moment.

    `accept` is asked about the tokenizer before weights are downloaded, and may raise. Raises what
    `load` raises, and InputError when the two do not fit together.
    """
    read_model = _reader(device, dtype, compiled=compiled)
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
    device: torch.device | str, dtype: torch.dtype | str, *, compiled: bool
) -> Callable[[Path], GPT2]:
    """From a folder to a model ready to decode; what this machine lacks is said at once."""
    where = pick_device(device)
    number = pick_dtype("auto" if dtype == "int8" else dtype, where, training=False)

    def read(folder: Path) -> GPT2:
        model = GPT2.from_pretrained(folder, device=where, dtype=number, deferred=True)
        if dtype == "int8":
            quantize(model)
        if where.type == "cpu":
            pack(model, compiled=compiled)
            _leave_file(model)
        elif where.type == "cuda":
            fix_shapes(model, compiled=compiled)
        return model.requires_grad_(False)  # gradients of what was laid out would be wrong

    return read


def _leave_file(model: GPT2) -> None:
    """Read what could not be laid out anew: the file may change while the model is used."""

    def read(stored: StoredLinear) -> nn.Linear:
        linear = nn.Linear(stored.in_features, stored.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(stored.weight.contiguous()), stored.bias
        return linear

    for name, module in [*model.named_modules()]:
        if isinstance(module, StoredLinear):
            swap(model, name, read, "deferred weights")
