"""What Ctrl-C, SIGTERM and SIGHUP do: end the process, raise, or ask for work to be saved.

While nothing has begun a signal ends the process at once; then it is raised, for something may have
to be cleaned up; and it is a request where work is saved first.

A signal that is ignored when the program starts stays so: nohup means it for SIGHUP, and a shell's
script for the SIGINT of what it starts in the background. Imports nothing heavy: scripts import it
before all else.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
MOMENT = 0.2  # seconds within which the same signal is meant once: `timeout` sends it twice


class SignalExit(SystemExit):
    """SIGTERM or SIGHUP ends the program, as KeyboardInterrupt does for SIGINT."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number


class Stopped(Exception):
    """A signal asked for an end; what was under way was finished and saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class StopRequest:
    """The signal that came first, or 0."""

    signal_number = 0


def exit_on_signals() -> contextlib.ExitStack:
    """From this call on, or inside `with`, a signal ends the process at once, without cleaning up.

    For as long as nothing has begun: an exception that is raised in the middle of an import, as
    KeyboardInterrupt is, may be swallowed there (about one in fifty in torch's).
    """
    atexit.unregister(_ignore)
    atexit.register(_ignore)
    return _handle(_exit)


def raise_on_signals() -> None:
    """A signal that `exit_on_signals` let end the process is raised from this call on, as
    KeyboardInterrupt or SignalExit; one that was lost in a destructor comes again.

    Nothing happens to the handlers of a program that only uses the library.
    """
    numbers = [number for number in SIGNALS if signal.getsignal(number) is _exit]
    if numbers:
        _handle(_Raise(), numbers)
        sys.unraisablehook = _again


def raised() -> int:
    """The signal that was raised since `raise_on_signals`, or 0: whoever gets here has swallowed
    it.
    """
    handlers = map(signal.getsignal, SIGNALS)
    return max((handler.came for handler in handlers if isinstance(handler, _Raise)), default=0)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request; a second Ctrl-C or SIGTERM acts as
    it did before. A second SIGHUP does not: a terminal that closes sends several.
    """
    request, came = StopRequest(), dict[int, float]()
    request.signal_number = raised()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in came:
            if now - came[number] >= MOMENT and signal.Signals(number).name != "SIGHUP":
                signal.signal(number, before[number])
                signal.raise_signal(number)
            return
        came[number] = now
        request.signal_number = request.signal_number or number
        name = signal.Signals(number).name
        if logger.isEnabledFor(logging.WARNING):  # logging may be in the middle of a line
            again = "" if name == "SIGHUP" else "; a second one stops without saving"
            _say(f"{name}: stopping after this step{again}\n")

    with _handle(ask):
        yield request


def stop_on_interrupt(work: Callable[[StopRequest], T]) -> T:
    """Do a work in a thread of its own, where no KeyboardInterrupt reaches it: one that is raised
    here meanwhile is the request that the work is given, and so is every later one.

    For a library, which must not touch the program's signal handlers. Returns or raises what the
    work does.
    """
    request, result, waited_for = StopRequest(), Future[T](), threading.Event()

    def done_aside() -> None:
        waited_for.wait()
        if result.set_running_or_notify_cancel():
            try:
                result.set_result(work(request))
            except BaseException as problem:
                result.set_exception(problem)

    thread, told = threading.Thread(target=done_aside, name="minigpt2", daemon=True), False
    try:
        thread.start()
    except BaseException:  # nothing has begun
        result.cancel()
        waited_for.set()
        raise
    while True:
        try:
            waited_for.set()
            if request.signal_number and not told:
                told = True
                logger.warning("interrupted: stopping after this step, to save it")
            thread.join(MOMENT)  # Windows interrupts none without an end
            if not thread.is_alive():
                return result.result()
        except KeyboardInterrupt:
            if result.done():
                raise
            request.signal_number = int(signal.SIGINT)


def answered(work: Callable[[], T]) -> T:
    """Do a work in a thread of its own that ends with the process, while a signal is answered here:
    for libraries that do not come back to Python until they are done.

    Returns or raises what the work does, or raises what the signal does; then the work goes on, and
    nobody waits for it.
    """
    result = Future[T]()

    def done_aside() -> None:
        try:
            result.set_result(work())
        except BaseException as problem:
            result.set_exception(problem)

    thread = threading.Thread(target=done_aside, name="minigpt2", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(MOMENT)  # Windows interrupts none without an end
    return result.result()


def keyboard_interrupts() -> contextlib.ExitStack:
    """Inside `with`, Ctrl-C raises KeyboardInterrupt and means a part of what is done."""
    return _handle(signal.default_int_handler, [signal.SIGINT])


def _handle(
    handler: Callable[[int, FrameType | None], object], numbers: list[int] = SIGNALS
) -> contextlib.ExitStack:
    """Set a handler for signals that are not ignored; the end of a `with` block sets the old."""
    stack = contextlib.ExitStack()
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        for number in numbers:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: not set by Python
                stack.callback(signal.signal, number, before)
                signal.signal(number, handler)
    return stack


def _exit(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        _say("\n")  # after the terminal's ^C
    os._exit(128 + number)


class _Raise:
    """Raises a signal, and remembers it."""

    came = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SignalExit(number)


def _again(ignored: sys.UnraisableHookArgs) -> None:
    """Send a signal once more whose exception nobody can catch, a moment later: sys.unraisablehook.

    Not at once, which would be in the same destructor.
    """
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        number = int(signal.SIGINT)
    elif isinstance(ignored.exc_value, SignalExit):
        number = ignored.exc_value.signal_number
    else:
        sys.__unraisablehook__(ignored)
        return
    threading.Timer(MOMENT, os.kill, (os.getpid(), number)).start()


def _ignore() -> None:
    """The program is over, with its exit code. Python gives signals back to the system before it
    takes the modules down, which lasts 0.2 s with torch: one that came then would be the exit code.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
