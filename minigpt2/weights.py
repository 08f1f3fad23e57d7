"""Hugging Face model folders, read strictly and written so that their tools read them back.

Knows file layouts, tensor names and shapes, and nothing of attention: a model is any module whose
parameters carry the names of the published GPT-2 files. Those files store the Linear weights (in,
out), torch (out, in).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError, NotFoundError
from .files import describe, read_json, replace_file, write_json
from .hub import shard_names

WEIGHTS = "model.safetensors"
# wrappers that torch.compile, DDP and GPT2LMHeadModel put in front of the names
PREFIXES = re.compile(r"^(_orig_mod\.|module\.|transformer\.)+")
# causal masks that old files carry; anchored, so that attn.c_attn.bias stays
MASKS = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
HEAD = "lm_head.weight"
# dtypes as safetensors and torch name them
FLOATS = ("F32", "F16", "BF16", "F64")
FLOATS += ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")
# config.json fields that a reader of this file must find there; the others have GPT-2's defaults
REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


class StoredTensor(NamedTuple):
    """A tensor that lies in a file: shape and dtype are known, values are read when asked for."""

    shape: tuple[int, ...]
    dtype: str  # as the file names it
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a model folder under GPT-2's own names, without prefixes and stored masks."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> TensorFiles:
        """Find model.safetensors, its shards, or pytorch_model.bin (or shards), in this order.

        Raises NotFoundError without any of them, InputError for a damaged one.
        """
        tensors: dict[str, StoredTensor] = {}
        for path in _weight_files(folder):
            for stored_name, tensor in _stored_tensors(path).items():
                name = PREFIXES.sub("", stored_name)
                if MASKS.match(name):
                    continue
                if name in tensors:
                    raise InputError(
                        f"{path} holds {name} twice, once as {stored_name}: keep one of them"
                    )
                tensors[name] = tensor
        return cls(folder, tensors)


def read_config(folder: Path) -> dict:
    """The config.json of a model folder."""
    return read_json(folder / "config.json")


def read_config_fields(values: dict, config_class: type, where: str) -> dict[str, Any]:
    """The fields of `config_class` found in a Hugging Face config.json, checked; others do not
    concern GPT-2.

    Raises InputError naming the field for a missing size, a wrong type, or a feature that is not
    supported.
    """
    if values.get("model_type", "gpt2") != "gpt2":
        raise InputError(f"{where}: model_type is {values['model_type']!r}, supported is 'gpt2'")
    for unsupported in ("add_cross_attention", "quantization_config"):
        if values.get(unsupported):
            raise InputError(
                f"{where}: {unsupported} is set, which is not supported; use a plain GPT-2"
            )
    for name in REQUIRED:
        if name not in values:
            raise InputError(f"{where}: {name} is missing; a GPT-2 config.json states its sizes")
    known: dict[str, Any] = {}
    for field in fields(config_class):
        name = "n_positions" if field.name == "block_size" else field.name
        if name in values:
            known[field.name] = _typed(values[name], str(field.type), f"{where}: {name}")
    return known


def has_own_head(files: TensorFiles) -> bool:
    """Whether the files hold an output head that differs from the token embedding."""
    head, embedding = files.tensors.get(HEAD), files.tensors.get("wte.weight")
    if head is None or embedding is None:
        return False
    return not torch.equal(head.read(), embedding.read())


def stored_shape(name: str, parameter: Tensor) -> tuple[int, ...]:
    """The shape a parameter has in a file: Linear weights lie there as (in, out)."""
    shape = tuple(parameter.shape)
    return shape[::-1] if TRANSPOSED.search(name) else shape


def check(model: nn.Module, files: TensorFiles) -> None:
    """Raise InputError that lists every missing, extra, misshapen or non-float tensor, if there is
    one.
    """
    expected = {name: stored_shape(name, p) for name, p in model.named_parameters()}
    found = dict(files.tensors)
    if HEAD not in expected:
        found.pop(HEAD, None)  # the caller has seen that it equals the embedding
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of this model" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        shape, dtype = found[name].shape, found[name].dtype
        if shape != expected[name]:
            problems.append(f"{name} is {shape}, expected {expected[name]}")
        if dtype not in FLOATS:
            problems.append(f"{name} is {dtype}, expected {', '.join(FLOATS[:4])}")
    if problems:
        raise InputError(
            f"the weights in {files.folder} do not fit its config.json: "
            + "; ".join(sorted(problems))
        )


@torch.no_grad()
def fill(
    model: nn.Module,
    files: TensorFiles,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    mapped: bool = False,
) -> None:
    """Give a model built on "meta" its memory and the values of the files, one tensor at a time.

    The largest tensor goes first, while the others hold no memory yet: the peak stays near the
    model's own size. With `mapped`, what needs no cast and no other device stays in the file, and
    is read when it is used: for models that are soon changed into something else.
    """
    check(model, files)
    parameters = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    for name, parameter in parameters:
        stored = files.tensors[name].read()
        value = stored.T if TRANSPOSED.search(name) else stored
        if not mapped or value.dtype != dtype or torch.device(device).type != "cpu":
            # not nn.Module.to_empty: its empty_like of a meta tensor imports 400 modules (0.4 s)
            value = torch.empty(parameter.shape, dtype=dtype, device=device).copy_(value)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def save(model: nn.Module, config: dict, folder: Path, *, eot: int) -> None:
    """Write a model folder from a model: its parameters under their own names, and a config.json
    that fits them.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu")
        tensors[name] = (value.T if TRANSPOSED.search(name) else value).contiguous()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    described = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": dtype,
        **config,
    }
    save_tensors(tensors, {**described, "bos_token_id": eot, "eos_token_id": eot}, folder)


