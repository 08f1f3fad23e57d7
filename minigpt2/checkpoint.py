"""The run folder: the best weights as a Hugging Face folder, and beside them all that a run needs
to go on.

    config.json model.safetensors vocab.json ...      the best weights so far
    checkpoints/step-000200/                          weights, optimizer.safetensors, state.json
    metrics.jsonl  samples.jsonl  run.json            what happened
    run.lock  run.owner                               held by the process that trains

A checkpoint is written under another name, brought to the disk, sealed with a manifest of sizes and
SHA-256, and renamed; only then do older ones go. Where one of the same step is replaced, it counts
as step-000200.old until the new one has its name. Whatever kills the process, a whole checkpoint is
there. Knows folders and files, nothing of the training loop.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import InputError, NotFoundError
from .files import Lock, lock, read_json, remove_leftovers, sync, write_json, write_text
from .weights import read_tensors, write_tensors

logger = logging.getLogger(__name__)

KEEP = 2  # checkpoints: when the newest is damaged, there is another
STEP = re.compile(r"step-(\d{6,})")
OLD, TEMPORARY = ".old", ".tmp"  # after the step's name: being replaced; being written or removed
MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
HASHED_AT_ONCE = 2**22


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: all that decides its future besides weights, optimizer and settings."""

    step: int = 0  # optimizer steps done
    best_step: int = 0
    best_val_loss: float | None = None
    evaluations_without_gain: int = 0
    first_val_loss: float | None = None  # of the weights the run began with
    micro_batch_size: int = 0  # sequences computed at once; 0 is not decided yet
    unjudged: dict[str, Any] | None = None  # what a step measured whose evaluation is still to come
    n_skipped: int = 0  # steps that float16 overflow skipped
    skipped_in_a_row: int = 0

    def ended(self, max_steps: int) -> bool:
        """Whether a run of so many steps has nothing left to do."""
        return self.step >= max_steps and self.unjudged is None


