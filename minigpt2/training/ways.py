"""How a step is computed: chosen for a run that begins, kept by one that goes on.

What is chosen decides dropout's masks and the last digits of a loss, so a run records it.
"""

from __future__ import annotations

import torch

from ..decoding.c_library import find_compiler
from ..equivalences import ways_of
from ..model import GPT2
from ..system.precision import Precision
from . import blocks, c_parts, dropout

PLAIN = ""  # torch's own, with its masks
IN_C, COMPILED, QUICK_DROPOUT = c_parts.WAY, blocks.WAY, dropout.WAY
SWAPS = {IN_C: c_parts.swap_in_c, QUICK_DROPOUT: dropout.swap_dropout}
# Operations of a run from which on it computes in C without being asked: about half a minute on two
# cores, and building the C file takes a second.
LONG = 2e12


def choose_way(
    precision: Precision,
    *,
    compiled: bool | None,
    operations: float = 0,
    sharded: bool = False,
    recorded: str | None = None,
) -> str:
    """The way of a run's steps: a row of the table of equivalences, or PLAIN.

    `compiled` is what was asked for; None leaves it to the run's length, in `operations`. A run
    that goes on has `recorded` a way, which is PLAIN where its version knew no other; it is kept
    as far as the device allows, and unless the other was asked for. `sharded`: no process has
    the weights as a whole.
    """
    on_cpu = precision.device.type == "cpu"
    c_fits = on_cpu and precision.dtype == torch.float32 and not sharded
    if recorded is not None and compiled in (None, recorded in (IN_C, COMPILED)):
        possible = {IN_C: c_fits, QUICK_DROPOUT: on_cpu}.get(recorded, True)
        if possible and (recorded != IN_C or c_parts.c_trains()):
            return recorded
    if compiled and (not c_fits or recorded == PLAIN):
        return COMPILED
    long = recorded is None and operations > LONG and find_compiler() is not None
    if c_fits and (compiled or (compiled is None and long)) and c_parts.c_trains():
        return IN_C
    return QUICK_DROPOUT if on_cpu and recorded != PLAIN else PLAIN


def go(model: GPT2, way: str) -> None:
    """Let a model on the CPU compute in a way that was chosen; COMPILED is `prepare_blocks`'s."""
    if way in SWAPS:
        SWAPS[way](model)


def way_of_step(model: GPT2) -> str:
    """The way that a model goes, for the record of its run."""
    found = {way for ways in ways_of(model).values() for way in ways}
    return next((way for way in (*SWAPS, COMPILED) if way in found), PLAIN)
