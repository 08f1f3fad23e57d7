"""`finetune` is train.py as a function: the same weights, from whatever is in memory, and a run
that goes on in another process; and it leaves the program that calls it alone.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minigpt2
from minigpt2 import GPT2, InputError, NotFoundError, Run, Tokenizer, finetune
from minigpt2.finetuning.run import in_arguments
from minigpt2.formats.tensors import read_tensors
from minigpt2.runs.folder import RunFolder
from minigpt2.runs.kept import BASE, TEXTS
from minigpt2.system.signals import MOMENT
from minigpt2.training import loop
from scripts import run_alone, run_here, tiny_folder
from text_files import lamp_lines

LAMPS = lamp_lines(60)
SHORT = {"max_steps": 6, "batch_size": 3, "micro_batch_size": 2, "learning_rate": 0.01}
SHORT |= {"eval_every": 3, "save_every": 2, "dropout": 0.1, "device": "cpu", "workers": 1}
LORA = {"lora_rank": 3, "lora_alpha": 5.0, "merge_lora": True}
TIMED = dict.fromkeys(("tokens_per_second", "seconds", "memory"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    Path("lamps.txt").write_text("".join(LAMPS))
    Path("lamps.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in LAMPS))
    tiny_folder(tmp_path / "model")
    return tmp_path


def flags(settings):
    """Settings as they are typed."""
    for name, value in settings.items():
        word = "--" + name.replace("_", "-")
        yield from [word] if value is True else [word, value]


def weights(run):
    """All weight files of a run's folder, those of the newest checkpoint among them."""
    folder = Path(getattr(run, "folder", run))
    newest = RunFolder(folder).checkpoints()[0]
    found = [*folder.glob("*.safetensors"), *newest.glob("*.safetensors")]
    found += folder.glob("merged/*.safetensors")
    return {path.relative_to(folder).as_posix(): read_tensors(path)[0] for path in found}


def assert_equal_runs(first, second):
    """Bit for bit: weights, optimizer, what was measured and what was written."""
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys() and len(one) >= 3
    for name in one:
        assert one[name].keys() == two[name].keys()
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name]), name
    told = [
        [replace(line, **TIMED) for line in Run.open(getattr(run, "folder", run)).metrics]
        for run in (first, second)
    ]
    assert told[0] == told[1] and len(told[0]) > 1
    assert (
        Run.open(getattr(first, "folder", first)).samples
        == Run.open(getattr(second, "folder", second)).samples
    )


@pytest.mark.usefixtures("drawn_pages")
def test_it_is_the_command_of_equal_settings_in_a_process_of_its_own(place):
    words = ["--data", "lamps.txt", "--model", "model", "--out", "typed", *flags(SHORT)]
    typed = run_alone("train", *words, cwd=place)
    assert typed.code == 0, typed.err
    run = finetune("model", data="lamps.txt", out="called", **SHORT)
    assert_equal_runs(run, "typed")
    before, after = (RunFolder(Path(name)).read_info() for name in ("typed", "called"))
    for part in ("options", "settings", "data", "model", "memory"):
        assert getattr(before, part) == getattr(after, part), part
    assert {p.name for p in Path("typed").iterdir()} == {p.name for p in Path("called").iterdir()}
    assert after.sessions[0].command.startswith("minigpt2.finetune('model', data=['lamps.txt'], ")


@pytest.mark.parametrize(
    "settings",
    [
        LORA,
        {"preset": "nano", "block_size": 16},
        {"preset": "nano", "block_size": 16, "train_vocabulary": True, "vocab_size": 270},
    ],
    ids=["lora", "preset", "own vocabulary"],
)
def test_it_is_the_command_with_adapters_and_from_random_weights(place, capsys, settings):
    settings = SHORT | settings
    source = () if "preset" in settings else ("--model", "model")
    words = ["--data", "lamps.txt", *source, "--out", "typed", *flags(settings)]
    assert run_here(capsys, "train", *words).code == 0
    run = finetune("model" if source else None, data="lamps.txt", out="called", **settings)
    assert_equal_runs(run, "typed")
    assert run.model.wte.weight.isfinite().all()


