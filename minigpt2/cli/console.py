"""How a command meets its command line: flags in, results out, one line for what went wrong.

The exit codes:

    0 done, or the reader of the results has had enough of them
    1 a bug of ours, or a FAIL of verify
    2 the user or the environment, such as a result that could not be written
    130, 143, 129 stopped by SIGINT, SIGTERM, SIGHUP

A message that could not be written changes none of this. Imports nothing heavy: a command's `main`
does that, after its flags were read.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol, TextIO, TypeVar

import tyro

from .. import __version__
from ..arguments import did_you_mean, shown
from ..errors import InputError
from ..system.messages import MessageFormatter, one_line, shown_lines
from ..system.signals import SignalExit, exit_on_signals, raised
from ..system.streams import ReaderLeftError, drop_results, prepare_streams
from .flags import CommandLine, Given
from .options import in_flags, without_effect

logger = logging.getLogger(__name__)


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
SCRIPTS = {"train": "train.py", "sample": "sample.py", "convert": "convert_weights.py"}
MODULE = "__main__.py"  # what python -m starts
PROGRAMS = (MODULE, "minigpt2", "minigpt2.exe")  # those whose first word names a command
PRINT_COMPLETION = "--tyro-print-completion"  # tyro's own name for it
HELP_COLUMNS = 100  # longer lines are hard to read
# embeddings, overrides and isolates: what follows may stand where it does not belong
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# each class's fields become flags of their own, without the class's name in front
PLAIN_FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)


def run_script(
    main: Callable[[OptionsT], int | None],
    options_class: type[OptionsT],
    argv: Sequence[str] | None = None,
    *,
    positional: bool = False,
    recorded: Callable[[Given], list[str]] = lambda given: [],
    subcommand: str = "",
) -> int:
    """Read the flags (see `parse`), run `main(options)`, and turn however it ends into an exit
    code. `subcommand` is the word that stood before the flags, if one did.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = None

    def work() -> int:
        nonlocal options
        options = _asked_for(options_class, argv, positional, recorded, subcommand)
        if options is not None and options.debug:
            logging.getLogger("minigpt2.decoding").setLevel(logging.DEBUG)
        return 0 if options is None else main(options) or 0

    return ended(work, traceback_wanted=lambda: options is not None and options.debug)


def show_commands(commands: Mapping[str, str], argv: Sequence[str]) -> int:
    """Answer a command line that begins with none of the commands: what there is, by name."""

    def work() -> int:
        if argv[:1] == ["--version"]:
            print(f"minigpt2 {__version__}")
        elif not argv or argv[0] in ("-h", "--help"):
            print(_overview(commands))
        else:
            near = did_you_mean(argv[0], commands)
            raise InputError(f"there is no command {shown(argv[0])}{near}; see --help")
        return 0 if argv else 2

    return ended(work)


def _overview(commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    listed = "\n".join(f"  {name:<{width}}  {about}" for name, about in commands.items())
    return (
        f"usage: {' '.join(_program())} COMMAND ...; COMMAND --help says more\n\n{listed}\n\n"
        f"{PRINT_COMPLETION} {{bash,zsh}} writes what that shell needs to complete these words"
    )


def ended(work: Callable[[], int], *, traceback_wanted: Callable[[], bool] = lambda: False) -> int:
    """Do the work of a command, and turn however it ends into an exit code."""
    _prepare_output()
    try:
        with exit_on_signals():
            code = work()
            if not code and (number := raised()):
                code = 128 + number
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the terminal's ^C
        return 130
    except SignalExit as stop:
        return 128 + stop.signal_number
    except ReaderLeftError:
        return 0
    except Exception as problem:
        message = explain(problem)
        if message is None or traceback_wanted():
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    finally:
        drop_results()


def leave(code: int) -> NoReturn:
    """End the program with this exit code, as the last thing that it does.

    A process that torchrun started ends before Python takes its modules down: a thread of torch's
    that lets go of a tensor while this is done aborts the process, after all was saved.
    """
    if "RANK" in os.environ:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # `ended` has told what was not written
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _asked_for(
    options_class: type[OptionsT],
    argv: Sequence[str],
    positional: bool,
    recorded: Callable[[Given], list[str]],
    subcommand: str,
) -> OptionsT | None:
    """The options, or None where --version or --help was asked for and is answered."""
    if CommandLine(options_class, positional=positional).asks_for("--version", argv):
        print(f"minigpt2 {__version__}")
        return None
    try:
        return parse(
            options_class, argv, positional=positional, recorded=recorded, subcommand=subcommand
        )
    except SystemExit:
        return None


def explain(problem: Exception) -> str | None:
    """One line for what the user or the machine caused; None for a bug of ours."""
    if isinstance(problem, InputError):
        return one_line(in_flags(problem))
    if isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename else ""
        return one_line(f"{where}{problem.strerror or problem}")
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
    options_class: type[OptionsT],
    argv: Sequence[str],
    *,
    positional: bool = False,
    recorded: Callable[[Given], list[str]] = lambda given: [],
    subcommand: str = "",
) -> OptionsT:
    """The flags as an object of `options_class`; with `positional`, required fields take no flag.
    `recorded` knows, of what is given, words from elsewhere that are read beside it. What is given
    and changes nothing is said.

    Raises InputError, in one line, for flags that make no such object, and SystemExit after --help.
    """
    line = CommandLine(options_class, positional=positional)
    if line.asks_for("--help", argv) or line.asks_for("-h", argv):
        command = f"{_command()} {subcommand}".strip()
        print(line.help(command, min(HELP_COLUMNS, shutil.get_terminal_size().columns)))
        raise SystemExit(0)
    try:
        given = line.given(argv)
    except InputError as problem:
        raise InputError(f"{problem}; see --help") from None
    argv = [*recorded(given), *argv]
    framed = io.StringIO()
    markers = (*PLAIN_FLAGS, *POSITIONAL * positional)
    try:
        with contextlib.redirect_stderr(framed):
            options = tyro.cli(options_class, args=list(argv), config=markers)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        message = _refusal(stop) or _unframed(framed.getvalue())
        if message.startswith("Missing from"):
            message = line.missing(message)
        raise InputError(f"{message}; see --help") from None
    if os.environ.get("RANK", "0") == "0":  # under torchrun, the main process speaks for all
        for notice in without_effect(options, given):
            logger.warning(notice)
    return options


