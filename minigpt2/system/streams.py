"""The streams that a program is started with, whatever became of them.

A message that cannot be written is lost and changes nothing; a result that cannot be written is an
error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

from ..errors import InputError


class ReaderLeftError(BrokenPipeError):
    """Whoever read the results has had enough of them, as `head` has."""


def prepare_streams() -> None:
    """Have writing to stderr never fail, and to stdout say so as OSError or ReaderLeftError; and
    neither fail on a character that it cannot show.

    A stream that is closed is None, or raises OSError when it is used; no file that is opened
    later gets its number, and with it what somebody writes there.
    """
    # opened the wrong way round: who reads or writes there is told that it cannot be done
    for descriptor, mode in enumerate([os.O_WRONLY, os.O_RDONLY, os.O_WRONLY]):
        _fill(descriptor, mode)
    sys.stdout = _guarded(sys.stdout, sys.__stdout__, 1, _Results)
    sys.stderr = _guarded(sys.stderr, sys.__stderr__, 2, _Messages)


def draws_over(stream: TextIO | None) -> bool:
    """Whether what follows a carriage return is drawn over its line: on a terminal that can, and in
    a notebook, whose streams say that they are none.
    """
    if stream is None or getattr(stream, "closed", False):
        return False
    if type(stream).__module__.partition(".")[0] == "ipykernel":
        return True
    is_terminal = getattr(stream, "isatty", lambda: False)()  # some have `write` alone
    return is_terminal and os.environ.get("TERM") != "dumb"


def drop_results() -> None:
    """Let go of what could not be written to stdout: the interpreter, which writes what is left
    when it ends, would complain once more.
    """
    results = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(results, _Results):
        results.dropping = True
        sys.stdout.flush()


def read_stdin(most: int = -1) -> bytes:
    """All that stdin has, or so many bytes of it; InputError where it is closed or cannot be
    read.
    """
    try:
        if sys.stdin is None:
            raise OSError(errno.EBADF, "it is closed")
        return sys.stdin.buffer.read(most)
    except OSError as problem:
        raise InputError(f"stdin cannot be read: {problem.strerror}") from problem


class _Raw(io.RawIOBase):
    """What a stream's bytes pass on their way out."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()


class _Messages(_Raw):
    """Drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return self._raw.write(data) or len(data)
        except OSError:
            return len(data)


class _Results(_Raw):
    """Raises when something could not be written, until the rest of it is dropped."""

    dropping = False

    def write(self, data: Any) -> int:
        if self.dropping:
            return len(data)
        try:
            written = self._raw.write(data)
        except BrokenPipeError as problem:
            raise ReaderLeftError(errno.EPIPE, "nobody reads stdout") from problem
        except OSError as problem:
            why = "it is closed" if problem.errno == errno.EBADF else problem.strerror
            raise OSError(problem.errno, f"stdout cannot be written: {why}") from problem
        if written is None:
            raise OSError(errno.EAGAIN, "stdout cannot be written: it takes no more at once")
        return written


def _fill(descriptor: int, mode: int) -> None:
    """Open the null device in the place of a descriptor that is closed."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, mode)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)


def _guarded(stream: TextIO, first: TextIO | None, descriptor: int, kind: type[_Raw]) -> TextIO:
    """The same stream with its bytes passing `kind`, if it is the one the program began with."""
    if stream is not first:
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
        return stream
    old: Any = stream
    if old is None:
        raw: Any = io.FileIO(descriptor, "w", closefd=False)
    else:
        with contextlib.suppress(OSError):
            old.flush()
        raw = getattr(old.buffer, "raw", old.buffer)  # with python -u, the buffer is raw
    return io.TextIOWrapper(
        io.BufferedWriter(kind(raw)),
        encoding=getattr(old, "encoding", None),
        errors="backslashreplace",
        line_buffering=getattr(old, "line_buffering", descriptor == 2),
        write_through=getattr(old, "write_through", False),
    )
