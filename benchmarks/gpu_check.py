"""Checks and measures the CUDA side of minigpt2 in one go: python benchmarks/gpu_check.py

Prints a Markdown table, each row as soon as it is known. A check that fails or breaks is a row like
any other, with its reason; the exit code is then 1. What the rows mean is in docs/benchmarks.md.
Without a GPU it shows that it works: --device cpu --preset nano --quick.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minigpt2 import __version__, memory
from minigpt2.batches import Batch, Batches
from minigpt2.blocks import prepare_blocks
from minigpt2.checkpoint import RunFolder
from minigpt2.console import run_script
from minigpt2.evaluate import Scorer
from minigpt2.generate import Token, decode, generate
from minigpt2.graphs import fix_shapes
from minigpt2.model import GPT2, PRESETS, GPT2Config
from minigpt2.optim import make_optimizer
from minigpt2.options import Preset, SampleOptions
from minigpt2.precision import Precision, pick_device
from minigpt2.sampling import SamplingConfig, row_generator
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import StepStats, train_step

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "data" / "sallow-point.txt"
HEADER = ("| what | result | bound | | s |", "| --- | --- | --- | --- | ---: |")
WARM_UP = 3  # steps that are not timed: kernels are chosen and memory is taken in them
LEARNING_RATE = 6e-4
GREEDY = SamplingConfig(temperature=0)
PROMPT_TOKENS, NEW_TOKENS = 32, 128
FORECAST_ROWS = 8  # in a step, at once or a few at a time: gradients then lie there from the start
MOST_SECONDS = 300  # for a run of train.py

# Dense peaks in TFLOP/s: 16-bit matrix products summed in float32, and float32 without TF32, which
# minigpt2 leaves off. From NVIDIA's data sheets (H200, H100, A100, L40S, L4, T4), where figures
# "with sparsity" are twice the dense ones, and the Ada and GA102 white papers (RTX 4090, 3090).
# A name must match as a whole: a laptop's chip, a slice of a card and a GH200 are other things.
PEAKS = {
    r"H200|H100 80GB HBM3": (989, 67),
    r"H100 PCIe": (756, 51),
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": (312, 19.5),
    r"L40S": (362, 91.6),
    r"L4": (121, 30.3),
    r"T4": (65, 8.1),
    r"GeForce RTX 4090": (165, 82.6),
    r"GeForce RTX 3090": (71, 35.6),
}


@dataclass(frozen=True)
class CheckOptions:
    """Check and measure minigpt2 on a GPU, and print a Markdown table."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    preset: Preset = "gpt2"
    """Size of the model; the resume check always takes nano."""
    batch_size: int = 0
    """Sequences per training step. 0: 32 on a GPU of 30 GB and more, otherwise 8."""
    quick: bool = False
    """Fewer steps and rows: one or two minutes on a large GPU instead of up to eight."""
    only: tuple[str, ...] = ()
    """Run only the rows whose name contains one of these texts."""
    out: str | None = None
    """Also write the table to this file."""
    debug: bool = False
    """Show the full traceback of an error."""


@dataclass(frozen=True)
class Bench:
    """What the checks share."""

    device: torch.device
    preset: Preset
    tokens: np.ndarray  # of the bundled play
    batch_size: int
    n_steps: int  # timed ones
    quick: bool

    @property
    def config(self) -> GPT2Config:
        """The model that is checked."""
        return PRESETS[self.preset]

    @property
    def half(self) -> torch.dtype:
        """The 16-bit format that `--dtype auto` trains with."""
        return torch.bfloat16 if supports(self.device, torch.bfloat16) else torch.float16


@dataclass(frozen=True)
class Outcome:
    """What a check found; `ok` is None where nothing is demanded."""

    result: str
    bound: str = ""
    ok: bool | None = None


Check = Callable[[], Outcome]


class NotTriedError(Exception):
    """This machine cannot do what the check is about, which is no failure."""


