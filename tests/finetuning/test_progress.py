"""The lines that a person who waits sees on stderr."""

import math

from minigpt2.finetuning.progress import Progress, evaluation_line
from minigpt2.runs.record import Metrics


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
    assert "| loss" not in evaluation_line(Metrics(0, val_loss=1.0))
