"""A run is what is in its folder: opened, shown, sampled from and resumed by whoever has it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from minigpt2 import GPT2, InputError, Run, Tokenizer, finetune
from minigpt2.formats.tensors import read_tensors
from minigpt2.runs.folder import RunFolder
from scripts import run_here, tiny_folder
from text_files import lamp_lines

TEXTS = lamp_lines(40)
SHORT = {"max_steps": 4, "batch_size": 2, "learning_rate": 0.01, "eval_every": 2, "device": "cpu"}
SHORT |= {"workers": 1, "progress": False}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    model, tokenizer = GPT2.from_pretrained(tiny_folder(tmp_path / "model")), Tokenizer.gpt2(300)
    return finetune(model, tokenizer, texts=TEXTS, out="run", **SHORT)


def weights(folder):
    return read_tensors(Path(folder) / "model.safetensors")[0]


@pytest.mark.usefixtures("drawn_pages")
def test_it_has_the_weights_tokens_and_records_that_the_commands_read(run, capsys):
    opened = Run.open("run")
    assert opened == run and not opened.model.training and opened.model is opened.model
    assert opened.report.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert opened.metrics == RunFolder(run.folder).read_metrics()
    assert [sample.step for sample in opened.samples] == [0, 2, 4]
    flags = ["--model", "run", "--prompt", "The", "--max-new-tokens", 8, "--temperature", 0]
    ids = json.loads(run_here(capsys, "sample", *flags, "--json").out)["ids"]
    idx = torch.tensor([opened.tokenizer.encode("The")], device=opened.model.wte.weight.device)
    assert opened.model(idx)[0, -1].argmax() == ids[0]


def test_its_weights_are_the_best_not_the_newest(run):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    worse = run.resume(max_steps=8, learning_rate=5.0, progress=False)
    losses = {line.step: line.val_loss for line in worse.metrics if line.val_loss is not None}
    assert min(losses, key=losses.__getitem__) == 4 and len(losses) == 5
    best = worse.model.state_dict()
    assert all(torch.equal(best[name], before[name]) for name in before)


@pytest.mark.usefixtures("drawn_pages")
def test_a_notebook_shows_its_curve_and_its_report_in_one_piece_of_html(run):
    shown = run._repr_html_()
    assert shown.startswith("<p><b>run</b>: best at step ")
    assert "data:image/png;base64," in shown and len(shown) < 150_000
    page = re.search(r'<iframe srcdoc="([^"]*)"', shown)
    assert page and "training report" in page[1] and "<" not in page[1]
    for name in ("loss.png", "report.html"):
        (run.folder / name).unlink()
    assert run._repr_html_().count("<") == 4  # the sentence alone


def test_a_run_killed_before_its_first_checkpoint_begins_again_from_its_folder(run):
    killed = Path(shutil.copytree("run", "killed"))
    for path in [*killed.iterdir()]:
        if path.name not in ("run.json", "texts.jsonl", "base"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree("model")
    Run.open(killed).resume(progress=False)
    again, before = weights(killed), weights("run")
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_listener_that_fails_ends_the_run_which_can_go_on(run):
    def fails(metrics):
        if metrics.step == 6:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run.resume(max_steps=8, progress=fails)
    assert run.resume(progress=False).metrics[-1].step == 8  # not in use, and 8 are wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_stepz": 9}, "there is no setting max_stepz (did you mean max_steps?)"),
        ({"out": "x"}, "there is no setting out"),
        ({"seed": 9}, "seed was 1337 in run/checkpoints/step-000004 and is 9 now"),
        ({"val_fraction": "a"}, "val_fraction is 'a', allowed is a number"),
    ],
)
def test_changes_that_cannot_be_are_refused(run, changes, message):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        run.resume(**changes)
    assert message in str(caught.value)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_another_model_is_refused_by_the_name_of_the_one_that_was_in_memory(run, tmp_path):
    with pytest.raises(InputError, match=r"model was run/base in .* and is .*model now") as caught:
        run.resume(model=tmp_path / "model", max_steps=9, progress=False)
    assert "{out}" not in str(caught.value)