@dataclass(frozen=True)
class Trained:
    """What some training steps measured."""

    losses: list[float]
    n_skipped: int
    seconds: float  # median of the timed steps
    micro_batch_size: int  # after the last step
    peak: int | None  # bytes of tensors above what was there before; None where nobody counts
    reserved: int | None  # bytes the allocator held


def main(options: CheckOptions) -> int:
    """Run the checks one after the other; 1 when any has failed."""
    began = time.perf_counter()
    bench = prepare(options)
    wanted = [
        (what, check)
        for what, check in checks(bench)
        if not options.only or any(text in what for text in options.only)
    ]
    with contextlib.ExitStack() as stack:
        files: list[TextIO] = [sys.stdout]
        if options.out:
            files.append(stack.enter_context(Path(options.out).open("w", encoding="utf-8")))
        n_failed = report(wanted, partial(write_line, files), bench.device)
    seconds = time.perf_counter() - began
    print(f"{len(wanted)} rows, {n_failed} failed, {seconds:.0f} s", file=sys.stderr)
    return 1 if n_failed else 0


def prepare(options: CheckOptions) -> Bench:
    """Read the text, and settle the sizes that were left open."""
    device = pick_device(options.device)
    tokenizer = Tokenizer.gpt2(PRESETS[options.preset].vocab_size)
    tokens = np.array(tokenizer.encode(TEXT.read_text(encoding="utf-8")), np.uint16)
    large = device.type == "cuda" and total_memory(device) > 30e9
    return Bench(
        device=device,
        preset=options.preset,
        tokens=tokens,
        batch_size=options.batch_size or (32 if large else 8),
        n_steps=5 if options.quick else 20,
        quick=options.quick,
    )


