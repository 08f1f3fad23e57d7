"""What benchmarks share that measure several programs in turns: processes that wait for their turn,
and figures of rounds.
"""

# No heavy import at the top: what a process imports counts for its start.
from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from math import comb
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from minigpt2.system.processor import instruction_sets, processor_name

FEWEST = 6  # rounds for an interval
SETTLE = 0.3  # seconds between turns: OpenMP's threads may spin for 0.2 after their last work

Result = TypeVar("Result")


class VariantError(Exception):
    """Why a variant cannot be measured, in one line."""


class Worker:
    """A process that answers one request at a time, each a line of JSON. Ctrl-C does not reach it:
    it ends with `end`, or with its parent.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.popen: subprocess.Popen[bytes] | None = None
        self.problem: str | None = None

    def attempt(self, job: Callable[[], Result]) -> Result | None:
        """What a job gives; None if it fails, or one before has failed: the others go on."""
        if self.problem is None:
            try:
                return job()
            except Exception as problem:
                self.problem = self.explain(problem)
                print(f"{self.name}: {self.problem}", file=sys.stderr)
        return None

    def explain(self, problem: Exception) -> str:
        """What went wrong, in one line."""
        return in_one_line(problem)

    def spawn(self, command: list[str]) -> None:
        """Start the process."""
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def ask(self, request: object) -> Any:
        """The answer to a request. Raises VariantError for what went wrong there."""
        assert self.popen and self.popen.stdin and self.popen.stdout
        with contextlib.suppress(BrokenPipeError):  # then there is no reply either
            self.popen.stdin.write(json.dumps(request, allow_nan=False).encode() + b"\n")
            self.popen.stdin.flush()
        line = self.popen.stdout.readline()
        reply = json.loads(line) if line else f"its process ended with {self.popen.wait()}"
        if isinstance(reply, str):
            raise VariantError(reply)
        return reply

    def end(self) -> None:
        """End the process, whatever it does."""
        if self.popen:
            self.popen.kill()
            self.popen.communicate()


def answer_all(
    answer: Callable[[Any], object], explain: Callable[[Exception], str] | None = None
) -> None:
    """What the process of a Worker does: answer every request, or say what went wrong."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as problem:
            reply = (explain or in_one_line)(problem)
        print(json.dumps(reply, allow_nan=False), file=replies, flush=True)


def in_one_line(problem: Exception) -> str:
    """What went wrong, as a cell of a table."""
    kind = "" if isinstance(problem, VariantError) else f"{type(problem).__name__}: "
    return kind + " ".join(str(problem).split())[:200]


def machine() -> str:
    """The processor, what it multiplies with, and the C compiler, which `compiled` needs."""
    sets = " ".join(instruction_sets()) or "instruction sets not told"
    path = shutil.which(os.environ.get("CC") or "cc")
    compiler = "no C compiler"
    if path is not None:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace")
        compiler = f"C compiler {next(iter(said.stdout.splitlines()), path)}"
    return f"{processor_name()} ({sets}), {os.cpu_count()} cores; {compiler}"


def versions(*packages: str) -> str:
    """Of Python, and of those packages that are there."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def seconds_of(call: Callable[[], object], device: str) -> float:
    """How long a call takes, with what it leaves the GPU to do."""
    torch = sys.modules.get("torch") if device == "cuda" else None
    wait = torch.cuda.synchronize if torch else lambda: None  # CTranslate2 waits by itself
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def peak_memory(device: str) -> int | None:
    """The most bytes that this process has had; None where nobody counts them."""
    if device == "cuda":
        torch = sys.modules.get("torch")
        return torch.cuda.max_memory_allocated() if torch else None
    with contextlib.suppress(OSError):  # not getrusage: it starts from what the parent had
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def paired(ratios: list[float]) -> str:
    """The median of ratios of the same round, and its interval."""
    least, most = interval(ratios)
    return f"{median(ratios):.2f} ({least:.2f} to {most:.2f})"


def interval(values: list[float]) -> tuple[float, float]:
    """What holds the median of all that could have been measured in 95 of 100 cases; with fewer
    than 6 values, the least and the most.

    By order statistics: each value is above that median with probability 1/2, so the k-th least one
    is with that of fewer than k heads among so many coins.
    """
    ordered, n = sorted(values), len(values)
    k = 1
    while n >= FEWEST and sum(comb(n, heads) for heads in range(k + 1)) <= 0.025 * 2**n:
        k += 1
    return ordered[k - 1], ordered[n - k]


def spread(values: list[float], digits: int = 1) -> str:
    """The median, and the least and the most."""
    least, most = min(values), max(values)
    return f"{median(values):.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"
