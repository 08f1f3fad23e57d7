"""The curves of a run go through its numbers, at every stage of a run."""

import re
import xml.etree.ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.runs import curves as drawing
from minigpt2.runs.curves import curves, draw_loss_curve
from minigpt2.runs.page import page
from run_records import LINES, full_lines, metrics_of, run_folder


@pytest.mark.parametrize("n_lines", range(len(LINES) + 1))
def test_the_curve_is_drawn_at_every_stage_of_a_run(tmp_path, n_lines):
    run = run_folder(tmp_path, LINES[:n_lines])
    draw_loss_curve(run)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(tmp_path / "loss.svg").getroot().tag.endswith("svg")


def test_the_curve_shows_the_best_step_and_the_untuned_level(tmp_path, monkeypatch):
    monkeypatch.setitem(drawing.matplotlib.rcParams, "svg.fonttype", "none")
    draw_loss_curve(run_folder(tmp_path, full_lines(20)))
    drawn = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    assert "best, step 10" in drawn
    assert "untuned" in drawn


def test_the_curves_are_the_lines_of_metrics(tmp_path):
    lines = full_lines(40)
    shown = curves(metrics_of(lines))
    for field in ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "memory"):
        expected = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
        assert shown[field] == expected


def drawn_points(svg, colour):
    """The vertices of the longest line of a colour, in the picture's own coordinates."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: var\(--{colour}\)', svg)
    vertices = [re.findall(r"[ML] (\S+) (\S+)", path) for path in paths]
    return [(float(x), float(y)) for x, y in max(vertices, key=len)]


@pytest.mark.parametrize(
    ("picture", "field", "colour"),
    [
        ("loss", "loss", "train"),
        ("loss", "val_loss", "val"),
        ("lr", "lr", "train"),
        ("grad_norm", "grad_norm", "train"),
        ("memory", "memory", "train"),
    ],
)
def test_a_drawn_line_goes_through_the_values_and_nothing_else(tmp_path, picture, field, colour):
    """x and y are straight functions of step and value: two points fix them, the others agree."""
    lines = full_lines(300)  # matplotlib would simplify a line of more than 127 points
    html = page(run_folder(tmp_path, lines).read_record())
    (svg,) = re.findall(rf'<svg class="{picture}".*?</svg>', html, flags=re.S)
    drawn = drawn_points(svg, colour)
    expected = curves(metrics_of(lines))[field]
    assert len(drawn) == len(expected)
    for axis in (0, 1):
        values = [point[axis] for point in expected]
        pixels = [point[axis] for point in drawn]
        low, high = values.index(min(values)), values.index(max(values))
        scale = (pixels[high] - pixels[low]) / (values[high] - values[low])
        assert scale > 0 if axis == 0 else scale < 0
        assert pixels == pytest.approx(
            [pixels[low] + scale * (value - values[low]) for value in values], abs=1e-3
        )


finite = st.floats(-1e6, 1e6)


@settings(deadline=None, max_examples=60)
@given(
    finite,
    st.sampled_from([0.0, *(10.0**power for power in range(-9, 7))]),
    st.integers(1, 10**7),
    st.sampled_from([0, 1, 2, 3, 7, 150, 10**6]),
    st.sampled_from([(500, 250), (300, 160)]),
)
def test_no_two_numbers_beside_an_axis_are_alike(low, span, first, n_steps, size):
    figure, axes = drawing._canvas(*size)
    axes.plot([first, first + n_steps], [low, low + span], marker="o")
    drawing._calm(axes, drawing.PRINTED)
    figure.canvas.draw()
    for axis, (start, end) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        pairs = zip(axis.get_majorticklocs(), axis.get_majorticklabels())
        shown = [label.get_text() for at, label in pairs if start <= at <= end]
        assert len(shown) == len({*shown}), shown
    steps = [float(label.get_text().replace(",", "").replace("\N{MINUS SIGN}", "-"))
             for label in axes.get_xticklabels()]  # fmt: skip
    assert steps and all(step == int(step) for step in steps)
