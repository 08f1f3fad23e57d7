"""What a person who waits for a run sees on stderr.

Takes numbers, knows nothing of where they come from.
"""

from __future__ import annotations

import math
import sys

from tqdm import tqdm

from ..loss import perplexity
from ..runs.record import Metrics
from ..system.streams import draws_over

SECONDS = 0.5  # between two pictures of the bar: a notebook is sent, and may keep, each of them


class Progress:
    """A bar with loss, tokens per second and time left on a terminal and in a notebook, and one
    line per evaluation everywhere. Without colours: it moves by carriage returns alone.
    """

    def __init__(self, *, done: int, total: int) -> None:
        self._bar = tqdm(
            initial=done,
            total=total,
            unit="step",
            disable=not draws_over(sys.stderr),
            file=sys.stderr,
            smoothing=0.1,
            mininterval=SECONDS,
        )

    def update(self, metrics: Metrics) -> None:
        """Show one step's metrics, and its evaluation if it has one."""
        if metrics.loss is not None:
            loss, rate = _shown(metrics.loss, 3), metrics.tokens_per_second or 0
            self._bar.set_postfix_str(f"loss {loss}, {rate:,.0f} tok/s", refresh=False)
            self._bar.update(1)
        if metrics.val_loss is not None:
            self._bar.write(evaluation_line(metrics), file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()


def evaluation_line(metrics: Metrics) -> str:
    """One line for an evaluation, in a fixed order."""
    assert metrics.val_loss is not None, "without held-out loss it is no evaluation"
    parts = [f"step {metrics.step:>6}"]
    if metrics.loss is not None:
        parts.append(f"loss {_shown(metrics.loss, 4)}")
    parts += [
        f"val loss {metrics.val_loss:.4f}",
        f"perplexity {perplexity(metrics.val_loss):,.1f}",
    ]
    if metrics.bits_per_byte is not None:
        parts.append(f"bits per byte {metrics.bits_per_byte:.3f}")
    return " | ".join(parts)


def _shown(loss: float, digits: int) -> str:
    return f"{loss:.{digits}f}" if math.isfinite(loss) else "not finite"