def checks(bench: Bench) -> Iterator[tuple[str, Check]]:
    """The rows of the table: what they are called, and what finds their content."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    half = named(bench.half)
    yield "machine", partial(machine, bench)
    yield "logits, float32, as on the CPU", partial(logits_parity, bench)
    yield f"loss in {half}", partial(half_loss, bench)
    for dtype in dtypes:
        yield f"training, {named(dtype)}", partial(training, bench, dtype)
    yield f"training, {half}, compiled", partial(training, bench, bench.half, compiled=True)
    yield (
        f"training, {half}, activation checkpointing",
        partial(training, bench, bench.half, recomputed=True),
    )
    yield "float16 loss scaler", partial(loss_scaler, bench)
    yield "resume", partial(resume, bench, "auto")
    if bench.device.type == "cuda" and not bench.quick:
        yield "resume, float16", partial(resume, bench, "float16")
    yield "out of memory", partial(out_of_memory, bench)
    for preset, dtype, recomputed, n_rows in forecast_cases(bench):
        how = f"{named(dtype)}, {n_rows} of {FORECAST_ROWS} x {PRESETS[preset].block_size}"
        how += ", activation checkpointing" * recomputed
        yield (
            f"memory, {preset}, {how}",
            partial(forecast_error, bench, preset, dtype, recomputed, n_rows),
        )
    yield "micro-batch chosen to fit", partial(chosen_micro_batch, bench)
    for dtype in dtypes:
        for n_rows in (1, 64):
            yield (
                f"sampling, {named(dtype)}, {n_rows} at once",
                partial(sampling, bench, dtype, n_rows),
            )
    yield "greedy tokens, float32, as on the CPU", partial(greedy_parity, bench)
    yield "next to a plain step", partial(next_to_a_plain_step, bench)


def forecast_cases(bench: Bench) -> Iterator[tuple[Preset, torch.dtype, bool, int]]:
    """Preset, dtype, activation checkpointing, micro-batch."""
    presets: list[Preset] = [bench.preset]
    if bench.preset == "gpt2" and not bench.quick:
        presets.append("gpt2-medium")
    for preset in presets:
        for dtype in (torch.float32, bench.half):
            for recomputed in (False, True):
                for n_rows in (FORECAST_ROWS,) if bench.quick else (2, FORECAST_ROWS):
                    yield preset, dtype, recomputed, n_rows


def report(
    wanted: Iterable[tuple[str, Check]], write: Callable[[str], None], device: torch.device
) -> int:
    """Run each check and write its row; returns how many have failed."""
    n_failed = 0
    for line in HEADER:
        write(line)
    for what, check in wanted:
        began = time.perf_counter()
        outcome = attempt(check)
        Precision(device, torch.float32).release_memory()
        verdict = {True: "pass", False: "**FAIL**", None: ""}[outcome.ok]
        n_failed += outcome.ok is False
        cells = [what, outcome.result, outcome.bound, verdict]
        line = " | ".join(cell.replace("|", r"\|") for cell in cells)
        write(f"| {line} | {time.perf_counter() - began:.1f} |")
    return n_failed


def attempt(check: Check) -> Outcome:
    """What a check found, or why it could not; the traceback goes to stderr."""
    try:
        return check()
    except NotTriedError as reason:
        return Outcome(f"not tried: {reason}")
    except Exception as problem:  # one broken check must not take the others with it
        traceback.print_exc()
        reason = next(iter(str(problem).splitlines()), "")
        return Outcome(f"{type(problem).__name__}: {reason[:200]}", ok=False)


def write_line(files: Iterable[TextIO], line: str) -> None:
    """Write at once: a run that is cut short leaves what it knew."""
    for file in files:
        print(line, file=file, flush=True)


def machine(bench: Bench) -> Outcome:
    """What the other rows were measured on."""
    parts = [
        *card_facts(bench.device),
        f"{os.cpu_count()} {platform.machine()} cores",
        f"torch {torch.__version__}",
        f"float32 products: {torch.get_float32_matmul_precision()}",
        f"Python {platform.python_version()}",
        f"minigpt2 {__version__}, {bench.preset}",
    ]
    return Outcome(", ".join(parts))


def logits_parity(bench: Bench) -> Outcome:
    """The same weights and tokens on both sides."""
    model, idx = randomised(bench.config), windows(bench, 2)
    with torch.no_grad():
        expected = model(idx)
        got = model.to(bench.device)(idx.to(bench.device)).cpu()
    difference = (got - expected).abs().max().item()
    return Outcome(
        f"largest difference {difference:.1e}, logits up to {expected.abs().max():.0f}",
        "<= 1e-3",
        difference <= 1e-3,
    )


def half_loss(bench: Bench) -> Outcome:
    """The loss of one batch under autocast and without."""
    model, idx = randomised(bench.config).to(bench.device), windows(bench, 8).to(bench.device)
    losses = []
    for dtype in (torch.float32, bench.half):
        with torch.no_grad(), Precision(bench.device, dtype).autocast():
            losses.append(Scorer(model)(idx[:, :-1], idx[:, 1:]).item() / idx[:, 1:].numel())
    exact, rounded = losses
    result = f"{rounded:.4f}, in float32 {exact:.4f}"
    return Outcome(result, "<= 0.02 apart", abs(rounded - exact) <= 0.02)


def training(
    bench: Bench, dtype: torch.dtype, *, compiled: bool = False, recomputed: bool = False
) -> Outcome:
    """Steps as train.py takes them, with the model's own dropout and the micro-batch chosen."""
    at_once = fitting(bench, dtype, bench.batch_size, recomputed)
    trained = train(
        bench, dtype, micro_batch_size=at_once, compiled=compiled, recomputed=recomputed
    )
    n_tokens = bench.batch_size * bench.config.block_size
    first, last = trained.losses[0], trained.losses[-1]
    parts = [
        f"{bench.batch_size} x {bench.config.block_size} tokens, {trained.micro_batch_size} rows "
        f"at a time: {trained.seconds * 1e3:.1f} ms",
        f"{n_tokens / trained.seconds:,.0f} tokens/s",
        utilisation(bench, dtype, n_tokens / trained.seconds),
        f"loss {first:.2f} to {last:.2f}",
    ]
    bounds, ok = ["loss falls by 0.3"], first - last >= 0.3
    if trained.peak is not None and not compiled:  # the forecast is about uncompiled blocks
        accumulated = at_once < bench.batch_size
        expected = forecast(bench, bench.config, dtype, at_once, recomputed, accumulated)
        text, fits = compared(trained.peak, expected)
        parts.append(text)
        bounds.append("memory within 10 %")
        ok = ok and fits
    elif trained.peak is not None:
        parts.append(f"peak {gigabytes(trained.peak)}")
    return Outcome("; ".join(parts), ", ".join(bounds), ok)


