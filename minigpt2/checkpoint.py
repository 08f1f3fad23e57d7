"""The run folder: the best weights as a Hugging Face folder, and beside them all that a run needs
to go on.

    config.json model.safetensors vocab.json ...      the best weights so far
    checkpoints/step-000200/                          the newest weights, optimizer, state.json
    metrics.jsonl  samples.txt  loss.png  loss.svg    what happened

A checkpoint is written under another name and renamed when it is whole, so a folder called step-...
is complete. Knows folders and files, nothing of the training loop.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .errors import InputError, NotFoundError
from .files import describe, read_json, sync, write_json
from .model import GPT2
from .precision import Precision
from .tokenizer import Tokenizer

STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: all that decides its future besides weights, optimizer and settings."""

    step: int = 0  # optimizer steps done
    best_step: int = 0
    best_val_loss: float | None = None
    evaluations_without_gain: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A folder written by `save_checkpoint`, and where the run stood then."""

    path: Path
    state: TrainState


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one training run."""

    path: Path

    @classmethod
    def claim(cls, path: Path, *, resume: bool) -> RunFolder:
        """Make or reopen a run folder, before anything expensive happens.

        Raises InputError when it is a file, cannot be written, or holds another run that is not to
        be resumed.
        """
        if path.exists() and not path.is_dir():
            raise InputError(f"--out is {path}, which is a file: name a folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise InputError(
                f"--out {path} cannot be made: {problem.strerror}; choose another folder"
            ) from problem
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(
                f"--out {path} cannot be written: change its permissions or choose another folder"
            )
        run = cls(path)
        if resume and not run.checkpoints():
            raise NotFoundError(
                f"--resume: {path} holds no checkpoint; check --out, or start without --resume"
            )
        if not resume and (run.checkpoints() or (path / "config.json").exists()):
            raise InputError(
                f"--out {path} already holds a run or a model: add --resume or choose another --out"
            )
        return run

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line: what every step measured."""
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        """What the model wrote at each evaluation."""
        return self.path / "samples.txt"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        folder = self.path / "checkpoints"
        found = (
            [path for path in folder.iterdir() if STEP.fullmatch(path.name)]
            if folder.is_dir()
            else []
        )
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def save_best(self, model: GPT2, tokenizer: Tokenizer) -> None:
        """Make these the weights the folder stands for."""
        model.save_pretrained(self.path, tokenizer)

    def save_checkpoint(
        self,
        state: TrainState,
        model: GPT2,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        facts: Mapping[str, object],
    ) -> None:
        """Write the newest step, then drop older ones: there is a whole checkpoint at every
        moment.
        """
        final = self.path / "checkpoints" / f"step-{state.step:06d}"
        temporary = final.with_name(final.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tensors = {"optimizer": optimizer.state_dict(), "scaler": precision.scaler.state_dict()}
        torch.save(tensors, temporary / "training.pt")
        sync(temporary / "training.pt")
        write_json(temporary / "state.json", {"state": asdict(state), "facts": dict(facts)})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(final.parent)
        for older in self.checkpoints():
            if older != final:
                shutil.rmtree(older)

    def newest(self, facts: Mapping[str, object]) -> Checkpoint:
        """The newest checkpoint.

        Raises InputError when the run was made with other data, tokenizer, model or batches than
        `facts` says.
        """
        newest = self.checkpoints()[0]
        stored = read_json(newest / "state.json")
        for name, value in facts.items():
            before = stored["facts"].get(name)
            if before != value:
                raise InputError(
                    f"--resume: {name} was {before} in {self.path} and is {value} now; "
                    "give the run's own settings or choose another --out"
                )
        return Checkpoint(newest, TrainState(**stored["state"]))

    def load_training(
        self, checkpoint: Path, optimizer: torch.optim.Optimizer, precision: Precision
    ) -> None:
        """Put optimizer and scaler where the checkpoint left them."""
        path = checkpoint / "training.pt"
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            optimizer.load_state_dict(tensors["optimizer"])
            precision.scaler.load_state_dict(tensors["scaler"])
        except Exception as problem:  # torch.load alone raises six types for damaged files
            raise InputError(
                f"{path} is damaged ({describe(path)}): remove {checkpoint} and resume"
            ) from problem

    def log(self, metrics: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def read_metrics(self) -> list[dict]:
        """All lines of metrics.jsonl; a last line cut off by a crash is left out."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run is about to repeat."""
        kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        self.metrics_path.write_text("".join(kept), encoding="utf-8")

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """Append what the model wrote at this step to samples.txt."""
        with self.samples_path.open("a", encoding="utf-8") as file:
            file.write(f"=== step {step}\n{prompt}{text}\n\n")
