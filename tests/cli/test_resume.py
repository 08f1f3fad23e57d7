"""`--resume --out RUN` goes on with what the run folder knows, and with the flags that differ."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from minigpt2.corpus.options import TextConfig
from minigpt2.finetuning.recorded import described
from minigpt2.formats.tensors import read_tensors
from minigpt2.runs.folder import RunFolder
from minigpt2.training import c_parts
from minigpt2.training.options import TrainConfig, TrainOptions
from scripts import run_here, tiny_folder
from tiny_training import needs_c

WORDS = "the lamp of a small ship went out over dark water and nobody saw it again. "
KINDS = {
    "full": ["--dropout", 0.1, "--patience", 5, "--document-separator", "\\n"],
    "lora": ["--lora-rank", 3, "--lora-alpha", 5, "--val-fraction", 0.2, "--merge-lora"],
    "preset": ["--epochs", 0.5, "--block-size", 16, "--min-characters", 3, "--seed", 7],
}
FLAGS = ["--batch-size", 3, "--micro-batch-size", 2, "--learning-rate", 0.01, "--eval-every", 2]
FLAGS += ["--save-every", 2, "--weight-decay", 0.3, "--warmup-steps", 3, "--device", "cpu"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(WORDS * 12)
    (tmp_path / "-more.txt").write_text(WORDS.upper() * 5)
    tiny_folder(tmp_path / "base")
    return tmp_path


def begun(capsys, *flags, out="run"):
    """A run folder after its end, and after its newest checkpoint was taken away."""
    source = [] if "--preset" in flags else ["--model", "base"]
    argv = ["--data", "text.txt", "./-more.txt", *source, *FLAGS, *flags, "--out", out]
    result = run_here(capsys, "train", *argv)
    assert result.code == 0, result.err
    shutil.copytree(out, "ended")
    shutil.rmtree(RunFolder(Path(out)).checkpoints()[0])
    return result


def lines_of(folder, *names):
    run = RunFolder(folder)
    return [[getattr(line, name) for name in names] for line in run.read_metrics()]


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_is_the_run_that_was_never_stopped(place, capsys, kind):
    flags = KINDS[kind] + (["--preset", "nano"] if kind == "preset" else ["--max-steps", 8])
    begun(capsys, *flags)
    result = run_here(capsys, "train", "--resume", "--out", "run")
    assert result.code == 0 and "from here on" not in result.err, result.err
    names = ("step", "loss", "val_loss", "lr", "grad_norm")
    assert lines_of(place / "run", *names) == lines_of(place / "ended", *names)
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    found, expected = (read_tensors(place / name / weights)[0] for name in ("run", "ended"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before, after = (RunFolder(place / name).read_info().to_json() for name in ("ended", "run"))
    for part in ("options", "settings", "data", "model"):
        given = {**before[part]}
        if part == "options" and "--epochs" in given:
            del given["--epochs"]  # what was decided counts from there on
            given |= {name: after[part][name] for name in after[part].keys() - given.keys()}
        assert {**after[part], **given} == after[part], part


def test_flags_that_are_given_take_the_place_of_the_runs(place, capsys):
    begun(capsys, "--max-steps", 8)
    more = ["--max-steps", 10, "--learning-rate", 0.02, "--device", "auto"]
    result = run_here(capsys, "train", "--resume", "--out", "run", *more)
    assert result.code == 0, result.err
    said = [line for line in result.err.splitlines() if "from here on" in line]
    assert said == [
        "--max-steps was 8, from here on it is 10",
        "--learning-rate was 0.01, from here on it is 0.02",
    ]
    assert lines_of(place / "run", "step")[-1] == [10]
    result = run_here(capsys, "train", "--resume", "--out", "run", "--epochs", 1)
    assert result.code == 0 and "--max-steps was 10" in result.err
    options = RunFolder(place / "run").read_info().options
    assert options["--learning-rate"] == 0.02 and options["--epochs"] == 1


REFUSED = {
    "--seed 3": "--seed was 1337 in run/checkpoints/step-000006 and is 3 now",
    "--preset nano": "--preset was not given in run/checkpoints/step-000006 and is nano now",
    "--model other": "--model was base in run/checkpoints/step-000006 and is other now",
    "--document-mask": "--document-mask was False in",
    "--lora-rank 3": "--lora-rank was 0 in",
    "--val-fraction 0.3": "--val-fraction was 0.1 in",
    "--batch-size 4": "--batch-size was 3 in",
    "--data text.txt": "--data was",
    "--text-field": "--text-field lacks its value",
    "--data gone.txt": "gone.txt does not exist",
    "--out gone": "there is no folder gone: check --out",
    "--block-size 24": "--block-size is 24, the model has 23 positions",
    "--lora-alpha 3": "--lora-alpha is given without --lora-rank",
}


def test_what_may_not_differ_is_refused_and_nothing_changes(place, capsys):
    begun(capsys, "--max-steps", 8)
    shutil.copytree("base", "other")
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    for flags, message in REFUSED.items():
        out = [] if "--out" in flags else ["--out", "run"]
        result = run_here(capsys, "train", "--resume", *out, *flags.split())
        assert result.code == 2 and message in result.last_line, (flags, result.err)
        if flags.split()[0] in ("--seed", "--preset", "--model", "--lora-rank"):
            assert result.err.count("\n") == 1, "said before the text was read"
    after = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    assert after == before


def test_the_base_of_adapters_may_be_found_by_another_path(place, capsys):
    begun(capsys, "--max-steps", 4, "--lora-rank", 3)
    (place / "base").rename("moved")
    result = run_here(capsys, "train", "--resume", "--out", "run")
    assert result.code == 2 and "run.json names base, which is not here" in result.last_line
    result = run_here(capsys, "train", "--resume", "--out", "run", "--model", "moved")
    assert result.code == 0, result.err


def test_a_run_of_all_weights_goes_on_without_the_model_it_began_with(place, capsys):
    begun(capsys, "--max-steps", 4)
    shutil.rmtree("base")
    assert run_here(capsys, "train", "--resume", "--out", "run").code == 0


def test_a_text_that_is_not_here_and_a_damaged_record_are_said(place, capsys):
    begun(capsys, "--max-steps", 4)
    (place / "text.txt").rename("moved.txt")
    result = run_here(capsys, "train", "--resume", "--out", "run")
    assert result.code == 2
    assert "run/run.json names text.txt, which is not here: start where" in result.last_line
    for damage in ("{", "{}", '{"options": {"--data": 3}, "settings": 4}'):
        (place / "run" / "run.json").write_text(damage)
        result = run_here(capsys, "train", "--resume", "--out", "run")
        assert result.code == 2 and "does not say how the run was started" in result.last_line
    data = ["--data", "moved.txt", "./-more.txt", "--model", "base", *FLAGS]
    result = run_here(capsys, "train", "--resume", "--out", "run", *data, "--max-steps", 4)
    assert result.code == 0, result.err


def test_without_out_the_folder_is_that_of_the_text(place, capsys):
    argv = ["--data", "text.txt", "--model", "base", *FLAGS]
    assert run_here(capsys, "train", *argv, "--max-steps", 2).code == 0
    again = ["--data", "text.txt", "--model", "base", "--resume"]
    result = run_here(capsys, "train", *again)
    assert result.code == 0 and "nothing to do: runs/text-base is at step 2 of 2" in result.err


def test_a_run_that_was_killed_after_its_last_step_leaves_nothing_half_written(place, capsys):
    begun(capsys, "--max-steps", 4)
    shutil.rmtree(place / "run")
    (place / "ended").rename("run")
    before = {path.name for path in (place / "run").iterdir()}
    (place / "run" / ".loss.png.0123abcd.tmp").touch()
    result = run_here(capsys, "train", "--resume", "--out", "run")
    assert result.code == 0 and "nothing to do" in result.err, result.err
    assert {path.name for path in (place / "run").iterdir()} == before


def test_run_json_keeps_what_differs_from_the_defaults():
    assert described(TrainOptions(data=("a",))) == {"--data": ["a"]}
    options = TrainOptions(
        data=("a", "-b"),
        out="x",
        resume=True,
        workers=3,
        compile=True,
        text=TextConfig(duplicates="drop"),
        training=TrainConfig(max_steps=5),
    )
    expected = {"--duplicates": "drop", "--max-steps": 5, "--data": ["a", "-b"], "--compile": True}
    assert described(options) == expected
    assert json.loads(json.dumps(described(options), allow_nan=False)) == expected


@needs_c
def test_a_run_goes_on_as_it_was_computed_until_it_is_asked_for_anew(place, capsys, monkeypatch):
    def resumed(*flags):
        result = run_here(capsys, "train", "--resume", "--out", "run", *flags)
        assert result.code == 0, result.err
        return json.loads(Path("run/run.json").read_text())["settings"]["way"], result.err

    with monkeypatch.context() as patch:
        patch.setattr(c_parts, "c_trains", lambda: False)
        begun(capsys, "--max-steps", 4, "--compile")
    way, told = resumed("--max-steps", 5)  # where there is a compiler
    assert way == "16-bit dropout" and "the way of its steps" not in told
    way, told = resumed("--max-steps", 6, "--compile")
    assert way == "training in C" and "was 16-bit dropout, from here on it is training in C" in told
    assert resumed("--max-steps", 7)[0] == "training in C"
    assert resumed("--max-steps", 8, "--no-compile")[0] == "16-bit dropout"
    assert resumed("--max-steps", 9)[0] == "16-bit dropout"


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "model.safetensors", "merged"])
def test_a_disk_that_is_full_says_which_checkpoint_counts(place, capsys, monkeypatch, file):
    lora = ["--lora-rank", 3, "--merge-lora"] if file == "merged" else []
    begun(capsys, "--max-steps", 4, *lora)
    replaced = Path.replace

    def full(temporary, target):
        parts = Path(target).relative_to("run").parts
        if file in parts and "checkpoints" not in parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replaced(temporary, target)

    monkeypatch.setattr(Path, "replace", full)
    result = run_here(capsys, "train", "--resume", "--out", "run")
    assert result.code == 2 and "No space left on device (" in result.last_line, result.err
    saved = RunFolder(Path("run")).checkpoints()[0]
    assert f"{saved} is intact; make room" in result.last_line
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setenv("MINIGPT2_CACHE", str(place / "cache"))
    assert run_here(capsys, "train", "--resume", "--out", "run").code == 0
