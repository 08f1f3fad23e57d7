"""Hugging Face model folders, read strictly and written so that their tools read them back.

Knows file layouts, tensor names and shapes, and nothing of attention: a model is any module whose
parameters carry the names of the published GPT-2 files. Those files store the Linear weights (in,
out), torch (out, in). A folder with LoRA adapters is a model folder whose tensors are computed: the
base's, with the adapters' products added as they are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import torch.nn as nn
from torch import Tensor

from ..arguments import shown
from ..equivalences import swap
from ..errors import InputError, NotFoundError
from ..hub.folders import MODEL_FILES, model_folder, shard_names
from ..system.files import at_one_moment, read_json, write_json
from .bases import base_folder, is_adapter
from .llama_cpp import ARCHITECTURES
from .peft import Adapter, WeightsDigest
from .tensors import (
    FLOATS,
    PICKLE,
    WEIGHTS,
    StoredTensor,
    check_range,
    stored_tensors,
    tensor_problems,
    write_tensors,
)

T = TypeVar("T")
INDEX = ".index.json"
# wrappers that torch.compile, DDP and GPT2LMHeadModel put in front of the names
PREFIXES = re.compile(r"^(_orig_mod\.|module\.|transformer\.)+")
# causal masks that old files carry; anchored, so that attn.c_attn.bias stays
MASKS = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
HEAD = "lm_head.weight"
LAYER = re.compile(r"^h\.(\d{1,9})\.")
# the tensor, and which of its axes, that has a size of the model
SIZE_FROM = {
    "vocab_size": ("wte.weight", 0),
    "n_embd": ("wte.weight", 1),
    "block_size": ("wpe.weight", 0),
    "n_inner": ("h.0.mlp.c_fc.bias", 0),
}
# config.json fields that a reader of this file must find there; the others have GPT-2's defaults
REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# other names that transformers reads them by
ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
# what a config field of some type may be in Python once JSON is read, and what that is called
JSON_TYPES: dict[object, tuple[tuple[type, ...], str]] = {
    int: ((int,), "int"),
    int | None: ((int, type(None)), "int | null"),
    float: ((int, float), "float"),
    bool: ((bool,), "bool"),
    str: ((str,), "str"),
}


class StoredLinear(nn.Linear):
    """A Linear that reads its matrix from the file whenever it is asked for it, and keeps none."""

    def __init__(
        self, linear: nn.Module, stored: StoredTensor, transposed: bool, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        assert isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # without memory: its size, for whoever takes the largest first
        self.register_buffer("shape", torch.empty(linear.weight.shape, device="meta"))
        self._stored, self._transposed, self._dtype = stored, transposed, dtype
        self.stored_dtype = FLOATS.get(stored.dtype)  # None for what a pickle calls otherwise

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(out, in)."""
        return self.as_stored().to(self._dtype)

    def as_stored(self) -> Tensor:
        """(out, in), in the precision of the file."""
        value = self._stored.read()
        return value.T if self._transposed else value


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a model folder under GPT-2's own names, without prefixes and stored masks."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @property
    def path(self) -> Path:
        """The file that holds them, or the index of the files."""
        return _weight_file(self.folder)

    @classmethod
    def open(cls, folder: Path) -> TensorFiles:
        """Find model.safetensors, its shards, or pytorch_model.bin (or shards), in this order.

        Raises NotFoundError without any of them, InputError for a damaged one.
        """
        tensors: dict[str, StoredTensor] = {}
        for path in _weight_files(folder):
            for stored_name, tensor in stored_tensors(path).items():
                name = PREFIXES.sub("", stored_name)
                if MASKS.match(name):
                    continue
                if name in tensors:
                    raise InputError(
                        f"{path} holds {name} twice, once as {stored_name}: keep one of them"
                    )
                tensors[name] = tensor
        return cls(folder, tensors)

    def with_own_head(self) -> TensorFiles:
        """The same, and a head that is the token embedding where they hold none."""
        if HEAD in self.tensors or "wte.weight" not in self.tensors:
            return self
        return replace(self, tensors={**self.tensors, HEAD: self.tensors["wte.weight"]})

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise InputError that counts and gives examples of missing, extra, misshapen and
        non-float tensors, if there are any.
        """
        found = dict(self.tensors)
        if HEAD not in expected:
            found.pop(HEAD, None)  # the caller has seen that it equals the embedding
        floats = (*FLOATS, *map(str, FLOATS.values()))
        problems = tensor_problems(
            expected,
            {
                name: (tensor.shape, tensor.dtype, tensor.dtype in floats)
                for name, tensor in found.items()
            },
            allowed=", ".join(FLOATS),
        )
        if problems:
            raise InputError(f"the weights in {self.folder} do not fit its config.json: {problems}")

    def read_all(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, which have so many numbers, one at a time.

        The largest first, while the others hold no memory yet.
        """
        yield from self.read_in_order(sorted(sizes, key=lambda name: -sizes[name]))

    def read_in_order(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, one at a time, in this order."""
        for name in names:
            yield name, self.tensors[name].read()


@dataclass(frozen=True)
class FoldedFiles(TensorFiles):
    """The tensors of a model with an adapter folded into them, each computed when it is read."""

    base: TensorFiles
    adapter: Adapter
    dtype: torch.dtype  # float32 or wider: what is rounded further is rounded once, after folding

    @classmethod
    def over(cls, base: TensorFiles, adapter: Adapter, dtype: torch.dtype) -> FoldedFiles:
        """An adapter on the tensors of its base, which may be computed themselves."""

        def computed(name: str, stored: StoredTensor) -> StoredTensor:
            return stored._replace(read=lambda: _folded(adapter, name, stored.read().to(dtype)))

        tensors = {name: computed(name, stored) for name, stored in base.tensors.items()}
        return cls(base.folder, tensors, base, adapter, dtype)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise InputError for tensors of the base, or of the adapter, that do not fit."""
        self.base.check(expected)
        linears = {name: shape[::-1] for name, shape in expected.items() if TRANSPOSED.search(name)}
        by_name = {name.removesuffix(".weight"): shape for name, shape in linears.items()}
        self.adapter.check(by_name, expected["wte.weight"])
        if HEAD in expected and self.adapter.config.token_ids:
            raise InputError(
                f"{self.adapter.folder} trains token embeddings of a model with an output head of "
                "its own, supported are heads that are the embedding"
            )

    def read_all(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, one at a time, in the order given, which is the model's.

        The base is known by its SHA-256 only when all was read: then InputError for another one
        than the adapter was trained on.
        """
        yield from self.read_in_order(sizes)

    def read_in_order(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As `read_all`: the digest is that of the very values that are folded, never of values
        that were read another time.
        """
        digest = WeightsDigest()
        for name, stored in self.base.read_in_order(names):
            value = stored.to(self.dtype)
            digest.add(name, _turned(name, value))
            yield name, _folded(self.adapter, name, value)
        self.adapter.check_base(digest.hexdigest())


@dataclass(frozen=True)
class ModelFolder:
    """Where a model lies: the folder of config.json and weights, and the folders of the adapters
    that are folded into them, one after the other.
    """

    path: Path
    adapters: tuple[Path, ...] = ()

    @classmethod
    def without_adapters(cls, folder: Path) -> ModelFolder:
        """A folder that holds a model; InputError for one that holds adapters."""
        if is_adapter(folder):
            raise InputError(
                f"{folder} holds adapters and no model: write one with them folded in, by "
                "convert_weights.py"
            )
        return cls(folder)

    def open(self, dtype: torch.dtype) -> TensorFiles:
        """The model's tensors; adapters are folded in float32, or in `dtype` if that is wider.

        Raises NotFoundError or InputError for what is missing or damaged.
        """
        wide = torch.promote_types(dtype, torch.float32)
        files = TensorFiles.open(self.path)
        for folder in self.adapters:
            files = FoldedFiles.over(files, Adapter.read(folder), wide)
        return files


def read_model(source: str | Path, revision: str | None, read: Callable[[ModelFolder], T]) -> T:
    """What `read` makes of the model of a Hub id or a folder, downloaded if need be, all of one
    moment: where a file of the model or of an adapter on it changes meanwhile, it reads again.

    Inside, nothing may be left to be read later. Raises what `model_folder`, `bases.base_folder`
    and `read` raise, and UnsettledError for files that never rest.
    """
    return _read_at_one_moment(model_folder(source, revision), (), read)


def _read_at_one_moment(
    folder: Path, adapters: tuple[Path, ...], read: Callable[[ModelFolder], T]
) -> T:
    def once() -> T:
        if not is_adapter(folder):
            return read(ModelFolder(folder, adapters))
        return _read_at_one_moment(base_folder(folder), (folder, *adapters), read)

    return at_one_moment(folder, MODEL_FILES, once)


def config_folder(folder: Path) -> Path:
    """The folder whose config.json tells the shape of a folder's model: itself, or that of the
    model under its adapters, of which no weights are downloaded.
    """
    while is_adapter(folder):
        folder = base_folder(folder, with_weights=False)
    return folder


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
        raise InputError(
            f"{where}: model_type is {shown(values['model_type'])}, supported is 'gpt2'"
        )
    for unsupported in ("add_cross_attention", "quantization_config"):
        if values.get(unsupported):
            raise InputError(
                f"{where}: {unsupported} is set, which is not supported; use a plain GPT-2"
            )
    for name in REQUIRED:
        other = ALIASES.get(name)
        if name not in values and other not in values:
            raise InputError(f"{where}: {name} is missing; a GPT-2 config.json states its sizes")
        if name in values and values.get(other, values[name]) != values[name]:
            raise InputError(
                f"{where}: {name} is {shown(values[name])} and {other}, which is the same, is "
                f"{shown(values[other])}: leave out one of them"
            )
    known: dict[str, Any] = {}
    types = get_type_hints(config_class)
    for field in fields(config_class):
        name = name_in(values, field.name)
        if name in values:
            known[field.name] = _typed(values[name], types[field.name], f"{where}: {name}")
    return known


def hf_name(field: str) -> str:
    """What Hugging Face's config.json calls a field of the configuration."""
    return "n_positions" if field == "block_size" else field


def name_in(values: Mapping[str, Any], field: str) -> str:
    """What this config.json calls a field of the configuration."""
    name = hf_name(field)
    other = ALIASES.get(name, name)
    return other if other in values and name not in values else name


def with_all_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with its sizes under GPT-2's own names, too, and under the n_ctx of older
    files: llama.cpp's converter reads no others.
    """
    sizes = {name: values[name_in(values, name)] for name in REQUIRED}
    more = {"architectures": ARCHITECTURES, "n_ctx": sizes["n_positions"]}
    return {**more, **sizes, **values}


def check_sizes(
    sizes: Mapping[str, Any], files: TensorFiles, where: str, values: Mapping[str, Any]
) -> None:
    """Raise InputError for sizes, by their own names, that are not those of the tensors in the
    files; what is missing or invalid is for other checks. `values` is what config.json says.

    Compares numbers only, so that a wrong one costs no time and no memory.
    """
    found = {int(match[1]) for name in files.tensors if (match := LAYER.match(name))}
    problems = []
    if found and max(found) + 1 != sizes["n_layer"] > 0:
        name = name_in(values, "n_layer")
        problems.append(f"{name} is {sizes['n_layer']:,}, there are layers 0 to {max(found):,}")
    for name, (tensor, axis) in SIZE_FROM.items():
        shape = files.tensors[tensor].shape if tensor in files.tensors else ()
        size = sizes.get(name)
        if size is not None and axis < len(shape) and shape[axis] != size > 0:
            problems.append(f"{name_in(values, name)} is {size:,}, {tensor} is {shape}")
    if problems:
        raise InputError(f"{where} does not fit {files.path}: {'; '.join(problems)}")


def check_head(files: TensorFiles, where: str) -> None:
    """Raise InputError if the files lack the output head of an untied model."""
    if HEAD not in files.tensors and "wte.weight" in files.tensors:
        raise InputError(
            f"{where}: tie_word_embeddings is false, but {files.path} holds no {HEAD}: set it to "
            "true if the head is the token embedding, or add the head"
        )


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each weight in a model folder, by GPT-2's own names; what is no float, which
    fits no model, counts as float32.
    """
    kinds = {**FLOATS, **{str(kind): kind for kind in FLOATS.values()}}
    tensors = TensorFiles.open(folder).tensors
    return {name: kinds.get(stored.dtype, torch.float32) for name, stored in tensors.items()}


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
    """Raise InputError for tensors that are missing, extra, misshapen or no floats."""
    files.check({name: stored_shape(name, p) for name, p in model.named_parameters()})


@torch.no_grad()
def fill(
    model: nn.Module,
    files: TensorFiles,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    deferred: bool = False,
) -> None:
    """Give a model built on "meta" its memory and the values of the files, one tensor at a time.

    The largest tensor goes first, while the others hold no memory yet: the peak stays near the
    model's own size. With `deferred`, Linears become `StoredLinear`: for models whose Linears are
    soon changed into something else.
    """
    check(model, files)
    parameters = dict(model.named_parameters())
    if deferred:
        assert not isinstance(files, FoldedFiles), "the base of adapters is checked as it is read"
        for name in [name for name in parameters if TRANSPOSED.search(name) or name == HEAD]:
            del parameters[name]
            _defer(model, name, files.tensors[name], dtype)
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    for name, stored in files.read_all(sizes):
        value = _turned(name, stored)
        here = value.dtype == dtype and torch.device(device).type == "cpu"
        if not here or not value.is_contiguous():
            # not nn.Module.to_empty: its empty_like of a meta tensor imports 400 modules (0.4 s)
            cast = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
            check_range(f"{files.path}: {name}", value, cast)
            value = cast
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def _defer(model: nn.Module, name: str, stored: StoredTensor, dtype: torch.dtype) -> None:
    """Let a Linear read its matrix, of this name, when it is asked for it."""

    def reading(linear: nn.Module) -> StoredLinear:
        return StoredLinear(linear, stored, TRANSPOSED.search(name) is not None, dtype)

    swap(model, name.removesuffix(".weight"), reading, "deferred weights")


def _turned(name: str, value: Tensor) -> Tensor:
    """A tensor as the model has it, from how it lies in a file, or the other way round."""
    return value.T if TRANSPOSED.search(name) else value


def _folded(adapter: Adapter, name: str, value: Tensor) -> Tensor:
    """A tensor as it lies in a file, with the adapter of its Linear in it, if there is one."""
    weight = adapter.folded(name.removesuffix(".weight"), _turned(name, value))
    return _turned(name, weight)


def save(model: nn.Module, config: dict, folder: Path) -> None:
    """Write a model folder from a model: its parameters under their own names, and a config.json
    that fits them.
    """
    tensors = {
        name: _turned(name, parameter.detach().to("cpu")).contiguous()
        for name, parameter in model.named_parameters()
    }
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    described = {
        "architectures": ARCHITECTURES,
        "model_type": "gpt2",
        "dtype": dtype,
        **config,
    }
    save_tensors(tensors, described, folder)


def save_tensors(
    tensors: dict[str, Tensor], config: dict, folder: Path, *, generation: dict | None = None
) -> None:
    """Write a model folder from tensors in the files' layout; each file is replaced in one step,
    weights last.

    generation_config.json holds `generation` if it is given, else what `config` says of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = with_all_names(config)
    if generation is None:
        roles = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {name: config[name] for name in roles if config.get(name) is not None}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_tensors(folder / WEIGHTS, tensors)


def _weight_files(folder: Path) -> list[Path]:
    path = _weight_file(folder)
    return _shards(path) if path.name.endswith(INDEX) else [path]


def _weight_file(folder: Path) -> Path:
    """The file of all weights, or the index of several, that a folder is read by."""
    for name in (WEIGHTS, PICKLE):
        if (folder / name).exists():
            return folder / name
        if (folder / f"{name}{INDEX}").is_file():
            return folder / f"{name}{INDEX}"
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise NotFoundError(f"{folder} holds no {WEIGHTS} and no {PICKLE}; it holds {found}")


def _shards(index: Path) -> list[Path]:
    paths = [index.parent / name for name in shard_names(index)]
    for path in paths:
        if not path.is_file():
            raise NotFoundError(f"{path} is missing, which {index.name} names: download it again")
    return paths


def _typed(value: object, annotation: object, where: str) -> Any:
    allowed, name = JSON_TYPES[annotation]
    if not isinstance(value, allowed) or (isinstance(value, bool) and annotation is not bool):
        raise InputError(f"{where} is {shown(value)}, expected {name}")
    return value
