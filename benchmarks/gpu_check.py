"""Checks and measures the CUDA side of minigpt2 in one go: python benchmarks/gpu_check.py

Prints a Markdown table, each row as soon as it is known. A check that fails or breaks is a row like
any other, with its reason; the exit code is then 1. What is timed is compared with its plain twin,
and what computes something else has no speed. What the rows mean is in docs/benchmarks.md.
Without a GPU it shows that it works: --device cpu --preset nano --quick.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import math
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
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import starmap
from pathlib import Path
from types import ModuleType
from typing import TextIO

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minigpt2 import __version__
from minigpt2.arguments import Preset
from minigpt2.cli.console import run_script
from minigpt2.decoding import c_library, c_products
from minigpt2.decoding import cpu_layout as packed
from minigpt2.decoding import cuda_graphs as graphs
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.options import SampleOptions
from minigpt2.decoding.ready import load
from minigpt2.equivalences import ROUNDED, WAYS, difference, way_of_loaded
from minigpt2.evaluation.agreement import logprob_error, shortfall
from minigpt2.evaluation.scorer import Scorer
from minigpt2.generate import DecodeSettings, Token, decode, generate
from minigpt2.model import GPT2, PRESETS, GPT2Config
from minigpt2.runs.folder import RunFolder
from minigpt2.sampling import SamplingConfig
from minigpt2.system.memory import memory_budget
from minigpt2.system.precision import DTYPES, Precision, pick_device
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import blocks
from minigpt2.training.batches import Batch, Batches
from minigpt2.training.forecast import fitting_micro_batch, forecast_memory
from minigpt2.training.optimizer import BETAS, make_optimizer
from minigpt2.training.step import StepStats, train_step

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "data" / "sallow-point.txt"
HEADER = ("| what | result | bound | | s |", "| --- | --- | --- | --- | ---: |")
WARM_UP = 3  # steps that are not timed: kernels are chosen and memory is taken in them
LEARNING_RATE = 6e-4
GREEDY = SamplingConfig(temperature=0)
WEIGHT_DECAY = 0.1
PROMPT_TOKENS, NEW_TOKENS = 32, 128
GREEDY_PROMPTS, GREEDY_NEW = (range(32), range(100, 105), range(200, 217)), 32
FORECAST_ROWS = 8  # in a step, at once or a few at a time: gradients then lie there from the start
DECODING = (
    graphs,
    packed,
    c_library,
    c_products,
)  # what decoding is made faster by, where it works
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
    work: Path  # a folder for what is written

    @property
    def config(self) -> GPT2Config:
        """The model that is checked."""
        return PRESETS[self.preset]

    @property
    def without_dropout(self) -> GPT2Config:
        """The same, so that the losses of two ways to train can be compared."""
        return replace(self.config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)

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
    planned: int  # micro-batch of the first step
    micro_batch_size: int  # after the last step
    peak: int | None  # bytes of tensors above what was there before; None where nobody counts
    reserved: int | None  # bytes the allocator held


def main(options: CheckOptions) -> int:
    """Run the checks one after the other; 1 when any has failed."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory())
        bench = prepare(options, Path(work))
        wanted = [
            (what, check)
            for what, check in checks(bench)
            if not options.only or any(text in what for text in options.only)
        ]
        files: list[TextIO] = [sys.stdout]
        if options.out:
            files.append(stack.enter_context(Path(options.out).open("w", encoding="utf-8")))
        n_failed = report(wanted, partial(write_line, files), bench.device)
    seconds = time.perf_counter() - began
    print(f"{len(wanted)} rows, {n_failed} failed, {seconds:.0f} s", file=sys.stderr)
    return 1 if n_failed else 0


def prepare(options: CheckOptions, work: Path) -> Bench:
    """Read the text, and settle the sizes that were left open; `work` is a folder to write to."""
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
        work=work,
    )


