"""The command that writes a page about a model: python -m minigpt2 explain --prompt TEXT"""

import subprocess

import pytest

import warm
from minigpt2.cli import explain
from scripts import ROOT, tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("explain") / "model")


def test_the_command_writes_a_page(tmp_path, model, capsys):
    out = tmp_path / "page.html"
    words = ["--model", str(model), "--compare", str(model), "--out", str(out)]
    assert explain.run([*words, "--prompt", r"a\nlamp"]) == 0
    told = capsys.readouterr()
    assert told.out == "" and f"{out} shows how" in told.err
    assert '"prompt":"a\\nlamp"' in out.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--prompt is missing"),
        (["--prompt", ""], "--prompt is empty: give it at least one word"),
        (["--prompt", "~" * 24], "has 24 tokens, {model} reads 23 at most: give a shorter one"),
        (["--prompt", "a\udcff"], "lone surrogate"),
        (["--prompt", "a", "--model", "no/where/at/all"], "there is no folder 'no/where/at/all'"),
        (["--prompt", "a", "--compare", "no/where/at/all"], "there is no folder"),
        (["--prompt", "a", "--out", "{model}"], "{model} is a folder: name a file"),
        (["--prompt", "a", "--out", "{model}/config.json"], "is no page of this kind"),
    ],
    ids=range(8),
)
def test_what_makes_no_page_is_one_line(model, capsys, arguments, told):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    words = [word.replace("{model}", str(model)) for word in arguments]
    if "--model" not in words:
        words += ["--model", str(model)]
    if "--out" not in words:
        words += ["--out", str(model / "page.html")]
    assert explain.run(words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[-1].startswith("error: ")
    assert told.replace("{model}", str(model)) in shown.err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize("module", [["minigpt2", "explain"], ["minigpt2.explain"]], ids=" ".join)
def test_bytes_that_are_no_text_are_one_line(tmp_path, model, module):
    words = [*warm.python(), "-m", *module, "--prompt", "-", "--model", str(model)]
    done = subprocess.run(
        words, input=b"a\xff", capture_output=True, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: stdin is not UTF-8 at byte 1")
    assert not list(tmp_path.iterdir())


def environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_special_tokens_are_read_where_that_is_asked_for(tmp_path, model, capsys):
    out = tmp_path / "page.html"
    words = ["--model", str(model), "--out", str(out), "--prompt", "a<|endoftext|>"]
    assert explain.run([*words, "--special-tokens"]) == 0
    assert "read as plain text" not in capsys.readouterr().err
    assert '"special":"\\u003c|endoftext|\\u003e"' in out.read_text("utf-8")
    assert explain.run(words) == 0
    assert "<|endoftext|> in a text is read as plain text" in capsys.readouterr().err
    assert '"special":null' in out.read_text("utf-8")


def test_special_tokens_that_change_nothing_are_said(tmp_path, model, capsys, monkeypatch):
    words = ["--model", str(model), "--out", str(tmp_path / "page.html"), "--special-tokens"]
    assert explain.run([*words, "--prompt", "a"]) == 0
    assert "changes nothing" not in capsys.readouterr().err  # they may be typed
    monkeypatch.setattr("minigpt2.explain.live.LARGEST", 0)
    assert explain.run([*words, "--prompt", "a"]) == 0
    assert "--special-tokens changes nothing: no special token" in capsys.readouterr().err


def test_a_run_that_was_trained_with_special_tokens_has_its_prompts_read_so(
    tmp_path, model, capsys, monkeypatch
):
    monkeypatch.setattr("minigpt2.cli.prompts.trained_with_special_tokens", lambda folder: True)
    words = ["--model", str(model), "--out", str(tmp_path / "page.html"), "--prompt", "a"]
    assert explain.run(words) == 0
    assert "was trained with --special-tokens, so prompts are read" in capsys.readouterr().err
    assert '"readSpecial":true' in (tmp_path / "page.html").read_text("utf-8")
