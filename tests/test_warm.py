"""A command that is started in a fork of a process with torch is as one that Python starts anew."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import warm
from scripts import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
PROBE = ROOT / "tests" / "helpers" / "probe.py"


def probed(python, place, how, line="", **environment):
    """How the probe ends, what is seen of it, and what it was given."""
    record = place / "record"
    command = " ".join([*python, str(PROBE), f"'{how}'", str(record)])
    done = subprocess.run(
        ["bash", "-c", f"{line.partition('|')[0]} exec {command} {line.partition('|')[2]}"],
        cwd=place,
        input=b"typed",
        capture_output=True,
        env={**os.environ, **environment},
        timeout=60,
    )
    given = json.loads(record.read_text())
    record.unlink()
    given["environment"].pop("_", None)
    # a traceback begins in warm.py, which Python's own does not
    frame = r'  File "(.*warm.py|<frozen runpy>)".*\n(    run.*\n( +\^+\n)?)?'
    errors = re.sub(frame, "", done.stderr.decode())
    return done.returncode, done.stdout, errors, given


@pytest.mark.parametrize("how", ["", "exit 7", "exit text", "leave", "abort", "raise"])
def test_it_ends_as_python_does(tmp_path, how):
    assert probed(warm.python(), tmp_path, how) == probed([sys.executable], tmp_path, how)


@pytest.mark.parametrize(
    "line",
    [
        "|<&-", "|>&-", "|2>&-", "|<&- >&- 2>&-", "|>/dev/full", "|2>/dev/full", "|< /dev/null",
        "|> >(exec true)", "trap '' HUP; |", "trap '' INT TERM; |", "cd /; |",
    ],
)  # fmt: skip
def test_it_has_the_streams_signals_and_folder_of_python(tmp_path, line):
    assert probed(warm.python(), tmp_path, "", line) == probed([sys.executable], tmp_path, "", line)


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0", "MINIGPT2_CACHE": "here"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}, {"ANY": "thing"}],
    ids=str,
)
def test_it_has_the_environment_of_python(tmp_path, environment):
    ours = probed(warm.python(), tmp_path, "", **environment)
    assert ours == probed([sys.executable], tmp_path, "", **environment)


def waiting(python, place):
    """The probe, once it waits."""
    record = place / "record"
    process = subprocess.Popen([*python, PROBE, "wait", record], stdin=subprocess.DEVNULL)
    while not record.exists():
        time.sleep(0.01)
    record.unlink()
    time.sleep(0.2)
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL", "SIGINT"])
def test_a_signal_ends_it_as_it_ends_python(tmp_path, name):
    codes = []
    for python in (warm.python(), [sys.executable]):
        process = waiting(python, tmp_path)
        process.send_signal(getattr(signal, name))
        codes.append(process.wait(timeout=20))
    assert codes[0] == codes[1] == -getattr(signal, name)


def test_a_pipe_that_it_reads_no_more_is_closed_when_it_is_killed(tmp_path):
    record = tmp_path / "record"
    process = subprocess.Popen(
        [*warm.python(), PROBE, "", record], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    while not record.exists():
        time.sleep(0.01)
    process.kill()
    assert process.stdout is not None and process.stdin is not None
    process.stdout.read()  # comes to its end: the program has ended with its stand-in
    process.wait(timeout=20)
    process.stdin.close()
    process.stdout.close()
