"""LoRA adapters in files, as Hugging Face's peft writes and reads them.

An adapter folder holds adapter_config.json (size, strength, and which model it lies on) and
adapter_model.safetensors (the two matrices of each Linear that has an adapter). Ours say beside the
tensors, where peft does not look, which weights they were trained on. Knows names, shapes and
numbers, and no modules: a model is known by the names and the shapes of its Linears.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import check_types, require, shown
from ..errors import InputError, OptionError
from ..system.files import read_json, write_json
from .bases import CONFIG
from .tensors import read_tensors, tensor_problems, write_tensors

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # c_attn: q, k and v in one
LINEAR = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
ROOT = "transformer."  # before our names in GPT2LMHeadModel
PREFIX = f"base_model.model.{ROOT}"  # and in peft's wrapper of it
DIGEST = "base_sha256"  # beside the tensors, where peft does not look
ROWS = f"{PREFIX}wte.token_adapter.trainable_tokens_delta"  # the rows themselves, as peft names it
ROW_IDS = "trainable_token_indices"
HASHED = 2**14  # numbers at a time: copies of whole matrices would leave holes in the heap

# adapter_config.json: fields that must have one of these values, the first where they are missing
ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others start by changing the base
}
TYPES = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float), "target_modules": list}
READ = (*TYPES, "use_rslora", "base_model_name_or_path", "revision", ROW_IDS)
# these do not change what a trained adapter computes
IDLE = ("auto_mapping", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version")
IDLE += ("qalora_group_size",)


@dataclass(frozen=True)
class LoRAConfig:
    """Size and strength of the adapters, and the ends of the names of the Linears that have one.

    Raises InputError for values that make no adapter.
    """

    rank: int
    alpha: float
    dropout: float = 0.0  # of what goes into A, while training
    targets: tuple[str, ...] = TARGETS
    token_ids: tuple[int, ...] = ()  # whose embeddings are trained, too

    def __post_init__(self) -> None:
        check_types(self)
        require("rank", self.rank, 1 <= self.rank < 2**31, "1 or more (and below 2^31)")
        # an int may be larger than any float
        require("alpha", self.alpha, 0 < self.alpha <= sys.float_info.max, "above 0")
        require("dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1")

    @property
    def scale(self) -> float:
        """What multiplies the product of the two matrices."""
        return self.alpha / self.rank

    @classmethod
    def from_peft(cls, values: dict, *, where: str) -> LoRAConfig:
        """Read the dictionary of an adapter_config.json; InputError names `where` and the field at
        fault.
        """
        _check_fields({"lora_dropout": 0.0, **values}, where)
        rank, alpha = values["r"], values["lora_alpha"]
        dropout, targets = values.get("lora_dropout", 0.0), tuple(values["target_modules"])
        token_ids = _token_ids(values.get(ROW_IDS), where)
        try:
            config = cls(rank, alpha, dropout, targets, token_ids)
            # rank-stabilised LoRA (arXiv:2312.03732) multiplies with alpha / sqrt(r)
            return replace(config, alpha=alpha * rank**0.5) if values.get("use_rslora") else config
        except OptionError as problem:
            peft_name = {"rank": "r"}.get(problem.names[0], f"lora_{problem.names[0]}")
            complaint = str(problem).removeprefix(problem.names[0])
            raise InputError(f"{where}: {peft_name}{complaint}") from problem

    def to_peft(self, base_model: str) -> dict:
        """The same as adapter_config.json, for adapters of the model with this Hub id or folder."""
        rows = {ROW_IDS: {"wte": list(self.token_ids)}} if self.token_ids else {}
        return {
            **rows,
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "bias": "none",
            "fan_in_fan_out": True,  # transformers' GPT-2 keeps its matrices (in, out)
            "inference_mode": True,
        }


@dataclass(frozen=True)
class Adapter:
    """The adapter in a folder: what its two files say."""

    folder: Path
    config: LoRAConfig
    base_model: object  # Hub id or folder, as the file names it
    tensors: Mapping[str, Tensor]
    base_sha256: str | None  # of the weights it was trained on; peft does not note it

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Raises NotFoundError for a missing file, InputError for a damaged one and for what is not
        supported.
        """
        values = read_json(folder / CONFIG)
        config = LoRAConfig.from_peft(values, where=str(folder / CONFIG))
        tensors, notes = read_tensors(folder / WEIGHTS)
        base_model = values.get("base_model_name_or_path")
        return cls(folder, config, base_model, tensors, notes.get(DIGEST))

    def check(
        self, linears: Mapping[str, tuple[int, ...]], embedding: tuple[int, ...]
    ) -> list[str]:
        """Which of a model's Linears, by name with their (out, in), have an adapter; `embedding` is
        the shape (V, C) of the token embedding.

        Raises InputError for targets or tensors that do not fit.
        """
        names = targeted(self.config, linears, where=str(self.folder / CONFIG))
        expected = {}
        for name in names:
            n_out, n_in = linears[name]
            expected[_key(name, "A")] = (self.config.rank, n_in)
            expected[_key(name, "B")] = (n_out, self.config.rank)
        if ids := self.config.token_ids:
            expected[ROWS] = (len(ids), embedding[1])
            if max(ids) >= embedding[0]:
                raise InputError(
                    f"{self.folder / CONFIG}: {ROW_IDS} has {max(ids)}, the base has "
                    f"{embedding[0]} rows: give it the rows that were added, or its grown base"
                )
        found = {
            key: (tuple(value.shape), value.dtype, value.is_floating_point())
            for key, value in self.tensors.items()
        }
        if problems := tensor_problems(expected, found):
            path = self.folder / WEIGHTS
            raise InputError(f"{path} does not fit its {CONFIG} and this model: {problems}")
        return names

    def check_base(self, found: str) -> None:
        """Raise InputError if weights of this SHA-256 are not those it was trained on; warn where
        that is not known.
        """
        wanted = self.base_sha256
        if wanted is None:
            logger.warning(
                "%s does not say which weights it was trained on: not checked", self.folder
            )
        elif found != wanted:
            raise InputError(
                f"{self.folder} was trained on {self.base_model} with weights of SHA-256 "
                f"{wanted[:16]}..., this model's have {found[:16]}...: load the adapter onto the "
                "base it was trained on"
            )

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the Linear of this name."""
        return self.tensors[_key(name, "A")], self.tensors[_key(name, "B")]

    @property
    def rows(self) -> Tensor:
        """The embeddings (n, C) of config.token_ids."""
        return self.tensors[ROWS]

    def folded(self, name: str, weight: Tensor) -> Tensor:
        """The matrix (out, in) of the Linear of this name with its adapter in it, if it has one;
        "wte" and the head that it is have the rows of the tokens that were trained.
        """
        if name in ("wte", "lm_head") and self.config.token_ids:
            ids = torch.tensor(self.config.token_ids, device=weight.device)
            return weight.index_copy(0, ids, self.rows.to(weight))
        if _key(name, "A") not in self.tensors:
            return weight
        return folded(weight, *self.matrices(name), self.config.scale)


class WeightsDigest:
    """SHA-256 of the names, shapes and float32 values of weights, in the model's own order.

    The same on any device and in float64; 16-bit floats are other weights.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, name: str, weight: Tensor) -> None:
        """One more weight, in the shape that it has in the model."""
        self._sha256.update(f"{name} {tuple(weight.shape)}\n".encode())
        matrix = torch.atleast_1d(weight.detach())
        for rows in matrix.split(max(1, HASHED * len(matrix) // max(1, matrix.numel()))):
            values = rows.to("cpu", torch.float32).contiguous()
            self._sha256.update(values.numpy().data)

    def hexdigest(self) -> str:
        """Of all that was added so far."""
        return self._sha256.hexdigest()


def folded(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W (out, in) + scale * B (out, r) A (r, in) in the dtype of W, the sum taken in float32 or
    wider.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    # in one piece of memory: others beside it would leave holes in the heap as large as the model
    product = b.to(wide) @ a.to(wide)
    return product.mul_(scale).add_(weight).to(weight.dtype)


def write_adapter(
    folder: Path,
    config: LoRAConfig,
    matrices: Mapping[str, tuple[Tensor, Tensor]],
    *,
    rows: Tensor | None = None,
    base_model: str,
    base_sha256: str,
) -> None:
    """Write the matrices (A, B) of Linears, by name, into a folder as peft does, for the model with
    this Hub id or folder and weights of this SHA-256; `rows` are the embeddings of
    config.token_ids.

    Raises OSError when the disk does not take the files.
    """
    tensors = {}
    for name, (a, b) in matrices.items():
        tensors[_key(name, "A")], tensors[_key(name, "B")] = a, b
    if rows is not None:
        tensors[ROWS] = rows
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config.to_peft(base_model))
    write_tensors(folder / WEIGHTS, tensors, {DIGEST: base_sha256})


def targeted(config: LoRAConfig, linears: Iterable[str], where: str = "LoRA") -> list[str]:
    """The Linears, of a model's, that the targets name, by peft's rule; InputError if one names
    none.
    """
    found = set()
    linears = [name for name in linears if LINEAR.fullmatch(name)]
    for target in config.targets:
        hits = {name for name in linears if f".{ROOT}{name}".endswith(f".{target}")}
        if not hits:
            known = ", ".join(TARGETS)
            raise InputError(
                f"{where}: target_modules names {shown(target)}, supported are {known}"
            )
        found |= hits
    return [name for name in linears if name in found]


def _token_ids(value: object, where: str) -> tuple[int, ...]:
    """The ids whose embeddings are trained: a list, or that of GPT-2's token embedding by name."""
    ids = value.get("wte") if isinstance(value, dict) and value.keys() == {"wte"} else value
    if ids in (None, {}, []):
        return ()
    if not (isinstance(ids, list) and all(type(id) is int and id >= 0 for id in ids)):
        raise InputError(f"{where}: {ROW_IDS} is {value!r:.60}, supported are token ids of wte")
    return tuple(ids)


def _key(name: str, matrix: str) -> str:
    return f"{PREFIX}{name}.lora_{matrix}.weight"


def _check_fields(values: dict, where: str) -> None:
    for name, allowed in ALLOWED.items():
        if values.get(name, allowed[0]) not in allowed:
            listed = " or ".join(repr(value) for value in allowed)
            raise InputError(f"{where}: {name} is {shown(values[name])}, supported is {listed}")
    for name, types in TYPES.items():
        value = values.get(name)
        if not isinstance(value, types) or isinstance(value, bool) or value == []:
            expected = {int: "a whole number", list: "a list of names"}.get(types, "a number")
            raise InputError(f"{where}: {name} is {shown(value)}, expected {expected}")
    for name in sorted(values.keys() - {*ALLOWED, *READ, *IDLE}):
        value = values[name]
        # not `value == False`: layers_to_transform may be 0, the first layer
        if not (value is None or value is False or value in ([], {}, "")):
            raise InputError(
                f"{where}: {name} is {shown(value)}, supported are adapters without it"
            )
