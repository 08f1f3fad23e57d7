"""What a training run left in its folder, read so that no damage keeps a page from being made, and
told in plain words. Knows numbers and text, nothing of pictures and markup.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from .checkpoint import RunFolder

Metrics = Mapping[str, Any]
Point = tuple[float, float]  # step, value
T = TypeVar("T")
DAMAGED = "run.json is damaged, so data, settings and commands are not shown."
CLEARLY = 0.02  # nats: 2% in perplexity, more than evaluations of a settled run differ by
STILL = 0.005  # nats between the last two evaluations of a run that is still getting better


@dataclass(frozen=True)
class Record:
    """All that is known of a run; any part may be empty."""

    name: str
    lines: list[dict]  # of metrics.jsonl
    samples: list[dict]
    info: dict  # run.json
    problems: list[str]  # a sentence on each file that is damaged

    def part(self, name: str) -> dict:
        """One object of run.json; an empty one when it is missing or something else."""
        return as_dict(self.info.get(name))

    @property
    def pretrained(self) -> bool:
        """Whether the run started from trained weights."""
        return self.part("model").get("pretrained") is not False


@dataclass(frozen=True)
class Evaluation:
    """The mean loss per token of held-out text after some steps."""

    step: int
    val_loss: float  # nats; nan when it was not a number

    @property
    def finite(self) -> bool:
        return math.isfinite(self.val_loss)


def read_record(run: RunFolder) -> Record:
    """All that can be read of a run folder; what is missing or damaged is empty."""
    info = run.read_info()
    problems = [DAMAGED] if run.info_path.exists() and not info else []
    lines, samples = run.read_metrics(), run.read_samples()
    return Record(run.path.resolve().name, lines, samples, info, problems)


def number(line: Metrics, name: str) -> float | None:
    """A field as a number that can be drawn; None when it is missing, not finite or absurd."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e30 else None  # false for nan; beyond it, axes overflow


def series(lines: Iterable[Metrics], name: str) -> list[Point]:
    """(step, value) of each line that has both."""
    found = ((number(line, "step"), number(line, name)) for line in lines)
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


def evaluations(lines: Iterable[Metrics]) -> list[Evaluation]:
    """Every evaluation of a run, in its order."""
    found = []
    for line in lines:
        step = number(line, "step")
        if step is not None and "val_loss" in line:
            loss = number(line, "val_loss")
            found.append(Evaluation(int(step), math.nan if loss is None else loss))
    return found


def best_of(judged: Iterable[Evaluation]) -> Evaluation | None:
    """The first evaluation with the lowest loss."""
    return min((e for e in judged if e.finite), key=lambda e: e.val_loss, default=None)


