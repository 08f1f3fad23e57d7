"""Runs the three scripts for other tests: in this process for their messages, in one of their own
for the rest.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import warm
from minigpt2.cli import convert, sample, train
from minigpt2.model import GPT2, GPT2Config
from minigpt2.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
COMMANDS = {"train": train, "sample": sample, "convert_weights": convert}


@dataclass(frozen=True)
class Result:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line on stderr, where errors are."""
        return self.err.strip().split("\n")[-1]


def run_here(capsys, script: str, *argv: object) -> Result:
    """Run a script in this process."""
    capsys.readouterr()
    code = exit_code(script, *argv)
    out, err = capsys.readouterr()
    return Result(code, out, err)


def exit_code(script: str, *argv: object) -> int:
    """Run a script's command in this process, with its messages on this process's stdout and
    stderr.
    """
    return COMMANDS[script].run([str(argument) for argument in argv])


def run_alone(
    script: str,
    *argv: object,
    stdin: bytes = b"",
    cwd: Path | None = None,
    **environment: str,
) -> Result:
    """Run a script in a process of its own."""
    done = subprocess.run(
        [*warm.python(), str(ROOT / f"{script}.py"), *map(str, argv)],
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        cwd=cwd,
        timeout=120,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def later_wins(*argv: object) -> list[str]:
    """Words of a command in which of flags that are there twice the later one stays."""
    words: dict[str, list[str]] = {}
    name = ""  # of the flag that a word belongs to
    for word in map(str, argv):
        if word.startswith("--"):
            name = word.partition("=")[0]
            words[name] = []
        words.setdefault(name, []).append(word)
    return [word for given in words.values() for word in given]


def words_of(command: str) -> list[str]:
    """What bash reads in a command's line."""
    show = f'exec "{sys.executable}" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"'
    line = f"show() {{ {show}; }}; show {command}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    return json.loads(done.stdout)


def tiny_folder(folder: Path, *, vocab_size: int = 300, n_positions: int = 23) -> Path:
    """A model folder with random weights that are far from flat, and its tokenizer."""
    config = GPT2Config(
        vocab_size=vocab_size, block_size=n_positions, n_embd=14, n_layer=2, n_head=2
    )
    model = GPT2(config, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.wte.weight.mul_(20)
    model.save_pretrained(folder, Tokenizer.gpt2(min(vocab_size, 300)))
    return folder
