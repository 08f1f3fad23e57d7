"""One start of a run, from options to its last page: the same for the command and the library.

Whoever starts it says how it is shown and how it is stopped; nothing of that changes the weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..arguments import flag
from ..corpus.survey import report_text, rough_duration, survey
from ..errors import InputError
from ..model import GPT2
from ..runs.card import write_card
from ..runs.curves import draw_loss_curve
from ..runs.folder import Checkpoint, RunFolder
from ..runs.page import write_report
from ..runs.record import Metrics, Settings
from ..runs.tensorboard import TensorBoardLog
from ..runs.wording import summary
from ..system.memory import memory_budget
from ..system.precision import pick_device
from ..system.processes import World, device_of, join
from ..system.signals import StopRequest, stop_on_interrupt
from ..training import loop
from ..training.build import Built, RunSpec, assemble, parameter_counts, specify
from ..training.forecast import estimate_seconds, forecast_in_words, measured_speed
from ..training.loop import Job, settings_of
from ..training.options import TrainOptions
from ..training.ways import COMPILED, IN_C, way_of_step
from .progress import Progress
from .run_info import write_run_info

logger = logging.getLogger(__name__)
PAGES_SHARE = 0.05  # one drawing takes 0.4 s, and an evaluation of a small model much less


@dataclass(frozen=True)
class Starter:
    """Who starts a run, and what is theirs in it."""

    command: str  # what was typed or called, as run.json keeps it
    progress: bool | Callable[[Metrics], None] = True  # a bar on stderr, none, or what gets metrics
    keep: Callable[[RunFolder], None] = lambda run: None  # writes what was in memory into the run
    has_signals: bool = True  # a signal stops the run, and else KeyboardInterrupt


def train(options: TrainOptions, world: World, starter: Starter) -> None:
    """Claim the run folder, train in it, and leave it as its reader wants it; every process calls
    it.

    Raises Stopped when the run was stopped and everything is saved, and InputError for options that
    cannot be used and what goes wrong through no fault of ours.
    """
    if options.fsdp and world.size == 1:
        raise InputError("--fsdp shares a model between processes: start them with torchrun")
    if world.size > 1 and options.device.startswith("cuda:"):
        raise InputError(
            f"--device is {options.device} with {world.size} processes, which would all be there: "
            "leave it out, and each takes one of its own"
        )
    device = pick_device(device_of(options.device, world))
    out = Path(options.folder)
    if not world.is_main:
        with join(world, device):
            train_in(RunFolder(out), options, device, world, starter)
        return
    with RunFolder.claim(out, resume=options.resume) as run:
        starter.keep(run)
        with join(world, device):
            train_in(run, options, device, world, starter)


def train_in(
    run: RunFolder, options: TrainOptions, device: torch.device, world: World, starter: Starter
) -> None:
    """Build what the run consists of, train, and say how it went."""
    spec = specify(options, run, device, world)
    tell_what_was_read(spec)
    built = assemble(spec)
    job, start = built.job, built.start
    if start:
        tell_changes(start, settings_of(job))
    announce(built)
    if world.is_main:
        write_run_info(options, built, starter.command)
    if start and start.state.ended(job.plan.max_steps):
        done, wanted = start.state.step, job.plan.max_steps
        logger.info("nothing to do: %s is at step %s of %s", run.path, done, wanted)
        if world.is_main:
            run.take_up()  # it may have been killed while its last pages were written
    else:
        fit(options, built, starter)
    if world.is_main:
        finish(options, job)


def fit(options: TrainOptions, built: Built, starter: Starter) -> None:
    """Take the steps, and show each."""
    job, start = built.job, built.start
    with Display(options, built, starter.progress) as show:
        if starter.has_signals:
            state = loop.fit(job, start=start, on_step=show)
        else:
            state = fit_aside(job, start, show)
    if state.step < job.plan.max_steps:
        logger.info("no better evaluation in %s: stopped early", job.plan.patience)


def fit_aside(
    job: Job, start: Checkpoint | None, show: Callable[[Metrics], None]
) -> loop.TrainState:
    """Take the steps in a thread of its own, on the device that is this thread's."""
    device = job.precision.device
    place = torch.cuda.current_device() if device.type == "cuda" else None

    def work(request: StopRequest) -> loop.TrainState:
        if place is not None:
            torch.cuda.set_device(place)  # each thread has its own
        return loop.fit(job, start=start, on_step=show, request=request)

    return stop_on_interrupt(work)