@dataclass(frozen=True)
class Checkpoint:
    """A folder written by `save_checkpoint`, and where the run stood then."""

    path: Path
    state: TrainState
    scaler: dict[str, Any]
    facts: dict[str, Any]
    settings: dict[str, Any]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What the optimizer remembered, by name."""
        return read_tensors(self.path / OPTIMIZER)[0]

    def require(self, facts: Mapping[str, object]) -> None:
        """Raise InputError unless the run was made with the data, tokenizer, model and batches that
        `facts` says.
        """
        for name, value in facts.items():
            before = self.facts.get(name)
            if before != value:
                raise InputError(
                    f"--resume: {name} was {before} in {self.path} and is {value} now; "
                    "give the run's own settings or choose another --out"
                )


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one training run."""

    path: Path
    _lock: Lock | None = field(default=None, repr=False, compare=False)
    _failing: set[Path] = field(default_factory=set, repr=False, compare=False)
    _damaged: set[Path] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def claim(cls, path: Path, *, resume: bool) -> RunFolder:
        """Make or reopen a run folder for this process alone, before anything expensive happens,
        and remove what killed processes left half-written.

        The claim ends with `release`, with the `with` block, or with the process, however that
        ends. Raises InputError when the folder is a file, cannot be written, is in use, or holds
        another run that is not to be resumed; NotFoundError when there is nothing to resume.
        """
        _make_folder(path)
        run = cls(path, _locked(path))
        try:
            run._check_contents(resume)
            run._sweep()
        except BaseException:
            run.release()
            raise
        return run

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # a disk that broke is what the caller tells of
                (self.path / "run.owner").unlink()
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *problem: object) -> None:
        self.release()

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line: what every step measured."""
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        """One JSON object per line: what the model wrote at each evaluation."""
        return self.path / "samples.jsonl"

    @property
    def info_path(self) -> Path:
        """What the run was started with."""
        return self.path / "run.json"

    def checkpoints(self) -> list[Path]:
        """Checkpoints that have a manifest, newest first: the highest step, whatever clocks say."""
        return [path for path in self._step_folders() if (path / MANIFEST).is_file()]

    def save_checkpoint(
        self,
        state: TrainState,
        *,
        write_weights: Callable[[Path], None],
        optimizer: Mapping[str, Tensor],
        scaler: Mapping[str, object],
        facts: Mapping[str, object],
        settings: Mapping[str, object],
    ) -> None:
        """Write the newest step, then drop all but one of the older ones.

        `write_weights` fills a folder. Raises InputError when the disk does not take it, with the
        checkpoints before as they were.
        """
        final = self.path / "checkpoints" / f"step-{state.step:06d}"
        temporary = final.with_suffix(TEMPORARY)
        needed = self._bytes_needed(optimizer)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if shutil.disk_usage(temporary).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_weights(temporary)
            write_tensors(temporary / OPTIMIZER, optimizer)
            described = {"state": asdict(state), "scaler": dict(scaler)}
            write_json(
                temporary / STATE, {**described, "facts": dict(facts), "settings": dict(settings)}
            )
            _seal(temporary)
            for path in (self.metrics_path, self.samples_path, self.path):
                if path.exists():
                    sync(path)
            _put_in_place(temporary, final)
        except OSError as problem:
            shutil.rmtree(temporary, ignore_errors=True)  # before the free bytes are counted
            raise InputError(self._why_not_saved(state.step, needed, problem)) from problem
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._damaged.discard(final)
        self._prune(final)

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step that turned out to be of no use, if there is one."""
        path = self.path / "checkpoints" / f"step-{step:06d}"
        if path.exists():
            _remove(path)

    def newest(self) -> Checkpoint:
        """The newest checkpoint that is whole; damaged ones are named in a warning.

        Raises NotFoundError when there is none.
        """
        problems = []
        for path in self._step_folders():
            problem = _damage(path)
            if problem is None:
                if problems:
                    logger.warning("%s: going on from %s", "; ".join(problems), path)
                return _read(path)
            self._damaged.add(path)
            problems.append(f"{path} is damaged ({problem})")
        found = "; ".join(problems) or f"{self.path} holds no checkpoint"
        raise NotFoundError(f"--resume: {found}; start without --resume in another --out")

    def log(self, metrics: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl; where that fails, say so once and go on."""
        self._append(self.metrics_path, metrics)

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """Append what the model wrote at this step to samples.jsonl, as `log` does."""
        self._append(self.samples_path, {"step": step, "prompt": prompt, "text": text})

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, but those that a crash or a full disk cut off."""
        return _read_lines(self.metrics_path)

    def read_samples(self) -> list[dict[str, Any]]:
        """All lines of samples.jsonl, but those that a crash or a full disk cut off."""
        return _read_lines(self.samples_path)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is about to repeat."""
        for path in (self.metrics_path, self.samples_path):
            if path.exists():
                kept = [line for line in _read_lines(path) if line.get("step", 0) <= step]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write_info(self, info: Mapping[str, object]) -> None:
        """Keep what the run was started with in run.json."""
        write_json(self.info_path, dict(info))

    def read_info(self) -> dict[str, Any]:
        """What run.json says; nothing where it is missing or damaged."""
        try:
            return read_json(self.info_path)
        except InputError:
            return {}

    def _step_folders(self, suffixes: tuple[str, ...] = ("", OLD)) -> list[Path]:
        """The folders called step-... in checkpoints/, the highest step first, the old one of two
        last.
        """
        folder, found = self.path / "checkpoints", []
        for path in folder.iterdir() if folder.is_dir() else ():
            match = STEP.match(path.name)
            if match and path.name[match.end() :] in suffixes:
                found.append((-int(match[1]), path))
        return [path for _, path in sorted(found)]

    def _check_contents(self, resume: bool) -> None:
        died_early = self.metrics_path.exists() or self.info_path.exists()
        if resume and self._step_folders() and not self.checkpoints():
            self.newest()  # names what is wrong with each: starting anew would remove them
        if resume and not self._step_folders():
            # the first checkpoint is written before anything is measured
            if not died_early or self.read_metrics() or self._holds_weights():
                raise NotFoundError(
                    f"--resume: {self.path} holds no checkpoint; check --out, or start without "
                    "--resume in another one"
                )
            logger.info("%s was stopped before its first checkpoint: starting at step 0", self.path)
        if not resume and (self._step_folders() or died_early or self._holds_weights()):
            raise InputError(
                f"--out {self.path} already holds a run or a model: add --resume or choose another "
                "--out"
            )

    def _holds_weights(self) -> bool:
        return any((self.path / name).exists() for name in ("config.json", "adapter_config.json"))

    def _sweep(self) -> None:
        """Remove what killed processes left, and end what they had begun."""
        remove_leftovers(self.path)
        for path in self._step_folders((TEMPORARY, OLD + TEMPORARY)):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._step_folders((OLD,)):
            if path.with_suffix("").exists():
                _remove(path)
            else:
                path.rename(path.with_suffix(""))
        for path in self.checkpoints()[KEEP:]:
            _remove(path)

    def _bytes_needed(self, optimizer: Mapping[str, Tensor]) -> int:
        """What a checkpoint takes, with a tenth to spare: the weights of the one before, and the
        optimizer's; without one before, the weights are not known.
        """
        before = [path for folder in self.checkpoints()[:1] for path in folder.iterdir()]
        weights = sum(path.stat().st_size for path in before if path.name != OPTIMIZER)
        return int(1.1 * (weights + sum(value.nbytes for value in optimizer.values())))

    def _why_not_saved(self, step: int, needed: int, problem: OSError) -> str:
        saved = self.checkpoints()
        kept = f"{saved[0]} is intact" if saved else "there is no checkpoint yet"
        free = shutil.disk_usage(self.path).free
        room = f"{needed / 1e6:,.1f} MB are needed, " if saved else ""  # not known the first time
        room += f"{free / 1e6:,.1f} MB are free"
        return (
            f"step {step} could not be saved in {self.path}: {problem.strerror or problem} "
            f"({room}); {kept}; make room or mend the disk, and go on with --resume"
        )

    def _prune(self, newest: Path) -> None:
        """Drop old and damaged checkpoints, and those of a later step: a run only goes back before
        damage.
        """
        before = self._step_folders(("",))
        before = before[before.index(newest) + 1 :]
        whole = [path for path in before if (path / MANIFEST).is_file()]
        kept = [newest, *(path for path in whole if path not in self._damaged)][:KEEP]
        for path in self._step_folders():
            if path not in kept:
                _remove(path)

    def _append(self, path: Path, line: Mapping[str, object]) -> None:
        try:
            _append_line(path, json.dumps(line).encode())
            self._failing.discard(path)
        except OSError as problem:
            if path not in self._failing:
                logger.warning(
                    "%s cannot be written (%s): training goes on", path, problem.strerror
                )
            self._failing.add(path)


def _make_folder(path: Path) -> None:
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


def _locked(path: Path) -> Lock:
    """A lock on a run folder, which the kernel takes back when the process dies."""
    held, owner = None, path / "run.owner"
    try:
        held = lock(path / "run.lock", wait=False)
        if held:
            write_text(owner, f"process {os.getpid()} on {socket.gethostname()}")
            return held
    except (OSError, NotImplementedError) as problem:
        if held:
            held.release()
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(f"--out {path} cannot be locked: {reason}") from problem
    who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
    raise InputError(
        f"--out {path} is in use by {who}: wait for it, stop it, or choose another --out"
    )


def _seal(folder: Path) -> None:
    """Bring all that is in a folder to the disk, and after it a manifest that describes it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            size, digest = path.stat().st_size, _sha256(path)
            files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    write_json(folder / MANIFEST, {"files": files})
    sync(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name; one that has it already counts until that is done."""
    if final.exists():
        _remove(final.with_suffix(OLD))
        final.rename(final.with_suffix(OLD))
    temporary.rename(final)
    sync(final.parent)


def _remove(path: Path) -> None:
    """Remove a checkpoint, its name first: a half-removed one is none."""
    doomed = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):  # what cannot be removed only takes room
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _read(folder: Path) -> Checkpoint:
    """A checkpoint that is whole."""
    stored = read_json(folder / STATE)
    try:
        return Checkpoint(folder, TrainState(**stored.pop("state")), **stored)
    except (KeyError, TypeError) as problem:
        raise InputError(
            f"{folder} was written by another version of minigpt2 ({problem}): go on with that one"
        ) from problem


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None if every byte is as it was written."""
    try:
        expected = {
            name: (stored["size"], stored["sha256"])
            for name, stored in read_json(folder / MANIFEST)["files"].items()
        }
    except NotFoundError:
        return f"{MANIFEST} is missing"
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not one"
    if STATE not in expected:
        return f"{STATE} is missing"
    problems = (_difference(folder / name, name, *facts) for name, facts in expected.items())
    return next((problem for problem in problems if problem), None)


def _difference(path: Path, name: str, size: int, sha256: str) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is no file" if path.exists() else f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        return None if _sha256(path) == sha256 else f"{name} is not what was written"
    except OSError as problem:
        return f"{name} cannot be read: {problem.strerror}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASHED_AT_ONCE):
            digest.update(data)
    return digest.hexdigest()


def _append_line(path: Path, line: bytes) -> None:
    """Append a line in one write; where the last one was cut off, begin a new one."""
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size > 0 and file.read(1) != b"\n"
        data = b"\n" * torn + line + b"\n"
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
