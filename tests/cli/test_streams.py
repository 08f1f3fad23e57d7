"""Streams that are closed, full or read by nobody, and signals at bad moments: a message that is
not written ends nothing, a result that cannot be written is told, and a signal ends the run.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import warm
from scripts import ROOT, tiny_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX streams and signals")

TEXT = "the lamp of a small ship went out over dark water and nobody saw it again. " * 40
TRAIN = "train.py --data text.txt --model model --out {out} --max-steps 4 --batch-size 2"
COMMANDS = {
    "train": TRAIN + " --eval-every 2 --save-every 2",
    "sample": "sample.py --model model --prompt lamp --max-new-tokens 3",
    "samples": "sample.py --model model --prompt lamp --max-new-tokens 3 --json --num-samples 3",
    "convert": "convert_weights.py model {out}",
    "corpus": "-m minigpt2.corpus text.txt --model model",
    "evaluate": "-m minigpt2 evaluate --model model --data text.txt",
    "explain": "-m minigpt2 explain --model model --prompt lamp --out {out}.html",
    "help": "train.py --help",
    "version": "sample.py --version",
    "interactive": "sample.py --model model --interactive --max-new-tokens 3",
    "prompt -": "sample.py --model model --prompt - --max-new-tokens 3",
    "data -": "train.py --data - --model model --out {out}",
    "refused": "train.py --nothing",
    "no run": "-m minigpt2 report nowhere",
}
STREAMS = {
    "nothing": "",
    "stdin closed": "<&-",
    "stdout closed": ">&-",
    "stdout full": ">/dev/full",
    "stdout gone": "> >(exec true)",
    "stderr closed": "2>&-",
    "stderr full": "2>/dev/full",
    "stderr gone": "2> >(exec true)",
    "all closed": "<&- >&- 2>&-",
}
RESULTS = ("sample", "samples", "corpus", "evaluate", "help", "version", "interactive", "prompt -")
SIGNALLED = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def expected(command: str, streams: str) -> int:
    """The exit code."""
    if command in ("refused", "no run"):
        return 2
    if command in ("interactive", "prompt -", "data -") and streams in (
        "stdin closed",
        "all closed",
    ):
        return 2
    unwritten = ("stdout closed", "stdout full", "all closed")
    return 2 if command in RESULTS and streams in unwritten else 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    tiny_folder(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def environment(place: Path) -> dict[str, str]:
    own = {"MINIGPT2_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def words(command: str, out: str = "out", *, python: Sequence[str] = ()) -> list[str]:
    script, *argv = command.format(out=out).split()
    place = script if script == "-m" else str(ROOT / script)
    return [*(python or warm.python()), place, *argv]


def ended(place: Path, name: str, streams: str) -> tuple[int, str, Path]:
    """How a command ends on such streams: its exit code, what was to be seen, its folder."""
    out = f"{name} {streams}".replace(" ", "_")
    # a reader that is gone must be gone before something is written
    line = f"sleep 0.2; exec {shlex.join(words(COMMANDS[name], out))} {STREAMS[streams]}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=place,
        env=environment(place),
        input=b"lamp\n" if name != "data -" else TEXT.encode(),
        capture_output=True,
        timeout=200,
    )
    return done.returncode, (done.stdout + done.stderr).decode(), place / out


CASES = [
    (command, streams)
    for command in COMMANDS
    for streams in STREAMS
    if (command, streams) != ("data -", "nothing")
    and not (command == "data -" and streams not in ("stdin closed", "all closed"))
]


@pytest.fixture(scope="module")
def walked(place):
    """Every case once; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda case: ended(place, *case), CASES)
        return dict(zip(CASES, found))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "streams"), CASES)
def test_no_stream_ends_a_command_in_another_way_than_in_one_line(walked, command, streams):
    code, seen, out = walked[command, streams]
    assert code == expected(command, streams), seen
    for word in ("Traceback", "Exception ignored", "BrokenPipe"):
        assert word not in seen
    if code == 2 and not streams.startswith(("stderr", "all")):
        assert seen.count("error: ") == 1 and seen.rstrip().split("\n")[-1].startswith("error: ")
    if command in ("train", "convert"):
        assert fingerprint(out) == fingerprint(walked[command, "nothing"][2])
    if command in ("train", "data -"):
        assert not (out / "run.lock").exists()


def fingerprint(folder: Path) -> dict[str, str]:
    """The digests of the weights in a folder, and its losses."""
    files = sorted(folder.rglob("*.safetensors"))
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    assert found
    return {**found, "losses": str([json.loads(line).get("loss") for line in lines])}


LONG = TRAIN.replace("--max-steps 4", "--max-steps 100000") + " --eval-every 100000"


def wait_for_step(out: Path, step: int) -> None:
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def newest_step(out: Path) -> int:
    return max(int(path.name[5:]) for path in (out / "checkpoints").iterdir())


