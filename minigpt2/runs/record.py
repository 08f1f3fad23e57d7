"""What a run left in its folder: each object of its JSON files as a frozen record.

Every record has one reader, `from_json`, and one writer, `to_json`. What a file of an earlier
version lacks is None; what a later version has added is kept in `more` and written again. Knows
numbers and text, nothing of wording, pictures and markup; imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InputError

Point = tuple[float, float]  # step, value
T = TypeVar("T")
J = TypeVar("J", bound="JsonObject")
DAMAGED = "run.json is damaged, so data, settings and commands are not shown."


@dataclass(frozen=True)
class Metrics:
    """What a step measured, one line of metrics.jsonl: None is not measured, nan measured and not
    finite, for which JSON has no word but null.
    """

    step: int  # optimizer steps done
    loss: float | None = None  # nats per token, of the step's batch
    lr: float | None = None  # learning rate
    grad_norm: float | None = None  # before clipping
    tokens_per_second: float | None = None
    skipped: int | None = None  # of a skipped step: how many float16 overflow has skipped by now
    memory: int | None = None  # bytes, the most so far; 0 where the system does not say
    seconds: float | None = None  # since this process began to train
    val_loss: float | None = None  # nats per token, of all held-out text
    bits_per_byte: float | None = None  # the same, by the bytes of its text: UTF-8
    more: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> Metrics:
        """A line as an object; ValueError where it has no step, or other values than numbers."""
        if not (is_count(stored.get("step")) and all(map(is_measured, stored.values()))):
            raise ValueError(f"these are no metrics: {stored!r:.60}")
        numbers: dict[str, Any] = {k: math.nan if v is None else v for k, v in stored.items()}
        known = {name: numbers.pop(name) for name in MEASURED if name in numbers}
        return cls(**known, more=numbers)

    def to_json(self) -> dict[str, float | None]:
        """The line as an object that JSON can hold."""
        known = {name: getattr(self, name) for name in MEASURED}
        measured = {name: value for name, value in known.items() if value is not None}
        return {name: finite_or_none(value) for name, value in {**measured, **self.more}.items()}


MEASURED = tuple(part.name for part in fields(Metrics) if part.name != "more")


@dataclass(frozen=True)
class Sample:
    """What the model wrote at an evaluation, one line of samples.jsonl."""

    step: int
    prompt: str
    text: str
    more: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> Sample:
        """A line as an object; ValueError where it is none."""
        more = dict(stored)
        step, prompt, text = (more.pop(name, None) for name in ("step", "prompt", "text"))
        if not (is_count(step) and isinstance(prompt, str) and isinstance(text, str)):
            raise ValueError(f"this is no sample: {stored!r:.60}")
        assert isinstance(step, int)
        return cls(step, prompt, text, more)

    def to_json(self) -> dict[str, object]:
        """The line as an object that JSON can hold."""
        return {"step": self.step, "prompt": self.prompt, "text": self.text, **self.more}


@dataclass(frozen=True)
class JsonObject:
    """An object in a JSON file, whose fields are those of the dataclass. One that the file lacks is
    None; what has no field, or a value of another kind than its field, is in `more`.
    """

    more: Mapping[str, object] = field(default_factory=dict, kw_only=True)

    @classmethod
    def json_keys(cls) -> dict[str, str]:
        """From each field to what it is called in the file."""
        return {part.name: part.name for part in fields(cls) if part.name != "more"}

    @classmethod
    def from_json(cls: type[J], stored: Mapping[str, object]) -> J:
        """The object, whatever it holds."""
        kinds, known, more = _kinds(cls), {}, dict(stored)
        for name, key in cls.json_keys().items():
            if key in stored and _fits(stored[key], kinds[name]):
                value = more.pop(key)
                known[name] = tuple(value) if isinstance(value, list) else value
        return cls(**known, more=more)

    def to_json(self) -> dict[str, Any]:
        """The object as JSON can hold it, in the order of the fields."""
        values = {key: getattr(self, name) for name, key in self.json_keys().items()}
        known = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        return {**known, **self.more}


@dataclass(frozen=True)
class Session(JsonObject):
    """One start of a run: from the first, or from a checkpoint."""

    command: str | None = None  # as it can be pasted
    started: str | None = None  # ISO 8601
    from_step: int | None = None
    device: str | None = None
    dtype: str | None = None
    world_size: int | None = None  # processes
    versions: Mapping[str, object] | None = None  # of minigpt2, python, torch and the platform


@dataclass(frozen=True)
class ModelInfo(JsonObject):
    """The model of a run."""

    source: str | None = None  # a preset, a folder, or an id of the Hub
    source_kind: str | None = None  # which of them: "preset", "folder", "hub"
    pretrained: bool | None = None  # trained before this run began
    n_parameters: int | None = None
    n_trained: int | None = None  # parameters
    lora_rank: int | None = None
    config: Mapping[str, object] | None = None  # GPT2Config's fields


@dataclass(frozen=True)
class DataInfo(JsonObject):
    """The text of a run. In `more` is also what was counted while it was prepared, such as
    duplicates, and, by their flags, the options of the text that are not as by default.
    """

    paths: tuple[str, ...] | None = None
    val_paths: tuple[str, ...] | None = None
    n_documents: int | None = None
    n_characters: int | None = None
    n_tokens: int | None = None
    n_train_tokens: int | None = None
    n_val_tokens: int | None = None
    identity: str | None = None  # a hash of all of it

    def to_json(self) -> dict[str, Any]:
        """The object as JSON can hold it: what is in the whole text before its two parts."""
        found = super().to_json()
        parts = {name: found.pop(name) for name in ("n_train_tokens", "n_val_tokens", "identity")}
        return found | parts

    @property
    def flags(self) -> dict[str, object]:
        """The options of the text that are not as by default."""
        return {name: value for name, value in self.more.items() if name.startswith("--")}


@dataclass(frozen=True)
class Settings(JsonObject):
    """What was decided for a run, and may be another value in a resumed one."""

    max_steps: int | None = None
    batch_size: int | None = None  # sequences per step, of all processes
    micro_batch_size: int | None = None  # sequences computed at once
    block_size: int | None = None  # tokens per sequence
    learning_rate: float | None = None  # the peak
    warmup_steps: int | None = None
    weight_decay: float | None = None
    grad_clip: float | None = None  # norm; 0 is no clipping
    eval_every: int | None = None  # steps
    save_every: int | None = None  # steps
    patience: int | None = None  # evaluations; 0 is without end
    seed: int | None = None
    dropout: float | None = None
    way: str | None = None  # in which steps are computed, a row of WAYS; None is torch's own
    dtype: str | None = None

    def changes(self, before: Settings) -> dict[str, tuple[object, object]]:
        """By name, (before, now) of each setting that has another value; those that `before` does
        not know have not changed.
        """
        was, now = before.to_json(), self.to_json()
        return {k: (was[k], now[k]) for k in now if was.get(k) not in (None, now[k])}


@dataclass(frozen=True)
class RunInfo:
    """What a run was started with: run.json."""

    sessions: tuple[Session, ...] = ()
    model: ModelInfo = ModelInfo()
    data: DataInfo = DataInfo()
    options: Mapping[str, Any] | None = None  # flags that are not as by default, with their values
    settings: Settings = Settings()
    memory: Mapping[str, object] | None = None  # bytes of one process, forecast, and their "total"
    more: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> RunInfo:
        """A file as a record; InputError where a part of it is something else."""
        more = dict(stored)
        parts = {name: _object(name, more.pop(name, {})) for name in ("model", "data", "settings")}
        options, memory = (
            _object(name, more.pop(name)) if name in more else None
            for name in ("options", "memory")
        )
        sessions = more.pop("sessions", [])
        if not isinstance(sessions, list):
            raise InputError(f"sessions is {sessions!r:.60}, expected a list")
        return cls(
            tuple(Session.from_json(_object("a session", session)) for session in sessions),
            ModelInfo.from_json(parts["model"]),
            DataInfo.from_json(parts["data"]),
            options,
            Settings.from_json(parts["settings"]),
            memory,
            more,
        )

    def to_json(self) -> dict[str, Any]:
        """The file's object."""
        parts = {
            "sessions": [session.to_json() for session in self.sessions],
            "model": self.model.to_json(),
            "data": self.data.to_json(),
            "options": self.options,
            "settings": self.settings.to_json(),
            "memory": self.memory,
        }
        return {name: part for name, part in parts.items() if part is not None} | {**self.more}


