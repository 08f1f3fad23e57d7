"""The loss curve, the report page, TensorBoard's log and the lines on stderr, made from nothing but
a run's records.
"""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter
from html.parser import HTMLParser

import pytest

from minigpt2 import report
from minigpt2.checkpoint import RunFolder
from minigpt2.errors import InputError
from minigpt2.progress import evaluation_line
from minigpt2.record import read_record
from minigpt2.report import TensorBoardLog, curves, draw_loss_curve, page, write_report

LINES = [
    {"step": 0, "val_loss": 6.9},
    {"step": 1, "loss": 6.8},
    {"step": 2, "loss": 6.0, "val_loss": 6.1},
]
VOID = {"meta", "br", "hr", "img", "input", "link"}


def full_lines(n_steps):
    """Metrics as a run of n_steps writes them, judged every 5 steps."""
    lines = [{"step": 0, "val_loss": 3.5}]
    for step in range(1, n_steps + 1):
        line = {
            "step": step,
            "loss": 3.0 + 1 / step + 0.01 * (step % 7),
            "lr": 1e-4 * step / n_steps,
            "grad_norm": None if step == 3 else 0.5 + 0.1 * (step % 3),
            "tokens_per_second": 1000.0 + 13 * (step % 5),
            "memory": 10_000_000 + 1_000 * step,
            "seconds": 0.25 * step,
        }
        if step == 3:
            line["skipped"] = True
        if step % 5 == 0:
            line["val_loss"] = 3.2 + 0.002 * abs(step - 10)
        lines.append(line)
    return lines


INFO = {
    "sessions": [
        {
            "command": "python train.py --data 'a b.txt' --out x",
            "started": "2025-03-10T14:03:21+01:00",
            "from_step": 0,
            "device": "cpu",
            "dtype": "float32",
            "world_size": 3,
            "versions": {"minigpt2": "0.1.0", "torch": "2.13.0"},
        }
    ],
    "model": {"source": "nano", "pretrained": False, "n_parameters": 1_234_567, "lora_rank": None},
    "data": {"paths": ["a b.txt"], "val_paths": [], "n_documents": 2, "n_tokens": 71_230},
    "settings": {"max_steps": 40, "learning_rate": 0.0005, "seed": 1337, "grad_clip": 1.0},
    "memory": {"weights": 5 << 20, "total": 7 << 20},
}
SAMPLES = [
    {"step": 0, "prompt": "Once", "text": " upon a time"},
    {"step": 20, "prompt": "Once", "text": " a lamp"},
]