def untuned_of(judged: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation before the first step."""
    return judged[0] if judged and judged[0].step == 0 and judged[0].finite else None


def perplexity(loss: float) -> float:
    """exp(loss): how many equally likely tokens the model hesitates between; inf beyond float's
    range.
    """
    return math.exp(loss) if not loss >= 700 else math.inf


def shown_perplexity(loss: float) -> str:
    """Perplexity with three digits or more."""
    value = perplexity(loss)
    if value >= 1e9:
        return f"{value:.1e}"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def summary(lines: Sequence[Metrics], *, pretrained: bool = True) -> str:
    """One sentence on how a run went.

    `pretrained` says whether the weights before the first step were trained ones.
    """
    judged = evaluations(lines)
    best, untuned = best_of(judged), untuned_of(judged)
    start = "untuned" if pretrained else "at the start"
    if not judged:
        return _unjudged(lines)
    if best is None:
        return "held-out loss was never a number: try a lower --learning-rate or --dtype float32"
    if len(judged) == 1:
        when = "before training" if best.step == 0 else f"at step {best.step:,}"
        return f"judged once, {when}: val perplexity {shown_perplexity(best.val_loss)}"
    if best is untuned:
        return _never_better(judged, best, start, memorised=_memorised(lines, judged, best))
    before = f" ({start} {shown_perplexity(untuned.val_loss)})" if untuned else ""
    return (
        f"best at step {best.step:,}: val perplexity {shown_perplexity(best.val_loss)}{before}; "
        + _afterwards(lines, judged, best)
    )


def _unjudged(lines: Sequence[Metrics]) -> str:
    losses = series(lines, "loss")
    if not losses:
        return "nothing was measured yet"
    (first, start), (last, end) = losses[0], losses[-1]
    return (
        f"no held-out text, so nothing says how well it does on new text; "
        f"training loss {start:.2f} at step {int(first):,}, {end:.2f} at step {int(last):,}"
    )


def _never_better(
    judged: Sequence[Evaluation], best: Evaluation, start: str, *, memorised: bool
) -> str:
    text = f"never better than {start} (val perplexity {shown_perplexity(best.val_loss)}): "
    later = best_of(e for e in judged if e is not best)
    if later is None:
        return text + "after that held-out loss was not a number"
    text += f"the next best is {shown_perplexity(later.val_loss)} at step {later.step:,}; "
    if memorised:
        return text + "the run memorised its text, and more text would help most"
    return text + "try a lower --learning-rate or more text"


def _afterwards(lines: Sequence[Metrics], judged: Sequence[Evaluation], best: Evaluation) -> str:
    last = judged[-1]
    if not last.finite:
        return f"held-out loss was not a number at step {last.step:,}"
    if best is last:
        improving = judged[-2].val_loss - best.val_loss > STILL
        return "still improving, more steps may help" if improving else "level at the end"
    if last.val_loss - best.val_loss <= CLEARLY:
        return "after that it stayed level"
    if _memorised(lines, judged, best):
        return "after that the run memorised"
    return f"after that it got worse (val perplexity {shown_perplexity(last.val_loss)})"


def _memorised(lines: Sequence[Metrics], judged: Sequence[Evaluation], best: Evaluation) -> bool:
    """Whether held-out text ended clearly worse than at its best while training loss kept
    falling.
    """
    steps, last = [evaluation.step for evaluation in judged], judged[-1]
    at = judged.index(best)
    around_best = (steps[at - 1], best.step) if at else (best.step, steps[1])
    losses = series(lines, "loss")
    early, late = (
        [loss for step, loss in losses if begin < step <= end]
        for begin, end in (around_best, (steps[-2], last.step))
    )
    worse = last.val_loss - best.val_loss > CLEARLY
    # a run that diverged may fall back a little too
    return bool(worse and early and late and fmean(late) < min(fmean(early), losses[0][1]))


def duration(lines: Iterable[Metrics]) -> float:
    """Seconds spent training, over all processes that had a part: each counts from 0."""
    total = previous = 0.0
    for _, seconds in series(lines, "seconds"):
        if seconds < previous:
            total += previous
        previous = seconds
    return total + previous


def shown_duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def shown_size(n_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    unit, power = size_unit(n_bytes)
    return (
        f"{n_bytes / power:.3g} {unit}" if n_bytes < 999 * power else f"{n_bytes / power:,.0f} GiB"
    )


def size_unit(n_bytes: float) -> tuple[str, int]:
    """MiB or GiB, and the bytes in one."""
    return ("GiB", 2**30) if n_bytes >= 999 * 2**20 else ("MiB", 2**20)


def clean(text: object) -> str:
    """Text that a page may hold: control characters, lone surrogates and noncharacters become
    U+FFFD, line ends become line feeds.
    """
    plain = str(text).replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or not _forbidden(c) else "\ufffd" for c in plain)


def as_dict(value: object) -> dict:
    """The value when it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list:
    """The value when it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def _forbidden(character: str) -> bool:
    code = ord(character)
    nonchar = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return nonchar or unicodedata.category(character) in ("Cc", "Cs")
