"""What a shell needs to complete the words of `minigpt2`: tyro writes it, of all commands."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro

from ..corpus.options import CorpusOptions
from ..decoding.options import SampleOptions
from ..errors import InputError
from ..evaluation.options import EvaluateOptions, VerifyOptions
from ..explain.options import ExplainOptions
from ..formats.options import ConvertOptions
from ..runs.options import ReportOptions
from ..training.options import TrainOptions
from .console import PLAIN_FLAGS, POSITIONAL, PRINT_COMPLETION, ended

SHELLS = ("bash", "zsh")
SPEC = "COMPLETION_SPEC = "  # begins the line of tyro's script that lists all words
OPTIONS = {
    "train": TrainOptions,
    "sample": SampleOptions,
    "convert": ConvertOptions,
    "corpus": CorpusOptions,
    "report": ReportOptions,
    "evaluate": EvaluateOptions,
    "verify": VerifyOptions,
    "explain": ExplainOptions,
}


def run(arguments: Sequence[str]) -> int:
    """Print the script for a shell, and return the exit code."""

    def work() -> int:
        print(script(arguments))
        return 0

    return ended(work)


def script(arguments: Sequence[str]) -> str:
    """The script for the shell that the words after PRINT_COMPLETION name.

    Raises InputError where they name none.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise InputError(f"{PRINT_COMPLETION} takes one of {', '.join(SHELLS)}")
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            OPTIONS,
            prog="minigpt2",
            args=[PRINT_COMPLETION, *arguments],
            config=(*PLAIN_FLAGS, *POSITIONAL),
        )
    lines = map(_on_one_line, written.getvalue().split("\n"))
    # bash: where there is nothing of ours to offer, the names of files, as without any script
    return "\n".join(lines).replace("complete -F", "complete -o bashdefault -o default -F")


def _on_one_line(line: str) -> str:
    """A line of the script in which no description has line ends: the shell would offer what
    follows them as words.
    """
    if not line.startswith(SPEC):
        return line
    return SPEC + repr(_folded(ast.literal_eval(line.removeprefix(SPEC))))


def _folded(value: Any) -> Any:
    if isinstance(value, dict):
        folded = {name: _folded(held) for name, held in value.items()}
        if "choices" in folded:  # None is what a flag is that is not given
            folded["choices"] = sorted(set(folded["choices"]) - {"None"})
        return folded
    if isinstance(value, list):
        return [_folded(held) for held in value]
    return " ".join(value.split()) if isinstance(value, str) else value
