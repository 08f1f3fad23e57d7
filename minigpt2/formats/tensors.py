"""Tensors that lie in files: described at once, read one at a time, written in one step.

safetensors files (https://huggingface.co/docs/safetensors, "Format"), and pickles of tensors, of
which no code is ever run. Knows names, shapes and numbers, nothing of models.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, NotFoundError
from ..system.files import describe, replace_file

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"  # of a model, whole
# what weights may be stored as, by the names that safetensors gives it
FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2}
SIZES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # bytes
SHOWN = 3  # tensors of a kind that an error names


class StoredTensor(NamedTuple):
    """A tensor that lies in a file: shape and dtype are known, values are read when asked for."""

    shape: tuple[int, ...]
    dtype: str  # as the file names it
    read: Callable[[], Tensor]  # into memory of its own


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of a pickle whose name ends in .bin, by name.

    Raises InputError for a damaged file, and for a pickle of anything but tensors.
    """
    reader = _open_pickle if path.suffix == ".bin" else _open_safetensors
    try:
        return reader(path)
    except Exception as problem:  # torch.load alone raises six types for damaged files
        reason = f"{describe(path)}; {next(iter(str(problem).splitlines()), problem)}"
        if type(problem).__name__ == "UnpicklingError":  # torch's own text says to allow everything
            reason = f"{describe(path)}; only tensors are read from pickles, never code"
        raise InputError(f"{path} cannot be read as weights: {reason}") from problem


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the text that was written beside them.

    Raises NotFoundError, or InputError for a damaged file.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: is {path.parent} complete?")
    try:
        start, parts, notes = _header(path)
        stored = _described(path, start, parts)
        return {name: tensor.read() for name, tensor in stored.items()}, notes
    except (InputError, SafetensorError, OSError) as problem:
        raise InputError(f"{path} is damaged ({describe(path)}): {problem}") from problem


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors on any device, and text beside them, into one safetensors file; an existing one
    is replaced in one step.

    Raises OSError when the disk does not take it.
    """
    on_cpu = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    replace_file(path, lambda temporary: _save_file(on_cpu, temporary, metadata or {}))


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[tuple[int, ...], object, bool]],
    *,
    allowed: str = "floats",
) -> str:
    """How tensors, by name (shape, dtype, whether that is allowed), differ from the shapes that are
    expected: how many of each kind, and SHOWN of them. "" if they do not.
    """
    shapes = [
        f"{name} is {found[name][0]}, expected {expected[name]}"
        for name in expected
        if name in found and tuple(found[name][0]) != expected[name]
    ]
    dtypes = [
        f"{name} is {found[name][1]}, expected {allowed}"
        for name in expected
        if name in found and not found[name][2]
    ]
    kinds = [
        _counted([name for name in expected if name not in found], "missing"),
        _counted([name for name in found if name not in expected], "not part of this model"),
        _examples(shapes, "have another shape"),
        _examples(dtypes, "have another dtype"),
    ]
    return "; ".join(filter(None, kinds))


def check_range(name: str, value: Tensor, cast: Tensor) -> None:
    """Raise InputError for a finite number of a tensor that became infinite in another dtype."""
    kind = cast.dtype
    if torch.finfo(kind).max >= torch.finfo(value.dtype).max or not value.numel() or cast.is_meta:
        return
    if all(torch.isfinite(edge) for edge in torch.aminmax(cast)):  # which takes no memory
        return
    lost = cast.isinf().to(value.device) & value.isfinite()
    if lost.any():
        text = str(kind).removeprefix("torch.")
        raise InputError(
            f"{name} holds {value[lost][0].item():.6g}, which {text} cannot: it ends at "
            f"{torch.finfo(kind).max:.6g}; take a wider dtype"
        )


def _counted(names: Sequence[str], what: str) -> str:
    if len(names) <= SHOWN:
        return "; ".join(f"{name} is {what}" for name in sorted(names))
    return f"{len(names)} tensors are {what}, such as {', '.join(sorted(names)[:SHOWN])}"


def _examples(problems: Sequence[str], what: str) -> str:
    if len(problems) <= SHOWN:
        return "; ".join(sorted(problems))
    return f"{len(problems)} tensors {what}, such as: {'; '.join(sorted(problems)[:SHOWN])}"


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    try:
        # transformers refuses a file that does not say which framework's layout it has
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as problem:
        raise OSError(f"{path.parent} could not take the weights: {problem}") from problem


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    start, parts, _ = _header(path)
    return _described(path, start, parts)


def _described(path: Path, start: int, parts: dict[str, dict]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file whose values begin at `start`, by its header."""
    found = {}
    for name, part in parts.items():
        shape, dtype = tuple(part["shape"]), part["dtype"]
        read = _reader(path, name, shape, dtype, start + part["data_offsets"][0])
        found[name] = StoredTensor(shape, dtype, read)
    return found


