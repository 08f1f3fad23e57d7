"""How a run is shown while it goes on."""

from types import SimpleNamespace

import pytest

from minigpt2.finetuning import session
from minigpt2.finetuning.session import PAGES_SHARE, Display
from minigpt2.runs.record import Metrics
from minigpt2.system.signals import SignalExit, Stopped
from run_records import run_folder

DRAWING = 0.5  # seconds


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """A display whose drawings take DRAWING seconds of a clock of its own, which others move."""
    clock = SimpleNamespace(now=100.0, drawn=[])

    def redraw(run):
        clock.now += DRAWING
        clock.drawn.append(clock.now)

    monkeypatch.setattr(session, "redraw", redraw)
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock.now))
    job = SimpleNamespace(
        run=run_folder(tmp_path), plan=SimpleNamespace(max_steps=9), world=SimpleNamespace()
    )
    options = SimpleNamespace(tensorboard=False)
    return Display(options, SimpleNamespace(job=job, start=None), progress=False), clock


@pytest.mark.parametrize("seconds", [0.01, 1.0, 100.0])
def test_pages_are_drawn_at_once_and_then_in_a_small_share_of_the_time(shown, seconds):
    display, clock = shown
    began = clock.now
    with display:
        for step in range(500):
            display(Metrics(step=step, val_loss=3.0))
            clock.now += seconds
            display(Metrics(step=step, loss=3.0))
    assert clock.drawn[0] == began + DRAWING
    spent = DRAWING * len(clock.drawn)
    assert spent - DRAWING <= 1.01 * PAGES_SHARE * (clock.now - began)
    assert len(clock.drawn) == 500 or seconds < 100


@pytest.mark.parametrize("problem", [Stopped(15), ValueError("not finite")])
def test_a_run_that_is_stopped_leaves_its_last_evaluation_on_its_pages(shown, problem):
    display, clock = shown
    with pytest.raises(type(problem)), display:
        display(Metrics(step=0, val_loss=3.0))
        display(Metrics(step=1, val_loss=2.0))
        assert len(clock.drawn) == 1
        raise problem
    assert len(clock.drawn) == 2


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), SignalExit(15)])
def test_a_run_that_must_end_at_once_draws_nothing_more(shown, problem):
    display, clock = shown
    with pytest.raises(type(problem)), display:
        display(Metrics(step=0, val_loss=3.0))
        display(Metrics(step=1, val_loss=2.0))
        raise problem
    assert len(clock.drawn) == 1


def test_a_run_whose_pages_are_drawn_already_is_not_drawn_again(shown):
    display, clock = shown
    with pytest.raises(Stopped), display:
        display(Metrics(step=0, val_loss=3.0))
        raise Stopped(15)
    assert len(clock.drawn) == 1
