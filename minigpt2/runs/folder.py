"""The folder of a run: the best weights, and beside them all that a run needs to go on.

    config.json model.safetensors vocab.json ...      the best weights so far, as the Hub has them
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
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..errors import InputError, NotFoundError
from ..formats.tensors import read_tensors, write_tensors
from ..system.files import (
    Lock,
    disown,
    file_sha256,
    open_no_link,
    own,
    read_json,
    remove_leftovers,
    sync,
    write_json,
    write_text,
)
from . import kept
from .record import DAMAGED, Metrics, Record, RunInfo, Sample, Settings, finite_or_none
from .state import Facts, TrainState

logger = logging.getLogger(__name__)
T = TypeVar("T")

KEEP = 2  # checkpoints: when the newest is damaged, there is another
STEP = re.compile(r"step-(\d{6,})")
OLD, TEMPORARY = ".old", ".tmp"  # after the step's name: being replaced; being written or removed
MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
# what is added to, or made in, where it lies
WRITTEN_INTO = (
    "metrics.jsonl",
    "samples.jsonl",
    "run.lock",
    "checkpoints",
    "tensorboard",
    "merged",
    kept.BASE,
    kept.TEXTS,
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder written by `save_checkpoint`, and where the run stood then."""

    path: Path
    state: TrainState
    scaler: Mapping[str, Any]  # what float16's loss scaler remembered
    facts: Facts
    settings: Settings

    @classmethod
    def from_json(cls, path: Path, stored: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint in a folder, from what its state.json holds.

        Raises InputError for a state of another version, and ValueError for one that is none.
        """
        try:
            parts = {name: stored[name] for name in ("state", "scaler", "facts", "settings")}
            for name, part in parts.items():
                if not isinstance(part, dict):
                    raise ValueError(f"{name} is {part!r:.60}, expected an object")
            state = TrainState.from_json(parts["state"])
        except (KeyError, TypeError) as problem:
            raise InputError(
                f"{path} was written by another version of minigpt2 ({problem}): go on with that "
                "one"
            ) from problem
        facts, settings = Facts.from_json(parts["facts"]), Settings.from_json(parts["settings"])
        return cls(path, state, parts["scaler"], facts, settings)

    def to_json(self) -> dict[str, Any]:
        """What state.json holds."""
        return {
            "state": self.state.to_json(),
            "scaler": dict(self.scaler),
            "facts": self.facts.to_json(),
            "settings": self.settings.to_json(),
        }

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What the optimizer remembered, by name."""
        return read_tensors(self.path / OPTIMIZER)[0]

    def require(self, facts: Facts, but: Collection[str] = ()) -> None:
        """Raise InputError unless the run was made with the data, tokenizer, model and batches that
        `facts` says; `but` names fields that are not known yet.
        """
        for name, values in self.facts.differences(facts, but).items():
            was, now = ("not given" if value is None else value for value in values)
            was, now = (kept.found(str(value), self.path.parents[1]) for value in (was, now))
            raise InputError(
                f"--resume: {name} was {was} in {self.path} and is {now} now; leave it out to "
                "go on as the run began, or choose another --out"
            )


class DamagedError(ValueError):
    """A checkpoint is not what was written, or holds what no run has; the text says what."""


class RunFolder:
    """A folder that holds one training run. Reading and writing need no claim; training does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None
        self._made: tuple[Path, ...] = ()  # folders, by the claim
        self._is_new = False  # there was no run before
        self._left = False  # a process that was killed had claimed it
        self._own: list[Path] = []  # what the run began with, written by this claim
        self._failing: set[Path] = set()  # files that could not be written the last time
        self._damaged: set[Path] = set()  # checkpoints

    @classmethod
    def claim(cls, path: Path, *, resume: bool) -> RunFolder:
        """Make or reopen a run folder for this process alone, before anything expensive happens.

        The claim ends with `release`, with the `with` block, or with the process, however that
        ends. Raises InputError when the folder is a file, cannot be written, is in use, leads
        elsewhere by a link in it, or holds another run that is not to be resumed; NotFoundError
        when there is nothing to resume.
        """
        made = _make_folder(path)
        try:
            _refuse_links(path)
            run = cls(path)
            run._left = (path / "run.owner").exists()
            run._lock, run._made = _locked(path), made
            run._is_new = not run.info_path.exists()
        except BaseException:
            _remove_empty(made)
            raise
        try:
            run._check_contents(resume)
        except BaseException:
            run.release()
            raise
        return run

    def take_up(self) -> None:
        """Remove what killed processes left half-written, and end what they had begun: a run goes
        on here. What was read of a checkpoint may bear another name afterwards.
        """
        remove_leftovers(self.path)
        for path in self._step_folders((TEMPORARY, OLD + TEMPORARY)):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._step_folders((OLD,)):
            if path.with_suffix("").exists():
                _remove(path)
            else:
                path.rename(path.with_suffix(""))
        whole = [path for path in self.checkpoints() if path not in self._damaged]
        for path in whole[KEEP:]:
            _remove(path)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Inside, a disk that does not take what is written is an InputError that says which
        checkpoint counts.
        """
        try:
            yield
        except OSError as problem:
            raise InputError(self._why_not_saved(what, problem)) from problem

    def release(self) -> None:
        """Let other processes have the folder; of a run that did not come to its first checkpoint,
        nothing stays.
        """
        if self._lock is None or not self._lock.is_locked:
            return
        with contextlib.suppress(OSError):  # a disk that broke is what the caller tells of
            if self._is_new and not self._step_folders():
                self.info_path.unlink(missing_ok=True)
                for path in self._own:
                    _delete(path)
                (self.path / "checkpoints").rmdir()
        with contextlib.suppress(OSError):
            (self.path / "run.owner").unlink()
        disown(self._lock)
        _remove_empty(self._made)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *problem: object) -> None:
        self.release()

    def own_place(self, name: str) -> Path:
        """An empty place in the folder for what the run begins with; what is written there goes if
        the run does not come to its first checkpoint.

        Raises InputError where something lies that no killed run left.
        """
        path = self.path / name
        if path.exists() and not (self._left and self._is_new):
            raise InputError(
                f"--out {self.path} holds {name} already, and no run: choose another --out"
            )
        _delete(path)
        self._own.append(path)
        return path

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

    def holds_a_run(self) -> bool:
        """Whether there is anything of a run in the folder."""
        recorded = self.info_path.exists() or self.metrics_path.exists()
        return recorded or bool(self.checkpoints())

    def checkpoints(self) -> list[Path]:
        """Checkpoints that have a manifest, newest first: the highest step, whatever clocks say."""
        return [path for path in self._step_folders() if (path / MANIFEST).is_file()]

    def save_checkpoint(
        self,
        state: TrainState,
        *,
        write_weights: Callable[[Path], None],
        optimizer: Mapping[str, Tensor],
        scaler: Mapping[str, Any],
        facts: Facts,
        settings: Settings,
    ) -> None:
        """Write the newest step, then drop all but one of the older ones.

        `write_weights` fills a folder. Raises InputError when the disk does not take it, with the
        checkpoints before as they were.
        """
        final = self.path / "checkpoints" / f"step-{state.step:06d}"
        temporary = final.with_suffix(TEMPORARY)
        needed = self._bytes_needed(optimizer)
        checkpoint = Checkpoint(final, state, scaler, facts, settings)
        try:
            with _passing_folder(temporary):
                if shutil.disk_usage(temporary).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                write_weights(temporary)
                write_tensors(temporary / OPTIMIZER, optimizer)
                write_json(temporary / STATE, checkpoint.to_json())
                _seal(temporary)
                for path in (self.metrics_path, self.samples_path, self.path):
                    if path.exists():
                        sync(path)
                _put_in_place(temporary, final)
        except OSError as problem:
            raise InputError(
                self._why_not_saved(f"step {state.step}", problem, needed)
            ) from problem
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
            try:
                checkpoint = _whole_checkpoint(path)
            except DamagedError as problem:
                self._damaged.add(path)
                problems.append(f"{path} is damaged ({problem})")
                continue
            if problems:
                logger.warning("%s: going on from %s", "; ".join(problems), path)
            return checkpoint
        found = "; ".join(problems) or f"{self.path} holds no checkpoint"
        raise NotFoundError(f"--resume: {found}; start without --resume in another --out")

    def log(self, metrics: Metrics) -> None:
        """Append one line to metrics.jsonl; where that fails, say so once and go on."""
        self._append(self.metrics_path, metrics)

    def log_sample(self, sample: Sample) -> None:
        """Append what the model wrote to samples.jsonl, as `log` does."""
        self._append(self.samples_path, sample)

    def read_metrics(self) -> list[Metrics]:
        """All lines of metrics.jsonl, but those that are damaged: cut off by a crash or a full
        disk, or with other values than numbers.
        """
        return _read_lines(self.metrics_path, Metrics.from_json)

    def read_samples(self) -> list[Sample]:
        """All lines of samples.jsonl, but those that are damaged."""
        return _read_lines(self.samples_path, Sample.from_json)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is about to repeat."""
        files = ((self.metrics_path, self.read_metrics), (self.samples_path, self.read_samples))
        for path, read in files:
            if path.exists():
                write_text(path, "".join(_as_line(line) for line in read() if line.step <= step))

    def write_info(self, info: RunInfo) -> None:
        """Keep what the run was started with in run.json."""
        with self.writing("run.json"):
            write_json(self.info_path, info.to_json())

    def read_info(self) -> RunInfo | None:
        """What run.json says; None where it is missing or damaged."""
        try:
            return RunInfo.from_json(read_json(self.info_path, with_names=True))
        except (InputError, OSError):
            return None

    def read_record(self) -> Record:
        """All that can be read of the run; what is missing or damaged is empty."""
        info = self.read_info()
        problems = [DAMAGED] if info is None and self.info_path.exists() else []
        return Record(
            self.path.resolve().name,
            self.read_metrics(),
            self.read_samples(),
            info or RunInfo(),
            problems,
        )

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

    def _bytes_needed(self, optimizer: Mapping[str, Tensor]) -> int:
        """What a checkpoint takes, with a tenth to spare: the weights of the one before, and the
        optimizer's; without one before, the weights are not known.
        """
        before = [path for folder in self.checkpoints()[:1] for path in folder.iterdir()]
        weights = sum(path.stat().st_size for path in before if path.name != OPTIMIZER)
        return int(1.1 * (weights + sum(value.nbytes for value in optimizer.values())))

    def _why_not_saved(self, what: str, problem: OSError, needed: int = 0) -> str:
        saved = self.checkpoints()
        kept = f"{saved[0]} is intact" if saved else "there is no checkpoint yet"
        free = shutil.disk_usage(self.path).free
        room = f"{needed / 1e6:,.1f} MB are needed, " if saved and needed else ""
        room += f"{free / 1e6:,.1f} MB are free"
        again = "go on with --resume" if saved else "start again"
        return (
            f"{what} could not be saved in {self.path}: {problem.strerror or problem} ({room}); "
            f"{kept}; make room or mend the disk, and {again}"
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

    def _append(self, path: Path, line: Metrics | Sample) -> None:
        try:
            _append_line(path, _as_line(line).encode())
            self._failing.discard(path)
        except OSError as problem:
            if path not in self._failing:
                logger.warning(
                    "%s cannot be written (%s): training goes on", path, problem.strerror
                )
            self._failing.add(path)


def _make_folder(path: Path) -> tuple[Path, ...]:
    """Make a folder and those above it, and return what was made, the deepest first."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out is {path}, which is a file: name a folder")
    missing = tuple(above for above in (path, *path.parents) if not above.exists())
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        _remove_empty(missing)
        raise InputError(
            f"--out {path} cannot be made: {problem.strerror}; choose another folder"
        ) from problem
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(
            f"--out {path} cannot be written: change its permissions or choose another folder"
        )
    return missing


