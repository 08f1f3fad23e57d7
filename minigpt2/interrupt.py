"""Stopping when asked: a signal becomes a request that is looked at between two steps."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked for an end; what was under way was finished and saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


@dataclass
class StopRequest:
    """The signal that came, or 0."""

    signal_number: int = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request; a second one acts as it always
    does, and one that is ignored (nohup ignores SIGHUP) stays so.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    numbers = [signal.SIGINT, signal.SIGTERM] + (
        [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    )
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        name = signal.Signals(number).name
        text = f"{name}: stopping after this step; a second one stops without saving\n"
        if logger.isEnabledFor(logging.WARNING):
            os.write(2, text.encode())  # logging may be in the middle of a line
        signal.signal(number, before[signal.Signals(number)])

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in numbers:
            signal.signal(number, before[number])