def loss_scaler(bench: Bench) -> Outcome:
    """Float16 must learn what the wider format learns, over as many steps that were taken."""
    wide = torch.bfloat16 if bench.half == torch.bfloat16 else torch.float32
    expected = train(bench, wide, dropout=0.0).losses[-1]
    got = train(bench, torch.float16, dropout=0.0)
    result = f"loss {got.losses[-1]:.4f}, in {named(wide)} {expected:.4f}"
    return Outcome(
        f"{result}; {got.n_skipped} steps skipped and done again",
        "<= 0.05 apart",
        abs(got.losses[-1] - expected) <= 0.05,
    )


def resume(bench: Bench, dtype: str) -> Outcome:
    """train.py from start to end, and once more with a SIGTERM and --resume on the way."""
    with tempfile.TemporaryDirectory() as folder:
        straight, stopped = Path(folder, "straight"), Path(folder, "stopped")
        run_train(bench, dtype, straight)
        at = run_train(bench, dtype, stopped, stop_after=4)
        run_train(bench, dtype, stopped, "--resume")
        losses = [logged_losses(out) for out in (straight, stopped)]
        weights = [last_weights(out) for out in (straight, stopped)]
    assert len(losses[0]) == len(losses[1]), "steps are missing from metrics.jsonl"
    loss = max(abs(a - b) for a, b in zip(*losses))
    weight = (weights[0] - weights[1]).abs().max().item()
    exact = bench.device.type == "cpu"
    return Outcome(
        f"stopped at step {at} of {len(losses[0])}: losses differ by {loss:.1e}, weights by "
        f"{weight:.1e} at most",
        "0" if exact else "losses <= 1e-3",
        loss == weight == 0 if exact else loss <= 1e-3,
    )


def out_of_memory(bench: Bench) -> Outcome:
    """A micro-batch that cannot fit is halved until it does, and the step is the same step."""
    if bench.device.type != "cuda":
        raise NotTriedError("only CUDA can be told to have less memory")
    run = partial(train, bench, torch.float32, n_steps=2, dropout=0.0)
    small = run(micro_batch_size=1)
    assert small.reserved is not None
    limit = int(1.3 * small.reserved)
    with memory_limit(bench.device, limit):
        large = run(micro_batch_size=bench.batch_size)
    difference = max(abs(a - b) for a, b in zip(small.losses, large.losses))
    return Outcome(
        f"with {gigabytes(limit)}: micro-batch {bench.batch_size} became "
        f"{large.micro_batch_size}; losses differ from those of 1 by {difference:.1e}",
        "halved, <= 1e-3",
        large.micro_batch_size < bench.batch_size and difference <= 1e-3,
    )


def forecast_error(
    bench: Bench, preset: Preset, dtype: torch.dtype, recomputed: bool, n_rows: int
) -> Outcome:
    """What train.py would announce, and what two steps took."""
    accumulated = n_rows < FORECAST_ROWS
    expected = forecast(bench, PRESETS[preset], dtype, n_rows, recomputed, accumulated)
    if expected > memory.budget(bench.device):
        raise NotTriedError(f"the forecast is {gigabytes(expected)}, which is not there")
    trained = train(
        bench,
        dtype,
        config=PRESETS[preset],
        batch_size=FORECAST_ROWS,
        micro_batch_size=n_rows,
        n_steps=2,
        recomputed=recomputed,
    )
    if trained.peak is None:
        raise NotTriedError(f"the forecast is {gigabytes(expected)}; only CUDA counts its tensors")
    text, ok = compared(trained.peak, expected)
    return Outcome(text, "within 10 %", ok)


