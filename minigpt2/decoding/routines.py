"""Which routine multiplies a matrix on this CPU: measured once for each shape, and kept.

Decoding reads every weight once a token, and which routine does so at the speed of memory differs
between processors, shapes and numbers of rows. So each candidate is timed, for one row and for
eight, on matrices of the model's shapes: the first time that a shape is met, for a fraction of a
second. Where one is the fastest for one row and another for eight, both are chosen. What was chosen
lies in the cache and is chosen by every later start, since routines add up in different orders, and
a text that is drawn may turn at the last digit of a score.

Letters: N outputs of a Linear, K its inputs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..corpus.cached import hash_of
from ..errors import InputError, NotFoundError
from ..system.files import cache_folder, lock, own_folder, read_json, write_json
from ..system.processor import processor_name

logger = logging.getLogger(__name__)

ROWS = (1, 8)  # that are timed: one text, and some at once
AHEAD = 0.95  # of another routine's time: less is noise, and no reason for a second layout
# Below this a token's time is that of Python and of small operations, whichever routine is taken.
LEAST_BYTES = 4 * 2**20
# Between two products with one matrix a model reads all others. So do the rounds: they go through
# more than most processors' caches hold, or what is timed is the cache and not the memory.
RING_BYTES = 96 * 2**20
MOST_BYTES = RING_BYTES // 6  # of one matrix: of a head, so many rows stand for all
ROUNDS, LEAST_ROUNDS = 7, 3
SECONDS = 0.7  # after which no round begins but the first LEAST_ROUNDS

Shape = tuple[int, int]  # N, K
Seconds = dict[str, tuple[float, ...]]  # of a product with each of ROWS, by routine
Clock = Callable[[], float]


@dataclass(frozen=True)
class Routine:
    """A way to multiply by a float32 matrix: its name for users, its row in the table of
    equivalences, and what it makes of a Linear.
    """

    name: str
    way: str
    make: Callable[[Any], nn.Module]  # of what has the weight and bias of a Linear


Choice = tuple[Routine, Routine]  # for one row, and for some


def choose(
    candidates: Sequence[Routine], shapes: Sequence[Shape], *, clock: Clock = time.perf_counter
) -> dict[Shape, Choice]:
    """The routines for each shape of a model's matrices, which `shapes` has once for each matrix.

    The first candidate is the plain one, which the others have to be clearly ahead of. All have to
    compute the same.
    """
    different = list(dict.fromkeys(shapes))
    n_bytes = sum(4 * n * k for n, k in shapes)
    if len(candidates) == 1 or n_bytes < LEAST_BYTES:
        reason = "there is no other" if len(candidates) == 1 else "the matrices are small"
        logger.debug("products on the CPU: %s (%s)", candidates[0].name, reason)
        return dict.fromkeys(different, (candidates[0], candidates[0]))
    by_name = {routine.name: routine for routine in candidates}
    times = _kept(list(by_name), different, lambda new: measured(candidates, new, clock=clock))
    chosen = {shape: fastest(times[shape]) for shape in different}
    for shape, (one, some) in chosen.items():
        names = one if one == some else f"{one} for one row, {some} for more"
        logger.debug("products with %d x %d on the CPU: %s%s", *shape, names, _why(times[shape]))
    return {shape: (by_name[one], by_name[some]) for shape, (one, some) in chosen.items()}


def fastest(seconds: Seconds) -> tuple[str, str]:
    """The fastest routine for one row and for some: one for both, the plain one first, where none
    is clearly ahead of it.
    """
    best = [min(times) for times in zip(*seconds.values())]
    for name, times in seconds.items():
        if all(AHEAD * time <= least for time, least in zip(times, best)):
            return name, name
    one, some = (min(seconds, key=lambda name: seconds[name][place]) for place in range(len(ROWS)))
    return one, some


@torch.no_grad()
def measured(
    candidates: Sequence[Routine], shapes: Sequence[Shape], *, clock: Clock = time.perf_counter
) -> dict[Shape, Seconds]:
    """How long a product takes with each candidate: the least of several rounds, in which they take
    turns, as what else runs on a machine only adds.
    """
    began = clock()
    linears = list(_ring(shapes))
    rings = {
        routine.name: [(shape, routine.make(linear)) for shape, linear in linears]
        for routine in candidates
    }
    found = {
        shape: {name: [math.inf] * len(ROWS) for name in rings} for shape in dict.fromkeys(shapes)
    }
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and clock() - began > SECONDS:
            break
        for place, n_rows in enumerate(ROWS):
            for name, ring in rings.items():
                for shape, seconds in _pass(ring, n_rows, clock).items():
                    best = found[shape][name]
                    best[place] = min(best[place], seconds)
    return {
        shape: {name: tuple(best) for name, best in times.items()} for shape, times in found.items()
    }


def _pass(ring: list[tuple[Shape, nn.Module]], n_rows: int, clock: Clock) -> dict[Shape, float]:
    """The least time of a product of each shape, in one pass through all matrices."""
    inputs = {k: torch.ones(n_rows, 1, k) for (_, k), _ in ring}
    least: dict[Shape, float] = {}
    for shape, module in ring:
        x = inputs[shape[1]]
        start = clock()
        module(x)
        least[shape] = min(least.get(shape, math.inf), clock() - start)
    return least


def _ring(shapes: Sequence[Shape]) -> Iterator[tuple[Shape, nn.Linear]]:
    """Linears of all shapes, over and over until they have RING_BYTES, each under its shape."""
    cut = {(n, k): max(1, min(n, MOST_BYTES // (4 * k))) for n, k in shapes}
    once = sum(4 * n * k for (_, k), n in cut.items())
    for _ in range(max(1, RING_BYTES // once)):
        for (n, k), n_rows in cut.items():
            linear = nn.Linear(k, n_rows, bias=False, device="meta")
            # written, as memory that nothing was written to is one page of zeros
            linear.weight = nn.Parameter(torch.full((n_rows, k), 0.01), requires_grad=False)
            yield (n, k), linear


def _why(seconds: Seconds) -> str:
    """The times as a person reads them."""
    rows = " and ".join(map(str, ROWS))
    times = (
        f"{name} " + " and ".join(f"{1000 * value:.2f}" for value in values)
        for name, values in seconds.items()
    )
    return f" (ms for {rows} rows: {', '.join(times)})"


# what is kept


def _kept(
    names: list[str],
    shapes: Sequence[Shape],
    measure: Callable[[Sequence[Shape]], dict[Shape, Seconds]],
) -> dict[Shape, Seconds]:
    """The times for the shapes from the cache; those that are not there are measured, by one
    process at a time, and put there. Without a cache they are measured by every start.
    """
    key = _key(names)
    path = cache_folder("routines") / f"{hash_of(key)[:16]}.json"
    found = _read(path, key)
    if all(shape in found for shape in shapes):
        return found
    try:
        own_folder(path.parent)  # whoever else could write there could choose a routine, no more
        with _alone(path.with_suffix(".lock")):
            found = _read(path, key, quietly=True)
            new = [shape for shape in shapes if shape not in found]
            if new:
                found |= measure(new)
                _write(path, key, found)
            return found
    except OSError as problem:
        logger.warning(
            "the choice of the CPU's routines is not kept (%s: %s), so the same seed may give "
            "another text next time: set MINIGPT2_CACHE to a folder that you can write to",
            path.parent,
            problem.strerror or problem,
        )
    new = [shape for shape in shapes if shape not in found]
    return found | (measure(new) if new else {})


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process after the other measure: two at once would time each other."""
    try:
        held = lock(path, wait=True)
    except (
        NotImplementedError
    ):  # no locks on this file system: files are replaced whole all the same
        yield
        return
    assert held is not None
    try:
        yield
    finally:
        held.release()


