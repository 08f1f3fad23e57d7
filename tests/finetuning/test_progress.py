"""What a person who waits sees on stderr: lines everywhere, a bar where it can be drawn over."""

import io
import math
import sys
from types import SimpleNamespace

import pytest

from minigpt2.finetuning.progress import Progress, evaluation_line
from minigpt2.runs.record import Metrics
from minigpt2.system.streams import draws_over


def test_a_loss_that_is_not_finite_is_shown_as_such(capsys):
    skipped = Metrics(20, loss=math.inf, tokens_per_second=1.0, val_loss=3.0)
    assert evaluation_line(skipped).startswith("step     20 | loss not finite | val loss 3.0000 | ")
    progress = Progress(done=19, total=20)
    progress.update(skipped)
    progress.close()
    assert "loss not finite" in capsys.readouterr().err


def test_an_evaluation_is_one_line_in_a_fixed_order():
    line = evaluation_line(Metrics(50, loss=2.5, val_loss=math.log(20)))
    assert line == "step     50 | loss 2.5000 | val loss 2.9957 | perplexity 20.0"
    judged = Metrics(50, val_loss=math.log(20), bits_per_byte=1.0444)
    assert evaluation_line(judged).endswith(" | perplexity 20.0 | bits per byte 1.044")
    assert "| loss" not in evaluation_line(Metrics(0, val_loss=1.0))


class Terminal(io.StringIO):
    """A terminal that keeps what it was sent."""

    def isatty(self):
        return True


class Notebook(io.StringIO):
    """A notebook's stream, which says that it is no terminal and has no descriptor."""


Notebook.__module__ = "ipykernel.iostream"
STREAMS = [
    (Terminal, "xterm", True),
    (Terminal, "dumb", False),
    (io.StringIO, "xterm", False),
    (Notebook, "xterm", True),
    (Notebook, "dumb", True),
]


@pytest.mark.parametrize(("stream", "terminal", "draws"), STREAMS)
def test_lines_are_everywhere_the_bar_where_it_is_drawn_over_and_colours_nowhere(
    monkeypatch, stream, terminal, draws
):
    seen = stream()
    monkeypatch.setattr(sys, "stderr", seen)
    monkeypatch.setenv("TERM", terminal)
    assert draws_over(seen) == draws
    progress = Progress(done=0, total=2)
    for step in (1, 2):
        progress.update(Metrics(step, loss=2.0, tokens_per_second=9.0, val_loss=3.0))
    progress.close()
    shown = seen.getvalue()
    assert "\x1b" not in shown and ("\r" in shown) == draws == ("2/2" in shown)
    lines = [part for line in shown.split("\n") for part in line.split("\r") if "val loss" in part]
    assert [line.split()[1] for line in lines] == ["1", "2"]


def test_without_stderr_there_is_none_of_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert not draws_over(None)


def test_a_stream_that_can_only_be_written_to_is_no_terminal():
    assert not draws_over(SimpleNamespace(write=print, flush=print))
    progress = Progress(done=0, total=1)
    progress.update(Metrics(1, loss=2.0, val_loss=3.0))
    progress.close()
