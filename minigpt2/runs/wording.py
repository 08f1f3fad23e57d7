"""A run's numbers in words, for card, page and screen."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from statistics import fmean

from ..loss import perplexity
from .record import Evaluation, Metrics, best_of, evaluations, series, untuned_of

CLEARLY = 0.02  # nats: 2% in perplexity, more than evaluations of a settled run differ by
BITS = (
    "Bits per byte: what all scored tokens cost, ends of texts included, divided by the UTF-8 "
    "bytes of their text; unlike perplexity it compares models whose tokenizers differ."
)
STILL = 0.005  # nats between the last two evaluations of a run that is still getting better


def summary(metrics: Sequence[Metrics], *, pretrained: bool = True) -> str:
    """One sentence on how a run went.

    `pretrained` says whether the weights before the first step were trained ones.
    """
    judged = evaluations(metrics)
    best, untuned = best_of(judged), untuned_of(judged)
    start = "untuned" if pretrained else "at the start"
    if not judged:
        return _unjudged(metrics)
    if best is None:
        return "held-out loss was never a number: try a lower --learning-rate or --dtype float32"
    if len(judged) == 1:
        when = "before training" if best.step == 0 else f"at step {best.step:,}"
        return f"judged once, {when}: val {_judgement(best)}"
    if best is untuned:
        return _never_better(judged, best, start, memorised=_memorised(metrics, judged, best))
    before = f" ({start} {' and '.join(_figures(untuned))})" if untuned else ""
    after = _afterwards(metrics, judged, best)
    return f"best at step {best.step:,}: val {_judgement(best)}{before}; {after}"


def _unjudged(metrics: Sequence[Metrics]) -> str:
    losses = series(metrics, "loss")
    if not losses:
        return "nothing was measured yet"
    (first, start), (last, end) = losses[0], losses[-1]
    return (
        f"no held-out text, so nothing says how well it does on new text; "
        f"training loss {start:.2f} at step {int(first):,}, {end:.2f} at step {int(last):,}"
    )


def _judgement(evaluation: Evaluation) -> str:
    """What an evaluation found: bits per byte where they are known."""
    names = ("perplexity", "bits per byte")
    return ", ".join(f"{name} {value}" for name, value in zip(names, _figures(evaluation)))


def _figures(evaluation: Evaluation) -> list[str]:
    bits = evaluation.bits_per_byte
    shown = [] if bits is None else [shown_bits(bits)]
    return [shown_perplexity(evaluation.val_loss), *shown]


def _never_better(
    judged: Sequence[Evaluation], best: Evaluation, start: str, *, memorised: bool
) -> str:
    text = f"never better than {start} (val {_judgement(best)}): "
    later = best_of(e for e in judged if e is not best)
    if later is None:
        return text + "after that held-out loss was not a number"
    text += f"the next best is {shown_perplexity(later.val_loss)} at step {later.step:,}; "
    if memorised:
        return text + "the run memorised its text, and more text would help most"
    return text + "try a lower --learning-rate or more text"


def _afterwards(metrics: Sequence[Metrics], judged: Sequence[Evaluation], best: Evaluation) -> str:
    last = judged[-1]
    if not last.finite:
        return f"held-out loss was not a number at step {last.step:,}"
    if best is last:
        improving = judged[-2].val_loss - best.val_loss > STILL
        return "still improving, more steps may help" if improving else "level at the end"
    if last.val_loss - best.val_loss <= CLEARLY:
        return "after that it stayed level"
    if _memorised(metrics, judged, best):
        return "after that the run memorised"
    return f"after that it got worse (val perplexity {shown_perplexity(last.val_loss)})"


def _memorised(metrics: Sequence[Metrics], judged: Sequence[Evaluation], best: Evaluation) -> bool:
    """Whether held-out text ended clearly worse than at its best while training loss kept
    falling.
    """
    steps, last = [evaluation.step for evaluation in judged], judged[-1]
    at = judged.index(best)
    around_best = (steps[at - 1], best.step) if at else (best.step, steps[1])
    losses = series(metrics, "loss")
    early, late = (
        [loss for step, loss in losses if begin < step <= end]
        for begin, end in (around_best, (steps[-2], last.step))
    )
    worse = last.val_loss - best.val_loss > CLEARLY
    # a run that diverged may fall back a little too
    return bool(worse and early and late and fmean(late) < min(fmean(early), losses[0][1]))


def shown_perplexity(loss: float) -> str:
    """Perplexity with three digits or more."""
    value = perplexity(loss)
    if value >= 1e9:
        return f"{value:.1e}"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def shown_bits(bits: float) -> str:
    """Bits per byte: what a person calls a gain is a few thousandths."""
    return f"{bits:.3f}" if bits < 1e6 else f"{bits:.1e}"


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


def _forbidden(character: str) -> bool:
    code = ord(character)
    nonchar = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return nonchar or unicodedata.category(character) in ("Cc", "Cs")
