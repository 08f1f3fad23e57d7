"""The run folder: claimed before work starts, resumed only by the same run, damaged files named."""

import errno
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigpt2.errors import InputError, NotFoundError
from minigpt2.model import GPT2, GPT2Config
from minigpt2.runs import folder as checkpoint
from minigpt2.runs.folder import RunFolder
from minigpt2.runs.record import Metrics, ModelInfo, RunInfo, Sample, Settings
from minigpt2.runs.state import Facts, TrainState
from minigpt2.system import files
from minigpt2.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors

FACTS = Facts(data="abc", seed=3)


def tiny():
    return GPT2(GPT2Config(vocab_size=29, block_size=7, n_embd=10, n_layer=2, n_head=2))


def saved(run, step, *, model=None, facts=FACTS):
    model = model or tiny()
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    run.save_checkpoint(
        TrainState(step=step, best_val_loss=2.5),
        write_weights=model.save_pretrained,
        optimizer=optimizer_tensors(model, optimizer),
        scaler={},
        facts=facts,
        settings=Settings(max_steps=20),
    )
    return model, optimizer


def names(run):
    return [path.name for path in run.checkpoints()]


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    with RunFolder.claim(tmp_path / "a" / "b", resume=False) as run:
        assert run.path.is_dir()


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
    checkpoint = run.newest()
    assert checkpoint.state == TrainState(step=12, best_val_loss=2.5)
    assert (checkpoint.facts, checkpoint.settings) == (FACTS, Settings(max_steps=20))
    again = GPT2.from_pretrained(checkpoint.path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    restored = make_optimizer(again, learning_rate=0.1, weight_decay=0.1)
    load_optimizer_tensors(again, restored, checkpoint.optimizer_tensors())
    for a, b in zip(model.parameters(), again.parameters()):
        ours, theirs = optimizer.state[a], restored.state[b]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_discarded_checkpoint_is_gone_and_the_one_before_is_the_newest(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 6):
        saved(run, step)
    run.discard(6)
    run.discard(99)
    assert names(run) == ["step-000005"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


def test_the_two_highest_steps_are_kept(tmp_path):
    run = RunFolder(tmp_path)
    for step in (9, 10, 1_000_000):
        saved(run, step)
    assert names(run) == ["step-1000000", "step-000010"]


def test_steps_decide_and_not_clocks_or_pointers(tmp_path):
    run = RunFolder(tmp_path)
    saved(run, 10)
    saved(run, 11)
    os.utime(run.checkpoints()[0], (0, 0))
    (tmp_path / "checkpoints" / "latest").symlink_to("step-000010")
    (tmp_path / "checkpoints" / "latest.txt").write_text("step-000099")
    assert run.newest().state.step == 11


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_bit_flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def emptied(path):
    path.write_bytes(b"")


def an_error_page(path):
    path.write_text("<html>404</html>")


def a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [truncated, halved, one_bit_flipped, emptied, an_error_page, a_folder, os.unlink]
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, name, caplog):
    run = RunFolder(tmp_path)
    saved(run, 5)
    saved(run, 6)
    damage(tmp_path / "checkpoints" / "step-000006" / name)
    found = run.newest()
    if name == "manifest.json" and damage is truncated:
        assert found.state.step == 6  # its last line feed says nothing
        return
    assert found.state.step == 5
    # of a digit of a hash in the manifest, it is the other file that seems to be damaged
    named = "" if name == "manifest.json" and damage is one_bit_flipped else name
    assert f"step-000006 is damaged ({named}" in caplog.text
    assert caplog.text.count("going on from") == len(caplog.records) == 1


def test_a_file_that_the_disk_does_not_give_back_is_damage(tmp_path, monkeypatch, caplog):
    run = RunFolder(tmp_path)
    saved(run, 5)
    saved(run, 6)
    real = checkpoint.file_sha256

    def broken(path):
        if path.parent.name == "step-000006" and path.name == "config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(checkpoint, "file_sha256", broken)
    assert run.newest().state.step == 5
    assert "step-000006 is damaged (config.json cannot be read: Input/output error)" in caplog.text


def test_a_damaged_checkpoint_is_not_the_other_that_is_kept(tmp_path):
    run = RunFolder(tmp_path)
    saved(run, 6)
    saved(run, 7)
    one_bit_flipped(tmp_path / "checkpoints" / "step-000007" / "model.safetensors")
    assert run.newest().state.step == 6
    saved(run, 8)
    assert names(run) == ["step-000008", "step-000006"]
    saved(run, 9)
    assert names(run) == ["step-000009", "step-000008"]


def test_a_damaged_step_that_was_saved_again_is_kept_as_any_other(tmp_path):
    run = RunFolder(tmp_path)
    saved(run, 6)
    saved(run, 7)
    one_bit_flipped(tmp_path / "checkpoints" / "step-000007" / "model.safetensors")
    run.newest()
    saved(run, 7)
    saved(run, 8)
    assert names(run) == ["step-000008", "step-000007"]


def test_a_run_without_any_manifest_is_not_begun_anew(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 6):
        saved(run, step)
    for path in run.checkpoints():
        (path / "manifest.json").unlink()
    named = r"step-000006 is damaged \(manifest.json is missing\); .*step-000005 is damaged"
    with pytest.raises(NotFoundError, match=named):
        RunFolder.claim(tmp_path, resume=True)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_state_that_another_version_wrote_is_refused_by_name(tmp_path):
    run = RunFolder(tmp_path)
    saved(run, 5)
    folder = tmp_path / "checkpoints" / "step-000005"
    stored = json.loads((folder / "state.json").read_text())
    stored["state"]["unheard_of"] = 1
    (folder / "state.json").write_text(json.dumps(stored))
    (folder / "manifest.json").unlink()
    checkpoint._seal(folder)
    with pytest.raises(InputError, match="step-000005 was written by another version of minigpt2"):
        run.newest()


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e999"])
def test_a_state_with_a_number_that_json_does_not_have_is_damage(tmp_path, number, caplog):
    run = RunFolder(tmp_path)
    for step in (5, 6):
        saved(run, step)
    folder = tmp_path / "checkpoints" / "step-000006"
    text = (folder / "state.json").read_text()
    unjudged = f'"unjudged": {{"step": 6, "loss": {number}}}'
    (folder / "state.json").write_text(text.replace('"unjudged": null', unjudged))
    (folder / "manifest.json").unlink()
    checkpoint._seal(folder)
    assert run.newest().state.step == 5
    assert f"{folder} is damaged (state.json is no valid JSON: {number} is not" in caplog.text
    saved(run, 6)
    assert run.newest().state.step == 6


def test_when_all_are_damaged_each_is_named(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 6):
        saved(run, step)
        emptied(tmp_path / "checkpoints" / f"step-00000{step}" / "state.json")
    with pytest.raises(NotFoundError, match=r"step-000006 is damaged.*step-000005 is damaged"):
        run.newest()


def test_a_run_that_went_back_replaces_the_damaged_step_and_what_lay_after_it(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 6):
        saved(run, step)
    emptied(tmp_path / "checkpoints" / "step-000006" / "state.json")
    model, _ = saved(run, 6)
    assert names(run) == ["step-000006", "step-000005"]
    again = GPT2.from_pretrained(run.newest().path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    emptied(tmp_path / "checkpoints" / "step-000006" / "state.json")
    saved(run, 4)
    assert names(run) == ["step-000004"]


class Killed(BaseException):
    """The process is gone, and with it everything it would still have done."""


CALLS = ["open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "chmod"]


def cut_off(monkeypatch, call, at):
    """Call, and have the at-th use of the file system and all after it not happen; returns whether
    it came to that.
    """
    n_used = 0

    def mortal(real):
        def use(*args, **more):
            nonlocal n_used
            n_used += 1
            if n_used > at:
                raise Killed
            return real(*args, **more)

        return use

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, mortal(getattr(os, name)))
        try:
            call()
        except Killed:
            return True
    return False


def saved_quickly(run, step, text):
    run.save_checkpoint(
        TrainState(step=step, first_val_loss=float(text)),
        write_weights=lambda folder: files.write_text(folder / "weights", text),
        optimizer={"wte.weight.exp_avg": torch.ones(3)},
        scaler={},
        facts=Facts(),
        settings=Settings(),
    )


@pytest.mark.parametrize("step", [6, 7], ids=["the-same-step-again", "the-next-step"])
def test_a_save_cut_off_at_any_moment_leaves_as_many_whole_checkpoints(tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes time, and nothing dies here
    at, died = 0, True
    while died:
        at += 1
        run = RunFolder(tmp_path / str(at))
        run.path.mkdir()
        saved_quickly(run, 5, "1")
        saved_quickly(run, 6, "1")
        died = cut_off(monkeypatch, lambda run=run: saved_quickly(run, step, "2"), at)
        left = sorted(path.name for path in (run.path / "checkpoints").iterdir())
        whole = [checkpoint._whole_checkpoint(path) for path in run.checkpoints()]
        assert len(whole) >= 2, f"cut off at {at}: {left}"
        found = run.newest()
        weights = (found.path / "weights").read_text()
        assert (found.state.step, weights) in {(6, "1"), (step, "2")}
        assert found.state.first_val_loss == float(weights)
        with RunFolder.claim(run.path, resume=True):
            assert run.newest().state == found.state
            run.take_up()
            assert run.newest().state == found.state
            claimed = sorted(path.name for path in (run.path / "checkpoints").iterdir())
            assert claimed in (["step-000005", "step-000006"], ["step-000006", "step-000007"])
            saved_quickly(run, step, "2")
        assert names(run) == [f"step-{step:06d}", f"step-{step - 1:06d}"]
        assert run.newest().state.first_val_loss == 2.0
    assert at > 50, "few moments were tried"


def test_half_written_checkpoints_do_not_count_and_go_when_the_run_goes_on(tmp_path):
    run = RunFolder(tmp_path)
    saved(run, 5)
    half, none = (tmp_path / "checkpoints" / name for name in ("step-000006.tmp", "step-000007"))
    half.mkdir()
    none.mkdir()
    assert names(run) == ["step-000005"]
    assert run.newest().state.step == 5
    with RunFolder.claim(tmp_path, resume=True) as run:
        assert half.exists()  # it may be refused yet
        run.take_up()
    assert not half.exists()


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    saved(RunFolder(tmp_path), 5)
    ours = [".model.safetensors.ab3_x9zq.tmp", ".tmpAb3xZ9", ".config.json.abcdefgh.tmp"]
    theirs = ["notes.tmp", ".hidden", "tmpAb3xZ9", ".tmp"]
    for name in ours + theirs:
        (tmp_path / name).write_text("x")
    with RunFolder.claim(tmp_path, resume=True) as run:
        run.take_up()
        left = {path.name for path in tmp_path.iterdir()}
    assert not left & set(ours) and left >= set(theirs)


class Order(list):
    """What happened to files, in its order."""

    def watch(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def watched(path, *more, **options):
            self.append((name, Path(path).name))
            return real(path, *more, **options)

        monkeypatch.setattr(owner, name, watched)


def test_everything_is_on_the_disk_before_the_name_and_the_name_before_older_ones_go(
    tmp_path, monkeypatch
):
    run = RunFolder(tmp_path)
    for step in (5, 6):
        saved(run, step)
    run.log(Metrics(7))
    order = Order()
    order.watch(monkeypatch, checkpoint, "sync")
    order.watch(monkeypatch, checkpoint, "write_json")
    order.watch(monkeypatch, Path, "rename")
    order.watch(monkeypatch, checkpoint.shutil, "rmtree")
    saved(run, 7)
    renamed = order.index(("rename", "step-000007.tmp"))
    sealed = order.index(("write_json", "manifest.json"))
    before, after = order[:renamed], order[renamed + 1 :]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert ("sync", name) in order[:sealed]
    for name in ("step-000007.tmp", "metrics.jsonl", tmp_path.name):
        assert ("sync", name) in before[sealed:], "the names in folders too"
    assert after[0] == ("sync", "checkpoints")
    gone = [entry for entry in after[1:] if entry[1] != "step-000007.tmp"]
    taken, removed = ("rename", "step-000005"), ("rmtree", "step-000005.tmp")
    assert gone.index(taken) < len(gone) - 1 - gone[::-1].index(removed), "the name goes first"
    assert set(gone) == {taken, removed}


@pytest.mark.parametrize("stage", ["write_tensors", "_seal", "_put_in_place"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_save_that_fails_leaves_the_one_before_and_says_so(tmp_path, monkeypatch, stage, code):
    run = RunFolder(tmp_path)
    saved(run, 5)

    def fail(*_args, **_more):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint, stage, fail)
    with pytest.raises(InputError) as error:
        saved(run, 6)
    text = str(error.value)
    assert f"step 6 could not be saved in {tmp_path}: {os.strerror(code)} (" in text
    assert "MB are needed" in text and "MB are free" in text and "step-000005 is intact" in text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert run.newest().state.step == 5


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("a bug")], ids=repr)
def test_a_save_that_is_given_up_leaves_nothing_of_its_own(tmp_path, problem):
    run = RunFolder(tmp_path)
    saved(run, 5)

    def give_up(folder):
        (folder / "model.safetensors").write_text("half")
        raise problem

    with pytest.raises(type(problem)):
        run.save_checkpoint(
            TrainState(step=6),
            write_weights=give_up,
            optimizer={},
            scaler={},
            facts=Facts(),
            settings=Settings(),
        )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


def test_files_in_folders_are_sealed_too(tmp_path):
    def write(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text("abc")

    run = RunFolder(tmp_path)
    for step in (5, 6):
        run.save_checkpoint(
            TrainState(step=step),
            write_weights=write,
            optimizer={},
            scaler={},
            facts=Facts(),
            settings=Settings(),
        )
    assert run.newest().state.step == 6
    (tmp_path / "checkpoints" / "step-000006" / "adapter" / "weights").write_text("abd")
    assert run.newest().state.step == 5


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    saved(run, 5)
    written = sum(path.stat().st_size for path in run.checkpoints()[0].iterdir())

    def with_free(n_bytes):
        usage = shutil.disk_usage(tmp_path)._replace(free=n_bytes)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)

    with_free(written // 2)
    message = (
        r"No space left on device \(0.0 MB are needed, 0.0 MB are free\); .*step-000005 is intact"
    )
    with pytest.raises(InputError, match=message):
        saved(run, 6)
    assert names(run) == ["step-000005"]
    monkeypatch.undo()
    with_free(int(1.2 * written))
    saved(run, 6)
    assert names(run) == ["step-000006", "step-000005"]


@pytest.mark.parametrize(("name", "other"), [("data", "other"), ("seed", 5), ("model", "gpt2")])
def test_another_run_is_not_resumed_and_both_values_are_named(tmp_path, name, other):
    run = RunFolder(tmp_path)
    saved(run, 5)
    run.newest().require(FACTS)
    was = getattr(FACTS, name) or "not given"
    with pytest.raises(InputError, match=f"--{name} was {was} in .* and is {other} now"):
        run.newest().require(replace(FACTS, **{name: other}))


def test_files_are_readable_by_whom_the_umask_allows(tmp_path):
    saved(RunFolder(tmp_path), 1)
    mask = os.umask(0)
    os.umask(mask)
    for path in (tmp_path / "checkpoints" / "step-000001").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


def test_a_folder_in_use_is_refused_until_it_is_released(tmp_path):
    with RunFolder.claim(tmp_path / "run", resume=False) as run:
        with pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on \S+: wait"):
            RunFolder.claim(tmp_path / "run", resume=False)
        saved(run, 1)
    RunFolder.claim(tmp_path / "run", resume=True).release()


def test_a_refused_claim_leaves_the_folder_free(tmp_path):
    saved(RunFolder(tmp_path), 1)
    for _ in range(2):
        with pytest.raises(InputError, match="already holds a run"):
            RunFolder.claim(tmp_path, resume=False)
    assert not (tmp_path / "run.owner").exists()


def everything(folder):
    """All paths in a folder, and what the files hold."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_claim_that_comes_to_nothing_leaves_what_was_there(tmp_path):
    with RunFolder.claim(tmp_path / "runs" / "first", resume=False):
        assert (tmp_path / "runs" / "first" / "run.lock").exists()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "kept").mkdir(parents=True)
    (tmp_path / "runs" / "kept" / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    for out in ("kept", "first"):
        with RunFolder.claim(tmp_path / "runs" / out, resume=False) as run:
            run.write_info(RunInfo())
            (run.path / "checkpoints").mkdir()
    with pytest.raises(NotFoundError):
        RunFolder.claim(tmp_path / "runs" / "second", resume=True)
    assert everything(tmp_path) == before


def test_a_resume_that_is_refused_changes_nothing(tmp_path):
    saved(RunFolder(tmp_path), 5)
    for name in ("step-000006.tmp", "step-000005.old", "step-000007"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / ".tmpAb3xZ9").write_text("x")
    before = everything(tmp_path)
    with (
        pytest.raises(InputError, match="--data was"),
        RunFolder.claim(tmp_path, resume=True) as run,
    ):
        run.newest().require(replace(FACTS, data="another"))
    assert everything(tmp_path) == before


def test_a_run_that_is_over_leaves_no_lock(tmp_path):
    with RunFolder.claim(tmp_path, resume=False) as run:
        saved(run, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


CONTENDER = """
import sys, time
from pathlib import Path
from minigpt2.system.files import disown, own
lock, busy = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(300):
    if held := own(lock):
        busy.mkdir()  # fails if another one is inside
        busy.rmdir()
        disown(held)
"""


def test_a_lock_that_goes_away_is_held_by_one_process_at_a_time(tmp_path):
    command = [sys.executable, "-c", CONTENDER, tmp_path / "run.lock", tmp_path / "busy"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[1] for process in running] == [b""] * 3
    assert [*tmp_path.iterdir()] == []


def test_a_lock_file_that_was_removed_meanwhile_is_not_held(tmp_path, monkeypatch):
    path, names = tmp_path / "run.lock", []
    locked = files.lock

    def removed_between(lock_file, *, wait):
        if not names:
            path.unlink()
            path.touch()
        names.append(lock_file)
        return locked(lock_file, wait=wait)

    monkeypatch.setattr(files, "lock", removed_between)
    held = files.own(path)
    assert held is not None and len(names) == 2
    files.disown(held)


def test_a_refused_folder_is_not_swept(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / ".tmpAb3xZ9").write_text("somebody else's")
    with pytest.raises(InputError, match="already holds a run or a model"):
        RunFolder.claim(tmp_path, resume=False)
    assert (tmp_path / ".tmpAb3xZ9").exists()


def test_a_disk_that_breaks_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
    def read_only(*_args, **_more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = RunFolder.claim(tmp_path / "run", resume=False)
    with pytest.raises(InputError, match="what went wrong"), run:
        monkeypatch.setattr(Path, "unlink", read_only)
        raise InputError("what went wrong")
    monkeypatch.undo()
    RunFolder.claim(tmp_path / "run", resume=False).release()


def test_a_file_system_that_cannot_lock_is_refused(tmp_path, monkeypatch):
    def cannot(_lock):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoint.Lock, "acquire", cannot)
    with pytest.raises(InputError, match="cannot be locked: No locks available"):
        RunFolder.claim(tmp_path / "run", resume=False)


def test_a_run_that_died_before_its_first_checkpoint_may_be_resumed(tmp_path, caplog):
    caplog.set_level("INFO")
    run = RunFolder(tmp_path)
    run.write_info(RunInfo())
    with pytest.raises(InputError, match="already holds a run"):
        RunFolder.claim(tmp_path, resume=False)
    with RunFolder.claim(tmp_path, resume=True) as run:
        assert run.checkpoints() == []
    assert "starting at step 0" in caplog.text


@pytest.mark.parametrize("left", ["metrics", "weights"])
def test_a_run_whose_checkpoints_were_deleted_is_not_begun_anew(tmp_path, left):
    run = RunFolder(tmp_path)
    run.write_info(RunInfo())
    if left == "metrics":
        run.log(Metrics(220))
    else:
        tiny().save_pretrained(tmp_path)
    with pytest.raises(NotFoundError, match="holds no checkpoint"):
        RunFolder.claim(tmp_path, resume=True)


def test_metrics_survive_lines_cut_off_by_a_crash_or_a_full_disk(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    for step in range(3):
        run.log(Metrics(step))
    with run.metrics_path.open("a") as file:
        file.write('{"step": 3, "los')
    run.log(Metrics(4))
    run.log_sample(Sample(4, "The", " sea"))
    assert [line.step for line in run.read_metrics()] == [0, 1, 2, 4]
    run.forget_after(2)
    lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert run.read_samples() == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_metrics_that_are_no_numbers_are_read_as_nan_and_rewritten_as_json(tmp_path, number):
    run = RunFolder(tmp_path)
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    run.metrics_path.write_text(text.replace("null", number) + f'{{"step": {number}}}\n')
    metrics = [Metrics(1, 2.5), Metrics(2, math.nan), Metrics(3, 1.5)]
    assert run.read_metrics() == metrics
    run.forget_after(2)
    assert run.metrics_path.read_text().startswith('{"step": 1, "loss": 2.5}\n{"step": 2, "loss"')
    assert number not in run.metrics_path.read_text()
    assert run.read_metrics() == metrics[:2]


@pytest.mark.parametrize("partly", [False, True])
def test_a_log_that_cannot_be_written_never_stops_training_and_warns_once(
    tmp_path, monkeypatch, caplog, partly
):
    run = RunFolder(tmp_path)
    real = checkpoint._append_line

    def full(path, line):
        if partly:
            real(path, line)
            path.write_bytes(path.read_bytes()[:-3])
        raise OSError(errno.ENOSPC, "No space left on device")

    run.log(Metrics(0))
    monkeypatch.setattr(checkpoint, "_append_line", full)
    run.log(Metrics(1))
    run.log(Metrics(2))
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    monkeypatch.setattr(checkpoint, "_append_line", real)
    run.log(Metrics(3))
    assert [line.step for line in run.read_metrics()] == [0, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_met_with_one_warning_until_it_takes_lines_again(
    tmp_path, monkeypatch, caplog
):
    real, run = checkpoint.open_no_link, RunFolder(tmp_path)

    def full(path, flags):
        return os.open("/dev/full", flags)

    monkeypatch.setattr(checkpoint, "open_no_link", full)
    run.log(Metrics(1))
    run.log(Metrics(2))
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    monkeypatch.setattr(checkpoint, "open_no_link", real)
    run.log(Metrics(3))
    assert run.read_metrics() == [Metrics(3)]
    monkeypatch.setattr(checkpoint, "open_no_link", full)
    run.log(Metrics(4))
    assert len(caplog.records) == 2, "a new fault is a new warning"


@pytest.mark.parametrize("leads", ["to something", "to nothing"])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "samples.jsonl",
        "run.lock",
        "checkpoints",
        "tensorboard",
        "merged",
        "base",
        "texts.jsonl",
        "checkpoints/step-000009",
        "checkpoints/step-000009.tmp",
    ],
)
def test_a_run_folder_that_leads_elsewhere_by_a_link_is_refused(tmp_path, name, resume, leads):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    saved(RunFolder(run), 3)
    if leads == "to something":
        (elsewhere if "." not in name else tmp_path).mkdir(exist_ok=True)
    if name == "checkpoints":
        (run / name).rename(tmp_path / "aside")
    (run / name).symlink_to(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    message = f"has a link in it, {name} to {elsewhere}, and a run writes nothing through links"
    with pytest.raises(InputError, match=message):
        RunFolder.claim(run, resume=resume)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_takes_the_place_of_a_link_or_leaves_it_alone_is_no_reason_to_refuse(tmp_path):
    run = tmp_path / "run"
    saved(RunFolder(run), 3)
    for name in ("run.json", "run.owner", "report.html", "checkpoints/latest"):
        (run / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "by link").symlink_to(run)
    with RunFolder.claim(tmp_path / "by link", resume=True) as claimed:
        claimed.write_info(RunInfo())
    assert not (tmp_path / "elsewhere").exists() and not claimed.info_path.is_symlink()


@pytest.mark.parametrize(
    "write", [lambda run: run.log(Metrics(1)), lambda run: run.log_sample(Sample(1, "", ""))]
)
def test_a_link_that_is_made_later_is_not_written_through(tmp_path, write, caplog):
    run, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    run.path.mkdir()
    for path in (run.metrics_path, run.samples_path):
        path.symlink_to(elsewhere)
    write(run)
    assert not elsewhere.exists()
    assert "cannot be written" in caplog.text and "training goes on" in caplog.text


def test_what_the_run_was_started_with_comes_back_and_damage_is_nothing(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_info() is None
    run.write_info(info := RunInfo(model=ModelInfo(source="gpt2")))
    assert run.read_info() == info
    run.info_path.write_text("{")
    assert run.read_info() is None


def test_state_json_is_read_once_to_take_up_a_checkpoint(tmp_path, monkeypatch):
    run, read, real = RunFolder(tmp_path), [], checkpoint.read_json
    saved(run, 5)
    monkeypatch.setattr(checkpoint, "read_json", lambda path: read.append(path.name) or real(path))
    run.newest()
    assert read == ["manifest.json", "state.json"]
