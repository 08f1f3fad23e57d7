"""LoRA: fine-tuning by small matrices beside the large ones, which stay as they are.

Hu et al. 2021, arXiv:2106.09685. A Linear of GPT-2 computes x W^T + b. What fine-tuning would add
to W is taken to be of low rank, the product of two thin matrices; W is frozen, and these are
trained:

    y = x W^T + b + (alpha / r) x A^T B^T        A (r, in), B (out, r), with r = 8 or so

A starts random and B zero, so training starts from GPT-2 itself. In the 124M model r = 8 makes 1.2
million trained numbers, 1 % of all, and gradients and AdamW's memory shrink with them.

The model knows nothing of this: its Linears are swapped from outside for `LoRALinear`, which keep
their names. Adapters are written in the layout of Hugging Face's peft, so that peft loads them on
transformers' GPT-2, and read from it. Knows Linears and their names, nothing of attention.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import hub, weights
from .errors import InputError
from .files import read_json, write_json

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # c_attn: q, k and v in one
LINEAR = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
ROOT = "transformer."  # before our names in GPT2LMHeadModel
PREFIX = f"base_model.model.{ROOT}"  # and in peft's wrapper of it
DIGEST = "base_sha256"  # beside the tensors, where peft does not look

# adapter_config.json: fields that must have one of these values, the first where they are missing
ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others start by changing the base
}
TYPES = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float), "target_modules": list}
READ = (*TYPES, "use_rslora", "base_model_name_or_path", "revision")
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

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"the LoRA rank is {self.rank}, allowed is 1 or more")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"the LoRA alpha is {self.alpha}, allowed is above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"the LoRA dropout is {self.dropout}, allowed is from 0 to below 1")

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
        try:
            config = cls(rank, alpha, dropout, targets)
        except InputError as problem:
            raise InputError(f"{where}: {problem}") from problem
        # rank-stabilised LoRA (arXiv:2312.03732) multiplies with alpha / sqrt(r)
        return replace(config, alpha=alpha * rank**0.5) if values.get("use_rslora") else config

    def to_peft(self, base_model: str) -> dict:
        """The same as adapter_config.json, for adapters of the model with this Hub id or folder."""
        return {
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


class LoRALinear(nn.Linear):
    """A Linear with frozen weight and bias, and beside it two thin matrices that are trained."""

    def __init__(
        self, base: nn.Linear, config: LoRAConfig, generator: torch.Generator | None = None
    ) -> None:
        """Around the parameters of `base`, which are not copied; A is drawn from `generator`."""
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.config = config
        # on the CPU: the same numbers whatever device the model is on
        start = torch.empty(config.rank, base.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)  # as nn.Linear itself
        self.lora_A = nn.Parameter(start.to(base.weight))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        # not nn.Dropout, whose share the model's set_dropout changes
        x = F.dropout(input, self.config.dropout, self.training)
        change = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return super().forward(input) + self.config.scale * change

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """A plain Linear that computes the same: W + (alpha / r) B A, the sum taken in float32 or
        wider.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        change = self.config.scale * (self.lora_B.to(wide) @ self.lora_A.to(wide))
        weight = (self.weight.to(wide) + change).to(self.weight.dtype)
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Give every Linear of every block an adapter, and leave nothing else trainable.

    The model computes what it did before, until the adapters are trained.
    """
    _attach(model, LoRAConfig(rank, alpha, dropout), generator)


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return bool(adapters(model))


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The Linears that have an adapter, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


def merge(model: nn.Module) -> dict[str, LoRALinear]:
    """Fold the adapters into plain frozen Linears, so that they cost nothing; returns what
    `unmerge` puts back.
    """
    taken = adapters(model)
    for name, part in taken.items():
        model.set_submodule(name, part.folded())
    return taken


def unmerge(model: nn.Module, taken: dict[str, LoRALinear]) -> None:
    """Put back the adapters and the base that `merge` took out, bit for bit the same."""
    for name, part in taken.items():
        model.set_submodule(name, part.train(model.training))


@contextlib.contextmanager
def merged(model: Model) -> Iterator[Model]:
    """The model as a plain GPT-2 inside, to be written or used; afterwards as it was, to be trained
    on.
    """
    taken = merge(model)
    try:
        yield model
    finally:
        unmerge(model, taken)


def base_identity(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and float32 values of all weights but the adapters'.

    The same with and without adapters, on any device, and in float64; 16-bit floats are other
    weights.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_A", ".lora_B")):
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            values = parameter.detach().to("cpu", torch.float32).contiguous()
            digest.update(values.numpy().data)
    return digest.hexdigest()


def save_adapter(
    model: nn.Module, folder: Path, *, base_model: str, identity: str | None = None
) -> None:
    """Write the adapters into a folder as peft does, for the model with this Hub id or folder.

    `identity` is the `base_identity` of the model, computed when it is not given. Raises OSError
    when the disk does not take the files.
    """
    taken = adapters(model)
    config = next(iter(taken.values())).config
    tensors = {}
    for name, part in taken.items():
        tensors[_key(name, "A")], tensors[_key(name, "B")] = part.lora_A, part.lora_B
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config.to_peft(base_model))
    weights.write_tensors(folder / WEIGHTS, tensors, {DIGEST: identity or base_identity(model)})


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Give the model the adapters of a folder, or fill those it has; nothing else stays trainable.

    Raises NotFoundError for a missing file, InputError for a damaged one, for adapters that do not
    fit, that need what is not supported, or that were trained on another base. peft does not note
    the base: its adapters load with a warning.
    """
    values = read_json(folder / CONFIG)
    config = LoRAConfig.from_peft(values, where=str(folder / CONFIG))
    tensors, notes = weights.read_tensors(folder / WEIGHTS)
    names = _targeted(model, config, where=str(folder / CONFIG))
    _check_tensors(model, names, config, tensors, folder / WEIGHTS)
    _check_base(model, notes.get(DIGEST), values.get("base_model_name_or_path"), folder)
    if not has_lora(model):
        _attach(model, config)
    taken = adapters(model)
    sizes = {(part.config.rank, part.config.alpha) for part in taken.values()}
    if [*taken] != names or sizes != {(config.rank, config.alpha)}:
        raise InputError(f"{folder} has other adapters than the model: load it onto a plain one")
    with torch.no_grad():
        for name, part in taken.items():
            part.lora_A.copy_(tensors[_key(name, "A")])
            part.lora_B.copy_(tensors[_key(name, "B")])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model."""
    return (folder / CONFIG).is_file() and not (folder / weights.WEIGHTS).exists()


def base_folder(folder: Path) -> Path:
    """The folder of the model that a folder's adapters were trained on, downloaded if need be.

    Raises InputError when the adapter names none, or one that is not there.
    """
    path = folder / CONFIG
    values = read_json(path)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    advice = "write the Hub id or the full path of its base into base_model_name_or_path"
    if not base or not isinstance(base, str) or not isinstance(revision, (str, type(None))):
        raise InputError(f"{path} names no base model: {advice}")
    try:
        found = hub.model_folder(base, revision)
    except InputError as problem:
        raise InputError(f"{path} names the base {base!r}: {problem}; {advice}") from problem
    if is_adapter(found) and found.resolve() == folder.resolve():
        raise InputError(f"{path} names its own folder as the base: {advice}")
    return found


def fold(base: Model, folder: Path) -> Model:
    """Fold a folder's adapters into their base for good; all of it is trainable afterwards.

    Raises what `load_adapter` raises.
    """
    load_adapter(base, folder)
    for name in [*adapters(base)]:  # one at a time: the old weights need not stay
        part = base.get_submodule(name)
        assert isinstance(part, LoRALinear)
        base.set_submodule(name, part.folded())
    return base.requires_grad_(True)


def _attach(model: nn.Module, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
    assert not has_lora(model), "a Linear has one adapter"
    model.requires_grad_(False)
    for name in _targeted(model, config):
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, LoRALinear(base, config, generator).train(base.training))


def _targeted(model: nn.Module, config: LoRAConfig, where: str = "LoRA") -> list[str]:
    """The Linears that the targets name, by peft's rule; InputError if one names none."""
    found = set()
    linears = [name for name, _ in model.named_modules() if LINEAR.fullmatch(name)]
    for target in config.targets:
        hits = {name for name in linears if f".{ROOT}{name}".endswith(f".{target}")}
        if not hits:
            known = ", ".join(TARGETS)
            raise InputError(f"{where}: target_modules names {target!r}, supported are {known}")
        found |= hits
    return [name for name in linears if name in found]


