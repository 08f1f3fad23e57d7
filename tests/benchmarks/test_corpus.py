"""The benchmark of data preparation: no rate for other tokens than tiktoken's."""

import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benches import loaded
from minigpt2.tokenizer import Tokenizer
from scripts import ROOT

SIZES = ["--megabytes", "1", "--rounds", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def bench():
    with loaded("corpus") as module:
        yield module


def test_tokens_that_are_tiktokens_have_a_rate(bench, capsys):
    assert bench.main(SIZES) == 0
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


@pytest.mark.parametrize("change", CHANGES)
def test_other_tokens_have_no_rate(bench, monkeypatch, capsys, change):
    prepare = bench.prepare

    def changed(*given, **options):
        tokens = prepare(*given, **options).train.tokens
        return SimpleNamespace(train=SimpleNamespace(tokens=CHANGES[change](np.array(tokens))))

    monkeypatch.setattr(bench, "prepare", changed)
    assert bench.main(SIZES) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2  # the head of the table
    assert err.startswith("error: ") and err.endswith(": no rate\n")


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
