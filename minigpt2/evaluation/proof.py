"""The proof of an installation, item by item: what one is, and how one is run.

An item computes something whose result is known, and says whether it found that. Whatever happens
inside of it, running it raises nothing and leaves this process as it was: its random state, default
dtype, threads and environment. Knows nothing of what the items prove.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..arguments import did_you_mean
from ..errors import InputError
from ..system.messages import one_line
from ..system.precision import own_randomness

Status = Literal["PASS", "FAIL", "NOT HERE"]


@dataclass(frozen=True)
class Result:
    """What an item found; `detail` says of a FAIL what was found and expected, of NOT HERE why it
    cannot be run on this machine.
    """

    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Item:
    """One thing to prove. `check` gives its Result, or raises NotHereError; any other exception is
    a FAIL. What is `long` takes a compiler's time, or processes of its own. `threads` says that all
    of torch's are to be used: what is tiny is computed by one, as on a busy machine several would
    wait for each other.
    """

    name: str
    proves: str
    check: Callable[[], Result]
    long: bool = False
    threads: bool = False


@dataclass(frozen=True)
class Outcome:
    """How an item went."""

    name: str
    proves: str
    status: Status
    detail: str
    seconds: float


class NotHereError(Exception):
    """Something that an item needs is not on this machine; the text says what."""


PASS = Result("PASS")


def judged(ok: bool, found: object, expected: object) -> Result:
    """PASS if it is as it should be, else FAIL with both values."""
    return PASS if ok else Result("FAIL", f"found {found}, expected {expected}")


def within(found: float, tolerance: float, where: str = "") -> Result:
    """PASS for a difference within a tolerance; NaN is within none."""
    place = f" ({where})" if where else ""
    return judged(
        found <= tolerance, f"a difference of {found:.2g}{place}", f"{tolerance:g} at most"
    )


def first_failure(results: Iterable[Result]) -> Result:
    """The first Result that is none of PASS, after which nothing is computed; PASS if all are."""
    return next((result for result in results if result.status != "PASS"), PASS)


def run(item: Item) -> Outcome:
    """Run one item, whatever happens inside."""
    began, heard = time.perf_counter(), []
    try:
        with unchanged(), notices("minigpt2") as heard:
            if not item.threads:
                torch.set_num_threads(1)
            result = item.check()
    except NotHereError as reason:
        result = Result("NOT HERE", one_line(reason))
    except Exception as problem:
        result = Result("FAIL", _told(problem))
    seconds, detail = time.perf_counter() - began, result.detail
    if result.status == "FAIL" and heard and heard[-1] not in detail:
        detail += f"; a notice: {heard[-1]}"
    return Outcome(item.name, item.proves, result.status, detail, seconds)


def chosen(items: Sequence[Item], names: Sequence[str]) -> list[Item]:
    """The items of these names, in the order of the items. Raises InputError for a name that there
    is not.
    """
    known = [item.name for item in items]
    for name in names:
        if name not in known:
            listed = ", ".join(known)
            raise InputError(f"there is no item {name!r}{did_you_mean(name, known)}: {listed}")
    return [item for item in items if item.name in names]


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Whatever is set inside, what it was is put back: random state, default dtype, threads,
    gradients on or off, environment.
    """
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with own_randomness(device):
        try:
            yield
        finally:
            if dict(os.environ) != environment:
                os.environ.clear()
                os.environ.update(environment)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


@contextlib.contextmanager
def notices(name: str) -> Iterator[list[str]]:
    """The warnings that a package logs inside, which go nowhere else."""
    heard: list[str] = []
    logger = logging.getLogger(name)
    handler, propagates = _Listener(heard), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _Listener(logging.Handler):
    """Keeps what is logged from warnings on."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(one_line(record.getMessage()))


def _told(problem: Exception) -> str:
    """An exception in one line, with the place that raised it."""
    frames = traceback.extract_tb(problem.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return one_line(f"{type(problem).__name__}{place}: {problem}")
