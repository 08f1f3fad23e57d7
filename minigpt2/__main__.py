"""The command: minigpt2 train | sample | convert | corpus | report | evaluate | verify | explain"""

from .system.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # from the first import on

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

COMMANDS = {
    "train": "fine-tune GPT-2, or train a small one, on your own text",
    "sample": "continue a prompt with GPT-2 or a model you trained",
    "convert": "rewrite a checkpoint as a clean Hugging Face folder",
    "corpus": "prepare a text for training and report what is in it",
    "report": "write the pictures and pages of a run anew",
    "evaluate": "say how good models are on a text",
    "verify": "prove that this installation computes what it should",
    "explain": "write a page that shows how a model reads a text",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return import_module(f".cli.{argv[0]}", "minigpt2").run(argv[1:])
    from .cli.console import PRINT_COMPLETION, show_commands

    if argv[:1] == [PRINT_COMPLETION]:
        return import_module(".cli.completion", "minigpt2").run(argv[1:])
    return show_commands(COMMANDS, argv)


def command() -> NoReturn:
    """The program that `pip install` puts beside python."""
    exit_on_signals()
    from .cli.console import leave

    leave(main())


if __name__ == "__main__":
    command()
