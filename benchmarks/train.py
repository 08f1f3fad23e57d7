"""Measures training steps next to peers, in turns: python benchmarks/train.py

Every variant is a process of its own that loads the same weights once and then waits for its turns:
one round of all variants, then the next in the opposite order. A turn is some optimizer steps, the
same for all: forward and backward passes over the same batches, clipping, AdamW. minigpt2 takes the
steps as train.py takes them, nanogpt as nanoGPT does (see train_peers.py), and hf-trainer is
transformers' Trainer (pip install transformers accelerate).

Prints a Markdown table. tok/s counts tokens over the time of a turn. "of peak" is the time that the
matrix products of a step take alone, by the best routine for each of their shapes, over the time of
the step: another process takes its turn with them in each round, as a processor is not always as
fast. Ratios are those of tok/s in the same round, above 1 if the variant is faster: the median of
the rounds and its 95 % interval, by order statistics; fewer than 6 rounds have the least and the
most. "peak" is the most resident memory of the process, Python included (on CUDA: of torch's
tensors). "loss" is that of the last step, and "off by" the largest difference of a loss from
nanogpt's, as a share of it: without dropout, a variant that is off by more than its precision
explains has no speed, and the exit code is 1. With dropout masks differ, and so do losses a little.
"""

# No heavy import at the top: what a process imports counts for its memory.
from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from train_peers import Task, Told, hf_trainer, nanogpt
from turns import (
    FEWEST,
    SETTLE,
    VariantError,
    Worker,
    answer_all,
    in_one_line,
    machine,
    paired,
    peak_memory,
    seconds_of,
    spread,
    versions,
)

from minigpt2.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt2.model import GPT2Config

SERVE = "--serve"  # how this script starts itself
HEADER = (
    "| case | dropout | variant | tok/s | s/step | of peak | to nanogpt | to hf-trainer | peak, MB "
    "| loss | off by |"
)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}  # of a loss, after some steps
REFERENCE = "nanogpt"


@dataclass(frozen=True)
class Case:
    """What is trained, and how many steps a turn takes."""

    preset: str
    n_rows: int
    n_tokens: int
    steps: int
    device: str = "cpu"
    lora_rank: int = 0


# `learner` is nano with a smaller vocabulary, as a lesson has it
CASES = {
    "124M 4x256": Case("gpt2", 4, 256, 1),
    "124M 1x1024": Case("gpt2", 1, 1024, 1),
    "nano 16x128": Case("nano", 16, 128, 8),
    "learner 32x128": Case("learner", 32, 128, 5),
    **{f"124M {n}x1024": Case("gpt2", n, 1024, 5, "cuda") for n in (8, 16, 32, 64)},
    "355M 8x1024": Case("gpt2-medium", 8, 1024, 5, "cuda"),
    "774M 4x1024": Case("gpt2-large", 4, 1024, 5, "cuda"),
    "1.5B 4x1024 LoRA": Case("gpt2-xl", 4, 1024, 5, "cuda", lora_rank=8),
}


