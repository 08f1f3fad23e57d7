"""The command that `pip install` gives: minigpt2 COMMAND ..."""

import subprocess
import sys

import pytest

from minigpt2.__main__ import COMMANDS, main

RUN = [sys.executable, "-m", "minigpt2"]


def test_every_command_is_listed_and_says_how_it_is_started(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/minigpt2", "--help"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: minigpt2 COMMAND")
    for name in COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_comes_without_torch(name):
    code = f"import sys; from minigpt2.__main__ import main; main(['{name}', '--help']); "
    code += "print(*({'torch', 'matplotlib', 'huggingface_hub'} & {*sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ") and done.stderr == "\n"


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        ([], 2, "usage: "),
        (["--version"], 0, "minigpt2 0"),
        (["trian"], 2, "there is no command 'trian' (did you mean train?); see --help"),
        (["sample", "--promt", "x"], 2, "did you mean --prompt?"),
    ],
)
def test_what_is_no_command_is_told_in_a_line(argv, code, told, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minigpt2", *argv])
    assert main() == code
    out, err = capsys.readouterr()
    assert told in out + err


def test_the_package_runs_as_a_module():
    done = subprocess.run([*RUN, "sample", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m minigpt2 sample ")
