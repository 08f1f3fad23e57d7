"""How the scripts meet the command line: flags in, results to stdout, one clear line for what went
wrong, exit codes.

    0 done
    1 a bug of ours
    2 the user or the environment
    130, 143, 129 stopped by SIGINT, SIGTERM, SIGHUP

Imports nothing heavy: a script's `main` does that, after its flags were read.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO, TypeVar

import tyro

from . import __version__
from .errors import InputError


class Debuggable(Protocol):
    """Options that say whether errors are shown with their traceback."""

    @property
    def debug(self) -> bool: ...


OptionsT = TypeVar("OptionsT", bound=Debuggable)
POSITIONAL = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
OUT_OF_MEMORY = (
    "out of memory: use a smaller --micro-batch-size (the result stays the same), "
    "--activation-checkpointing, a shorter --block-size, --lora-rank or a smaller model"
)
OTHER_PROCESS = (
    "another process of this run has ended or cannot be reached: its own message says why; "
    "if there is a checkpoint it is intact, and --resume goes on from it"
)
# each class's fields become flags of their own, without the class's name in front
PLAIN_FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)


def run_script(
    main: Callable[[OptionsT], int | None],
    options_class: type[OptionsT],
    argv: Sequence[str] | None = None,
    *,
    positional: bool = False,
) -> int:
    """Read the flags (see `parse`), run `main(options)`, and turn however it ends into an exit
    code.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = None
    _prepare_output()
    try:
        if "--version" in argv:
            print(f"minigpt2 {__version__}")
            return 0
        options = parse(options_class, argv, positional=positional)
        return main(options) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output has gone; keep the interpreter from complaining when it flushes at
        # exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as problem:
        message = explain(problem)
        if message is None or (options is not None and options.debug):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def explain(problem: Exception) -> str | None:
    """One line for what the user or the machine caused; None for a bug of ours."""
    if isinstance(problem, InputError):
        return " ".join(str(problem).split())
    if isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename else ""
        return f"{where}{problem.strerror or problem}"
    # torch is not imported here: its errors are known by name and by text
    kind, text = type(problem).__name__, str(problem)
    if isinstance(problem, MemoryError) or kind == "OutOfMemoryError":
        return OUT_OF_MEMORY
    if isinstance(problem, RuntimeError) and "can't allocate memory" in text:
        return OUT_OF_MEMORY
    if kind.startswith("Dist") or (isinstance(problem, RuntimeError) and "gloo" in text):
        return OTHER_PROCESS
    return None


def parse(
    options_class: type[OptionsT], argv: Sequence[str], *, positional: bool = False
) -> OptionsT:
    """The flags as an object of `options_class`; with `positional`, required fields take no flag.

    Raises InputError, in one line, for flags that make no such object.
    """
    framed = io.StringIO()
    markers = (*PLAIN_FLAGS, *POSITIONAL * positional)
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(options_class, args=list(argv), config=markers)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise InputError(f"{_unframed(framed.getvalue())}; see --help") from None


def printable(text: str, stream: TextIO) -> str:
    """Text as it may be shown: on a terminal, control characters but newline and tab become
    U+FFFD.
    """
    if not stream.isatty():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def _unframed(box: str) -> str:
    """tyro's message without the box around it: its first paragraph as one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    paragraph = []
    for line in lines:
        if set(line) <= {"─"}:
            break
        paragraph.append(line)
    message = " ".join(" ".join(paragraph).split())
    # our own checks name the flag themselves; tyro's do it in this prefix
    return re.sub(r"^Error parsing (?!--)\S+: ", "", message).replace("Error parsing ", "")


def _prepare_output() -> None:
    """Notices of the library go to stderr as plain lines; stdout never fails on a character it
    cannot show.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "httpcore", "httpx2", "matplotlib", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