@dataclass(frozen=True)
class TrainBenchOptions:
    """Measure training steps next to peers, and print a Markdown table."""

    case: tuple[str, ...] = ()
    """Only these cases; otherwise all of the device."""
    only: tuple[str, ...] = ()
    """Only these variants."""
    dropout: tuple[float, ...] = (0.0, 0.1)
    """Rates of dropout."""
    rounds: int = FEWEST
    """Turns of each variant."""
    steps: int = 0
    """Steps of a turn; 0 is as many as the case takes."""
    threads: int = 2
    """Threads of each variant."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast."""
    out: str | None = None
    """Also write what is printed to this file."""
    json: bool = False
    """Print every measurement as JSON instead of the table."""
    debug: bool = False
    """Show the full traceback of an error."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("steps", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} is {getattr(self, name)}, allowed is {least} or more")
        for name, allowed in (("device", ("cpu", "cuda")), ("dtype", tuple(TOLERANCE))):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"--{name} is {getattr(self, name)!r}, allowed are {' and '.join(allowed)}"
                )
        for name, known in (("case", self._known()), ("only", [*VARIANTS])):
            if unknown := set(getattr(self, name)).difference(known):
                raise InputError(f"--{name} is {min(unknown)!r}, known are {', '.join(known)}")
        if not self.dropout or not all(0 <= rate < 1 for rate in self.dropout):
            raise InputError(f"--dropout is {self.dropout}, allowed are rates from 0 to below 1")

    def _known(self) -> list[str]:
        return [name for name, case in CASES.items() if case.device == self.device]

    @property
    def cases(self) -> list[str]:
        """The names of those to measure."""
        return [name for name in self._known() if not self.case or name in self.case]

    @property
    def variants(self) -> list[str]:
        """The names of those to measure, in the order of the table."""
        return [name for name in VARIANTS if not self.only or name in self.only]


def ours(task: Task, told: Told, *, compiled: bool = False) -> None:
    """The step that train.py takes, whose micro-batches are as many rows as it would choose."""
    import torch

    from minigpt2.evaluation.scorer import Scorer
    from minigpt2.lora import add_lora
    from minigpt2.model import GPT2
    from minigpt2.system.memory import memory_kept
    from minigpt2.system.precision import Precision
    from minigpt2.training.blocks import prepare_blocks
    from minigpt2.training.build import enough_rows
    from minigpt2.training.optimizer import make_optimizer
    from minigpt2.training.step import train_step
    from minigpt2.training.ways import COMPILED, choose_way, go

    model = GPT2.from_pretrained(task.folder)
    model.set_dropout(task.dropout)
    if task.lora_rank:
        random = torch.Generator().manual_seed(4)
        add_lora(model, rank=task.lora_rank, alpha=2 * task.lora_rank, generator=random)
    model.to(task.device).train()
    precision = Precision(torch.device(task.device), getattr(torch, task.dtype))
    at_once = task.n_rows
    if task.device == "cpu":
        at_once = min(at_once, enough_rows(model.config, task.n_tokens))
    way = choose_way(precision, compiled=compiled)
    go(model, way)
    shape = at_once, task.n_tokens
    prepare_blocks(model, precision, shape, compiled=way == COMPILED, recomputed=False)
    optimizer = make_optimizer(
        model, learning_rate=task.learning_rate, weight_decay=task.weight_decay
    )
    scorer = Scorer(model)
    with memory_kept():
        for number, batch in enumerate(task.batches()):
            stats = train_step(
                scorer,
                batch,
                optimizer,
                precision,
                micro_batch_size=at_once,
                learning_rate=task.learning_rate,
                grad_clip=task.grad_clip,
                seed=number,
            )
            told(stats.loss)


def products_alone(task: Task, told: Told) -> None:
    """The matrix products of a step and nothing else, each by the fastest routine."""
    import torch

    from minigpt2.model import config_of

    config, dtype = config_of(Path(task.folder)), getattr(torch, task.dtype)
    chosen = []
    shapes = products(config, task.n_rows * task.n_tokens, all_trained=not task.lora_rank)
    for (m, k, n), count in shapes.items():
        a = torch.randn(m, k, device=task.device, dtype=dtype)
        b = torch.randn(k, n, device=task.device, dtype=dtype)
        jobs = routines(a, b)
        chosen += count * [min(jobs, key=partial(least_seconds, device=task.device))]
    while True:
        for job in chosen:
            job()
        if task.device == "cuda":
            torch.cuda.synchronize()
        told(0.0)


VARIANTS: dict[str, Callable[[Task, Told], None]] = {
    REFERENCE: nanogpt,
    "hf-trainer": hf_trainer,
    "minigpt2": ours,
    "minigpt2-compiled": partial(ours, compiled=True),
}
PRODUCTS = "products"
PEERS = (REFERENCE, "hf-trainer")


@dataclass(frozen=True)
class Turn:
    """Some steps of a variant."""

    seconds: float
    losses: list[float]
    peak: int | None  # bytes


@dataclass(frozen=True)
class Outcome:
    """All turns of a variant, or what went wrong."""

    case: str
    dropout: float
    variant: str
    turns: list[Turn]
    problem: str | None = None
    off: float | None = None

    @property
    def losses(self) -> list[float]:
        """Of all its steps."""
        return [loss for turn in self.turns for loss in turn.losses]


def main(options: TrainBenchOptions) -> int:
    """Measure, print the table and perhaps write it; 1 when a variant failed."""
    # for the processes, and before torch reads it here
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1"}
    about, outcomes = header(options), []
    for name in options.cases:
        with tempfile.TemporaryDirectory() as work:
            write_model(CASES[name], work)
            for rate in options.dropout:
                outcomes += compared(measure(options, name, rate, work), options.dtype)
    if options.json:
        found = {"about": about, "outcomes": [*map(asdict, outcomes)]}
        text = json.dumps(found, indent=1, allow_nan=False)
    else:
        text = "\n".join([*about, "", *table(outcomes)])
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    return int(any(o.problem and not o.problem.startswith("skipped") for o in outcomes))


def header(options: TrainBenchOptions) -> list[str]:
    """What was measured on what, with what."""
    hardware = machine()
    if options.device == "cuda":
        import torch

        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    interval = "with their 95 % intervals by order statistics"
    if options.rounds < FEWEST:
        interval = f"with the least and the most, as an interval takes {FEWEST} rounds"
    return [
        f"{hardware}; {versions('torch', 'transformers', 'accelerate')}.",
        f"{options.threads} threads, {options.dtype}, {options.rounds} rounds; medians, ratios "
        f"of the same round {interval}.",
    ]


def shape_of(case: Case) -> GPT2Config:
    """The shape of a case's model."""
    from minigpt2.model import PRESETS

    if case.preset == "learner":
        return replace(PRESETS["nano"], vocab_size=1024)
    return PRESETS[case.preset]