def save_tensors(
    tensors: dict[str, Tensor], config: dict, folder: Path, *, generation: Path | None = None
) -> None:
    """Write a model folder from tensors in the files' layout; each file is replaced in one step,
    weights last.

    generation_config.json is taken over from the path `generation` if there is one, else made from
    `config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if generation is not None and generation.is_file():
        ends = read_json(generation)
    else:
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ends)
    write_tensors(folder / WEIGHTS, tensors)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors on any device, and text beside them, into one safetensors file; an existing one
    is replaced in one step.

    Raises OSError when the disk does not take it.
    """
    on_cpu = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    replace_file(path, lambda temporary: _save_file(on_cpu, temporary, metadata or {}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the text that was written beside them.

    Raises NotFoundError, or InputError for a damaged file.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: is {path.parent} complete?")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise InputError(f"{path} is damaged ({describe(path)}): {problem}") from problem


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    try:
        # transformers refuses a file that does not say which framework's layout it has
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as problem:
        raise OSError(f"{path.parent} could not take the weights: {problem}") from problem


def _weight_files(folder: Path) -> list[Path]:
    for single, index in (
        (WEIGHTS, f"{WEIGHTS}.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise NotFoundError(f"{folder} holds no {WEIGHTS} and no pytorch_model.bin; it holds {found}")


def _shards(index: Path) -> list[Path]:
    paths = [index.parent / name for name in shard_names(index)]
    for path in paths:
        if not path.is_file():
            raise NotFoundError(f"{path} is missing, which {index.name} names: download it again")
    return paths


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    reader = _open_pickle if path.suffix == ".bin" else _open_safetensors
    try:
        return reader(path)
    except Exception as problem:  # torch.load alone raises six types for damaged files
        reason = f"{describe(path)}; {next(iter(str(problem).splitlines()), problem)}"
        if type(problem).__name__ == "UnpicklingError":  # torch's own text says to allow everything
            reason = f"{describe(path)}; only tensors are read from pickles, never code"
        raise InputError(f"{path} cannot be read as weights: {reason}") from problem


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        return {
            name: StoredTensor(tuple(part.get_shape()), part.get_dtype(), _reader(path, name))
            for name, part in slices.items()
        }


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # opened anew for each tensor: a file kept mapped would count its read pages on top of the
        # model's
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


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


def _typed(value: object, annotation: str, where: str) -> Any:
    allowed: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "int | None": (int, type(None)),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
    }
    if not isinstance(value, allowed[annotation]) or (
        isinstance(value, bool) and annotation != "bool"
    ):
        raise InputError(f"{where} is {value!r}, expected {annotation.replace('None', 'null')}")
    return value