def _remove_empty(folders: tuple[Path, ...]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


def _refuse_links(path: Path) -> None:
    """Raise InputError for a link in a run folder that the run would write through: all else that
    it writes takes the place of what has the name.
    """
    steps = (step for step in path.glob("checkpoints/*") if STEP.match(step.name))
    for place in (*(path / name for name in WRITTEN_INTO), *steps):
        if place.is_symlink():
            raise InputError(
                f"--out {path} has a link in it, {place.relative_to(path)} to {place.readlink()}, "
                "and a run writes nothing through links: remove it, or choose another --out (which "
                "may itself be a link to a folder)"
            )


def _locked(path: Path) -> Lock:
    """A lock on a run folder, which the kernel takes back when the process dies."""
    held, owner = None, path / "run.owner"
    try:
        held = own(path / "run.lock")
        if held:
            write_text(owner, f"process {os.getpid()} on {socket.gethostname()}")
            return held
    except (OSError, NotImplementedError) as problem:
        if held:
            disown(held)
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
            size, digest = path.stat().st_size, file_sha256(path)
            files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    write_json(folder / MANIFEST, {"files": files})
    sync(folder)


@contextlib.contextmanager
def _passing_folder(path: Path) -> Iterator[None]:
    """An empty folder that is gone afterwards, however that comes, unless it got another name."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name; one that has it already counts until that is done."""
    if final.exists():
        _remove(final.with_suffix(OLD))
        final.rename(final.with_suffix(OLD))
    temporary.rename(final)
    sync(final.parent)


def _delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint, its name first: a half-removed one is none."""
    doomed = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):  # what cannot be removed only takes room
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _whole_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint in which every byte is as its manifest says, and whose state a run can have.

    Raises DamagedError for any other, and InputError for one of another version.
    """
    files = _listed_files(folder)
    problems = (_difference(folder / name, name, *listed) for name, listed in files.items())
    for problem in filter(None, problems):
        raise DamagedError(problem)
    try:
        stored = read_json(folder / STATE)
    except InputError as problem:
        text = f"{STATE} is no valid JSON: {problem.__cause__ or problem}"
        raise DamagedError(text) from problem
    try:
        return Checkpoint.from_json(folder, stored)
    except InputError:
        raise  # of another version, which is no damage
    except ValueError as problem:
        raise DamagedError(f"{STATE} holds what no run has: {problem}") from problem


def _listed_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of every file that a checkpoint's manifest names."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        files = {name: (stored["size"], stored["sha256"]) for name, stored in listed.items()}
        for size, digest in files.values():
            if type(size) is not int or not isinstance(digest, str):
                raise TypeError
    except NotFoundError as problem:
        raise DamagedError(f"{MANIFEST} is missing") from problem
    except (InputError, OSError, KeyError, TypeError, AttributeError) as problem:
        raise DamagedError(f"{MANIFEST} is not one") from problem
    if STATE not in files:
        raise DamagedError(f"{STATE} is missing")
    return files


def _difference(path: Path, name: str, size: int, sha256: str) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is no file" if path.exists() else f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        return None if file_sha256(path) == sha256 else f"{name} is not what was written"
    except OSError as problem:
        return f"{name} cannot be read: {problem.strerror}"


def _append_line(path: Path, line: bytes) -> None:
    """Append a line in one write; where the last one was cut off, begin a new one. Raises OSError
    for a link.
    """
    with open(path, "a+b", buffering=0, opener=open_no_link) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size > 0 and file.read(1) != b"\n"
        data = b"\n" * torn + line
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _as_line(line: Metrics | Sample) -> str:
    return json.dumps(line.to_json(), allow_nan=False) + "\n"


def _read_lines(path: Path, from_json: Callable[[dict[str, Any]], T]) -> list[T]:
    """Such objects of a file, one a line; NaN and infinities, which are not JSON, become None."""
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text, parse_float=_finite, parse_constant=_finite)
            if isinstance(line, dict):
                lines.append(from_json(line))
        except (ValueError, RecursionError):
            continue
    return lines


def _finite(digits: str) -> float | None:
    return finite_or_none(float(digits))
