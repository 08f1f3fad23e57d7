"""LoRA: fine-tuning by small matrices beside the large ones, which stay as they are.

Hu et al. 2021, arXiv:2106.09685. A Linear of GPT-2 computes x W^T + b. What fine-tuning would add
to W is taken to be of low rank, the product of two thin matrices; W is frozen, and these are
trained:

    y = x W^T + b + (alpha / r) x A^T B^T        A (r, in), B (out, r), with r = 8 or so

A starts random and B zero, so training starts from GPT-2 itself. In the 124M model r = 8 makes 1.2
million trained numbers, 1 % of all, and gradients and AdamW's memory shrink with them.

The model knows nothing of this: its Linears are swapped from outside for `LoRALinear`, which keep
their names. Adapters are written in the layout of Hugging Face's peft, so that peft loads them on
transformers' GPT-2, and read from it (formats/peft.py). Knows Linears and their names, nothing of
attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .equivalences import swap
from .errors import InputError
from .formats.peft import (
    LINEAR,
    Adapter,
    LoRAConfig,
    WeightsDigest,
    folded,
    targeted,
    write_adapter,
)

Model = TypeVar("Model", bound=nn.Module)


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

    if TYPE_CHECKING:  # nn.Module's own gives Any

        def __call__(self, input: Tensor) -> Tensor: ...

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
        weight = folded(self.weight, self.lora_A, self.lora_B, self.config.scale)
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear


class TrainedRows(nn.Embedding):
    """An embedding that is frozen but for the rows of some tokens, such as those just added."""

    def __init__(self, base: nn.Module, ids: Sequence[int]) -> None:
        """Around the parameter of `base`, which is not copied."""
        nn.Module.__init__(self)
        self.frozen = base.get_parameter("weight").requires_grad_(False)
        self.num_embeddings, self.embedding_dim = self.frozen.shape
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0  # asked for by DDP, repr
        self.scale_grad_by_freq, self.sparse = False, False
        self.ids = tuple(ids)
        self.register_buffer("index", torch.tensor(self.ids), persistent=False)
        index = self.index.to(self.frozen.device)
        self.rows = nn.Parameter(self.frozen.detach()[index].clone())

    if TYPE_CHECKING:  # nn.Module's own gives Any
        index: Tensor

        def __call__(self, input: Tensor) -> Tensor: ...

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(V, C), for embedding and head: gradients reach the trained rows alone."""
        return self.frozen.index_copy(0, self.index.to(self.frozen.device), self.rows)

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (..., C)."""
        return F.embedding(input, self.weight)

    @torch.no_grad()
    def folded(self) -> nn.Embedding:
        """A plain frozen embedding with the trained rows in it."""
        return nn.Embedding.from_pretrained(self.weight, freeze=True)


def train_rows(model: nn.Module, ids: Sequence[int]) -> None:
    """Train the embeddings of these tokens too, in a model with adapters whose head is its
    embedding. Raises InputError for one with a head of its own, where they would not be learned.
    """
    if getattr(model, "lm_head", None) is not None:
        raise InputError(
            "added tokens are trained beside adapters only where the output head is the token "
            "embedding: this model's is its own; train all weights"
        )
    swap(model, "wte", lambda base: TrainedRows(base, ids), "LoRA beside")


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


Beside = LoRALinear | TrainedRows


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return bool(adapters(model))


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The Linears that have an adapter, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


def merge(model: nn.Module) -> dict[str, Beside]:
    """Fold the adapters into plain frozen Linears, so that they cost nothing; returns what
    `unmerge` puts back.
    """
    beside: dict[str, Beside] = {**adapters(model)}
    if (rows := _trained_rows(model)) is not None:
        beside["wte"] = rows
    for name, part in beside.items():
        swap(model, name, lambda _, part=part: part.folded(), "LoRA folded")
    return beside


def unmerge(model: nn.Module, beside: dict[str, Beside]) -> None:
    """Put back the adapters and the base that `merge` returned, bit for bit the same."""
    for name, part in beside.items():
        swap(model, name, lambda _, part=part: part.train(model.training), "LoRA beside")


@contextlib.contextmanager
def merged(model: Model) -> Iterator[Model]:
    """The model as a plain GPT-2 inside, to be written or used; afterwards as it was, to be trained
    on.
    """
    beside = merge(model)
    try:
        yield model
    finally:
        unmerge(model, beside)


def base_identity(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and float32 values of all weights but the adapters'.

    The same with and without adapters, on any device, and in float64; 16-bit floats are other
    weights.
    """
    digest = WeightsDigest()
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_A", ".lora_B", "wte.rows")):
            digest.add(name.replace("wte.frozen", "wte.weight"), parameter)
    return digest.hexdigest()


def save_adapter(
    model: nn.Module, folder: Path, *, base_model: str, identity: str | None = None
) -> None:
    """Write the adapters into a folder as peft does, for the model with this Hub id or folder.

    `identity` is the `base_identity` of the model, computed when it is not given. Raises OSError
    when the disk does not take the files.
    """
    parts = adapters(model)
    matrices = {name: (part.lora_A, part.lora_B) for name, part in parts.items()}
    config, digest = next(iter(parts.values())).config, identity or base_identity(model)
    trained = _trained_rows(model)
    config = replace(config, token_ids=() if trained is None else trained.ids)
    rows = None if trained is None else trained.rows
    write_adapter(folder, config, matrices, rows=rows, base_model=base_model, base_sha256=digest)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Give the model the adapters of a folder, or fill those it has; nothing else stays trainable.

    Raises NotFoundError for a missing file, InputError for a damaged one, for adapters that do not
    fit, that need what is not supported, or that were trained on another base. peft does not note
    the base: its adapters load with a warning.
    """
    adapter = Adapter.read(folder)
    wte = model.get_submodule("wte")
    assert isinstance(wte, nn.Embedding)
    names = adapter.check(_shapes(model), (wte.num_embeddings, wte.embedding_dim))
    adapter.check_base(base_identity(model))
    if not has_lora(model):
        _attach(model, adapter.config)
        if adapter.config.token_ids:
            train_rows(model, adapter.config.token_ids)
    parts, config = adapters(model), adapter.config
    sizes = {(part.config.rank, part.config.alpha) for part in parts.values()}
    trained = _trained_rows(model)
    ids = () if trained is None else trained.ids
    if [*parts] != names or sizes != {(config.rank, config.alpha)} or ids != config.token_ids:
        raise InputError(f"{folder} has other adapters than the model: load it onto a plain one")
    with torch.no_grad():
        for name, part in parts.items():
            a, b = adapter.matrices(name)
            part.lora_A.copy_(a)
            part.lora_B.copy_(b)
        if trained is not None:
            trained.rows.copy_(adapter.rows)


def _attach(model: nn.Module, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
    assert not has_lora(model), "a Linear has one adapter"
    model.requires_grad_(False)

    def beside(base: nn.Linear) -> LoRALinear:
        return LoRALinear(base, config, generator).train(base.training)

    for name in targeted(config, _linears(model)):
        swap(model, name, beside, "LoRA beside")


def _trained_rows(model: nn.Module) -> TrainedRows | None:
    wte = getattr(model, "wte", None)
    return wte if isinstance(wte, TrainedRows) else None


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """The Linears of the blocks, by name, with and without adapters."""
    return {name: part for name, part in model.named_modules() if LINEAR.fullmatch(name)}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(part.get_parameter("weight").shape) for name, part in _linears(model).items()
    }
