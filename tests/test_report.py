"""The loss curve and the lines on stderr, made from nothing but metrics.jsonl."""

import math
import xml.etree.ElementTree

import pytest

from minigpt2.checkpoint import RunFolder
from minigpt2.progress import evaluation_line, perplexity
from minigpt2.report import draw_loss_curve

LINES = [
    {"step": 0, "val_loss": 6.9},
    {"step": 1, "loss": 6.8},
    {"step": 2, "loss": 6.0, "val_loss": 6.1},
]


@pytest.mark.parametrize("n_lines", range(len(LINES) + 1))
def test_the_curve_is_drawn_at_every_stage_of_a_run(tmp_path, n_lines):
    run = RunFolder(tmp_path)
    for line in LINES[:n_lines]:
        run.log(line)
    draw_loss_curve(run)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(tmp_path / "loss.svg").getroot().tag.endswith("svg")


def test_an_evaluation_is_one_line_in_a_fixed_order():
    line = evaluation_line({"val_loss": math.log(20), "step": 50, "loss": 2.5})
    assert line == "step     50 | loss 2.5000 | val loss 2.9957 | perplexity 20.0"
    assert "| loss" not in evaluation_line({"val_loss": 1.0, "step": 0})


def test_perplexity_of_a_hopeless_model_is_infinite_and_no_error():
    assert perplexity(1e6) == math.inf
