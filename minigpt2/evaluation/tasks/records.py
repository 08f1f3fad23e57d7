"""What a task is, and what a model's score in one is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import InputError
from .costs import Estimate, Judge


class TaskRow(NamedTuple):
    """A row of a test set, and where it stands, for messages."""

    where: str
    values: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field that holds text; InputError if it holds something else."""
        value = self.values[name]
        if not isinstance(value, str):
            raise self.wrong(f"{name!r} is no text")
        return value

    def texts(self, name: str) -> list[str]:
        """A field that holds several texts; InputError if it holds something else."""
        value = self.values[name]
        if not isinstance(value, list) or not value or not all(isinstance(t, str) for t in value):
            raise self.wrong(f"{name!r} is no list of texts")
        return value

    def wrong(self, reason: str) -> InputError:
        """An error that names the row."""
        return InputError(f"{self.where}: {reason}")


@dataclass(frozen=True)
class Published:
    """What somebody measured: a GPT-2 of one size in one metric, and how."""

    value: float
    who: str
    protocol: str


@dataclass(frozen=True)
class Metric:
    """A figure of a model, with its standard error, None where it is not known, and those that
    were published for a GPT-2 of its shape.
    """

    name: str
    value: float
    error: float | None
    published: tuple[Published, ...] = ()

    @property
    def gaps(self) -> tuple[float, ...]:
        """How much larger the figure is than each published one."""
        return tuple(self.value - other.value for other in self.published)


@dataclass(frozen=True)
class TaskScore:
    """What a model makes of a task."""

    task: str
    metrics: tuple[Metric, ...]
    n_items: int
    protocol: str
    published_for: str | None
    """The GPT-2 that has the shape of the model; None if none has."""

    def __getitem__(self, name: str) -> Metric:
        """The metric of this name; KeyError if there is none."""
        return {metric.name: metric for metric in self.metrics}[name]


Figures = Mapping[str, Estimate]


@dataclass(frozen=True)
class Task:
    """A test set: how it is read and scored, and where it lies."""

    about: str
    source: str
    """The path that is taken where none is given."""
    fields: tuple[tuple[str, ...], ...]
    """Groups of fields: a row has one of them. A line of a text file is a row with `text`."""
    items: Callable[[Iterable[TaskRow]], Sequence[Any]]
    """Makes items of rows; raises InputError for rows that are not of the task."""
    score: Callable[[Judge, Sequence[Any]], Figures]
    protocol: str
