"""Several processes are one run: the same rows, losses and weights, and a clean ending."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.errors import InputError
from minigpt2.model import GPT2
from minigpt2.runs.folder import RunFolder
from minigpt2.system.processes import ALONE, World, part_like, whole, world_from
from scripts import ROOT, later_wins, run_alone, tiny_folder
from text_files import lamp_lines

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}


@given(st.integers(1, 30), st.integers(1, 9))
def test_every_row_belongs_to_exactly_one_process_and_all_have_as_many(n_rows, size):
    idx = torch.arange(n_rows * 3).view(n_rows, 3)
    shares = [World(rank, size).share((idx, idx + 1)) for rank in range(size)]
    assert len({part.shape for share in shares for part in share}) == 1
    scored = torch.cat([idx[targets[:, 0] >= 0] for idx, targets in shares])
    assert torch.equal(scored, idx)
    for rank, (part, targets) in enumerate(shares):
        first = World(rank, size).rows(n_rows).start
        real = targets[:, 0] >= 0
        assert torch.equal(part[real], idx[first : first + len(part)])
        assert (targets[~real] == -100).all() and not part[~real].any()


def test_one_process_keeps_everything_and_gathers_itself():
    batch = torch.arange(6).view(2, 3), torch.arange(6).view(2, 3)
    assert all(torch.equal(a, b) for a, b in zip(ALONE.share(batch), batch))
    assert ALONE.gather("x") == ["x"] and ALONE.is_main
    with ALONE.main_first():
        pass


def test_a_plain_tensor_is_whole_already():
    value = torch.arange(3.0)
    assert whole(value) is value
    assert torch.equal(part_like(value, torch.zeros(3)), value)


def test_torchruns_variables_say_who_this_is():
    assert world_from({}) == ALONE
    assert world_from({"MASTER_ADDR": "left over"}) == ALONE
    assert world_from(TORCHRUN | ADDRESS) == World(1, 3, 1)
    assert not world_from(TORCHRUN | ADDRESS).is_main


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name):
    environment = TORCHRUN | ADDRESS
    del environment[name]
    with pytest.raises(InputError, match=f"and {name} is not: start the processes with torchrun"):
        world_from(environment)


@pytest.mark.parametrize("wrong", [{"RANK": "3"}, {"RANK": "one"}, {"LOCAL_RANK": "-1"}])
def test_variables_that_make_no_sense_are_named(wrong):
    with pytest.raises(InputError, match="makes no sense: start the processes with torchrun"):
        world_from(TORCHRUN | ADDRESS | wrong)


def test_half_set_variables_end_the_script_with_one_line(tmp_path):
    (tmp_path / "text.txt").write_text("The sea.")
    done = run_alone("train", "--data", tmp_path / "text.txt", "--out", tmp_path / "run", RANK="0")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.last_line.startswith("error: RANK is set and WORLD_SIZE, LOCAL_RANK")
    assert not (tmp_path / "run").exists()


IN_TURN = """
import os, sys, torch
from pathlib import Path
from minigpt2.system.processes import join, replicate, world_from
from minigpt2.errors import InputError
world, failing = world_from(os.environ), int(sys.argv[1])
try:
    with join(world, torch.device("cpu")):
        with world.main_first():
            print("prepares", flush=True)
            if world.rank == failing:
                raise InputError("there is no text")
        print("goes on", flush=True)
        replicate(torch.nn.Linear(2, 2), torch.device("cpu"))(torch.ones(1, 2)).sum().backward()
    for name in Path("/proc/self/task").glob("*/comm"):  # on Linux
        if "gloo" in name.read_text():
            print("leaves a thread")
except InputError as problem:
    print(problem)
