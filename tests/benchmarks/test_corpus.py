"""The benchmark of data preparation: no rate for other tokens than tiktoken's."""

import json
import random
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from benches import loaded
from minigpt2.tokenizer import Tokenizer
from scripts import ROOT

SIZES = ["--megabytes", "0.1", "--rounds", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def bench():
    with loaded("corpus") as module:
        yield module


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_tokens_that_are_tiktokens_have_a_rate(bench, capsys, format):
    assert bench.main([*SIZES, "--format", format]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 2", "| median"]


def another_id(ids):
    ids[len(ids) // 2] += 1
    return ids


CHANGES = {
    "another id": another_id,
    "an id too few": lambda ids: ids[1:],
    "no end-of-text": lambda ids: ids[:-1],
    "an id too many": lambda ids: np.append(ids, ids[-1]),
    "nothing": lambda ids: ids[:0],
}


@pytest.mark.parametrize(
    ("change", "format"),
    [*((change, "text") for change in CHANGES), ("another id", "jsonl"), ("nothing", "jsonl")],
)
def test_other_tokens_have_no_rate(bench, monkeypatch, capsys, change, format):
    prepare = bench.prepare

    def changed(*given, **options):
        tokens = prepare(*given, **options).train.tokens
        return SimpleNamespace(train=SimpleNamespace(tokens=CHANGES[change](np.array(tokens))))

    monkeypatch.setattr(bench, "prepare", changed)
    assert bench.main([*SIZES, "--format", format]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2  # the head of the table
    assert err.startswith("error: ") and err.endswith(": no rate\n")


def test_rows_are_the_lines_of_the_text(bench, tmp_path):
    for suffix in (".txt", ".jsonl"):
        bench.write_text(tmp_path / f"a{suffix}", 0.5)
    lines = (tmp_path / "a.jsonl").read_text("utf-8").split("\n")[:-1]
    rows = [json.loads(line)["text"] for line in lines]
    text = (tmp_path / "a.txt").read_bytes().decode()
    assert rows == text.splitlines(keepends=True) and len(text.encode()) > 500_000
    assert "".join(bench.documents_of(tmp_path / "a.txt")) == text
    assert bench.documents_of(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_another_checkout_is_compared_with_this_one(bench, capsys, format):
    sizes = [*SIZES, "--rounds", "1", "--format", format]
    assert bench.main([*sizes, "--against", str(ROOT)]) == 0
    first, second, _, interval = capsys.readouterr().out.splitlines()[2:]
    ratio = first.split(" | ")[-1].removesuffix(" |")
    assert second == f"| median | | | {ratio} |"
    assert interval.startswith(f"lowest to highest ratio: {ratio} to {ratio}, where")


def checkout(folder, seconds, ids="[]"):
    """A checkout that prepares nothing in this time, and has these ids."""
    files = {
        "corpus/prepared.py": f"""
            import time
            from types import SimpleNamespace
            def prepare(*given, cache_dir, **options):
                __import__("pathlib").Path(cache_dir).mkdir()
                time.sleep({seconds})
                return SimpleNamespace(train=SimpleNamespace(tokens={ids}))
            """,
        "tokenizer.py": "class Tokenizer:\n    gpt2 = dict",
        "__init__.py": "",
    }
    for name, content in files.items():
        path = folder / "minigpt2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    return folder


def test_checkouts_take_turns_and_who_begins_changes(bench, monkeypatch, tmp_path, capsys):
    other, turns, seconds = checkout(tmp_path, 0), [], iter([1, 4, 6, 2, 5, 3])
    monkeypatch.setattr(bench, "require_equal", lambda *given: None)

    def prepared_by(folder, *given):
        turns.append(folder)
        return next(seconds), np.zeros(3)

    monkeypatch.setattr(bench, "prepared_by", prepared_by)
    assert bench.main([*SIZES, "--rounds", "3", "--against", str(other)]) == 0
    assert turns == [ROOT, other, other, ROOT, ROOT, other]
    *rows, median, _, interval = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[-1] for row in rows] == ["4.000 |", "3.000 |", "0.600 |"]
    assert median == "| median | | | 3.000 |"
    assert interval == (
        "lowest to highest ratio: 0.600 to 4.000, where the median of all possible rounds lies "
        "with a probability of 75%"
    )


OTHERS = {
    "0 / 0": "prepared nothing (ZeroDivisionError: division by zero): no rate",
    "[5]": "the ids from 0 on are not tiktoken's: no rate",
}


@pytest.mark.parametrize("ids", OTHERS)
def test_another_checkout_with_other_tokens_has_no_rate(bench, capsys, tmp_path, ids):
    other = checkout(tmp_path, 0, ids)
    assert bench.main([*SIZES, "--against", str(other)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2  # the head of the table
    assert err.startswith("error: ") and err.endswith(f"{OTHERS[ids]}\n")


def test_only_the_time_to_prepare_is_taken(bench, tmp_path):
    seconds, ids = bench.prepared_by(checkout(tmp_path, 0.3, "[5]"), tmp_path / "a", tmp_path, 1)
    assert seconds >= 0.3 and ids.tolist() == [5] and not (tmp_path / "cache").exists()


def test_what_is_no_checkout_is_refused(bench, capsys, tmp_path):
    for words in (["--against", str(tmp_path)], ["--against", str(ROOT), "--rounds", "0"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(words)
        assert stop.value.code == 2
        assert "is no checkout: " in (told := capsys.readouterr().err) or "0 --rounds" in told


@pytest.mark.parametrize("most", [1, 5, 40])
def test_the_tokens_of_the_parts_are_those_of_the_whole(bench, monkeypatch, tmp_path, most):
    monkeypatch.setattr(bench, "PART_CHARACTERS", most)
    draw, tokenizer = random.Random(most), Tokenizer.gpt2()
    pieces = ["\n", "\n", " ", "\r", "a", "it's", " 17", "\u00e9", "\u3000", "\x1f", "!?", "\t"]
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=40))
        (tmp_path / "text.txt").write_bytes(text.encode())
        parts = [*bench.parts_of(tmp_path / "text.txt")]
        assert "".join(parts) == text
        assert [id for part in parts for id in tokenizer.encode(part)] == tokenizer.encode(text)
    (tmp_path / "text.txt").write_text("a lamp\n" * 50)
    assert len([*bench.parts_of(tmp_path / "text.txt")]) > 5


@pytest.mark.skipif(sys.platform != "linux", reason="memory is that of Linux")
@pytest.mark.parametrize("prepared", ["the text", "another text"])
def test_memory_is_that_of_preparing_the_text(bench, monkeypatch, capsys, prepared):
    def popen(command, **options):
        command = [str(ROOT / "README.md") if word.endswith("large.txt") else word
                   for word in command] if prepared == "another text" else command  # fmt: skip
        return start(command, **options)

    start = subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", popen)
    code = bench.main(["--rounds", "0", "--memory", "1", "--workers", "1"])
    out = capsys.readouterr().out
    assert code == (prepared == "another text")
    assert ("1 MB in" in out) is (prepared == "the text")
