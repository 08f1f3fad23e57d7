"""The command that prepares a text: python -m minigpt2.corpus"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import warm
from languages import text_in
from minigpt2.cli import corpus as module
from minigpt2.corpus import vocabulary
from minigpt2.corpus.options import CorpusOptions
from minigpt2.tokenizer import Tokenizer
from scripts import ROOT
from vocabularies import hf_encode, hf_reads


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))


def test_the_command_prints_a_report_or_json(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("The sea says nothing. " * 400)
    assert module.main(CorpusOptions(paths=(str(path),), preset="nano")) == 0
    shown = capsys.readouterr().out
    assert "training nano with the default settings: 800 steps of 16 x 128 tokens" in shown
    assert module.main(CorpusOptions(paths=(str(path),), preset="gpt2", json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    tokens = report["tokens"] - report["held_out_tokens"]
    assert report["steps"] == -(-3 * -(-tokens // 1024) // 8)
    assert report["seconds"] > 0 and report["documents"] == 1


def test_the_report_counts_what_was_taken_and_what_was_not(tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("a.txt", "b.txt", "c.md", "d.png", ".e", "f\x1b[2J.\x1b[2J", "g.rst"):
        Path(name).write_text(f"{name}: The sea says nothing. " * 40)
    for name in ("notes/h.log", "../held/i.txt", "../held/j.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"{name}: The sea says nothing. " * 40)
    named = {"paths": (".", "notes/*"), "val_data": ("../held",), "preset": "nano"}
    for _ in range(2):  # the second time from the cache
        assert module.main(CorpusOptions(**named)) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown[1].split(maxsplit=1) == ["files", "3 .txt, 1 .log, 1 .md, 1 .rst"]
        kinds, example = shown[2].split(maxsplit=2)[2].rsplit(": ", 1)
        assert kinds == "1 .\\x1b[2j, 1 .jpg, 1 .png (no suffix of text; a glob takes what is text)"
        assert example == "f\\x1b[2J.\\x1b[2J"
        assert shown[3].strip() == "1 without suffix (hidden): .e"
    module.main(CorpusOptions(**named, json=True))
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == {".txt": 3, ".md": 1, ".log": 1, ".rst": 1}
    assert {"kind": "without suffix", "reason": "hidden", "count": 1, "example": ".e"} in report[
        "left_out"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes")
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=["UTF-8", "C"])
def test_names_of_files_may_be_any_bytes_in_any_locale(tmp_path, locale):
    for name in (b"\xff\xe9.txt", "é.txt".encode(), b"\xff.\xff"):
        path = os.fsencode(tmp_path) + b"/texts/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(b"The sea says nothing. " * 400)
    command = [*warm.python(), "-m", "minigpt2.corpus", "--preset", "nano", "--val-fraction=0.5"]
    for flags in ((), ("--json",)):
        done = subprocess.run(
            [*command, "texts", *flags],
            cwd=tmp_path,
            env={**os.environ, **locale, "PYTHONPATH": str(ROOT)},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        shown = done.stdout.decode()
        if flags:
            assert json.loads(shown)["files"] == {".txt": 2}
        else:
            assert "  1 .\\udcff (no suffix of text; a glob" in shown


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("gpt2", "gpt2"),
        ("openai-community/gpt2-medium", "gpt2-medium"),
        ("distilbert/distilgpt2", "distilgpt2"),
        ("someone/gpt2", None),
        ("nano", None),
    ],
)
def test_the_time_is_told_of_the_public_models_alone(model, known):
    steps, sentence = module._training_ahead(CorpusOptions(("x",), model=model), 9000)
    assert bool(steps) == bool(known)
    assert sentence.startswith(f"training {known} with" if known else "")


def test_a_folder_with_a_public_models_name_is_a_model_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert module._training_ahead(CorpusOptions(("x",), model="gpt2"), 9000) == ({}, "")


@pytest.fixture
def korean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(text_in("korean", 200))
    return tmp_path


def test_a_vocabulary_is_a_folder_that_transformers_reads_with_equal_ids(korean, capsys):
    words = ["vocabulary", "my.txt", "--vocab-size", "300", "--out", "new/own"]
    assert module.run(words) == 0
    shown, told = capsys.readouterr()
    assert "bytes per token" in shown and "new/own: a vocabulary of 300 tokens" in told
    assert {p.name for p in (korean / "new").iterdir()} == {"own"}
    ours, hf = Tokenizer.from_pretrained("new/own"), hf_reads(korean / "new" / "own")
    text = text_in("korean", 3) + "🤗<|endoftext|> x"
    assert ours.encode(text) == hf_encode(hf, text)
    (korean / "empty").mkdir()
    assert module.run([*words[:-1], "empty", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["vocab_size"] == 300 and report["documents"] == 1
    assert {*report["bytes_per_token"]} == {"own", "gpt2", "own_held_out", "gpt2_held_out"}
    assert report["bytes_per_token"]["own"] > report["bytes_per_token"]["gpt2"]
    assert Tokenizer.from_pretrained("empty").identity == ours.identity


def test_a_file_of_the_subcommands_name_is_reached_by_its_path(korean, capsys):
    (korean / "my.txt").rename("vocabulary")
    assert module.run(["./vocabulary", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_per_token"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("my.txt", "--out is missing: name the folder to write"),
        ("my.txt --out my.txt", "--out my.txt is a file: name a folder"),
        ("my.txt --out full", "--out full is not empty: name another folder"),
        ("my.txt --out new --vocab-size 256", "--vocab-size is 256, allowed is 257 to"),
        ("none.txt --out new", "none.txt does not exist"),
        ("--out new", "no path is given: name at least one file"),
        ("my.txt --out my.txt/new", "--out my.txt/new cannot be written: Not a directory"),
    ],
)
def test_what_makes_no_vocabulary_is_refused_in_one_line(korean, capsys, words, message):
    (korean / "full").mkdir()
    (korean / "full" / "a").touch()
    before = sorted(korean.iterdir())
    assert module.run(["vocabulary", *words.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [p for p in sorted(korean.iterdir()) if p.name != "cache"] == before


def test_a_vocabulary_needs_its_library(korean, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert module.run(["vocabulary", "my.txt", "--out", "new"]) == 2
    assert "needs tokenizers: pip install tokenizers" in capsys.readouterr().err
    assert not (korean / "new").exists() and not (korean / "cache").exists()


def test_nothing_half_written_stays(korean, capsys, monkeypatch):
    def full(folder, **given):
        (folder / "vocab.json").touch()
        raise OSError(28, "No space left on device")

    tokenizer = Tokenizer.gpt2(300)
    monkeypatch.setattr(tokenizer, "save", full)
    with pytest.raises(ValueError, match="new cannot be written: No space left"):
        vocabulary.write_folder(tokenizer, korean / "new")
    assert [p.name for p in korean.iterdir()] == ["my.txt"]
