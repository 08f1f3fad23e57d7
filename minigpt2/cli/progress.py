"""What a person who waits sees on stderr. Takes numbers, knows nothing of where they come from."""

from __future__ import annotations

import math
import sys

from tqdm import tqdm

from ..loss import perplexity
from ..runs.record import Metrics


class Progress:
    """A bar with loss, tokens per second and time left on a terminal, and one line per evaluation
    everywhere.
    """

    def __init__(self, *, done: int, total: int) -> None:
        self._bar = tqdm(
            initial=done, total=total, unit="step", disable=None, file=sys.stderr, smoothing=0.1
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
    return " | ".join(parts)


def _shown(loss: float, digits: int) -> str:
    return f"{loss:.{digits}f}" if math.isfinite(loss) else "not finite"


class TokenBar:
    """How many tokens of several samples are there, on a terminal."""

    def __init__(self, n_rows: int, max_new_tokens: int) -> None:
        self._each, self._rows = max_new_tokens, 0
        self._bar = tqdm(
            total=n_rows * max_new_tokens,
            unit="token",
            disable=None if n_rows > 1 else True,
            file=sys.stderr,
            leave=False,
        )

    def update(self, n_tokens: int) -> None:
        """Count new tokens."""
        self._bar.update(n_tokens)

    def finish_rows(self, n_rows: int) -> None:
        """Count rows that have ended as whole, although they may be shorter or longer."""
        self._rows += n_rows
        self._bar.update(self._rows * self._each - self._bar.n)
        self._bar.clear()

    def __enter__(self) -> TokenBar:
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.close()
