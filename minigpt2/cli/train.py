"""Fine-tune GPT-2, or train a small one, on your own text: python train.py --data my.txt"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import flag
from ..corpus.sources.find import require_local
from ..errors import InputError
from ..hub.folders import require_source
from ..system.signals import raise_on_signals
from ..training.options import TrainOptions
from .console import PROGRAMS, command_words, pasteable, run_script, started_by_python
from .resume import recorded

if TYPE_CHECKING:
    import torch

    from ..runs.folder import Checkpoint, RunFolder
    from ..runs.record import Metrics, Settings
    from ..system.processes import World
    from ..training.build import Built, RunSpec
    from ..training.loop import Job

logger = logging.getLogger("train")


def main(options: TrainOptions) -> int:
    """Find this process's place among those that train together, and let it do its part."""
    if not options.resume:
        require_local([*options.data, *options.val_data], options.text)
        if not options.preset:
            require_source(options.source)

    import minigpt2.training.build  # noqa: F401  # with all that is heavy, before signals are raised

    from ..runs.folder import RunFolder
    from ..system.precision import pick_device
    from ..system.processes import device_of, join, world_from
    from ..system.signals import Stopped

    raise_on_signals()
    world = world_from(os.environ)
    if options.fsdp and world.size == 1:
        raise InputError("--fsdp shares a model between processes: start them with torchrun")
    if world.size > 1 and options.device.startswith("cuda:"):
        raise InputError(
            f"--device is {options.device} with {world.size} processes, which would all be there: "
            "leave it out, and each takes one of its own"
        )
    device = pick_device(device_of(options.device, world))
    out = Path(options.folder)
    try:
        if world.is_main:
            with RunFolder.claim(out, resume=options.resume) as run, join(world, device):
                train(options, run, device, world)
        else:
            logging.getLogger().setLevel(logging.ERROR)  # the main process speaks for all
            with join(world, device):
                train(options, RunFolder(out), device, world)
    except Stopped as stop:
        logger.info("%s; everything is saved, %s", stop, how_to_resume(options, world))
        return 128 + stop.signal_number
    return 0


def train(options: TrainOptions, run: RunFolder, device: torch.device, world: World) -> None:
    """Build what the run consists of, train, and say how it went."""
    from ..training.build import assemble, specify
    from ..training.loop import fit, settings_of
    from .run_info import write_run_info

    spec = specify(options, run, device, world)
    tell_what_was_read(spec)
    built = assemble(spec)
    job, start = built.job, built.start
    if start:
        tell_changes(start, settings_of(job))
    announce(built)
    if world.is_main:
        write_run_info(options, built, pasteable(command(world)))
    if start and start.state.ended(job.plan.max_steps):
        done, wanted = start.state.step, job.plan.max_steps
        logger.info("nothing to do: %s is at step %s of %s", run.path, done, wanted)
        if world.is_main:
            run.take_up()  # it may have been killed while its last pages were written
    else:
        with Display(options, job, start) as show:
            fit(job, start=start, on_step=show)
    if world.is_main:
        finish(options, job)


def tell_what_was_read(spec: RunSpec) -> None:
    """Say what is in the text, and what of the settings is odd with it."""
    from ..corpus.survey import report_text, survey

    if spec.world.is_main:
        logger.info(report_text(survey(spec.corpus, spec.tokenizer)))
    for remark in spec.remarks:
        logger.warning(remark)