@dataclass(frozen=True)
class Record:
    """All that is known of a run; any part may be empty."""

    name: str
    metrics: Sequence[Metrics] = ()
    samples: Sequence[Sample] = ()
    info: RunInfo = RunInfo()
    problems: Sequence[str] = ()  # a sentence on each file that is damaged

    @property
    def pretrained(self) -> bool:
        """Whether the run started from trained weights."""
        return self.info.model.pretrained is not False


@dataclass(frozen=True)
class Evaluation:
    """The loss of held-out text after some steps."""

    step: int
    val_loss: float  # nats per token, the mean; nan when it was not a number
    bits_per_byte: float | None = None  # None where no evaluation of the run knows it

    @property
    def finite(self) -> bool:
        return math.isfinite(self.val_loss)


def number(value: object) -> float | None:
    """A value as a number that can be drawn; None when it is none, not finite or absurd."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e30 else None  # false for nan; beyond it, axes overflow


def series(metrics: Iterable[Metrics], name: str) -> list[Point]:
    """(step, value) of each step that measured what is called so."""
    found = ((number(line.step), number(getattr(line, name))) for line in metrics)
    return [(step, value) for step, value in found if step is not None and value is not None]


def thinned(points: Sequence[Point], at_most: int = 1000) -> list[Point]:
    """About at_most of the points, the same ones when there are no more: the first, the last, and
    the lowest and highest of each stretch between, so that no spike is lost.
    """
    if len(points) <= at_most:
        return list(points)
    kept, size = {0, len(points) - 1}, math.ceil(2 * len(points) / at_most)
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept.add(min(stretch, key=lambda i: points[i][1]))
        kept.add(max(stretch, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def spread(items: Sequence[T], at_most: int) -> list[T]:
    """at_most of the items, evenly spaced, with the first and the last; all when there are no
    more.
    """
    if len(items) <= at_most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (at_most - 1))] for i in range(at_most)]


def evaluations(metrics: Iterable[Metrics]) -> list[Evaluation]:
    """Every evaluation of a run, in its order.

    All are of one text, so its bytes, which an earlier version did not count, are those that a
    later evaluation knows of.
    """
    found = []
    for line in metrics:
        step, loss = number(line.step), number(line.val_loss)
        if step is not None and line.val_loss is not None:
            bits = None if loss is None else number(line.bits_per_byte)
            found.append(Evaluation(int(step), math.nan if loss is None else loss, bits))
    ratios = (e.bits_per_byte / e.val_loss for e in found if e.bits_per_byte and e.val_loss)
    per_nat = next(ratios, None)
    return found if per_nat is None else [_with_bits(e, per_nat) for e in found]


def _with_bits(evaluation: Evaluation, per_nat: float) -> Evaluation:
    if evaluation.bits_per_byte is not None:
        return evaluation
    return replace(evaluation, bits_per_byte=number(evaluation.val_loss * per_nat))


def best_of(judged: Iterable[Evaluation]) -> Evaluation | None:
    """The first evaluation with the lowest loss."""
    return min((e for e in judged if e.finite), key=lambda e: e.val_loss, default=None)


def untuned_of(judged: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation before the first step."""
    return judged[0] if judged and judged[0].step == 0 and judged[0].finite else None


def seconds_trained(metrics: Iterable[Metrics]) -> float:
    """Seconds spent training, over all processes that had a part: each counts from 0."""
    total = previous = 0.0
    for _, seconds in series(metrics, "seconds"):
        if seconds < previous:
            total += previous
        previous = seconds
    return total + previous


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 0 on."""
    return type(value) is int and value >= 0


def is_measured(value: object) -> bool:
    """Whether a value is what a step measures: a number that floats can hold, or None."""
    if value is None:
        return True
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def finite_or_none(value: float | None) -> float | None:
    """A number as JSON holds it, which has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


@cache
def _kinds(record: type) -> dict[str, Any]:
    """From the names of a record's fields to their types."""
    return get_type_hints(record)


def _fits(value: object, kind: Any) -> bool:
    """Whether a value that was read from JSON is one of a field's type."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is not None:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} is {value!r:.60}, expected an object")
    return value
