"""A model and its loss as one module: from token ids to a number in one forward pass.

Training minimises it, an evaluation reports it; DDP and FSDP wrap it.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from ..loss import summed_loss
from ..model import GPT2


class Scorer(nn.Module):
    """A model with the cross-entropy of its logits as its output.

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
