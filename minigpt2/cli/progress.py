"""What a person who waits for samples, or for a judgement, sees on stderr."""

from __future__ import annotations

import sys

from tqdm import tqdm

from ..errors import visible
from ..system.streams import draws_over


class TokenBar:
    """How many tokens of several samples are there, on a terminal."""

    def __init__(self, n_rows: int, max_new_tokens: int) -> None:
        self._each, self._rows = max_new_tokens, 0
        self._bar = tqdm(
            total=n_rows * max_new_tokens,
            unit="token",
            disable=n_rows == 1 or not draws_over(sys.stderr),
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


class ScoringBar:
    """How much of a text a model has scored, on a terminal."""

    def __init__(
        self, name: str, done: int, total: int | None, *, shown: bool, unit: str = "token"
    ) -> None:
        self._bar = tqdm(
            desc=visible(name),
            initial=done,
            total=total,
            unit=unit,
            unit_scale=True,
            disable=not (shown and draws_over(sys.stderr)),
            file=sys.stderr,
            leave=False,
        )

    def update(self, place: int) -> None:
        """Show that everything up to this place is scored."""
        self._bar.update(place - self._bar.n)

    def reach(self, place: int, total: int) -> None:
        """The same, where how much there is comes to be known while it is done."""
        self._bar.total = total
        self.update(place)

    def __enter__(self) -> ScoringBar:
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.close()
