"""The loss of a model on a text it is judged by. Never changes the model, its mode, gradients or
any random state.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from .distributed import ALONE, World
from .loss import IGNORE, summed_loss
from .model import GPT2, evaluation_mode
from .precision import Precision


class Scorer(nn.Module):
    """A model and its loss as one module: what is trained on several GPUs goes from ids to a number
    in one forward pass.

    With `eot`, the end-of-text id, documents in a row are kept apart. As a target it ends a
    document; as an input its only task is to begin the next one, so it belongs to that.
    """

    def __init__(self, model: GPT2, eot: int | None = None) -> None:
        super().__init__()
        self.model, self.eot = model, eot

    def forward(self, idx: Tensor, targets: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """scale times the summed loss in nats of targets (B, T) after idx (B, T) -> ()."""
        model = self.model
        head = model.wte if model.config.tie_word_embeddings else model.lm_head
        documents = None if self.eot is None else (idx == self.eot).cumsum(1)
        x = model.hidden(idx, documents=documents)
        return summed_loss(x, head.weight, targets, scale)


@torch.no_grad()  # not inference_mode: FSDP would keep its buffers, and training may not use them
def mean_loss(
    scorer: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    world: World = ALONE,
) -> float:
    """Mean loss per scored token over all batches, in nats; every token weighs the same, however
    batches are cut and over however many processes.
    """
    total, count = 0.0, 0
    with evaluation_mode(scorer):
        for batch in batches:
            count += int((batch[1] != IGNORE).sum())
            idx, targets = (precision.to_device(part) for part in world.share(batch))
            with precision.autocast():
                total += scorer(idx, targets).item()
    assert count, "an evaluation needs at least one scored token"
    return sum(world.gather(total)) / count