def _key(names: list[str]) -> dict[str, object]:
    """What the times are of: a cache may be shared by several machines."""
    return {
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "routines": names,
    }


def _read(path: Path, key: dict[str, object], *, quietly: bool = False) -> dict[Shape, Seconds]:
    """What was kept; nothing, with a notice, where that cannot be read."""
    try:
        kept = read_json(path)
        if {name: kept.get(name) for name in key} != key:
            raise InputError(f"{path} is of another machine")
        return {
            _shape(name): _seconds(value, key["routines"])
            for name, value in kept["seconds"].items()
        }
    except NotFoundError:
        return {}
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = problem if isinstance(problem, InputError) else f"{path} is damaged"
        if not quietly:
            logger.warning("%s: measuring the CPU's routines anew", reason)
        return {}


def _shape(name: str) -> Shape:
    n, k = map(int, name.split(" x "))
    return n, k


def _seconds(value: dict[str, list[float]], names: object) -> Seconds:
    """Times as they were written. Raises ValueError for anything else."""
    found = {name: tuple(map(float, times)) for name, times in value.items()}
    if list(found) != names or any(
        len(times) != len(ROWS) or min(times) <= 0 for times in found.values()
    ):
        raise ValueError("these are no times")
    return found


def _write(path: Path, key: dict[str, object], found: dict[Shape, Seconds]) -> None:
    seconds = {f"{n} x {k}": times for (n, k), times in sorted(found.items())}
    write_json(path, {**key, "seconds": seconds})