def _header(path: Path) -> tuple[int, dict[str, dict], dict[str, str]]:
    """Where the values of a safetensors file begin, what it says of each tensor, and the text
    beside them: 8 bytes with the length of the header, the header, and then the values without gaps
    (https://huggingface.co/docs/safetensors, "Format").

    Read as any file is: the library maps it, and a file that is cut short meanwhile then ends the
    process. Raises InputError for a header that does not describe the file.
    """
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size else b""
    try:
        parts = json.loads(text)
        notes, end = parts.pop("__metadata__", {}), 0
        if not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("what stands beside its tensors is no text")
        for part in sorted(parts.values(), key=lambda part: part["data_offsets"]):
            start, stop = part["data_offsets"]
            # 3.0 and true, which are equal to whole numbers, are none
            if not all(type(n) is int and 0 <= n < 2**63 for n in (*part["shape"], start, stop)):
                raise ValueError("its sizes are not 0, 1, 2, ...")
            n_bytes = math.prod(part["shape"]) * SIZES[part["dtype"]]
            if (start, stop) != (end, end + n_bytes):
                raise ValueError("its tensors do not lie one behind the other")
            end = stop
        if 8 + length + end != size:
            raise ValueError(f"{8 + length + end:,} bytes are described")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise InputError(f"its header is not that of this file: {problem}") from problem
    return 8 + length, parts, notes


def _reader(
    path: Path, name: str, shape: tuple[int, ...], dtype: str, start: int
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if dtype not in FLOATS:  # no weights
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        # not mapped: a file that is cut short while its pages are read ends the process (SIGBUS),
        # and read pages would count on top of the model's
        count, kind = math.prod(shape), FLOATS[dtype]
        if not count:
            return torch.empty(shape, dtype=kind)
        data = _memory(count * kind.itemsize)
        with path.open("rb") as file:
            file.seek(start)
            if file.readinto(data) != len(data):
                raise InputError(f"{path} ends within {name} ({describe(path)}): is it complete?")
        return torch.frombuffer(data, dtype=kind).view(shape)

    return read


def _memory(n_bytes: int) -> mmap.mmap:
    """Memory that goes back to the system when it is let go: in the heap, what was read only to be
    transposed left holes of a sixth of the model.
    """
    if os.name == "nt":
        return mmap.mmap(-1, n_bytes)
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    # files from before torch 1.6 are no zip archives, and cannot be mapped
    zipped = zipfile.is_zipfile(path)
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(v, Tensor) for name, v in values.items()
    ):
        raise InputError("it holds something else than a dictionary of tensors")
    return {
        name: StoredTensor(tuple(v.shape), str(v.dtype), _copier(v)) for name, v in values.items()
    }


def _copier(value: Tensor) -> Callable[[], Tensor]:
    # pickled tensors may be views of each other, which safetensors does not write
    return lambda: value.detach().clone(memory_format=torch.contiguous_format)
