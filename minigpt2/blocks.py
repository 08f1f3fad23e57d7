"""How the blocks of a model are computed: compiled, or recomputed instead of remembered. The model,
its parameters and their names stay as they are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .model import GPT2
from .precision import Precision

logger = logging.getLogger(__name__)


def prepare_blocks(
    model: GPT2,
    precision: Precision,
    shape: tuple[int, int],
    *,
    compiled: bool,
    recomputed: bool,
    masked: bool = False,
) -> None:
    """Let every block go through torch.compile, and let it keep only what goes into it.

    A recomputed block runs a second time in the backward pass: a third more work, a fraction of the
    memory, the same numbers, dropout included. Compiling one block serves all of them, and works
    with DDP and FSDP; it is tried on one micro-batch of `shape` (B, T), and where that fails a
    notice is given and the blocks run as they are. `masked` says that documents will be kept apart.
    """
    plain = [block.forward for block in model.h]
    if compiled:
        try:
            _install(model, [torch.compile(forward) for forward in plain], recomputed)
            _try(model, precision, shape, masked)
            return
        except Exception as problem:  # compilers fail in as many ways as there are machines
            reason = next(iter(str(problem).splitlines()), type(problem).__name__)
            logger.warning("torch.compile failed (%s): going on without it", reason)
    _install(model, plain, recomputed)


def _install(model: GPT2, forwards: Sequence[Callable[..., Tensor]], recomputed: bool) -> None:
    for block, forward in zip(model.h, forwards):
        if recomputed:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward


def _try(model: GPT2, precision: Precision, shape: tuple[int, int], masked: bool) -> None:
    idx = precision.to_device(torch.zeros(shape, dtype=torch.int64))
    with precision.autocast():
        x = model.hidden(idx, documents=idx if masked else None)
    x.float().sum().backward()
    model.zero_grad(set_to_none=True)