def chosen_micro_batch(bench: Bench) -> Outcome:
    """As many sequences as are said to fit into this machine must fit."""
    budget = memory.budget(bench.device)
    most = 512 if bench.device.type == "cuda" else 8
    # of batches that do not fit as a whole, equal parts are taken, which may be half of what fits
    chosen = bisect.bisect_left(
        range(1, most + 1), True, key=lambda n_rows: fitting(bench, bench.half, n_rows) < n_rows
    )
    trained = train(bench, bench.half, batch_size=chosen, n_steps=2)
    peak = "" if trained.peak is None else f"peak {gigabytes(trained.peak)} of "
    return Outcome(
        f"{chosen} x {bench.config.block_size} tokens chosen, {trained.micro_batch_size} used; "
        f"{peak}{gigabytes(budget)} that may be taken",
        "not halved",
        trained.micro_batch_size == chosen,
    )


def sampling(bench: Bench, dtype: torch.dtype, n_rows: int) -> Outcome:
    """New tokens as sample.py draws them by default, from prompts that all differ."""
    need(bench.device, dtype)
    model = new_model(bench, bench.config).to(dtype).eval()
    starts = range(0, n_rows * PROMPT_TOKENS, PROMPT_TOKENS)
    rows = [bench.tokens[start : start + PROMPT_TOKENS].tolist() for start in starts]

    def rounds(n_new: int) -> Iterator[list[list[Token]]]:
        return decode(
            model,
            rows,
            max_new_tokens=n_new,
            sampling=SampleOptions(prompt="").sampling,
            generators=[row_generator(1, row) for row in range(n_rows)],
            take=lambda row, token: False,
        )

    fix_shapes(model)
    for _ in rounds(WARM_UP):
        pass
    began = time.perf_counter()
    stream = rounds(NEW_TOKENS)
    n_drawn = len(next(stream))  # tokens come as Python numbers: the device is done with them
    first = time.perf_counter() - began
    n_drawn += sum(len(new) for new in stream)
    seconds = time.perf_counter() - began
    return Outcome(
        f"{n_drawn / seconds:,.0f} tokens/s; first after {first * 1e3:.1f} ms, then "
        f"{(seconds - first) / (NEW_TOKENS - 1) * 1e3:.2f} ms each"
    )


def greedy_parity(bench: Bench) -> Outcome:
    """The likeliest tokens must be the same ones, and not the same one again and again."""
    model, prompt = randomised(bench.config), [bench.tokens[:PROMPT_TOKENS].tolist()]
    expected, got = (
        generate(model.to(device), prompt, max_new_tokens=32, sampling=GREEDY)[0]
        for device in ("cpu", bench.device)
    )
    n_equal = sum(a == b for a, b in zip(expected, got))
    return Outcome(
        f"{n_equal} of {len(expected)} equal, {len(set(expected))} different ones among them",
        "all equal, 5 different",
        n_equal == len(expected) == 32 and len(set(expected)) >= 5,
    )


