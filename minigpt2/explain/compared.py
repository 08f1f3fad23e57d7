"""What is different in two models of one shape, such as one before and after fine-tuning.

Letters: B batch, T tokens, C n_embd, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..lora import LoRALinear, TrainedRows
from ..model import GPT2
from .forward_pass import require_plain, require_tokens, trace
from .measures import surprise


@dataclass(frozen=True)
class Differences:
    """How two models read one text of ids (T), token by token and layer by layer.

    `nats_a` and `nats_b` are what each token costs either model; `divergence` (T) is how far the
    second model's probabilities for the next token are from the first's at every token: the
    Kullback-Leibler divergence KL(a || b) in nats, 0 where they are equal. `streams` (L + 1, T) is
    how far apart the residual streams are before every block and after the last, as a share of the
    first model's. `weights` is, for every tensor, how far it was moved, as a share of its size.
    """

    nats_a: tuple[float | None, ...]
    nats_b: tuple[float | None, ...]
    divergence: Tensor
    streams: Tensor
    weights: dict[str, float]


@torch.no_grad()
def differences(model_a: GPT2, model_b: GPT2, idx: Tensor) -> Differences:
    """What two models of one shape make of idx (1, T), and how far their weights are apart.

    Raises InputError for models of different shape or vocabulary, and more than one row.
    """
    for model in (model_a, model_b):
        require_plain(model)
    if (difference := _difference_of_shape(model_a, model_b)) is not None:
        raise InputError(
            f"the two models cannot be compared: {difference}; compare models of one shape"
        )
    require_tokens(idx)
    if len(idx) != 1:
        raise InputError(f"idx has the shape {tuple(idx.shape)}, allowed is one row: (1, T)")
    a, b = trace(model_a, idx), trace(model_b, idx)
    # the second on the first's device
    pairs = [(x[0].float(), y[0].to(x.device).float()) for x, y in zip(a.streams, b.streams)]
    log_a, log_b = (_log_probs(found, a.logits.device) for found in (a.logits, b.logits))
    return Differences(
        nats_a=tuple(surprise(model_a, idx)[0]),
        nats_b=tuple(surprise(model_b, idx)[0]),
        divergence=(log_a.exp() * (log_a - log_b)).sum(-1),
        streams=torch.stack([(y - x).norm(dim=-1) / x.norm(dim=-1) for x, y in pairs]),
        weights=_moved(dict(plain_weights(model_a)), dict(plain_weights(model_b))),
    )


def _log_probs(logits: Tensor, device: torch.device) -> Tensor:
    """Of one row, (T, V), in float32 at least."""
    return logits[0].to(device, torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _difference_of_shape(model_a: GPT2, model_b: GPT2) -> str | None:
    """The first field of the shape that differs, in words."""
    for name in ("vocab_size", "n_layer", "n_embd", "n_head", "block_size", "n_inner"):
        values = [getattr(model.config, name) for model in (model_a, model_b)]
        if values[0] != values[1]:
            return f"{name} is {values[0]} in the first and {values[1]} in the second"
    return None


def plain_weights(model: GPT2) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a plain model, adapters folded into them."""
    with torch.device("meta"):
        names = [name for name, _ in GPT2(model.config).named_parameters()]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        if leaf == "weight" and isinstance(owner, LoRALinear | TrainedRows):
            owner = owner.folded()
        yield name, owner.get_parameter(leaf)


def _moved(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor of the second is from the first's, as a share of the first's size."""
    return {
        name: float(
            (b[name].to(value.device).float() - value.float()).norm() / value.float().norm()
        )
        for name, value in a.items()
        if name in b
    }