def _key(name: str, matrix: str) -> str:
    return f"{PREFIX}{name}.lora_{matrix}.weight"


def _check_fields(values: dict, where: str) -> None:
    for name, allowed in ALLOWED.items():
        if values.get(name, allowed[0]) not in allowed:
            listed = " or ".join(repr(value) for value in allowed)
            raise InputError(f"{where}: {name} is {values[name]!r}, supported is {listed}")
    for name, types in TYPES.items():
        value = values.get(name)
        if not isinstance(value, types) or isinstance(value, bool) or value == []:
            expected = {int: "a whole number", list: "a list of names"}.get(types, "a number")
            raise InputError(f"{where}: {name} is {value!r}, expected {expected}")
    for name in sorted(values.keys() - {*ALLOWED, *READ, *IDLE}):
        value = values[name]
        # not `value == False`: layers_to_transform may be 0, the first layer
        if not (value is None or value is False or value in ([], {}, "")):
            raise InputError(f"{where}: {name} is {value!r}, supported are adapters without it")


def _check_tensors(
    model: nn.Module, names: list[str], config: LoRAConfig, tensors: dict[str, Tensor], path: Path
) -> None:
    expected = {}
    for name in names:
        n_out, n_in = model.get_submodule(name).weight.shape  # type: ignore[union-attr]
        expected[_key(name, "A")] = (config.rank, n_in)
        expected[_key(name, "B")] = (n_out, config.rank)
    problems = [f"{key} is missing" for key in expected if key not in tensors]
    for key, value in tensors.items():
        if key not in expected:
            problems.append(f"{key} is not part of it")
        elif value.shape != expected[key] or not value.is_floating_point():
            problems.append(
                f"{key} is {value.dtype} {tuple(value.shape)}, expected floats {expected[key]}"
            )
    if problems:
        listed = "; ".join(sorted(problems)[:6])
        raise InputError(
            f"{path} does not fit its {CONFIG} and this model in {len(problems)} tensors: {listed}"
        )


def _check_base(model: nn.Module, wanted: str | None, base_model: object, folder: Path) -> None:
    if wanted is None:
        logger.warning("%s does not say which weights it was trained on: not checked", folder)
        return
    found = base_identity(model)
    if found != wanted:
        raise InputError(
            f"{folder} was trained on {base_model} with weights of SHA-256 {wanted[:16]}..., this "
            f"model's have {found[:16]}...: load the adapter onto the base it was trained on"
        )