def next_to_a_plain_step(bench: Bench) -> Outcome:
    """Our step and the one that most tutorials write, in turns, from the same weights."""
    dtype = bench.half if bench.half == torch.bfloat16 else torch.float32
    # two models and all logits at once must fit
    precision, size = Precision(bench.device, dtype), max(1, bench.batch_size // 4)
    ours, plain = (new_model(bench, bench.config, dropout=0.0) for _ in range(2))
    optimizer = make_optimizer(ours, learning_rate=LEARNING_RATE, weight_decay=0.1)
    batches = make_batches(bench, size, bench.config)

    def our_step(batch: Batch) -> float:
        return one_step(Scorer(ours), batch, optimizer, precision, size).loss

    turns = take_turns((our_step, PlainStep(plain, precision)), batches, bench)
    shown = []
    for name, turn in zip(("ours", "plain"), turns):
        more = f", {gigabytes(turn.peak)} besides weights and optimizer" if turn.peak else ""
        shown.append(f"{name} {turn.seconds * 1e3:.1f} ms{more}")
    difference = abs(turns[0].first_loss - turns[1].first_loss)
    ratio = turns[1].seconds / turns[0].seconds
    return Outcome(
        f"{named(dtype)}, {size} x {bench.config.block_size} tokens: {'; '.join(shown)}; "
        f"ours is {ratio:.2f} times as fast",
        "first losses <= 0.02 apart",
        difference <= 0.02,
    )


@dataclass(frozen=True)
class Turn:
    """What one way to take a step measured, while others ran in between."""

    first_loss: float
    seconds: float  # median of the timed steps
    peak: int | None  # bytes of the last step, above what was there before it


def take_turns(
    steps: Sequence[Callable[[Batch], float]], batches: Batches, bench: Bench
) -> list[Turn]:
    """Take every step on every batch, so that what disturbs one way disturbs the others."""
    measured = [([], [], []) for _ in steps]
    for number in range(WARM_UP + bench.n_steps):
        batch = batches.at(number)
        for step, (losses, times, peaks) in zip(steps, measured):
            before, began = start_peak(bench.device), now(bench.device)
            losses.append(step(batch))
            times.append(now(bench.device) - began)
            peaks.append(peak_since(bench.device, before))
    return [
        Turn(losses[0], statistics.median(times[WARM_UP:]), peaks[-1])
        for losses, times, peaks in measured
    ]


class PlainStep:
    """All logits at once, F.cross_entropy, AdamW with foreach: what torch does by default on a GPU.

    The network is our own, so this compares the step around it, and is not a measurement of
    nanoGPT.
    """

    def __init__(self, model: GPT2, precision: Precision) -> None:
        self.model, self.precision = model, precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=True)

    def __call__(self, batch: Batch) -> float:
        """The loss of idx, targets (B, T) before the step."""
        idx, targets = (self.precision.to_device(part) for part in batch)
        with self.precision.autocast():
            logits = self.model(idx)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def train(
    bench: Bench,
    dtype: torch.dtype,
    *,
    config: GPT2Config | None = None,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    n_steps: int | None = None,
    dropout: float | None = None,
    compiled: bool = False,
    recomputed: bool = False,
) -> Trained:
    """Train a new model for WARM_UP + n_steps steps, or for exactly n_steps where it is given.

    A step that float16 skips is done again, on the same batch, and its loss is not counted. Raises
    RuntimeError when torch.compile fails, where train.py would go on without it.
    """
    need(bench.device, dtype)
    batch_size = batch_size or bench.batch_size
    micro_batch_size = micro_batch_size or batch_size
    precision = Precision(bench.device, dtype)
    precision.release_memory()
    before = start_peak(bench.device)
    model = new_model(bench, config or bench.config, dropout)
    batches = make_batches(bench, batch_size, model.config)
    shape = micro_batch_size, model.config.block_size
    with notices_are_errors("minigpt2.blocks"):
        prepare_blocks(model, precision, shape, compiled=compiled, recomputed=recomputed)
    scorer = Scorer(model)
    optimizer = make_optimizer(model, learning_rate=LEARNING_RATE, weight_decay=0.1)
    losses, times, n_skipped = [], [], 0
    while len(losses) < (n_steps or WARM_UP + bench.n_steps):
        batch = batches.at(len(losses))
        began = now(bench.device)
        stats = one_step(scorer, batch, optimizer, precision, micro_batch_size)
        times.append(now(bench.device) - began)
        micro_batch_size = stats.micro_batch_size
        n_skipped += stats.skipped
        assert n_skipped < 40, "float16 overflows at every step"
        if not stats.skipped:
            losses.append(stats.loss)
    timed = times if n_steps else times[WARM_UP:]
    peak = peak_since(bench.device, before)
    if compiled:
        torch.compiler.reset()
    return Trained(
        losses,
        n_skipped,
        statistics.median(timed),
        micro_batch_size,
        peak,
        reserved_peak(bench.device),
    )


def one_step(
    scorer: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    micro_batch_size: int,
) -> StepStats:
    """One optimizer step as train.py takes it."""
    return train_step(
        scorer,
        batch,
        optimizer,
        precision,
        micro_batch_size=micro_batch_size,
        learning_rate=LEARNING_RATE,
        grad_clip=1.0,
        seed=int(batch[0][0, 0]),
    )


