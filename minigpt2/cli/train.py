"""Fine-tune GPT-2, or train a small one, on your own text: python train.py --data my.txt"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..finetuning.inputs import require_inputs
from ..system.signals import raise_on_signals
from ..training.options import TrainOptions
from .console import PROGRAMS, command_words, pasteable, run_script, started_by_python
from .resume import recorded_words

if TYPE_CHECKING:
    from ..system.processes import World

logger = logging.getLogger("train")


def main(options: TrainOptions) -> int:
    """Find this process's place among those that train together, and let it do its part."""
    require_inputs(options)

    # with all that is heavy, before signals are raised
    from ..finetuning.added_tokens import kept_grown, loaded
    from ..finetuning.session import Starter, train
    from ..formats.vocabulary import CHAT
    from ..system.processes import world_from
    from ..system.signals import Stopped

    raise_on_signals()
    world = world_from(os.environ)
    if not world.is_main:
        logging.getLogger().setLevel(logging.ERROR)  # the main process speaks for all
    starter = Starter(pasteable(command(world)))
    if options.add_tokens and not options.resume:
        source = options.source
        options, keep = kept_grown(options, lambda: loaded(source))
        starter = replace(starter, keep=keep)
    try:
        train(options, world, starter)
    except Stopped as stop:
        logger.info("%s; everything is saved, %s", stop, how_to_resume(options, world))
        return 128 + stop.signal_number
    ask = "--interactive" if (Path(options.folder) / CHAT).is_file() else '--prompt "..."'
    logger.info("done: %s %s", pasteable(sample_command(Path(options.folder))), ask)
    return 0


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
    return run_script(main, TrainOptions, argv, recorded=recorded_words)