def checks(bench: Bench) -> Iterator[tuple[str, Check]]:
    """The rows of the table: what they are called, and what finds their content."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    half = named(bench.half)
    yield "machine", partial(machine, bench)
    yield "logits, float32, as on the CPU", partial(logits_parity, bench)
    yield f"loss in {half}", partial(half_loss, bench)
    exact = cache(partial(train_without_dropout, bench, torch.float32))
    for dtype in dtypes:
        yield f"training, {named(dtype)}", partial(training, bench, dtype, exact)
    yield f"training, {half}, compiled", partial(training, bench, bench.half, exact, compiled=True)
    yield (
        f"training, {half}, activation checkpointing",
        partial(training, bench, bench.half, exact, recomputed=True),
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
    for number, compiled in greedy_cases(bench):
        yield (
            f"greedy tokens, {number}" + ", compiled" * compiled,
            partial(greedy_tokens, bench, number, compiled=compiled),
        )
    yield "next to a plain step", partial(next_to_a_plain_step, bench)


def greedy_cases(bench: Bench) -> list[tuple[str, bool]]:
    """What sample.py calls --dtype, and whether with --compile."""
    half = named(bench.half)
    return [("float32", False), ("float32", True), (half, False), ("int8", False), ("int8", True)]


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
    bench: Bench,
    dtype: torch.dtype,
    exact: Callable[[], Trained],
    *,
    compiled: bool = False,
    recomputed: bool = False,
) -> Outcome:
    """Steps as train.py takes them, with the micro-batch chosen, whose losses have to be those of
    `exact`, float32 on the same batches.
    """
    plain = dtype == torch.float32 and not compiled and not recomputed
    if plain:
        trained = exact()
    else:
        trained = train_without_dropout(bench, dtype, compiled=compiled, recomputed=recomputed)
    first, last = trained.losses[0], trained.losses[-1]
    falls, bounds = f"loss {first:.2f} to {last:.2f}", ["loss falls by 0.3"]
    right = first - last >= 0.3
    if not plain:
        off = difference(torch.tensor(trained.losses), torch.tensor(exact().losses))
        most = training_tolerance(dtype, compiled=compiled, recomputed=recomputed)
        falls += f", off by {off:.1e} of that in float32"
        bounds.append(f"off by <= {most:g}")
        right = right and off <= most
    if not right:
        return Outcome(f"{falls}: it learns something else", ", ".join(bounds), False)
    n_tokens = bench.batch_size * bench.config.block_size
    parts = [
        f"{bench.batch_size} x {bench.config.block_size} tokens, {trained.micro_batch_size} rows "
        f"at a time: {trained.seconds * 1e3:.1f} ms",
        f"{n_tokens / trained.seconds:,.0f} tokens/s",
        utilisation(bench, dtype, n_tokens / trained.seconds),
        falls,
    ]
    fits = True
    if trained.peak is not None and not compiled:  # the forecast is about uncompiled blocks
        config, accumulated = bench.without_dropout, trained.planned < bench.batch_size
        expected = forecast(bench, config, dtype, trained.planned, recomputed, accumulated)
        text, fits = compared(trained.peak, expected)
        parts.append(text)
        bounds.append("memory within 10 %")
    elif trained.peak is not None:
        parts.append(f"peak {gigabytes(trained.peak)}")
    return Outcome("; ".join(parts), ", ".join(bounds), fits)


def train_without_dropout(
    bench: Bench, dtype: torch.dtype, *, compiled: bool = False, recomputed: bool = False
) -> Trained:
    """Train with the micro-batch that train.py would choose."""
    config = bench.without_dropout
    at_once = fitting(bench, config, dtype, bench.batch_size, recomputed)
    return train(
        bench,
        dtype,
        config=config,
        micro_batch_size=at_once,
        compiled=compiled,
        recomputed=recomputed,
    )


def training_tolerance(dtype: torch.dtype, *, compiled: bool, recomputed: bool) -> float:
    """How far losses may be from those of plain training, as a share of the largest."""
    ways = [f"{named(dtype)} autocast"] * (dtype != torch.float32)
    ways += ["compiled blocks"] * compiled + ["recomputed blocks"] * recomputed
    return max(WAYS[way].tolerance for way in ways)


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
    loss = max(starmap(loss_gap, zip(*losses)))
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
    if expected > memory_budget(bench.device):
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
    budget = memory_budget(bench.device)
    most = 512 if bench.device.type == "cuda" else 8
    # of batches that do not fit as a whole, equal parts are taken, which may be half of what fits
    chosen = bisect.bisect_left(
        range(1, most + 1), True, key=lambda n: fitting(bench, bench.config, bench.half, n) < n
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
    starts = range(0, n_rows * PROMPT_TOKENS, PROMPT_TOKENS)
    prompts = [bench.tokens[start : start + PROMPT_TOKENS].tolist() for start in starts]
    with notices_are_errors(*DECODING):
        model = loaded(bench, named(dtype))
        for _ in draws(model, prompts, WARM_UP):
            pass
        began = time.perf_counter()
        stream = draws(model, prompts, NEW_TOKENS)
        rounds = [next(stream)]  # tokens come as Python numbers: the device is done with them
        first = time.perf_counter() - began
        rounds += stream
        seconds = time.perf_counter() - began
    del model
    texts = [[token for new in rounds for token in new[row]] for row in range(n_rows)]
    twin, most = plain_twin(bench, named(dtype))
    off = max(map(partial(off_by, twin), prompts, texts))
    found, bound = f"off by {off:.1e} of the largest score", f"off by <= {most:g}"
    if not off <= most:
        return Outcome(f"log-probabilities {found}: another text", bound, False)
    n_drawn = sum(map(len, texts))
    return Outcome(
        f"{n_drawn / seconds:,.0f} tokens/s; first after {first * 1e3:.1f} ms, then "
        f"{(seconds - first) / (NEW_TOKENS - 1) * 1e3:.2f} ms each; log-probabilities {found}",
        bound,
        n_drawn == n_rows * NEW_TOKENS,
    )


def draws(model: GPT2, prompts: list[list[int]], n_new: int) -> Iterator[list[list[Token]]]:
    """The new tokens of every row, decode step by decode step."""
    settings = DecodeSettings(n_new, SampleOptions(prompt="").sampling, seed=1)
    return decode(model, prompts, settings, lambda row, token: False)


def off_by(twin: GPT2, prompt: list[int], text: list[Token]) -> float:
    """How far the log-probabilities of a text are from those that its plain twin gives."""
    ids, logprobs = [token.id for token in text], [token.logprob for token in text]
    off = logprob_error(twin, prompt, ids, logprobs)
    return off if off == off else float("inf")


def greedy_tokens(bench: Bench, number: str, *, compiled: bool) -> Outcome:
    """The text of a model as sample.py loads it must be the plain model's on the CPU, and no word
    again and again; `number` is the --dtype.
    """
    if number in DTYPES:
        need(bench.device, DTYPES[number])
    prompts = [bench.tokens[place].tolist() for place in GREEDY_PROMPTS]
    with notices_are_errors(*DECODING):
        model = loaded(bench, number, compiled=compiled)
        texts = generate(model, prompts, max_new_tokens=GREEDY_NEW, sampling=GREEDY)
    del model
    if compiled:
        torch.compiler.reset()
    twin, most = plain_twin(bench, number, compiled=compiled)
    off = max(map(partial(shortfall, twin), prompts, texts))
    n_different = len({id for text in texts for id in text})
    whole = all(len(text) == GREEDY_NEW for text in texts)
    return Outcome(
        f"{len(texts)} texts of {GREEDY_NEW} tokens, off by {off:.1e} of the largest score, "
        f"{n_different} different ones among them",
        f"off by <= {most:g}, 5 different",
        whole and off <= most and n_different >= 5,
    )


def loaded(bench: Bench, number: str, *, compiled: bool = False) -> GPT2:
    """The model as sample.py loads it."""
    return load(model_folder(bench), device=str(bench.device), dtype=number, compiled=compiled)


def plain_twin(bench: Bench, number: str, *, compiled: bool = False) -> tuple[GPT2, float]:
    """The plain model that a loaded one is compared with, on the CPU, and how far from it scores
    may be.
    """
    row = WAYS[way_of_loaded(bench.device.type, number, compiled=compiled)]
    twin = GPT2.from_pretrained(model_folder(bench))
    if row.twin == "int8":
        quantize(twin)
    return twin, 2 * max(row.tolerance, ROUNDED)  # two scores may each be off


def model_folder(bench: Bench) -> Path:
    """A saved model in which every parameter matters, made when it is first asked for."""
    folder = bench.work / bench.preset
    if not folder.is_dir():
        randomised(bench.config).save_pretrained(folder)
    return folder


def next_to_a_plain_step(bench: Bench) -> Outcome:
    """Our step and the one that most tutorials write, in turns, from the same weights."""
    dtype = bench.half if bench.half == torch.bfloat16 else torch.float32
    # two models and all logits at once must fit
    precision, size = Precision(bench.device, dtype), max(1, bench.batch_size // 4)
    ours, plain = (new_model(bench, bench.config, dropout=0.0) for _ in range(2))
    optimizer = make_optimizer(ours, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = make_batches(bench, size, bench.config)

    def our_step(batch: Batch) -> float:
        return one_step(Scorer(ours), batch, optimizer, precision, size).loss

    turns = take_turns((our_step, PlainStep(plain, precision)), batches, bench)
    apart = [abs(turns[0].losses[at] - turns[1].losses[at]) for at in (0, -1)]
    found = f"losses {apart[0]:.1e} apart at first, {apart[1]:.1e} at last"
    bound = "losses <= 0.02 apart"
    if not max(apart) <= 0.02:
        return Outcome(f"{found}: the steps are not the same", bound, False)
    shown = []
    for name, turn in zip(("ours", "plain"), turns):
        more = f", {gigabytes(turn.peak)} besides weights and optimizer" if turn.peak else ""
        shown.append(f"{name} {turn.seconds * 1e3:.1f} ms{more}")
    ratio = turns[1].seconds / turns[0].seconds
    return Outcome(
        f"{named(dtype)}, {size} x {bench.config.block_size} tokens: {'; '.join(shown)}; "
        f"ours is {ratio:.2f} times as fast; {found}",
        bound,
        True,
    )


@dataclass(frozen=True)
class Turn:
    """What one way to take a step measured, while others ran in between."""

    losses: list[float]
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
        Turn(losses, statistics.median(times[WARM_UP:]), peaks[-1])
        for losses, times, peaks in measured
    ]


class PlainStep:
    """All logits at once, F.cross_entropy, AdamW with foreach: what torch does by default on a GPU.

    The network is our own, and so is what AdamW is told, so this compares the step around it, and
    is not a measurement of nanoGPT.
    """

    def __init__(self, model: GPT2, precision: Precision) -> None:
        self.model, self.precision = model, precision
        parameters = [*model.parameters()]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, foreach=True)

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
    planned = micro_batch_size = micro_batch_size or batch_size
    precision = Precision(bench.device, dtype)
    precision.release_memory()
    before = start_peak(bench.device)
    model = new_model(bench, config or bench.config, dropout)
    batches = make_batches(bench, batch_size, model.config)
    shape = micro_batch_size, model.config.block_size
    with notices_are_errors(blocks):
        blocks.prepare_blocks(model, precision, shape, compiled=compiled, recomputed=recomputed)
    scorer = Scorer(model)
    optimizer = make_optimizer(model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
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
        planned,
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


def loss_gap(a: float, b: float) -> float:
    """How far apart two losses are; where float16 overflowed in both, they are the same."""
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return abs(a - b)


def logged_losses(out: Path) -> list[float]:
    """The loss of every step in the metrics.jsonl of a run; nan where float16 overflowed."""
    losses = (metrics.loss for metrics in RunFolder(out).read_metrics())
    return [loss for loss in losses if loss is not None]


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

    GPT-2's start would not do: its biases are 0, and what it says next is what it read last. With
    more noise, the rounding of int8 would hide mistakes.
    """
    random = torch.Generator().manual_seed(2)
    model = GPT2(config, generator=random)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.04 * torch.randn(parameter.shape, generator=random))
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
    return forecast_memory(
        config,
        micro_batch_size=n_rows,
        block_size=config.block_size,
        dtype=dtype,
        device=bench.device,
        activation_checkpointing=recomputed,
        accumulated=accumulated,
    ).total


def fitting(
    bench: Bench, config: GPT2Config, dtype: torch.dtype, n_rows: int, recomputed: bool = False
) -> int:
    """The micro-batch that train.py would choose for `n_rows` sequences."""
    return fitting_micro_batch(
        partial(
            forecast_memory,
            config,
            dtype=dtype,
            device=bench.device,
            activation_checkpointing=recomputed,
        ),
        rows=n_rows,
        block_size=config.block_size,
        budget=memory_budget(bench.device),
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
def notices_are_errors(*modules: ModuleType) -> Iterator[None]:
    """Raise RuntimeError with what a module of ours says in a notice: that it goes on without what
    is measured.
    """
    said: list[str] = []
    handler, loggers = logging.Handler(), [logging.getLogger(m.__name__) for m in modules]
    handler.emit = lambda record: said.append(record.getMessage())
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
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