def run_train(
    bench: Bench, dtype: str, out: Path, *more: str, stop_after: int | None = None
) -> int:
    """Run train.py in a process of its own, send SIGTERM once it has logged step `stop_after`, and
    return the last step it logged.

    Raises RuntimeError with its last words when it ends in another way than it should.
    """
    environment = {**os.environ, "MINIGPT2_CACHE": str(out.parent / "cache")}
    end = time.monotonic() + MOST_SECONDS
    command = [*train_command(bench, dtype, out), *more]
    with (
        tempfile.TemporaryFile() as words,
        subprocess.Popen(command, env=environment, stdout=words, stderr=words) as process,
    ):
        try:
            while stop_after is not None and process.poll() is None and time.monotonic() < end:
                if len(logged_losses(out)) >= stop_after:
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.002)
            code = process.wait(timeout=max(1.0, end - time.monotonic()))
        finally:
            process.kill()
        words.seek(0)
        last = words.read().decode(errors="replace").strip().rpartition("\n")[2]
    if code != (0 if stop_after is None else 128 + signal.SIGTERM):
        raise RuntimeError(f"train.py ended with {code}: {last}")
    return len(logged_losses(out))


def train_command(bench: Bench, dtype: str, out: Path) -> list[str]:
    """A short run with dropout, accumulation and one evaluation at each end."""
    flags = {
        "data": TEXT,
        "preset": "nano",
        "out": out,
        "device": bench.device,
        "dtype": dtype,
        "dropout": 0.1,
        "max-steps": 12,
        "eval-every": 12,
        "micro-batch-size": 8,
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, str(ROOT / "train.py"), *given]


def logged_losses(out: Path) -> list[float]:
    """The loss of every step in the metrics.jsonl of a run."""
    return [line["loss"] for line in RunFolder(out).read_metrics() if "loss" in line]


def last_weights(out: Path) -> Tensor:
    """All parameters of the newest checkpoint of a run, as one vector."""
    model = GPT2.from_pretrained(RunFolder(out).checkpoints()[0])
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def new_model(bench: Bench, config: GPT2Config, dropout: float | None = None) -> GPT2:
    """The same random weights each time, made on the device."""
    torch.manual_seed(1)
    with bench.device:
        model = GPT2(config)
    if dropout is not None:
        model.set_dropout(dropout)
    return model


def randomised(config: GPT2Config) -> GPT2:
    """A model on the CPU in which every parameter matters, and whose scores are far from flat.

    GPT-2's start would not do: its biases are 0, and what it says next is what it read last.
    """
    random = torch.Generator().manual_seed(2)
    model = GPT2(config, generator=random)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def windows(bench: Bench, n_rows: int) -> Tensor:
    """The first rows of the play, (n_rows, up to 256 tokens)."""
    length = min(256, bench.config.block_size)
    return torch.from_numpy(bench.tokens[: n_rows * length].astype(np.int64)).view(n_rows, length)


def make_batches(bench: Bench, batch_size: int, config: GPT2Config) -> Batches:
    """The play again and again, in batches of any size."""
    return Batches(bench.tokens, block_size=config.block_size, batch_size=batch_size, seed=1)


def forecast(
    bench: Bench,
    config: GPT2Config,
    dtype: torch.dtype,
    n_rows: int,
    recomputed: bool,
    accumulated: bool,
) -> int:
    """The bytes that train.py would announce."""
    return memory.forecast(
        config,
        micro_batch_size=n_rows,
        block_size=config.block_size,
        dtype=dtype,
        device=bench.device,
        activation_checkpointing=recomputed,
        accumulated=accumulated,
    ).total


