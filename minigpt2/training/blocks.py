"""Blocks of a model, compiled (torch.compile) or recomputed (activation checkpointing).

The model, its parameters and their names stay as they are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..equivalences import restore, swap, ways_of
from ..model import GPT2
from ..system.precision import Precision, guard_compiler_cache

logger = logging.getLogger(__name__)
WAY = "compiled blocks"


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
    if compiled:
        try:
            guard_compiler_cache()
            _install(model, compiled=True, recomputed=recomputed)
            _try(model, precision, shape, masked)
            return
        except Exception as problem:  # compilers fail in as many ways as there are machines
            reason = next(iter(str(problem).splitlines()), type(problem).__name__)
            logger.warning("torch.compile failed (%s): going on without it", reason)
        for name in ways_of(model).keys() & set(_forwards(model)):
            restore(model, name)
    _install(model, compiled=False, recomputed=recomputed)


def _install(model: GPT2, *, compiled: bool, recomputed: bool) -> None:
    for name in _forwards(model):
        if compiled:
            swap(model, name, torch.compile, WAY)
        if recomputed:
            swap(model, name, _recomputed, "recomputed blocks")


def _forwards(model: GPT2) -> list[str]:
    return [f"h.{i}.forward" for i in range(len(model.h))]


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.partial(checkpoint, forward, use_reentrant=False)


def _try(model: GPT2, precision: Precision, shape: tuple[int, int], masked: bool) -> None:
    idx = precision.to_device(torch.zeros(shape, dtype=torch.int64))
    with precision.autocast():
        x = model.hidden(idx, documents=idx if masked else None)
    x.float().sum().backward()
    model.zero_grad(set_to_none=True)