def write_model(case: Case, folder: str) -> None:
    """Write the weights that all begin with."""
    import torch

    from minigpt2.model import GPT2

    model = GPT2(shape_of(case), generator=torch.Generator().manual_seed(2))
    model.save_pretrained(folder)


def products(
    config: GPT2Config, n_tokens: int, *, all_trained: bool = True
) -> dict[tuple[int, int, int], int]:
    """How often a step multiplies (M, K) with (K, N), by M, K, N: forward, and for the gradients of
    inputs and of weights, if they are trained; adapters, which are small, are not counted.
    """
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    layers = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    counts = dict.fromkeys(layers, config.n_layer) | {(width, config.vocab_size): 1}
    found: dict[tuple[int, int, int], int] = {}
    for (k, n), count in counts.items():
        for shape in ((n_tokens, k, n), (n_tokens, n, k), (n, n_tokens, k))[: 2 + all_trained]:
            found[shape] = found.get(shape, 0) + count
    return found


def routines(a: Tensor, b: Tensor) -> list[Callable[[], object]]:
    """Ways to multiply two matrices: as they lie, transposed in memory, and laid out by oneDNN."""
    import torch

    ways = [(x, y) for x in (a, a.T.contiguous().T) for y in (b, b.T.contiguous().T)]
    out = a.new_empty(a.shape[0], b.shape[1])
    jobs: list[Callable[[], object]] = [partial(torch.mm, x, y, out=out) for x, y in ways]
    on_cpu = a.device.type == "cpu" and a.dtype == torch.float32
    if on_cpu and torch.backends.mkldnn.is_available():
        laid_out = torch.ops.mkldnn._reorder_linear_weight(b.T.contiguous(), len(a))
        linear = torch.ops.mkldnn._linear_pointwise
        jobs.append(partial(linear, a, laid_out, None, "none", [], ""))
    return jobs


def least_seconds(job: Callable[[], object], device: str) -> float:
    """The least of some times of a job."""
    job()
    return min(seconds_of(job, device) for _ in range(3))


def measure(options: TrainBenchOptions, case: str, rate: float, folder: str) -> list[Outcome]:
    """Start every variant, and measure all in turns."""
    shape = CASES[case]
    size = shape.n_rows, shape.n_tokens
    task = Task(folder, *size, rate, options.device, options.dtype, shape.lora_rank)
    skipped = [name for name in options.variants if shape.lora_rank and name in PEERS]
    steps = options.steps or shape.steps
    with contextlib.ExitStack() as stack:
        variants = [name for name in options.variants if name not in skipped]
        workers = [TrainWorker(name) for name in (PRODUCTS, *variants)]
        turns: dict[str, list[Turn]] = {worker.name: [] for worker in workers}
        for worker in workers:
            stack.callback(worker.end)
            worker.attempt(partial(worker.begin, task))
        for number in range(options.rounds):
            for worker in workers[::-1] if number % 2 else workers:
                turn = worker.attempt(partial(worker.turn, steps))
                turns[worker.name] += [] if turn is None else [turn]
        return [
            *(Outcome(case, rate, name, [], "skipped: has no adapters") for name in skipped),
            *(
                Outcome(case, rate, worker.name, turns[worker.name], worker.problem)
                for worker in workers
            ),
        ]


def compared(outcomes: list[Outcome], dtype: str) -> list[Outcome]:
    """The outcomes with how far their losses are off, and no speed if they learn something else."""
    whole = [o for o in outcomes if not o.problem and o.variant != PRODUCTS]
    if not whole:
        return outcomes
    reference = next((o for o in whole if o.variant == REFERENCE), whole[0]).losses
    judged = []
    for outcome in outcomes:
        if outcome not in whole:
            judged.append(outcome)
            continue
        off = max(abs(a - b) / b for a, b in zip(outcome.losses, reference, strict=True))
        problem = None
        if outcome.dropout == 0 and not off <= TOLERANCE[dtype]:
            allowed = TOLERANCE[dtype]
            problem = f"learns something else: its losses are off by {off:.2g}, allowed {allowed:g}"
        judged.append(replace(outcome, off=off, problem=problem))
    return judged


