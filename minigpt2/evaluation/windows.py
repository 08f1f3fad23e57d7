"""Where a model looks when it reads a text longer than it can: windows that overlap, in groups.

A model reads block_size tokens at most. So a longer row is read in windows, each of which begins
`stride` tokens behind the one before it, and scores the tokens that no earlier one has scored: all
of the first window's, the last `stride` of any other's. Every token but a row's first is scored
once, after at least block_size - stride + 1 tokens where the row has them. With a stride of
block_size the windows do not overlap, as in the held-out loss of a training run; with 1 every
token is scored after all that the model can read, in a forward pass of its own.

Windows are made when they are asked for, so rows may be longer than memory. They come in groups
that are cut by the rows, block_size and stride alone, so that whoever computes a group, alone or
beside others, computes the same.

Knows places, nothing of ids and models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..arguments import refuse, whole

GROUP_TOKENS = 2**14  # read by the windows of a group, and at most block_size - 1 more
WINDOWS_AT_ONCE = 4096  # made, before they are cut into groups

Rows = tuple[np.ndarray, np.ndarray]
"""Where some rows begin, and where they end, in the ids that hold all of them: (R,) int64 both."""


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows: of each, the tokens start to end - 2 are read, and first to end - 1 scored."""

    start: np.ndarray  # (W,) int64, as those below
    first: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, chosen: slice | np.ndarray) -> Windows:
        return Windows(self.start[chosen], self.first[chosen], self.end[chosen])


def groups_of(rows: Iterable[Rows], block_size: int, stride: int) -> Iterator[Windows]:
    """The windows of rows that come one after the other in their ids, in order, in groups; rows of
    one token, or none, have no windows.
    """
    for begins, ends in rows:
        n_behind = np.maximum(ends - begins - 1 - block_size, 0)  # tokens behind the first window
        n_windows = np.where(ends - begins > 1, 1 - (-n_behind // stride), 0)
        up_to = n_windows.cumsum()  # windows of this row and those before it
        total = int(up_to[-1]) if len(up_to) else 0
        for at in range(0, total, WINDOWS_AT_ONCE):
            numbers = np.arange(at, min(at + WINDOWS_AT_ONCE, total))
            row = up_to.searchsorted(numbers, side="right")
            behind = (numbers - up_to[row] + n_windows[row]) * stride
            start = begins[row] + behind
            end = np.minimum(start + block_size + 1, ends[row])
            # the window before this one ends where this one begins to score
            first = np.where(behind == 0, start + 1, start - stride + block_size + 1)
            yield from _cut(Windows(start, first, end))


def _cut(windows: Windows) -> Iterator[Windows]:
    n_read = windows.end - 1 - windows.start
    group = (n_read.cumsum() - n_read) // GROUP_TOKENS
    borders = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(windows)]
    for start, end in pairwise(borders):
        yield windows[start:end]


def checked_stride(stride: int | None, block_size: int) -> int:
    """A stride from 1 to block_size; None is half of it, rounded up. Raises OptionError."""
    if stride is None:
        return block_size - block_size // 2
    stride = whole("stride", stride, least=None)
    if not 1 <= stride <= block_size:
        raise refuse("stride", stride, f"from 1 to the model's block_size, {block_size}")
    return stride
