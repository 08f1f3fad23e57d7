"""Runs the three scripts for other tests: in this process for their messages, in one of their own
for the rest.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt2 import options
from minigpt2.console import run_script
from minigpt2.model import GPT2, GPT2Config
from minigpt2.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "train": options.TrainOptions,
    "sample": options.SampleOptions,
    "convert_weights": options.ConvertOptions,
}


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
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    positional = script == "convert_weights"
    try:
        given = [str(argument) for argument in argv]
        code = run_script(module.main, OPTIONS[script], given, positional=positional)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return Result(code, out, err)


def run_alone(script: str, *argv: object, stdin: bytes = b"", **environment: str) -> Result:
    """Run a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)],
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


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
