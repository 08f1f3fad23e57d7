"""The held-out loss: the mean over the scored tokens of a text that was not trained on.

And how many bytes of text these tokens stand for.

Never changes the model, its mode, gradients or any random state.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from ..loss import IGNORE
from ..model import evaluation_mode
from ..system.precision import Precision
from ..system.processes import ALONE, World


@torch.no_grad()  # not inference_mode: FSDP would keep its buffers, and training may not use them
def mean_loss(
    scorer: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    world: World = ALONE,
) -> float:
    """Mean loss per scored token over all batches of idx, targets (B, T), in nats; every token
    weighs the same, however batches are cut and over however many processes.
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


def bytes_per_target(batches: Iterable[tuple[Tensor, Tensor]], n_bytes: Tensor) -> float:
    """How many bytes of text a scored token stands for, over all batches that `mean_loss` takes.

    `n_bytes` (V,) is what each id adds to a text. End-of-text, which adds nothing, counts as one of
    the tokens, as its loss counts: so a loss per byte pays for where texts end too.
    """
    total = count = 0
    for _, targets in batches:
        scored = targets[targets != IGNORE]
        total += int(n_bytes[scored].sum())
        count += len(scored)
    assert count, "an evaluation needs at least one scored token"
    return total / count
