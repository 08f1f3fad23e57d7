"""Runs that are killed at random moments and resumed end as the run that was never stopped, bit for
bit.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from minigpt2.errors import NotFoundError
from minigpt2.runs.folder import RunFolder
from scripts import ROOT, later_wins, run_alone, tiny_folder
from text_files import lamp_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]

STEPS = 8
KILLS = 10  # of each kind of run; three kinds
TIMED = {"tokens_per_second", "seconds", "memory"}
# these differ from run to run: times, process numbers, pictures of times
NOT_COMPARED = {"metrics.jsonl", "run.json", "run.lock", "report.html", "README.md"}


class Driver:
    """Starts train.py in processes that begin at once, see kill_driver.py."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/helpers/kill_driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "MINIGPT2_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        )

    def start(self, *argv):
        """Start train.py; returns its process number."""
        task = {"argv": [str(part) for part in argv], "log": str(self.folder / "log.txt")}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit code of the process that was started last."""
        return int(self.process.stdout.readline())

    def run(self, *argv):
        self.start(*argv)
        return self.wait()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    tiny_folder(folder / "model")
    (folder / "text.txt").write_text("".join(lamp_lines(120)))
    driver = Driver(folder)
    with driver.process:
        yield driver


def flags(driver, out, *more):
    """A run that saves at every step, with dropout, accumulation and 3 evaluations."""
    settings = "--batch-size 4 --learning-rate 0.01 --dropout 0.1 --save-every 1 --eval-every 3"
    place = ["--model", driver.folder / "model", "--data", driver.folder / "text.txt", "--out", out]
    return later_wins(*place, *settings.split(), "--max-steps", STEPS, *more)


def contents(folder):
    """Every file of a run folder by its relative name; what is timed is left out of the metrics."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in NOT_COMPARED and path.suffix not in (".png", ".svg")
    }
    lines = RunFolder(folder).read_metrics()
    untimed = [replace(line, **dict.fromkeys(TIMED)) for line in lines]
    return files, untimed


def log_of(driver):
    return (driver.folder / "log.txt").read_text()


