"""Test sets that others use, judged by models: evaluate --task, its tables and its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import visible
from ..evaluation.options import EvaluateOptions
from .tables import table

if TYPE_CHECKING:
    from ..evaluation.tasks.records import Metric, TaskScore
    from ..model import GPT2
    from ..tokenizer import Tokenizer

HEAD = ("model", "metric", "figure", "published", "gap", "published by")
LARGE = 1e6  # the perplexity of a model that has learned nothing, whose digits say nothing
SHARES = ("accuracy", "bits")  # in names of figures that are small, and shown with more digits


@dataclass(frozen=True)
class Judged:
    """A model, what it made of a task, and how it was computed."""

    model: str  # as it was named
    score: TaskScore
    dtype: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """One object; null for a number that JSON has not."""
        score = self.score
        metrics = {metric.name: _metric_json(metric) for metric in score.metrics}
        about = {"model": self.model, "task": score.task, "items": score.n_items}
        how = {"protocol": score.protocol, "published_for": score.published_for}
        return {**about, "metrics": metrics, **how, "dtype": self.dtype, "device": self.device}


def judge(
    options: EvaluateOptions, models: Iterable[tuple[str, GPT2, Tokenizer]], device: str
) -> None:
    """Score every task by every model: JSON as soon as a figure is there, tables at the end."""
    from ..evaluation.tasks.table import read_items, score_items
    from .progress import ScoringBar

    items = {name: read_items(name, options.data) for name in options.task}
    judged = []
    for source, model, tokenizer in models:
        number = str(model.ln_f.weight.dtype).removeprefix("torch.")
        dtype = "int8" if options.dtype == "int8" else number
        for name, found in items.items():
            with ScoringBar(f"{source}: {name}", 0, None, unit="row", shown=True) as bar:
                score = score_items(model, tokenizer, name, found, progress=bar.reach)
            judged.append(Judged(source, score, dtype, device))
            if options.json:
                print(json.dumps(judged[-1].to_json(), allow_nan=False), flush=True)
    if not options.json:
        groups = ([one for one in judged if one.score.task == name] for name in items)
        print("\n\n".join(map(report, groups)))


def report(judged: Sequence[Judged]) -> str:
    """The figures of all models in one task, and below them what they are figures of."""
    from ..evaluation.tasks.table import TASKS

    score = judged[0].score
    rows = [HEAD, *(row for found in judged for row in _rows(found))]
    any_published = any(row[3] for row in rows[1:])
    columns = list(zip(*rows))[: len(HEAD) if any_published else 3]
    for n in {1, len(HEAD) - 1} & {*range(len(columns))}:  # text, which begins in line
        width = max(map(len, columns[n]))
        columns[n] = tuple(text.ljust(width) for text in columns[n])
    head, *rows = zip(*columns)
    lines = [f"{score.task}: {TASKS[score.task].about}", "", table(head, rows), ""]
    if not any_published:
        lines.append("no figure is published for models of this shape")
    text = f"{score.n_items:,} item{'s' * (score.n_items != 1)}; on {judged[0].device} in "
    text += judged[0].dtype
    if any(metric.error is not None for found in judged for metric in found.score.metrics):
        text += "; ± standard error over items"
    return "\n".join([*lines, text, score.protocol])


def _rows(found: Judged) -> Iterator[list[str]]:
    """A model's rows of the table: of each figure one, and one more for each further source."""
    model = visible(found.model)
    for metric in found.score.metrics:
        error = "" if metric.error is None else f" ± {_number(metric, metric.error)}"
        begin = [model, metric.name, f"{_number(metric, metric.value)}{error}"]
        for other, gap in zip(metric.published, metric.gaps):
            end = [_number(metric, other.value), f"{'+' * (gap >= 0)}{_number(metric, gap)}"]
            yield [*begin, *end, f"{other.who}: {other.protocol}"]
            begin = ["", "", ""]
        if not metric.published:
            yield [*begin, "", "", ""]
        model = ""


def _number(metric: Metric, value: float) -> str:
    if any(share in metric.name for share in SHARES):
        return f"{value:.4f}"
    return f"{value:,.2f}" if abs(value) < LARGE else f"{value:.3g}"


def _metric_json(metric: Metric) -> dict[str, Any]:
    published = [
        {"value": other.value, "gap": _finite(gap), "by": other.who, "protocol": other.protocol}
        for other, gap in zip(metric.published, metric.gaps)
    ]
    error = None if metric.error is None else _finite(metric.error)
    return {"value": _finite(metric.value), "standard_error": error, "published": published}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
