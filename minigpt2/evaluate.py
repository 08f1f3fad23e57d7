"""The loss of a model on a text it is judged by. Never changes the model, its mode, gradients or
any random state.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .batches import IGNORE
from .model import evaluation_mode
from .precision import Precision


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over the scored targets, in float32: logits (B, T, V), targets (B, T) ->
    ().

    In bfloat16 the same logits can give 15.375 instead of 15.302.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


@torch.inference_mode()
def mean_loss(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision
) -> float:
    """Mean loss per scored token over all batches, in nats; every token weighs the same, however
    batches are cut.
    """
    total, count = 0.0, 0
    with evaluation_mode(model):
        for idx, targets in batches:
            targets = precision.to_device(targets)
            with precision.autocast():
                logits = model(precision.to_device(idx))
            total += summed_loss(logits, targets).item()
            count += int((targets != IGNORE).sum())
    assert count, "an evaluation needs at least one scored token"
    return total / count
