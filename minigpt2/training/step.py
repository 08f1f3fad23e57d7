"""One optimizer step: forward and backward passes over micro-batches, clipping, AdamW.

The gradient does not depend on how a batch is cut into micro-batches, nor over how many processes
it is shared. Knows modules that go from ids to a loss, nothing of runs, files and schedules.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from ..loss import IGNORE
from ..system.precision import Precision, ran_out_of_memory
from ..system.processes import ALONE, World, gradient_sync, whole
from .batches import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step measured."""

    loss: float  # mean over the scored tokens of all micro-batches and processes, in nats
    grad_norm: float  # before clipping
    n_tokens: int
    micro_batch_size: int  # which fitted into memory
    skipped: bool  # float16 overflowed: the scaler halved its scale and left the weights alone


class NotFiniteError(ArithmeticError):
    """The loss or a gradient is not a number; the weights were left as they were before the
    step.
    """

    def __init__(self, loss: float, grad_norm: float) -> None:
        super().__init__(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}")
        self.loss, self.grad_norm = loss, grad_norm


def train_step(
    scorer: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    micro_batch_size: int,
    learning_rate: float,
    grad_clip: float,
    seed: int,
    world: World = ALONE,
) -> StepStats:
    """One optimizer step over idx, targets (B, T) of all processes; `seed` decides its dropout.

    The order is unscale, clip, step: clipping scaled gradients would clip them to nothing. Raises
    NotFiniteError before the weights change, unless float16 has overflowed, which is no error.
    """
    while True:
        try:
            loss = accumulate(scorer, batch, precision, micro_batch_size, seed, world)
            break
        except Exception as problem:
            if not ran_out_of_memory(problem) or micro_batch_size == 1 or world.size > 1:
                raise
        # after the except block, which keeps the failed frames and all their tensors alive
        optimizer.zero_grad(set_to_none=True)
        precision.release_memory()
        micro_batch_size = math.ceil(micro_batch_size / 2)
        logger.warning("out of memory: again, with %s sequences at a time", micro_batch_size)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    precision.scaler.unscale_(optimizer)
    trained = [p for p in scorer.parameters() if p.requires_grad]
    norm = whole(nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if not finite and not precision.scaler.is_enabled():
        raise NotFiniteError(loss, norm)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepStats(loss, norm, n_scored(batch), micro_batch_size, skipped=not finite)


def accumulate(
    scorer: nn.Module,
    batch: Batch,
    precision: Precision,
    micro_batch_size: int,
    seed: int,
    world: World = ALONE,
) -> float:
    """Leave the gradient of the batch's mean loss in the parameters, and return that loss.

    Each micro-batch's summed loss is divided by the tokens of the whole batch, so the gradient does
    not depend on how the batch is cut, nor over how many processes. Micro-batches draw their
    dropout from the seed and the number of their first row.
    """
    parts = [*zip(*(part.split(micro_batch_size) for part in world.share(batch)))]
    loss_scale = precision.loss_scale()
    # DDP and FSDP take the mean over processes; a batch may have nothing but prompts
    scale = loss_scale * world.size / max(1, n_scored(batch))
    loss = torch.zeros((), device=precision.device)
    for number, (idx, targets) in enumerate(parts):
        row = world.rows(len(batch[0])).start + number * micro_batch_size
        torch.manual_seed(mixed(seed, row))
        with gradient_sync(scorer, number == len(parts) - 1):
            with precision.autocast():
                part = scorer(precision.to_device(idx), precision.to_device(targets), scale)
            part.backward()
        loss += part.detach()
    return sum(world.gather((loss / loss_scale).item())) / world.size


def mixed(seed: int, number: int) -> int:
    """A seed for the number-th of many things, far from those of its neighbours."""
    return (seed * 6_364_136_223_846_793_005 + number * 1_442_695_040_888_963_407 + 1) % 2**63


def n_scored(batch: Batch) -> int:
    """How many tokens of a batch are targets."""
    return int((batch[1] != IGNORE).sum())
