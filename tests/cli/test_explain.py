"""The command that writes a page about a model: python -m minigpt2 explain --prompt TEXT"""

import subprocess

import pytest

import warm
from minigpt2.cli import explain
from minigpt2.explain.page import MARK
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
        (["--prompt", "~" * 129], "has 129 tokens, {model} reads 23 at most"),
        (["--prompt", "~" * 5000], "has 5,000 tokens, {model} reads 23 at most"),
        (["--prompt", "~" * 24], "has 24 tokens, {model} reads 23 at most: give a shorter one"),
        (["--prompt", "a\udcff"], "lone surrogate"),
        (["--prompt", "a", "--model", "no/where/at/all"], "there is no folder 'no/where/at/all'"),
        (["--prompt", "a", "--compare", "no/where/at/all"], "there is no folder"),
        (
            ["--prompt", "a", "--out", "{model}/none/page.html"],
            "{model}/none is no folder: make it",
        ),
        (["--prompt", "a", "--out", "{model}"], "{model} is a folder: name a file"),
        (["--prompt", "a", "--out", "{model}/config.json"], "is no page of this kind"),
    ],
    ids=range(11),
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


@pytest.mark.parametrize("kept", [True, False], ids=["an old page", "no page"])
@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (b"", "the prompt is empty: give it at least one word"),
        (b"~" * 129, "the prompt has 129 tokens, {model} reads 23 at most"),
        (b"~" * 5000, "the prompt has 5,000 tokens"),
        (b"a\xff", "stdin is not UTF-8 at byte 1"),
    ],
    ids=["0", "129", "5000", "no UTF-8"],
)
def test_a_prompt_from_stdin_that_makes_no_page_keeps_the_old_one(
    tmp_path, model, capsys, monkeypatch, prompt, told, kept
):
    out = tmp_path / "page.html"
    if kept:
        out.write_text(MARK + "old")
    monkeypatch.setattr("minigpt2.cli.prompts.read_stdin", lambda n: prompt)
    assert explain.run(["--prompt", "-", "--model", str(model), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told.replace("{model}", str(model)) in line
    assert out.exists() == kept and (not kept or out.read_text() == MARK + "old")


@pytest.mark.parametrize("early", [True, False], ids=["at first", "at last"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, model, capsys, monkeypatch, early):
    """Root writes everywhere, so the system's answers are made up here."""
    out = tmp_path / "page.html"
    out.write_text(MARK + "old")

    def refuse(*given, **named):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    if early:
        monkeypatch.setattr("minigpt2.explain.page.os.access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr("minigpt2.explain.page.write_text", refuse)
    assert explain.run(["--prompt", "a", "--model", str(model), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line
    assert ("cannot be written to: name a file in another folder" in line) == early
    assert out.read_text() == MARK + "old"


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