"""


@pytest.mark.parametrize("failing", [0, 1, -1])
def test_a_process_that_fails_in_its_turn_ends_the_others_with_a_line_and_else_no_thread_is_left(
    failing,
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TURN, str(failing)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    own = "there is no text"
    other = "another process of this run has failed: its own message says why"
    assert (
        said
        == {
            0: [["prepares", own], [other]],
            1: [["prepares", other], ["prepares", own]],
            -1: [["prepares", "goes on"]] * 2,
        }[failing]
    )


STEPS = 6
FLAGS = ["--max-steps", STEPS, "--batch-size", 4, "--micro-batch-size", 2, "--learning-rate", 0.01]
FLAGS += ["--eval-every", 2, "--save-every", 3, "--dropout", 0.1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model, a text, and `whole`: the run of one process."""
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model")
    (folder / "text.txt").write_text("".join(lamp_lines(120)))
    done = run_alone("train", *flags_of(folder, folder / "whole"), **environment(folder))
    assert done.code == 0, done.err
    return folder


def flags_of(base, out, *more):
    place = ["--model", base / "model", "--data", base / "text.txt", "--out", out]
    return later_wins(*place, *FLAGS, *more)


def environment(base):
    return {"MINIGPT2_CACHE": str(base / "cache"), "OMP_NUM_THREADS": "1"}


def start(base, out, *more, processes=2):
    """train.py under torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    run += ["--master-port", 0, "--standalone"]
    argv = [str(part) for part in [*run, ROOT / "train.py", *flags_of(base, out, *more)]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, env={**os.environ, **environment(base)}, **pipes)


def train_together(base, out, *more, processes=2):
    process = start(base, out, *more, processes=processes)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return err


def losses(folder):
    lines = RunFolder(folder).read_metrics()
    return [(line.step, line.loss, line.val_loss) for line in lines]


def assert_same_run(folder, whole_run):
    assert len(losses(folder)) == STEPS + 1
    for got, expected in zip(losses(folder), losses(whole_run)):
        assert got == pytest.approx(expected, abs=2e-5)
    for place in ("", "checkpoints/step-000006"):
        ours, theirs = (GPT2.from_pretrained(run / place) for run in (folder, whole_run))
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one_and_their_run_resumes_in_one(base, tmp_path, more):
    err = train_together(base, tmp_path / "two", *more)
    assert err.count("in each of 2 processes") == 1, "only the main process speaks"
    assert_same_run(tmp_path / "two", base / "whole")
    forget_the_end(tmp_path / "two")
    done = run_alone("train", *flags_of(base, tmp_path / "two", "--resume"), **environment(base))
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "two", base / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_a_run_of_one_process_resumes_in_two(base, tmp_path, more):
    shutil.copytree(base / "whole", tmp_path / "run")
    forget_the_end(tmp_path / "run")
    train_together(base, tmp_path / "run", "--resume", *more)
    assert_same_run(tmp_path / "run", base / "whole")


def forget_the_end(folder):
    shutil.rmtree(folder / "checkpoints" / "step-000006")


def long_run(base, out):
    """A run under torchrun that has just saved a checkpoint and would go on for long."""
    process = start(base, out, "--max-steps", 100_000, "--eval-every", 1000)
    deadline = time.monotonic() + 120
    while not any(path.name != "step-000000" for path in RunFolder(out).checkpoints()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    return process


def workers(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_one_dead_process_ends_all_and_the_checkpoint_is_intact(base, tmp_path):
    process = long_run(base, tmp_path / "run")
    both = workers(process)
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
    assert "another process of this run has ended" in err or "SIGTERM" in err
    assert RunFolder(tmp_path / "run").newest().state.step > 0


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_the_run_goes_on(base, tmp_path):
    process = long_run(base, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    launcher = r"(torchrun|\S+ -m torch.distributed.run) --nproc-per-node=2"
    assert re.search(f"everything is saved, go on with: {launcher} .* --resume --out .*\n", err)
    state = RunFolder(tmp_path / "run").newest().state
    assert state.step == len(RunFolder(tmp_path / "run").read_metrics()) - 1