def announce(built: Built) -> None:
    """Say how large the model is, and what time and memory the run is going to take."""
    from ..corpus.survey import rough_duration
    from ..system.memory import memory_budget
    from ..training.build import parameter_counts
    from ..training.forecast import estimate_seconds, forecast_in_words, measured_speed

    job, plan, world, precision = built.job, built.job.plan, built.job.world, built.job.precision
    n_parameters, n_trained = parameter_counts(job.model)
    logger.info(
        "%s parameters on %s in %s%s",
        f"{n_parameters:,}",
        precision.device,
        str(precision.dtype).removeprefix("torch."),
        f", {n_trained:,} of them trained" if n_trained < n_parameters else "",
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
            logger.warning("%s was %s, from here on it is %s", flag(name), before, now)


class Display:
    """Shows each step, and redraws the pages of the run folder at each evaluation."""

    def __init__(self, options: TrainOptions, job: Job, start: Checkpoint | None) -> None:
        from ..runs.tensorboard import TensorBoardLog
        from .progress import Progress

        done = start.state.step if start else 0
        self._run = job.run
        self._progress = Progress(done=done, total=job.plan.max_steps)
        wanted = options.tensorboard and job.world.is_main
        self._board = TensorBoardLog(job.run.path / "tensorboard", done) if wanted else None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *problem: object) -> None:
        self._progress.close()
        if self._board:
            self._board.close()

    def __call__(self, metrics: Metrics) -> None:
        self._progress.update(metrics)
        if self._board:
            self._board(metrics)
        if metrics.val_loss is not None:
            for sample in self._run.read_samples()[-1:]:
                if self._board:
                    self._board.sample(sample)
            redraw(self._run)


def redraw(run: RunFolder) -> None:
    """Bring the pages of the run folder up to date; that never stops a run."""
    from ..runs.card import write_card
    from ..runs.curves import draw_loss_curve
    from ..runs.page import write_report

    try:
        draw_loss_curve(run)
        write_report(run)
        write_card(run)
    except OSError as problem:
        logger.warning("the pages of %s are not up to date: %s", run.path, problem.strerror)


def finish(options: TrainOptions, job: Job) -> None:
    """Leave the run folder as its reader wants it, and say in words how the run went."""
    from ..model import GPT2
    from ..runs.wording import summary

    run = job.run
    if options.merge_lora:
        merged = GPT2.from_pretrained(run.path)
        with run.writing("the merged model"):
            merged.save_pretrained(run.path / "merged", job.tokenizer)
    redraw(run)
    logger.info(summary(run.read_metrics(), pretrained=not options.preset))
    logger.info('done: %s --prompt "..."', pasteable(sample_command(run.path)))


def command(world: World) -> list[str]:
    """What was typed, as words; under torchrun on one machine, what does the same; on several
    machines, how torchrun started this process.
    """
    if world.size == 1 or not on_one_machine(world):
        return sys.orig_argv if started_by_python() else ["minigpt2", *sys.argv[1:]]
    found = shutil.which("torchrun")
    launcher = ["torchrun"] if found else [sys.executable, "-m", "torch.distributed.run"]
    program = ["-m", "minigpt2"] if Path(sys.argv[0]).name in PROGRAMS else sys.argv[:1]
    return [*launcher, f"--nproc-per-node={world.size}", *program, *sys.argv[1:]]


def on_one_machine(world: World) -> bool:
    """Whether torchrun started all processes here."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(world.size)


def how_to_resume(options: TrainOptions, world: World) -> str:
    """What to type to go on, as a part of a sentence."""
    if world.size > 1 and not on_one_machine(world):
        return "go on with the same command on every machine, with --resume"
    typed = command(world)
    words = typed[: len(typed) - len(sys.argv) + 1]  # to the script
    if Path(sys.argv[0]).name in PROGRAMS:
        words += sys.argv[1:2]  # the command's name
    words += ["--resume", *_flag_words("--out", options.folder)]
    piped = "-" in (*options.data, *options.val_data)
    return f"go on with{' the same text on stdin and' * piped}: {pasteable(words)}"


def sample_command(folder: Path) -> list[str]:
    """What to type, but for a prompt, to sample from a run."""
    return [*command_words("sample"), *_flag_words("--model", str(folder))]


def _flag_words(flag: str, value: str) -> list[str]:
    """A flag and its value as words, where a value that begins with a dash is no flag."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def run(argv: Sequence[str] | None = None) -> int:
    """The command, from its flags to its exit code."""
    return run_script(main, TrainOptions, argv, recorded=recorded)