def table(outcomes: list[Outcome]) -> list[str]:
    """A Markdown table with a row for each variant."""
    n_columns = HEADER.count("|") - 1
    lines = [HEADER, "| --- | ---: | --- |" + " ---: |" * (n_columns - 3)]
    for outcome in outcomes:
        if outcome.variant == PRODUCTS and not outcome.problem:
            continue
        if outcome.problem:
            cells = [outcome.problem.replace("|", r"\|"), *[""] * (n_columns - 4)]
        else:
            peers = {
                other.variant: other
                for other in outcomes
                if (other.case, other.dropout) == (outcome.case, outcome.dropout)
            }
            cells = figures(outcome, peers)
        lines.append(
            f"| {' | '.join([outcome.case, f'{outcome.dropout:g}', outcome.variant, *cells])} |"
        )
    return lines


def figures(outcome: Outcome, peers: dict[str, Outcome]) -> list[str]:
    """A row from its fourth column."""
    case = CASES[outcome.case]
    steps = [turn.seconds / len(turn.losses) for turn in outcome.turns]
    peaks = [turn.peak for turn in outcome.turns if turn.peak is not None]
    return [
        spread([case.n_rows * case.n_tokens / step for step in steps], 0),
        spread(steps, 3),
        ratio(outcome, peers.get(PRODUCTS)),
        *(ratio(outcome, peers.get(name)) for name in (REFERENCE, "hf-trainer")),
        f"{max(peaks) / 1e6:.0f}" if peaks else "",
        f"{outcome.losses[-1]:.4f}",
        "" if outcome.off is None else f"{outcome.off:.1e}",
    ]


def ratio(outcome: Outcome, peer: Outcome | None) -> str:
    """How many times as fast as the peer."""
    if peer is None or peer.problem:
        return ""
    if peer is outcome:
        return "1.00"
    pairs = zip(outcome.turns, peer.turns)
    return paired([theirs.seconds / own.seconds for own, theirs in pairs])


class TrainWorker(Worker):
    """A variant's process."""

    def begin(self, task: Task) -> None:
        """Start, and take two steps that are not timed: memory is found in them."""
        self.spawn(
            [sys.executable, __file__, SERVE, self.name, json.dumps(asdict(task), allow_nan=False)]
        )
        self.ask(2)

    def turn(self, steps: int) -> Turn:
        """Take so many steps."""
        time.sleep(SETTLE)
        return Turn(*self.ask(steps))

    def explain(self, problem: Exception) -> str:
        """What went wrong, as a cell of the table."""
        return explained(problem)


def explained(problem: Exception) -> str:
    """What went wrong; of a peer that is not there, that it was skipped."""
    if isinstance(problem, ImportError) and problem.name in ("transformers", "accelerate"):
        return f"skipped: {problem.name} is not installed"
    return in_one_line(problem)


class Steps:
    """Training that goes on only while another thread asks for steps, as transformers' Trainer
    comes back from its loop only at the end.
    """

    def __init__(self) -> None:
        self._wanted: Queue[bool] = Queue()
        self._made: Queue[float | Exception] = Queue()

    def take(self, n_steps: int) -> list[float]:
        """The losses of the next steps."""
        losses = []
        for _ in range(n_steps):
            self._wanted.put(True)
            loss = self._made.get()
            if isinstance(loss, Exception):
                raise loss
            losses.append(loss)
        return losses

    def end(self) -> None:
        """Nothing more will be asked for."""
        self._wanted.put(False)

    def run(self, train: Callable[[Told], None]) -> None:
        """Train, until the end. In a process's main thread, as users do: glibc gives others less
        memory to keep.
        """
        try:
            if self._wanted.get():
                train(self._told)
                raise VariantError("its training has ended")
        except _Ended:
            return
        except Exception as problem:
            self._made.put(problem)
            while self._wanted.get():
                self._made.put(problem)

    def _told(self, loss: float) -> None:
        self._made.put(loss)
        if not self._wanted.get():
            raise _Ended


class _Ended(BaseException):
    """Leaves a loop that nobody asks for steps anymore."""


def serve(name: str, described: str) -> None:
    """The process of a variant: for a number of steps, the seconds they took, their losses and the
    peak memory.
    """
    values: dict[str, Any] = json.loads(described)
    task = Task(**{**values, "betas": tuple(values["betas"])})
    steps = Steps()

    def answer(n_steps: int) -> tuple[float, list[float], int | None]:
        began = time.perf_counter()
        losses = steps.take(n_steps)
        return time.perf_counter() - began, losses, peak_memory(task.device)

    def answers() -> None:
        answer_all(answer, explained)
        steps.end()

    threading.Thread(target=answers, daemon=True).start()
    steps.run(partial((VARIANTS | {PRODUCTS: products_alone})[name], task))


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(*sys.argv[2:])
    else:
        from minigpt2.cli.console import run_script

        sys.exit(run_script(main, TrainBenchOptions))
