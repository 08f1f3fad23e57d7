"""The report page is whole at every stage of a run, and obeys nothing that the run was given."""

import math
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from minigpt2.runs import page as report
from minigpt2.runs.curves import draw_loss_curve
from minigpt2.runs.folder import RunFolder
from minigpt2.runs.page import page, write_report
from minigpt2.runs.record import Metrics, Record, RunInfo, Session
from run_records import INFO, LINES, SAMPLES, full_lines, run_folder

VOID = {"meta", "br", "hr", "img", "input", "link"}


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
    best = "Best at step 10: val perplexity 24.5, bits per byte 1.600 (at the start 33.1 and 1.750)"
    assert best in shown
    for piece in (
        "3.2000",  # the best loss, and its bits
        "4.617",
        "best bits per byte",
        "bits per byte at the start",
        "random weights",  # step 0 in the table
        "whose tokenizers differ",
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


def test_a_page_shows_bits_per_byte_for_every_evaluation_or_not_at_all(tmp_path):
    lines = full_lines(10)
    known, earlier = run_folder(tmp_path, lines), [{**line} for line in lines]
    html = page_of(known)
    assert html.count('<th scope="col">bits per byte</th>') == 1
    assert '<th scope="row">0 <small>untuned</small></th><td>3.5000</td>' in html
    assert html.count("<td>") == 3 * 4 and "<td>1.750</td>" in html
    for line in earlier:
        line.pop("bits_per_byte", None)
    html = page_of(run_folder(tmp_path, earlier))
    assert "per byte" not in html and html.count("<td>") == 3 * 3


def test_the_newest_sample_comes_first_and_is_open(tmp_path):
    html = page_of(run_folder(tmp_path, LINES, SAMPLES))
    assert html.count("<details") == 2
    assert html.count("<details open>") == 1
    assert html.index("<details open><summary>step 20") < html.index("<summary>step 0")


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
    odd = {
        "loss",
        "val_loss",
        "bits_per_byte",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "memory",
        "seconds",
    }
    lines = [*LINES, *({"step": step, **dict.fromkeys(odd, value)} for step in (3, 4))]
    samples = [{"step": value, "prompt": value, "text": value}]
    run = run_folder(tmp_path, lines, samples)
    check(page_of(run))
    draw_loss_curve(run)


def test_a_hundred_thousand_steps_make_a_page_of_bounded_size(tmp_path):
    few, many = (
        len(page(run_folder(tmp_path, full_lines(n), SAMPLES * (n // 100)).read_record()))
        for n in (4_000, 100_000)
    )
    assert many < 1.2 * few
    assert many < 500_000


def test_the_page_replaces_the_old_one_in_one_step(tmp_path, monkeypatch):
    run = run_folder(tmp_path, LINES)
    old = page_of(run)
    run.log(Metrics(3, 1.0))

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt2.system.files.sync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_report(run)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("cut", [False, True])
def test_a_command_is_shown_whole_or_marked_as_cut(cut):
    command = "python train.py --data " + "x" * (report.MOST_CHARACTERS if cut else 99)
    shown = page(Record("run", info=RunInfo((Session(command=command),))))
    assert (f"<pre>{command}</pre>" in shown) != cut
    assert ("x …</pre>" in shown) == cut


def test_the_steps_shown_count_one_that_float16_skipped():
    skipped = Metrics(2, loss=math.inf, grad_norm=math.inf, skipped=1)
    assert "<dt>steps</dt><dd>2</dd>" in page(Record("run", [Metrics(1, 3.5), skipped]))