def run_folder(path, lines=(), samples=(), info=None):
    run = RunFolder(path)
    for name, values in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        text = "".join(json.dumps(value) + "\n" for value in values)
        (path / name).write_text(text, encoding="utf-8")
    if info is not None:
        (path / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return run


def page_of(run):
    write_report(run)
    return (run.path / "report.html").read_bytes().decode("utf-8")


class Checker(HTMLParser):
    """Reads a page strictly: tags must nest, ids must differ, addresses must lie in the page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.text, self.tags, self.styles = [], Counter(), [], Counter(), []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self._attributes(attrs)

    def _attributes(self, attrs):
        assert len(attrs) == len(dict(attrs))
        for name, value in attrs:
            if name == "id":
                self.ids[value] += 1
            assert name not in ("src", "srcset", "action", "data", "poster", "background")
            assert not name.startswith("on")
            if name.endswith("href"):
                assert value.startswith("#")
            if name == "style":
                self.styles.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
        else:
            self.text.append(data)


def check(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert html.startswith("<!DOCTYPE html>")
    assert checker.open == []
    assert max(checker.ids.values(), default=1) == 1
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(checker.tags)
    for style in checker.styles:
        assert "@import" not in style
        assert all(address.startswith("#") for address in re.findall(r"url\((.)", style))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    return checker


@pytest.mark.parametrize("n_lines", range(len(LINES) + 1))
def test_the_curve_is_drawn_at_every_stage_of_a_run(tmp_path, n_lines):
    run = run_folder(tmp_path, LINES[:n_lines])
    draw_loss_curve(run)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(tmp_path / "loss.svg").getroot().tag.endswith("svg")


def test_the_curve_shows_the_best_step_and_the_untuned_level(tmp_path, monkeypatch):
    monkeypatch.setitem(report.matplotlib.rcParams, "svg.fonttype", "none")
    draw_loss_curve(run_folder(tmp_path, full_lines(20)))
    drawn = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    assert "best, step 10" in drawn
    assert "untuned" in drawn


def test_a_run_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "灯 $x_$ <b>"
    folder.mkdir()
    run = run_folder(folder, LINES)
    draw_loss_curve(run)
    assert "灯 $x_$ <b>" in check(page_of(run)).text


@pytest.mark.parametrize("n_lines", [*range(8), 41])
def test_the_page_is_whole_after_a_crash_at_any_step(tmp_path, n_lines):
    lines = full_lines(40)[:n_lines]
    run = run_folder(tmp_path, lines, SAMPLES, INFO)
    with run.metrics_path.open("a") as file:
        file.write('{"step": 41, "lo')
    check(page_of(run))


def test_the_page_of_an_empty_folder_is_whole(tmp_path):
    checker = check(page_of(RunFolder(tmp_path)))
    assert "Nothing was measured yet." in checker.text


def test_the_page_shows_all_that_was_recorded(tmp_path):
    shown = " ".join(check(page_of(run_folder(tmp_path, full_lines(40), SAMPLES, INFO))).text)
    assert "Best at step 10: val perplexity 24.5 (at the start 33.1)" in shown
    for piece in (
        "3.2000",  # the best loss, and its bits
        "4.617",
        " a lamp",
        "python train.py --data 'a b.txt' --out x",
        "10 March 2025, 14:03 · from step 0 · cpu · float32 · 3 processes",
        "minigpt2 0.1.0 · torch 2.13.0",
        "1,234,567",
        "71,230",
        "0.0005",
        "1337",
        "7 MiB",  # forecast
        "9.57 MiB",  # measured
        "steps skipped",
    ):
        assert piece in shown
    assert "None" not in shown


def test_the_newest_sample_comes_first_and_is_open(tmp_path):
    html = page_of(run_folder(tmp_path, LINES, SAMPLES))
    assert html.count("<details") == 2
    assert html.count("<details open>") == 1
    assert html.index("<details open><summary>step 20") < html.index("<summary>step 0")


def test_the_curves_are_the_lines_of_metrics(tmp_path):
    lines = full_lines(40)
    shown = curves(lines)
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
    html = page_of(run_folder(tmp_path, lines))
    (svg,) = re.findall(rf'<svg class="{picture}".*?</svg>', html, flags=re.S)
    drawn = drawn_points(svg, colour)
    expected = curves(lines)[field]
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


HOSTILE = (
    "</script></pre></details><script>alert(1)</script>&amp;<b onclick='x'>\x00\x1b[31m\u202e"
    "\ud800שלום ]]>-->"
)


def test_hostile_text_is_shown_and_never_obeyed(tmp_path):
    info = {
        "sessions": [{"command": HOSTILE, "started": HOSTILE, "versions": {HOSTILE: HOSTILE}}],
        "model": {HOSTILE: HOSTILE, "config": {"n_layer": HOSTILE}},
        "data": {"paths": [HOSTILE], "identity": HOSTILE},
        "settings": {HOSTILE: [HOSTILE]},
        "memory": {HOSTILE: 5},
    }
    samples = [{"step": 1, "prompt": HOSTILE, "text": HOSTILE}]
    html = page_of(run_folder(tmp_path, LINES, samples, info))
    checker = check(html)
    assert "שלום" in html
    assert checker.tags["details"] == 1
    assert checker.tags["b"] == 0


@pytest.mark.parametrize(
    "info",
    [
        dict.fromkeys(INFO, value)
        for value in (None, [], {}, 3, "text", [None], [{}], {"a": None}, {"total": "x"})
    ],
)
def test_a_run_json_of_wrong_types_still_makes_a_page(tmp_path, info):
    check(page_of(run_folder(tmp_path, LINES, SAMPLES, info)))


@pytest.mark.parametrize("broken", ["", "{", "[1]", "\x00\x01", '{"a": NaN}'])
def test_a_broken_run_json_is_named_and_the_rest_shown(tmp_path, broken):
    run = run_folder(tmp_path, LINES)
    (tmp_path / "run.json").write_text(broken, encoding="utf-8")
    shown = " ".join(check(page_of(run)).text)
    assert "run.json is damaged" in shown
    assert "6.1000" in shown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "x", 10**400, 0, -3, 1e29])
def test_odd_numbers_make_no_odd_page(tmp_path, value):
    odd = {"loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "memory", "seconds"}
    lines = [*LINES, *({"step": step, **dict.fromkeys(odd, value)} for step in (3, 4))]
    samples = [{"step": value, "prompt": value, "text": value}]
    run = run_folder(tmp_path, lines, samples)
    check(page_of(run))
    draw_loss_curve(run)


def test_a_hundred_thousand_steps_make_a_page_of_bounded_size(tmp_path):
    few, many = (
        len(page(read_record(run_folder(tmp_path, full_lines(n), SAMPLES * (n // 100)))))
        for n in (4_000, 100_000)
    )
    assert many < 1.2 * few
    assert many < 500_000


def test_the_page_replaces_the_old_one_in_one_step(tmp_path, monkeypatch):
    run = run_folder(tmp_path, LINES)
    old = page_of(run)
    run.log({"step": 3, "loss": 1.0})

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt2.files.sync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_report(run)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert not [*tmp_path.glob(".*")]


def test_the_command_writes_all_pictures_and_pages(tmp_path):
    run_folder(tmp_path, full_lines(10), SAMPLES, INFO)
    assert report.main([str(tmp_path)]) == 0
    for name in ("loss.png", "loss.svg", "report.html", "README.md"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"], ["missing-folder"]])
def test_the_command_explains_itself(arguments, capsys):
    assert report.main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "missing-folder" in shown if "missing-folder" in arguments else "usage:" in shown


@pytest.mark.slow
def test_the_command_can_be_run_as_a_module(tmp_path):
    run_folder(tmp_path, LINES)
    command = [sys.executable, "-W", "error", "-m", "minigpt2.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.html").exists()


def logged_scalars(folder):
    """From a name to (step, value) pairs, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_tensorboard_shows_the_numbers_of_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    log = TensorBoardLog(tmp_path)
    for line in [*LINES, {"step": 3, "loss": 5.0, "grad_norm": None, "skipped": True}]:
        log(line)
    log.sample(2, "Once", " upon")
    log.close()
    assert logged_scalars(tmp_path) == {
        "loss": [(1, pytest.approx(6.8)), (2, 6.0), (3, 5.0)],
        "val_loss": [(0, pytest.approx(6.9)), (2, pytest.approx(6.1))],
    }
    assert b"Once upon" in next(tmp_path.glob("events*")).read_bytes()


def test_a_resumed_run_replaces_what_tensorboard_showed_of_the_steps_it_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    for done, steps, loss in ((0, range(1, 6), 1.0), (3, range(4, 8), 2.0)):
        log = TensorBoardLog(tmp_path, done)
        for step in steps:
            log({"step": step, "loss": loss})
        log.close()
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    assert logged_scalars(tmp_path)["loss"] == expected


def test_a_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path)


def test_an_evaluation_is_one_line_in_a_fixed_order():
    line = evaluation_line({"val_loss": math.log(20), "step": 50, "loss": 2.5})
    assert line == "step     50 | loss 2.5000 | val loss 2.9957 | perplexity 20.0"
    assert "| loss" not in evaluation_line({"val_loss": 1.0, "step": 0})