def test_ctrl_c_that_ends_tee_first_saves_all_the_same(place):
    command = shlex.join(words(LONG, "teed"))
    line = f"{command} 2>&1 | tee log; exit ${{PIPESTATUS[0]}}"
    process = subprocess.Popen(
        ["bash", "-c", f"trap : INT; {line}"], cwd=place, env=environment(place),
        start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(place / "teed", 3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    lines = (place / "teed" / "metrics.jsonl").read_text().splitlines()
    assert newest_step(place / "teed") == json.loads(lines[-1])["step"] >= 3


def test_a_terminal_that_closes_saves_all_the_same(place):
    pty = pytest.importorskip("pty")
    child, terminal = pty.fork()
    if child == 0:  # the terminal is its stdin, stdout and stderr, and its end a SIGHUP
        os.chdir(place)
        os.execve(sys.executable, words(LONG, "hung", python=[sys.executable]), environment(place))
    wait_for_step(place / "hung", 3)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    lines = (place / "hung" / "metrics.jsonl").read_text().splitlines()
    assert newest_step(place / "hung") == json.loads(lines[-1])["step"] >= 3


def test_a_signal_that_comes_twice_at_once_saves(place):
    process = subprocess.Popen(words(LONG, "twice"), cwd=place, env=environment(place))
    wait_for_step(place / "twice", 3)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert process.wait(timeout=60) == 143
    assert newest_step(place / "twice") >= 3


# signals that come while Python takes the modules down
AT_END = """
import os, runpy, signal, sys
numbers, argv = sys.argv[1], sys.argv[2:]

class Last:
    def __del__(self, kill=os.kill, numbers=numbers.split(","), own=os.getpid()):
        for number in numbers:
            kill(own, int(number))

sys.modules["last"] = Last()
sys.argv = argv
runpy.run_path(argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "code"), [("train", 0), ("sample", 0), ("convert", 0), ("refused", 2)]
)
def test_a_signal_after_the_end_changes_no_exit_code(place, name, code):
    numbers = ",".join(str(int(getattr(signal, name))) for name in SIGNALLED)
    python = [sys.executable, "-c", AT_END, numbers]
    command = words(COMMANDS[name], f"ended-{name}", python=python)
    done = subprocess.run(command, cwd=place, env=environment(place), capture_output=True)
    assert done.returncode == code, done.stderr


def test_an_ignored_signal_stays_ignored(place):
    command = shlex.join(
        words(COMMANDS["train"].replace("--max-steps 4", "--max-steps 40"), "nohup")
    )
    process = subprocess.Popen(
        ["bash", "-c", f"trap '' HUP INT; exec {command}"], cwd=place, env=environment(place)
    )
    wait_for_step(place / "nohup", 2)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0


# a module in whose body a signal comes, while somebody around it swallows all
AT_IMPORT = """
import importlib.abc, os, runpy, sys
name, number, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, asked, path=None, target=None):
        if asked == name:
            sys.meta_path.remove(self)
            print("reached", flush=True)
            try:
                os.kill(os.getpid(), number)
                for _ in range(1000):
                    pass
            except BaseException:
                pass

sys.meta_path.insert(0, Finder())
sys.argv = argv
runpy.run_path(argv[0], run_name="__main__")
"""
POINTS = ["tyro", "torch", "torch._C", "torch.nn.modules", "torch.distributed", "numpy"]
POINTS += ["safetensors", "minigpt2.model", "minigpt2.tokenizer"]


@pytest.mark.parametrize("script", ["train", "sample", "convert"])
@pytest.mark.parametrize("point", POINTS)
def test_a_signal_in_an_import_ends_the_program_though_it_is_swallowed(place, script, point):
    name = [*SIGNALLED][POINTS.index(point) % 3]
    python = [sys.executable, "-c", AT_IMPORT, point, str(int(getattr(signal, name)))]
    command = words(COMMANDS[script], f"imported-{point}", python=python)
    done = subprocess.run(command, cwd=place, env=environment(place), capture_output=True)
    assert b"reached" in done.stdout
    assert done.returncode == SIGNALLED[name], done.stderr
    assert b"Traceback" not in done.stderr
    assert not (place / f"imported-{point}").exists()


@pytest.mark.parametrize("name", SIGNALLED)
def test_a_signal_while_the_text_is_read_leaves_nothing(place, name):
    (place / "more.txt").write_text(TEXT)
    argv = words(LONG.replace("--data text.txt", "--data more.txt -"), f"early-{name}")
    process = subprocess.Popen(
        argv, cwd=place, env=environment(place), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (place / f"early-{name}" / "run.lock").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.3)  # it waits for stdin
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=60) == SIGNALLED[name]
    assert b"Traceback" not in process.communicate()[1]
    assert not (place / f"early-{name}").exists()