def wait_for_a_save(out, pid):
    """Come back while a checkpoint is being written, or when the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        while not is_saving(out):
            os.kill(pid, 0)


def is_saving(out):
    """Whether a checkpoint is half-written; so it stays when its writer is killed."""
    return any(out.glob("checkpoints/*.tmp"))


def lost_steps(out):
    """How many logged steps the newest checkpoint does not have."""
    logged = RunFolder(out).read_metrics()[-1:]
    try:
        saved = RunFolder(out).newest().state.step
    except NotFoundError:
        saved = -1  # it starts anew
    return logged[0].step - saved if logged else 0


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1], ids="accumulate-{}".format)
def test_killed_runs_end_as_the_run_that_was_never_stopped(driver, tmp_path, micro_batch_size):
    more = ["--micro-batch-size", micro_batch_size]
    began = time.monotonic()
    assert driver.run(*flags(driver, tmp_path / "whole", *more)) == 0, log_of(driver)
    seconds = time.monotonic() - began
    expected = contents(tmp_path / "whole")
    assert len(expected[1]) == STEPS + 1
    moments = random.Random(micro_batch_size)
    kills = n_runs = in_saves = 0
    while kills < KILLS:
        out, n_runs, resume = tmp_path / f"run{n_runs}", n_runs + 1, []
        while True:
            pid = driver.start(*flags(driver, out, *more, *resume))
            time.sleep(moments.uniform(0, 0.8 * seconds))
            if kills % 2:
                wait_for_a_save(out, pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = driver.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, log_of(driver)
            kills += 1
            in_saves += is_saving(out)
            assert lost_steps(out) <= 1
            began_before = (out / "run.json").exists() or (out / "checkpoints").exists()
            resume = ["--resume"] * began_before
        assert contents(out) == expected
    assert in_saves > 0, "no kill came while a checkpoint was written"


def test_a_run_killed_while_it_saves_first_starts_at_step_0(driver, tmp_path):
    out = tmp_path / "run"
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, runpy, signal, sys\n"
        "from minigpt2.runs import folder as checkpoint\n"
        "checkpoint._seal = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [sys.executable, killer, *flags(driver, out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in argv], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000.tmp"]
    assert driver.run(*flags(driver, out, "--resume")) == 0, log_of(driver)
    assert driver.run(*flags(driver, tmp_path / "whole")) == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_resumed_run_is_the_whole_one(driver, tmp_path, number):
    sparse = ["--save-every", 100]
    for attempt in range(5):  # a run may end before the signal comes
        out = tmp_path / f"run{attempt}"
        pid = driver.start(*flags(driver, out, *sparse))
        while not RunFolder(out).read_metrics():
            time.sleep(0.002)
        os.kill(pid, number)
        code = driver.wait()
        if code != 0:
            break
    assert code == 128 + number, log_of(driver)
    assert RunFolder(out).newest().state.step == RunFolder(out).read_metrics()[-1].step
    assert driver.run(*flags(driver, out, *sparse, "--resume")) == 0, log_of(driver)
    assert driver.run(*flags(driver, tmp_path / "whole", *sparse)) == 0
    ours, whole = contents(out), contents(tmp_path / "whole")
    assert ours[1] == whole[1]
    last = f"checkpoints/step-{STEPS:06d}/"
    assert {k: v for k, v in ours[0].items() if "step-" not in k or last in k} == {
        k: v for k, v in whole[0].items() if "step-" not in k or last in k
    }


def test_a_second_ctrl_c_ends_at_once_and_the_last_checkpoint_is_intact(driver, tmp_path):
    out = tmp_path / "run"
    pid = driver.start(*flags(driver, out, "--max-steps", 100_000))
    while len(RunFolder(out).read_metrics()) < 3:
        time.sleep(0.002)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGINT)
    assert driver.wait() == 130, log_of(driver)
    assert RunFolder(out).newest().state.step >= 1


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(driver, tmp_path):
    out = tmp_path / "run"
    pid = driver.start(*flags(driver, out, "--max-steps", 100_000))
    while len(RunFolder(out).checkpoints()) < 2:
        time.sleep(0.01)
    second = run_alone("train", *flags(driver, out, "--resume"))
    assert second.code == 2
    assert f"is in use by process {pid} on " in second.last_line
    assert os.kill(pid, 0) is None, "the first still lives"
    os.kill(pid, signal.SIGKILL)
    driver.wait()
    assert driver.run(*flags(driver, out, "--resume")) == 0, log_of(driver)


def test_a_disk_that_takes_no_more_ends_the_run_with_the_last_checkpoint_intact(driver, tmp_path):
    # weights take 39 kB, optimizer state 77 kB; no file may be longer than 60 kB
    code = "import resource, runpy, sys\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    code += "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    out = tmp_path / "run"
    ended = run_script([sys.executable, "-c", code], driver, flags(driver, out))
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step 1 could not be saved") and "step-000000 is intact" in last
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000"]
    assert RunFolder(out).newest().state.step == 0
    goes_on_as_the_whole_run(driver, out, tmp_path)


SMALL_DISK = """
set -e
mount -t tmpfs -o size=$1 tmpfs "$2"
small="$2" kept="$3"
shift 3
code=0
"$@" || code=$?
cp -a "$small/." "$kept"
exit $code
"""


@pytest.mark.parametrize("size", ["220k", "400k", "500k"])
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(driver, tmp_path, size):
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    kept.mkdir()
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh"]
    place = [size, str(small), str(kept)]
    if shutil.which("unshare") is None or subprocess.run([*alone, *place, "true"]).returncode:
        pytest.skip("this system does not let its users mount a small disk of their own")
    out = kept / "run"
    ended = run_script([*alone, *place, sys.executable], driver, flags(driver, small / "run"))
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "No space left on device" in last and " is intact; make room" in last
    assert not is_saving(out)
    assert RunFolder(out).newest().path == RunFolder(out).checkpoints()[0]
    goes_on_as_the_whole_run(driver, out, tmp_path)


def run_script(start, driver, argv):
    """Run train.py by itself in a process that `start` makes."""
    cache = str(driver.folder / "cache")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINIGPT2_CACHE": cache}
    command = [str(part) for part in [*start, ROOT / "train.py", *argv]]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def goes_on_as_the_whole_run(driver, out, tmp_path):
    """Resume a run, and compare its end with a run that was never stopped."""
    assert driver.run(*flags(driver, out, "--resume")) == 0, log_of(driver)
    assert driver.run(*flags(driver, tmp_path / "whole")) == 0, log_of(driver)
    assert contents(out) == contents(tmp_path / "whole")