def command_words(name: str) -> list[str]:
    """What starts the command of this name, in the form in which this program was started."""
    script = Path(sys.argv[0])
    if script.name in PROGRAMS:
        return [*_program(sys.orig_argv[0]), name]
    return [sys.orig_argv[0], str(script.with_name(SCRIPTS[name]))]


def started_by_python() -> bool:
    """Whether python was typed: with a script, or with -m and a module."""
    return Path(sys.argv[0]).name not in PROGRAMS or Path(sys.argv[0]).name == MODULE


def _program(python: str = "python") -> list[str]:
    """What starts `minigpt2`, which takes a command's name."""
    return [python, "-m", "minigpt2"] if started_by_python() else ["minigpt2"]


def _command() -> str:
    """How this program is started, as its help says."""
    script = Path(sys.argv[0])
    if script.name not in PROGRAMS:
        return f"python {script.name}"
    if script.parent.name in ("corpus", "explain"):
        return f"python -m minigpt2.{script.parent.name}"
    return " ".join([*_program(), *sys.argv[1:2]])


def pasteable(words: Iterable[str]) -> str:
    """A command that this system's shell, if it is pasted there, reads as these words: for a POSIX
    shell, or for cmd.exe on Windows.

    What cannot be seen is written as an escape in $'...', which POSIX has since 2024 and bash, zsh
    and ksh always had.
    """
    return subprocess.list2cmdline(words) if os.name == "nt" else " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = re.sub(r"([\\'])", r"\\\1", word)
    in_octal = ("".join(f"\\{byte:03o}" for byte in os.fsencode(c)) for c in escaped)
    return "".join(
        ["$'", *(c if c.isprintable() else octal for c, octal in zip(escaped, in_octal)), "'"]
    )


def show_warning(message: Warning | str, *details: object) -> None:
    """A warning of a library as a notice of one line: warnings.showwarning."""
    logging.getLogger("warnings").warning("%s", one_line(message))


def show_traceback(
    kind: type[BaseException], problem: BaseException, trace: TracebackType | None
) -> None:
    """What Python prints of an exception that nobody caught, as it may be shown: sys.excepthook."""
    print(
        shown_lines("".join(traceback.format_exception(kind, problem, trace))),
        end="",
        file=sys.stderr,
    )


def printable(text: str, stream: TextIO) -> str:
    """A result as it may be shown: on a terminal, control characters but newline and tab, and those
    that turn the direction of what follows, become U+FFFD.
    """
    if not stream.isatty():
        return text
    return "".join("\ufffd" if c not in "\n\t" and _takes_over(c) else c for c in text)


def _takes_over(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or character in TURNING


def _refusal(stop: SystemExit) -> str | None:
    """What our own check of a value said, where that is why tyro ends."""
    problem: BaseException | None = stop
    while problem is not None and not isinstance(problem, InputError):
        problem = problem.__cause__ or problem.__context__
    return problem and in_flags(problem)


def _unframed(box: str) -> str:
    """tyro's message without the box around it: its first paragraph as one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    paragraph = []
    for line in lines:
        if not set(line) <= {"─", "-"}:  # where stdout is not UTF-8, the rule is of hyphens
            paragraph.append(line)
        elif paragraph:
            break
    message = " ".join(" ".join(paragraph).split())
    # our own checks name the flag themselves; tyro's do it in this prefix
    return re.sub(r"^Error parsing (?!--)\S+: ", "", message).replace("Error parsing ", "")


def _prepare_output() -> None:
    """Notices of the library go to stderr as plain lines; see `prepare_streams` for the rest."""
    prepare_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setFormatter(MessageFormatter())
    logging.getLogger("minigpt2.decoding").setLevel(logging.NOTSET)  # until --debug asks for more
    warnings.showwarning, sys.excepthook = show_warning, show_traceback
    for noisy in ("httpx", "httpcore", "httpx2", "matplotlib", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
