"""Signals: whose handlers are set, and for how long."""

import os
import signal
import threading
import time

import pytest

from minigpt2.system.signals import (
    MOMENT,
    SIGNALS,
    SignalExit,
    exit_on_signals,
    raise_on_signals,
    raised,
    stop_on_interrupt,
    stop_on_signals,
)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_a_program_that_uses_the_library_keeps_its_handlers():
    before = handlers()
    raise_on_signals()
    assert handlers() == before
    with stop_on_signals():
        assert handlers() != before
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_scripts_signal_is_raised_and_remembered_until_its_end(number):
    before = handlers()
    with exit_on_signals():
        raise_on_signals()
        with pytest.raises((KeyboardInterrupt, SignalExit)):
            signal.raise_signal(number)
        assert raised() == number
    assert raised() == 0 and handlers() == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("times", [0, 1, 3])
def test_an_interrupt_reaches_work_aside_as_a_request_and_touches_no_handler(times):
    before, steps = handlers(), []

    def work(request):
        assert threading.current_thread() is not threading.main_thread()
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2 * MOMENT)
        assert handlers() == before
        steps.append("done")
        return request.signal_number

    assert stop_on_interrupt(work) == (signal.SIGINT if times else 0)
    assert steps == ["done"] and handlers() == before


def test_what_work_aside_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        stop_on_interrupt(lambda request: 1 / request.signal_number)
