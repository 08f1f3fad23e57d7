"""The command that writes a run's pictures and pages anew: python -m minigpt2 report RUN"""

import subprocess
import sys

import pytest

from minigpt2.cli import report
from minigpt2.runs.folder import RunFolder
from minigpt2.runs.record import Metrics


@pytest.fixture
def run(tmp_path):
    """A run of ten steps, told by its records alone."""
    folder = RunFolder(tmp_path)
    for step in range(1, 11):
        folder.log(Metrics(step, loss=5 / step, lr=0.1, grad_norm=1.0))
    return folder


def test_the_command_writes_all_pictures_and_pages(tmp_path, run):
    assert report.run([str(tmp_path)]) == 0
    for name in ("loss.png", "loss.svg", "report.html", "README.md"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "error: RUN is missing; see --help"),
        (["missing-folder"], "missing-folder is no folder: name the folder of a run"),
        (["--nothing"], "there is no flag '--nothing'"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(arguments, told, capsys):
    assert report.run(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and told in shown


def test_a_folder_that_is_no_run_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    assert report.run([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.slow
def test_the_command_can_be_run_as_a_module(tmp_path, run):
    command = [sys.executable, "-W", "error", "-m", "minigpt2", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.html").exists()