def fitting(bench: Bench, dtype: torch.dtype, n_rows: int, recomputed: bool = False) -> int:
    """The micro-batch that train.py would choose for `n_rows` sequences."""
    return memory.fitting_micro_batch(
        partial(
            memory.forecast,
            bench.config,
            dtype=dtype,
            device=bench.device,
            activation_checkpointing=recomputed,
        ),
        rows=n_rows,
        block_size=bench.config.block_size,
        budget=memory.budget(bench.device),
    )


def compared(measured: int, expected: int) -> tuple[str, bool]:
    """A forecast beside the measured bytes, and whether it is at most 10 % off."""
    error = (expected - measured) / measured
    text = f"peak {gigabytes(measured)}, forecast {gigabytes(expected)} ({error:+.1%})"
    return text, abs(error) <= 0.1


def utilisation(bench: Bench, dtype: torch.dtype, tokens_per_second: float) -> str:
    """Model FLOP/s, and their share of what the card could do at best (MFU)."""
    reached = flops_per_token(bench.config) * tokens_per_second / 1e12
    peak = peak_tflops(describe(bench.device), dtype)
    share = "MFU unknown" if peak is None else f"MFU {reached / peak:.1%}"
    return f"{reached:.3g} TFLOP/s, {share}"


def flops_per_token(config: GPT2Config) -> float:
    """What forward and backward pass of one token of a full window must compute: 6 for each weight
    it is multiplied with, and causal attention. What is recomputed does not count.
    """
    with torch.device("meta"):
        model = GPT2(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    n_weights = matrices - model.wpe.weight.numel()  # wpe is only looked up, tied wte is the head
    return 6 * n_weights + 6 * config.n_layer * config.n_embd * config.block_size


def peak_tflops(name: str, dtype: torch.dtype) -> float | None:
    """The dense peak of a card by its name in torch, or None when it is not in the table."""
    for pattern, (half, single) in PEAKS.items():
        if re.fullmatch(f"((NVIDIA|Tesla) )*({pattern})", name):
            return single if dtype == torch.float32 else half
    return None


@contextlib.contextmanager
def notices_are_errors(logger: str) -> Iterator[None]:
    """Raise RuntimeError with what a module of ours says in a notice."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(logger).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(logger).removeHandler(handler)
    if said:
        raise RuntimeError(said[0])


def need(device: torch.device, dtype: torch.dtype) -> None:
    """Raise NotTriedError for a format that the device only imitates."""
    if not supports(device, dtype):
        raise NotTriedError(f"this device has no {named(dtype)}")


def named(dtype: torch.dtype) -> str:
    """A dtype as the flags call it."""
    return str(dtype).removeprefix("torch.")


def gigabytes(n_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{n_bytes / 1e9:.2f} GB"


# What follows is all that asks CUDA itself.


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device computes in this format by itself."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return True
    return torch.cuda.is_bf16_supported(including_emulation=False)


def describe(device: torch.device) -> str:
    """The card's name in torch, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def card_facts(device: torch.device) -> list[str]:
    """What to know of a card and its software; nothing for the CPU."""
    if device.type != "cuda":
        return []
    card = torch.cuda.get_device_properties(device)
    return [
        f"{card.name}, {card.total_memory / 1e9:.0f} GB",
        f"compute capability {card.major}.{card.minor}",
        f"driver {driver_version()}",
        f"CUDA {torch.version.cuda}",
    ]


def total_memory(device: torch.device) -> int:
    """Bytes on the card."""
    return torch.cuda.get_device_properties(device).total_memory


def start_peak(device: torch.device) -> int:
    """Forget earlier peaks; returns the bytes of tensors that are there now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_since(device: torch.device, before: int) -> int | None:
    """The most bytes of tensors at once since `start_peak`, above what it returned."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) - before


def reserved_peak(device: torch.device) -> int | None:
    """The most bytes that torch's allocator held at once since `start_peak`."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


@contextlib.contextmanager
def memory_limit(device: torch.device, n_bytes: int) -> Iterator[None]:
    """Let torch's allocator hold no more than this on the card."""
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total_memory(device)), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def driver_version() -> str:
    """What nvidia-smi says; torch does not know it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


if __name__ == "__main__":
    sys.exit(run_script(main, CheckOptions))
