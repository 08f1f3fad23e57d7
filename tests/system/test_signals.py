"""Signals: whose handlers are set, and for how long."""

import signal

import pytest

from minigpt2.system.signals import (
    SIGNALS,
    SignalExit,
    exit_on_signals,
    raise_on_signals,
    raised,
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