def tell_what_was_read(spec: RunSpec) -> None:
    """Say what is in the text, and what of the settings is odd with it."""
    if spec.world.is_main:
        special = spec.origin.options.text.special_tokens
        logger.info(report_text(survey(spec.corpus, spec.tokenizer, special_tokens=special)))
    for remark in spec.remarks:
        logger.warning(remark)


def announce(built: Built) -> None:
    """Say how large the model is, and what time and memory the run is going to take."""
    job, plan, world, precision = built.job, built.job.plan, built.job.world, built.job.precision
    n_parameters, n_trained = parameter_counts(job.model)
    way = way_of_step(job.model)
    logger.info(
        "%s parameters on %s in %s%s%s",
        f"{n_parameters:,}",
        precision.device,
        str(precision.dtype).removeprefix("torch."),
        f", {n_trained:,} of them trained" if n_trained < n_parameters else "",
        f", {way}" if way in (IN_C, COMPILED) else "",
    )
    steps_left = plan.max_steps - (built.start.state.step if built.start else 0)
    tokens_left = steps_left * plan.batch_size * plan.block_size
    speed = measured_speed(precision.device, precision.dtype) * world.size
    logger.info(
        "%s steps of %s x %s tokens, %s sequences at a time%s; about %s, evaluations not counted",
        f"{plan.max_steps:,}",
        plan.batch_size,
        plan.block_size,
        plan.micro_batch_size,
        f" in each of {world.size} processes" if world.size > 1 else "",
        rough_duration(estimate_seconds(n_parameters, tokens_left, speed, n_trained=n_trained)),
    )
    logger.info(forecast_in_words(built.need, memory_budget(precision.device, world.size)))


def tell_changes(start: Checkpoint, settings: Settings) -> None:
    """Say which settings are no longer those of the run, which is then another run from here on."""
    for name, (before, now) in settings.changes(start.settings).items():
        if name != "micro_batch_size":
            what = "the way of its steps" if name == "way" else flag(name)
            logger.warning("%s was %s, from here on it is %s", what, before, now)


class Display:
    """Shows each step, and redraws the pages of the run folder at evaluations, as often as that
    takes no more than PAGES_SHARE of the time.
    """

    def __init__(
        self, options: TrainOptions, built: Built, progress: bool | Callable[[Metrics], None]
    ) -> None:
        job, done = built.job, built.start.state.step if built.start else 0
        self._run = job.run
        self._bar = Progress(done=done, total=job.plan.max_steps) if progress is True else None
        self._listen = progress if callable(progress) else None
        wanted = options.tensorboard and job.world.is_main
        self._board = TensorBoardLog(job.run.path / "tensorboard", done) if wanted else None
        self._pages_are_old, self._draws_from = False, 0.0  # a time.monotonic()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, *problem: object) -> None:
        if self._bar:
            self._bar.close()
        if self._board:
            self._board.close()
        # a run that is over has its pages drawn by `finish`; one that must end at once, no more
        if self._pages_are_old and kind and issubclass(kind, Exception):
            redraw(self._run)

    def __call__(self, metrics: Metrics) -> None:
        if self._bar:
            self._bar.update(metrics)
        if self._board:
            self._board(metrics)
        if metrics.val_loss is not None:
            for sample in self._run.read_samples()[-1:]:
                if self._board:
                    self._board.sample(sample)
            self._draw()
        if self._listen:
            self._listen(metrics)

    def _draw(self) -> None:
        began = time.monotonic()
        self._pages_are_old = began < self._draws_from
        if not self._pages_are_old:
            redraw(self._run)
            ended = time.monotonic()
            self._draws_from = ended + (ended - began) / PAGES_SHARE


def redraw(run: RunFolder) -> None:
    """Bring the pages of the run folder up to date; that never stops a run."""
    try:
        draw_loss_curve(run)
        write_report(run)
        write_card(run)
    except OSError as problem:
        logger.warning("the pages of %s are not up to date: %s", run.path, problem.strerror)


def finish(options: TrainOptions, job: Job) -> None:
    """Leave the run folder as its reader wants it, and say in words how the run went."""
    run = job.run
    if options.merge_lora:
        merged = GPT2.from_pretrained(run.path)
        with run.writing("the merged model"):
            merged.save_pretrained(run.path / "merged", job.tokenizer)
    redraw(run)
    logger.info(summary(run.read_metrics(), pretrained=not options.preset))
