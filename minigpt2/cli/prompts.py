"""Where prompts come from: a flag, stdin, a file that is one, a file of many, a person."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..corpus.options import unescape
from ..decoding.options import SampleOptions
from ..errors import InputError, NotFoundError
from ..runs.record import RunInfo
from ..system.files import cache_folder, did_you_mean, exposed, own_folder, read_json
from ..system.signals import keyboard_interrupts
from ..system.streams import read_stdin
from ..training.options import DEFAULT_MODEL
from .flags import Given

logger = logging.getLogger(__name__)
HISTORY = 1000  # prompts that are remembered
LONGEST = 2**26  # bytes of a prompt from stdin, which may have no end


def read_prompts(options: SampleOptions) -> list[str]:
    """The prompts that the flags name; none where they are to be asked for.

    Raises NotFoundError or InputError for files that are missing or no prompts.
    """
    if options.interactive:
        return []
    if options.prompts_file is not None:
        return _many(Path(options.prompts_file))
    if options.prompt_file is not None:
        return [_text(Path(options.prompt_file), "--prompt-file")]
    assert options.prompt is not None
    return [prompt_of(options.prompt, otherwise="use --prompt-file")]


def prompt_of(given: str, *, otherwise: str = "use --prompt -") -> str:
    """The text that --prompt stands for: what stdin has for -, else the text with its escapes read,
    where a notice says so and names what reads it as it is.

    Raises InputError for a stdin that is too long, or is no UTF-8.
    """
    if given == "-":
        data = read_stdin(LONGEST + 1)
        if len(data) > LONGEST:
            raise InputError(f"stdin has more than {LONGEST:,} bytes: give a shorter prompt")
        return _decoded(data, "stdin")
    prompt = unescape(given)
    if prompt != given:
        logger.info(
            r"--prompt: \n, \t, \r and \\ stand for other characters; write \\n for \n itself, "
            "or %s",
            otherwise,
        )
    return prompt


def _many(path: Path) -> list[str]:
    # not splitlines: it also cuts at form feeds and U+2028, which may stand in a prompt
    lines = re.split(r"\r?\n", _text(path, "--prompts-file"))
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{path} holds no prompt: write one a line")
    if path.suffix != ".jsonl":
        return [unescape(line) for _, line in numbered]
    return [_field(line, f"{path}, line {number}") for number, line in numbered]


def _field(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{where} is no JSON: {problem}") from problem
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise InputError(f'{where} has no text in a field prompt: write {{"prompt": "..."}}')
    return row["prompt"]


def _text(path: Path, flag: str) -> str:
    if not path.is_file():
        raise NotFoundError(f"{flag} {path} does not exist or is no file{did_you_mean(path)}")
    return _decoded(path.read_bytes(), str(path))


def _decoded(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a leading BOM."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise InputError(
            f"{where} is not UTF-8 at byte {problem.start}: convert it with iconv"
        ) from problem


def asked() -> Iterator[str]:
    """Ask for prompts until Ctrl-D; Ctrl-C takes back what was typed.

    Raises InputError where stdin is closed, or cannot be read.
    """
    if sys.stdin is None:
        raise InputError("stdin is closed: prompts are asked for there")
    with keyboard_interrupts(), _history():
        while True:
            try:
                yield _line()
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return


def _line() -> str:
    """What is typed next, or the next line of what else is stdin, which may have no line end."""
    if sys.stdin.isatty():
        return input("> ")
    print("> ", end="", flush=True)
    line = sys.stdin.readline(LONGEST + 1)
    if not line:
        raise EOFError
    if len(line) > LONGEST:
        raise InputError(f"stdin has a line of more than {LONGEST:,} characters: give shorter ones")
    return line.removesuffix("\n")


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing at the prompt, and the prompts of earlier times, where Python and the terminal
    have them; only the user can read their file.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    path = _private_history()
    with contextlib.suppress(OSError):
        if path is not None:
            readline.read_history_file(path)
    readline.set_history_length(HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path is not None:
                readline.write_history_file(path)


def _private_history() -> Path | None:
    """The file, made if need be; None, with a notice, where others could change it or, by a link,
    what is written in its place.
    """
    path = cache_folder("history")
    try:
        problem = own_folder(path.parent)
        if problem is None:
            path.touch(mode=0o600)
            problem = exposed(path)
    except OSError as failure:
        problem = f"{path}: {failure.strerror or failure}"
    if problem is None:
        return path
    logger.info("prompts are not remembered: %s", problem)
    return None


def recorded_words(given: Given) -> list[str]:
    """The flag with which prompts are read as the text was on which the model was trained."""
    source = given["model"][1][0] if "model" in given else DEFAULT_MODEL
    if "special_tokens" in given or not trained_with_special_tokens(Path(source)):
        return []
    logger.info(
        "%s was trained with --special-tokens, so prompts are read the same; "
        "--no-special-tokens reads them as plain text",
        source,
    )
    return ["--special-tokens"]


def trained_with_special_tokens(folder: Path) -> bool:
    """Whether the run says so that a folder holds, or is a part of."""
    path = folder.resolve()
    for place in (path, path.parent, path.parent.parent):  # merged/, checkpoints/step-000100/
        if (place / "run.json").is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                flags = (
                    RunInfo.from_json(read_json(place / "run.json", with_names=True)).options or {}
                )
                return bool(flags.get("--special-tokens"))
            return False
    return False