def test_the_folder_without_out_is_the_commands(place):
    run = finetune(Path("model"), data=["lamps.txt"], **SHORT | {"max_steps": 1}, progress=False)
    assert run.folder == Path("runs/lamps-model")
    run = finetune("model", texts=LAMPS, **SHORT | {"max_steps": 1}, progress=False)
    assert run.folder == Path("runs/texts-model")


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_a_model_in_memory_is_its_saved_folder_and_stays_as_it_is(place, settings):
    model, tokenizer = GPT2.from_pretrained("model"), Tokenizer.from_pretrained("model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = SHORT | settings
    run = finetune(model, tokenizer, "lamps.txt", out="called", progress=False, **settings)
    saved = finetune("model", data="lamps.txt", out="saved", progress=False, **settings)
    assert_equal_runs(run, saved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_tokenizer_beside_a_folder_takes_the_place_of_the_folders(place):
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        Path("model", name).unlink()
    with pytest.raises(InputError):
        finetune("model", data="lamps.txt", out="bare", **SHORT)
    run = finetune("model", Tokenizer.gpt2(300), "lamps.txt", out="run", progress=False, **SHORT)
    assert run.tokenizer.identity == Tokenizer.gpt2(300).identity


def test_texts_are_the_file_that_holds_them_and_a_generator_is_read_once(place):
    asked = []

    def generator():
        for text in LAMPS:
            asked.append(text)
            yield text

    run = finetune("model", texts=generator(), out="called", progress=False, **SHORT)
    assert asked == LAMPS
    assert_equal_runs(
        run, finetune("model", data="lamps.jsonl", out="rows", progress=False, **SHORT)
    )
    one = finetune("model", texts="".join(LAMPS), out="one", progress=False, **SHORT)
    assert_equal_runs(one, finetune("model", data="lamps.txt", out="file", progress=False, **SHORT))


def interrupt():
    """Ctrl-C, in the thread that trains: the main thread is given the time to see it."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2 * MOMENT)


class Interrupted:
    """Ctrl-C, so many times, after a step; and the handlers seen meanwhile."""

    def __init__(self, step, times=1):
        self.step, self.times, self.handlers = step, times, set()

    def __call__(self, metrics):
        self.handlers.add(signal.getsignal(signal.SIGINT))
        if metrics.step == self.step:
            for _ in range(self.times):
                interrupt()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_an_interrupt_saves_the_step_and_the_run_goes_on_from_its_folder_alone(place, settings):
    settings, times = SHORT | settings, 1 if settings else 3
    source = (GPT2.from_pretrained("model"), Tokenizer.from_pretrained("model"))
    whole = finetune(*source, texts=LAMPS, out="whole", progress=False, **settings)
    stop = Interrupted(3, times)
    with pytest.raises(KeyboardInterrupt, match=r"Run\.open\('stopped'\)\.resume\(\) goes on"):
        finetune(*source, texts=iter(LAMPS), out="stopped", progress=stop, **settings)
    assert stop.handlers == {signal.getsignal(signal.SIGINT)}
    assert RunFolder(Path("stopped")).checkpoints()[0].name == "step-000003"
    shutil.rmtree("model")
    if settings.get("lora_rank"):
        assert_equal_runs(whole, Run.open("stopped").resume(progress=False))
        return
    Path("elsewhere").mkdir()
    moved = Path("stopped").rename("elsewhere/moved")
    code = "import sys, minigpt2; print(minigpt2.Run.open(sys.argv[1]).resume().metrics[-1].step)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(moved.resolve())],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6\n" and "from here on" not in done.stderr
    assert_equal_runs(whole, moved)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_while_the_last_step_is_judged_leaves_that_to_the_run_that_goes_on(
    place, monkeypatch
):
    whole = finetune("model", data="lamps.txt", out="whole", progress=False, **SHORT)
    real, evaluation = loop.mean_loss, iter(range(3))

    def interrupted(scorer, batches, *more):
        if next(evaluation) == 2:
            interrupt()
        return real(scorer, batches, *more)

    monkeypatch.setattr(loop, "mean_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune("model", data="lamps.txt", out="stopped", progress=False, **SHORT)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert Run.open("stopped").metrics[-1].step == 5
    assert_equal_runs(Run.open("stopped").resume(progress=False), whole)


def test_changes_go_on_as_flags_beside_resume_do(place, capsys, caplog):
    run = finetune("model", data="lamps.txt", out="run", progress=False, **SHORT)
    shutil.copytree("run", "typed")
    before = run.model
    longer = run.resume(max_steps=8, learning_rate=0.02)
    assert run.model is not before and torch.equal(run.model.wte.weight, longer.model.wte.weight)
    assert "max-steps was 6, from here on it is 8" in caplog.text
    words = ["--resume", "--out", "typed", "--max-steps", 8, "--learning-rate", 0.02]
    assert run_here(capsys, "train", *words).code == 0
    assert_equal_runs(longer, "typed")
    assert longer.resume(progress=False).metrics == longer.metrics  # nothing is left to do
    command = RunFolder(run.folder).read_info().sessions[1].command
    assert command == "minigpt2.Run.open('run').resume(max_steps=8, learning_rate=0.02)"


REFUSED = {  # the call, and what is said
    "max_step": (lambda: finetune("model", data="lamps.txt", max_step=1), "did you mean max_steps"),
    "resume": (lambda: finetune("model", data="lamps.txt", resume=True), "no setting resume"),
    "neither": (lambda: finetune("model"), "data and texts are both missing: give one of them"),
    "both": (lambda: finetune("model", data="lamps.txt", texts=LAMPS), "both given: choose one"),
    "no path": (lambda: finetune("model", data=3), "data is 3, allowed is a path, or several"),
    "no text": (lambda: finetune("model", texts=["a", 5]), "texts holds 5, allowed are texts"),
    "no texts": (lambda: finetune("model", texts=()), "texts is empty: give at least one text"),
    "empty texts": (lambda: finetune("model", texts=["", ""]), "texts holds empty texts alone"),
    "a text": (lambda: finetune("model", data="The sea. " * 99), "a text itself is given as texts"),
    "lines": (lambda: finetune("model", data="A lamp.\nA sea."), "a text itself is given as texts"),
    "out": (lambda: finetune("model", data="lamps.txt", out=4), "out is 4, allowed is a folder"),
    "a preset": (lambda: finetune("nano", data="lamps.txt"), "is a preset: give it as preset"),
    "of none": (lambda: Run.open(None), "folder is None, allowed is the folder of a run"),
    "a flag": (lambda: finetune("model", data="lamps.txt", fsdp=True), "fsdp shares a model"),
    "texts 5": (lambda: finetune("model", texts=5), "texts is 5, allowed is texts, one or many"),
    "no tokenizer": (lambda: finetune(GPT2.from_pretrained("model"), data="lamps.txt"),
                     "tokenizer is missing: a model in memory comes without one"),
    "tokenizer": (lambda: finetune("model", "gpt2", "lamps.txt"), "allowed is a Tokenizer"),
    "misfit": (lambda: finetune("model", Tokenizer.gpt2(), "lamps.txt"),
               "50257 ids, the model 300"),
    "preset": (lambda: finetune("model", data="lamps.txt", preset="nano"), "both given: choose"),
    "preset's": (lambda: finetune(None, Tokenizer.gpt2(), "lamps.txt", preset="nano"),
                 "tokenizer is given with preset, which has its own"),
    "model": (lambda: finetune(5, data="lamps.txt"), "model_or_folder is 5"),
    "value": (lambda: finetune("model", data="lamps.txt", batch_size=0), "batch_size is 0"),
    "kind": (lambda: finetune("model", data="lamps.txt", device=3), "device is 3, allowed is a"),
    "progress": (lambda: finetune("model", data="lamps.txt", progress=3), "progress is 3"),
    "packed": (lambda: finetune(minigpt2.load("model", device="cpu"), Tokenizer.gpt2(300),
                                "lamps.txt"), "this model was changed"),
}  # fmt: skip
NOT_THERE = {
    "data": (lambda: finetune("model", data="none.txt"), "none.txt does not exist"),
    "folder": (lambda: finetune("./modal", data="lamps.txt"), "modal"),
    "run": (lambda: Run.open("nowhere"), "there is no folder nowhere"),
    "no run": (lambda: Run.open("model"), "model holds no run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_a_value_error_and_nothing_stays(place, name):
    there = sorted(place.rglob("*"))
    call, message = REFUSED[name]
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    left = [path for path in place.rglob("*") if "cache" not in path.parts[len(place.parts) :]]
    assert sorted(left) == there


@pytest.mark.parametrize("name", NOT_THERE)
def test_what_is_not_there_is_a_file_not_found_error(place, name):
    call, message = NOT_THERE[name]
    with pytest.raises(FileNotFoundError) as caught:
        call()
    assert isinstance(caught.value, NotFoundError) and message in str(caught.value)


def test_errors_of_a_run_are_the_commands_with_arguments_in_the_place_of_flags(place, capsys):
    finetune("model", data="lamps.txt", out="run", progress=False, **SHORT)
    told = []
    for call in (
        lambda: finetune("model", data="lamps.txt", out="run", **SHORT),
        lambda: Run.open("run").resume(seed=3),
        lambda: Run.open("run").resume(data="lamps.jsonl"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        told.append(str(caught.value))
    words = ["--data", "lamps.txt", "--model", "model", "--out", "run"]
    for message, more in zip(
        told,
        (
            words,
            ["--resume", *words, "--seed", 3],
            ["--resume", "--out", "run", "--data", "lamps.jsonl"],
        ),
    ):
        result = run_here(capsys, "train", *more)
        told_by_command = result.last_line.removeprefix("error: ")
        with pytest.raises(InputError) as caught, in_arguments():
            raise InputError(told_by_command)
        assert (result.code, str(caught.value)) == (2, message)
        assert "--" in told_by_command and "--" not in message
    assert told[0].endswith("go on with Run.open(out).resume() or choose another out")


def test_errors_keep_their_kind_and_paths_that_look_like_flags():
    with pytest.raises(NotFoundError) as caught, in_arguments():
        raise NotFoundError("--val-data x--data/--out/a.--out: check --lora-rank")
    assert str(caught.value) == "val_data x--data/--out/a.--out: check lora_rank"


def test_an_error_in_the_callers_texts_is_the_callers_and_their_files_are_safe(place):
    def broken():
        yield LAMPS[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        finetune("model", texts=broken(), out="new/run", **SHORT)
    assert not Path("new").exists()
    Path("mine").mkdir()
    for name in (TEXTS, BASE):
        Path("mine", name).write_text("my own")
    source = (GPT2.from_pretrained("model"), Tokenizer.from_pretrained("model"))
    for call in (
        lambda: finetune("model", texts=LAMPS, out="mine", **SHORT),
        lambda: finetune(*source, "lamps.txt", out="mine", **SHORT),
        lambda: finetune("model", data=Path("mine", TEXTS), out="mine", val_fraction=2),
        lambda: finetune("model", data=Path("mine", TEXTS), out="mine", block_size=99),
    ):
        with pytest.raises(InputError):
            call()
        assert {p.name: p.read_text() for p in Path("mine").iterdir()} == {
            TEXTS: "my own",
            BASE: "my own",
        }


def test_what_a_killed_start_left_does_not_keep_the_call_from_being_made_again(place):
    Path("run/base").mkdir(parents=True)
    Path("run/run.owner").write_text("process 1 on nowhere")
    Path("run/texts.jsonl").write_text('{"te')
    source = (GPT2.from_pretrained("model"), Tokenizer.from_pretrained("model"))
    run = finetune(*source, texts=LAMPS, out="run", progress=False, **SHORT | {"max_steps": 1})
    assert run.metrics[-1].step == 1


def state_of_the_program():
    root, ours = logging.getLogger(), logging.getLogger("minigpt2")
    loggers = [(log.level, log.propagate, list(log.handlers), log.disabled) for log in (root, ours)]
    signals = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return loggers, signals, sys.stdout, sys.stderr, torch.get_rng_state().tolist()


@pytest.fixture
def quiet_logging(monkeypatch):
    """The root logger as a program has it that never asked for anything."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    logging.getLogger("minigpt2").manager._clear_cache()


def test_the_program_is_left_alone_and_progress_is_the_callers(place, capfd, quiet_logging):
    before = state_of_the_program()
    seen = []
    for progress in (True, False, seen.append):
        run = finetune(
            "model",
            data="lamps.txt",
            out=f"run{progress is True}{bool(progress)}",
            progress=progress,
            **SHORT,
        )
        out, err = capfd.readouterr()
        assert out == "" and state_of_the_program() == before
        assert ("step      6 | loss" in err and "best at step" in err) == (progress is True), err
        assert progress is True or err == "" or "note" in err
    assert seen == run.metrics and [line.step for line in seen] == [*range(7)]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR])
def test_notices_that_the_programs_own_logging_shows_are_shown_once(
    place, capfd, quiet_logging, level
):
    for handlers in ([], [logging.StreamHandler(sys.stderr)]):
        logging.getLogger().handlers = handlers
        logging.getLogger().setLevel(level)
        more = {"max_steps": 2, "document_mask": True}
        finetune("model", data="lamps.txt", out=f"run{len(handlers)}", **SHORT | more)
        err = capfd.readouterr().err
        assert err.count("parameters on cpu") == 1
        assert err.count("--document-mask changes nothing") == 1
