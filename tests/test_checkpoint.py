"""The run folder: claimed before work starts, resumed only by the same run, damaged files named."""

import json
import os
import stat

import pytest
import torch

from minigpt2.checkpoint import RunFolder, TrainState
from minigpt2.errors import InputError, NotFoundError
from minigpt2.model import GPT2, GPT2Config
from minigpt2.optim import make_optimizer
from minigpt2.precision import Precision

FLOAT32 = Precision(torch.device("cpu"), torch.float32)
FACTS = {"--data": "abc", "--seed": 3}


def tiny():
    return GPT2(GPT2Config(vocab_size=29, block_size=7, n_embd=10, n_layer=2, n_head=2))


def saved(run, step, *, model=None, facts=FACTS):
    model = model or tiny()
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    run.save_checkpoint(TrainState(step=step), model, optimizer, FLOAT32, facts)
    return model, optimizer


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    assert RunFolder.claim(tmp_path / "a" / "b", resume=False).path.is_dir()


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="which is a file: name a folder"):
        RunFolder.claim(tmp_path / "run", resume=False)
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder.claim(tmp_path / "run" / "below", resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        RunFolder.claim(tmp_path / "run", resume=False)


def test_another_run_or_model_is_never_written_over(tmp_path):
    run = RunFolder(tmp_path)
    saved(run, 1)
    with pytest.raises(InputError, match="add --resume or choose another --out"):
        RunFolder.claim(tmp_path, resume=False)
    (tmp_path / "model").mkdir()
    tiny().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="already holds a run or a model"):
        RunFolder.claim(tmp_path / "model", resume=False)


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path):
    with pytest.raises(NotFoundError, match=f"{tmp_path} holds no checkpoint"):
        RunFolder.claim(tmp_path, resume=True)


def test_weights_optimizer_and_state_come_back_bit_for_bit(tmp_path):
    run = RunFolder(tmp_path)
    model, optimizer = saved(run, 12)
    checkpoint = run.newest(FACTS)
    assert checkpoint.state == TrainState(step=12)
    again = GPT2.from_pretrained(checkpoint.path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    restored = make_optimizer(again, learning_rate=0.5, weight_decay=0.5)
    run.load_training(checkpoint.path, restored, FLOAT32)
    before, after = optimizer.state_dict(), restored.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        assert all(
            torch.equal(value, after["state"][number][name]) for name, value in state.items()
        )


def test_the_newest_is_the_highest_step_and_older_ones_go(tmp_path):
    run = RunFolder(tmp_path)
    for step in (9, 10, 1_000_000):
        saved(run, step)
    assert [path.name for path in run.checkpoints()] == ["step-1000000"]
    (tmp_path / "checkpoints" / "step-000500").mkdir()
    assert run.newest(FACTS).path.name == "step-1000000"


def test_half_written_checkpoints_do_not_count(tmp_path):
    run = RunFolder(tmp_path)
    saved(run, 5)
    (tmp_path / "checkpoints" / "step-000006.tmp").mkdir()
    assert run.newest(FACTS).state.step == 5
    saved(run, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000006"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    saved(run, 5)

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        saved(run, 6)
    assert run.newest(FACTS).state.step == 5


@pytest.mark.parametrize("name", FACTS)
def test_another_run_is_not_resumed_and_both_values_are_named(tmp_path, name):
    run = RunFolder(tmp_path)
    saved(run, 5)
    with pytest.raises(InputError, match=f"{name} was {FACTS[name]} in .* and is other now"):
        run.newest(FACTS | {name: "other"})


@pytest.mark.parametrize("damage", [b"", b"<html>no</html>", b"PK\x03\x04 half"])
def test_a_damaged_optimizer_file_is_named(tmp_path, damage):
    run = RunFolder(tmp_path)
    _, optimizer = saved(run, 5)
    path = run.newest(FACTS).path
    (path / "training.pt").write_bytes(damage)
    with pytest.raises(InputError, match=r"training\.pt is damaged"):
        run.load_training(path, optimizer, FLOAT32)


def test_files_are_readable_by_whom_the_umask_allows(tmp_path):
    saved(RunFolder(tmp_path), 1)
    mask = os.umask(0)
    os.umask(mask)
    for path in (tmp_path / "checkpoints" / "step-000001").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


def test_metrics_survive_a_line_cut_off_by_a_crash(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    for step in range(4):
        run.log({"step": step})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "los')
    assert [line["step"] for line in run.read_metrics()] == [0, 1, 2, 3]
    run.forget_after(2)
    lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
