"""Which tokens a training step sees, and which an evaluation.

A batch is a function of (seed, step) alone: nothing is counted or remembered from one step to the
next, so a run goes on anywhere from one integer. Knows token ids and their order, nothing of text
and models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..corpus.token_file import TokenFile
from ..errors import InputError, OptionError
from ..loss import IGNORE

Batch = tuple[Tensor, Tensor]
"""idx (B, T) and targets (B, T), int64: the targets are the tokens that follow idx, or IGNORE."""


class Batches:
    """The batches of a training run over N tokens, in which every token is a target once per epoch.

    The tokens are read as a circle, whose seam is one more document border (or the place where
    held-out text was cut off). Each epoch cuts the circle into windows of T targets, from another
    starting point, and draws them in another order. The last window of the circle may be shorter;
    the rest of its targets are IGNORE, and so, with `mask_prompt`, are the tokens of prompts.
    """

    windows_per_epoch: int
    """N / T, rounded up."""

    def __init__(
        self,
        tokens: TokenFile | np.ndarray,
        *,
        block_size: int,
        batch_size: int,
        seed: int,
        mask_prompt: bool = False,
    ) -> None:
        """T is `block_size`. Raises InputError unless there are T + 1 tokens, and for `mask_prompt`
        unless some of them are a prompt, and others are not.
        """
        self._ids = _ids_of(tokens)
        self._prompts = _Prompts(tokens) if mask_prompt else None
        if self._prompts:
            self._prompts.require_some()
            self._prompts.require_others(0, "training")
        self._block_size, self._batch_size, self._seed = block_size, batch_size, seed
        n_tokens = len(self._ids)
        if block_size < 1 or batch_size < 1:
            raise InputError(f"block_size {block_size} or batch_size {batch_size} is not 1 or more")
        if n_tokens < block_size + 1:
            shorter = f"block_size up to {n_tokens - 1} or " if n_tokens > 1 else ""
            counts = f"has {n_tokens:,} tokens, needs {block_size + 1:,}"
            raise OptionError(f"training part {counts}: use {shorter}more text", "block_size")
        self.windows_per_epoch = math.ceil(n_tokens / block_size)
        self._epoch, self._plan = -1, (0, np.empty(0, np.int64))

    def at(self, step: int) -> Batch:
        """Batch number `step`, from 0, of all ranks and accumulation steps: they take its rows."""
        rows = np.empty((self._batch_size, self._block_size + 1), np.int64)
        n_scored = np.empty((self._batch_size, 1), np.int64)
        starts = np.empty((self._batch_size, 1), np.int64)
        for row in range(self._batch_size):
            offset, first = self._window(step * self._batch_size + row)
            rows[row] = self._circle(offset + first)
            n_scored[row], starts[row] = len(self._ids) - first, offset + first
        columns = np.arange(self._block_size)
        scored = columns < n_scored
        if self._prompts:
            scored &= ~self._prompts.at((starts + 1 + columns) % len(self._ids))
        targets = np.where(scored, rows[:, 1:], IGNORE)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)

    def spans(self, step: int) -> list[tuple[int, int]]:
        """Where the rows of `at(step)` lie in the text: (start, T) each, in tokens.

        A row whose end is beyond the last token goes on with the first.
        """
        samples = range(step * self._batch_size, (step + 1) * self._batch_size)
        starts = [sum(self._window(sample)) % len(self._ids) for sample in samples]
        return [(start, self._block_size) for start in starts]

    def _window(self, sample: int) -> tuple[int, int]:
        """Where the epoch of a sample starts on the circle, and the sample's window after that."""
        epoch, position = divmod(sample, self.windows_per_epoch)
        offset, order = self._plan_of(epoch)
        return offset, int(order[position]) * self._block_size

    def _plan_of(self, epoch: int) -> tuple[int, np.ndarray]:
        """Where an epoch starts on the circle, and the order of its windows.

        The order takes 8 bytes per window: 20 MB for 10 GB of text at T = 1024, and three seconds
        for 20 million windows. It is kept until another epoch is asked for.
        """
        if epoch != self._epoch:
            # NumPy promises that the bits of PCG64 stay; what Generator makes of them may change
            bits = np.random.PCG64([self._seed, epoch]).random_raw(1 + self.windows_per_epoch)
            offset = int(bits[0]) % len(self._ids)
            self._plan = offset, bits[1:].argsort(kind="stable")
            self._epoch = epoch
        return self._plan

    def _circle(self, start: int) -> np.ndarray:
        """The T + 1 tokens from `start` on; from the last one it goes on with the first."""
        start %= len(self._ids)
        end = start + self._block_size + 1
        if end <= len(self._ids):
            return self._ids[start:end]
        return np.concatenate([self._ids[start:], self._ids[: end - len(self._ids)]])


class _Prompts:
    """Which tokens of a token file are those of a prompt."""

    def __init__(self, tokens: TokenFile | np.ndarray) -> None:
        assert isinstance(tokens, TokenFile), "an array does not say what its prompts are"
        self._starts = np.ascontiguousarray(tokens.prompts["start"])
        self._ends = np.ascontiguousarray(tokens.prompts["end"])
        self._n_tokens = len(tokens.tokens)

    def require_some(self) -> None:
        """Raise InputError if there are none."""
        if not len(self._starts):
            raise OptionError(
                "mask_prompt: no row is a chat, or has the fields prompt and completion; leave it "
                "out, or give rows that are or have",
                "mask_prompt",
            )

    def require_others(self, first: int, part: str) -> None:
        """Raise InputError if all tokens from `first`, 0 or 1, on are those of prompts."""
        n_others = self._n_tokens - (self._ends - self._starts).sum()
        if n_others == 0 or (first == n_others == 1 and not self.at(np.zeros(1, np.int64))[0]):
            raise OptionError(
                f"mask_prompt: the {part} part is a prompt and nothing else; use more rows, or "
                "another val_fraction",
                "mask_prompt",
                "val_fraction",
            )

    def at(self, positions: np.ndarray) -> np.ndarray:
        """For each position in the token file whether a prompt's token stands there."""
        if not len(self._starts):
            return np.zeros(positions.shape, bool)
        span = np.searchsorted(self._starts, positions, side="right") - 1
        return (span >= 0) & (positions < self._ends[span])


def validation_batches(
    tokens: TokenFile | np.ndarray, *, block_size: int, batch_size: int, mask_prompt: bool = False
) -> Iterator[Batch]:
    """The tokens in their order, each but the first a target once; the last rows may be fewer.

    Where the last row goes beyond the text, its targets are IGNORE, and so, with `mask_prompt`, are
    the tokens of prompts. Raises InputError, at once, unless there are two tokens and a target.
    """
    ids = _ids_of(tokens)
    if len(ids) < 2:
        raise OptionError(
            f"held-out part has {len(ids)} tokens, needs 2: raise val_fraction, add to val_paths, "
            "or hold out nothing with val_fraction 0",
            "val_fraction",
            "val_paths",
        )
    prompts = _Prompts(tokens) if mask_prompt else None
    if prompts:
        prompts.require_others(1, "held-out")
    starts = range(0, len(ids) - 1, block_size * batch_size)
    return (_in_rows(ids, range(at, at + starts.step), block_size, prompts) for at in starts)


def _in_rows(ids: np.ndarray, positions: range, block_size: int, prompts: _Prompts | None) -> Batch:
    """The tokens at these positions as idx, and those after them as targets."""
    positions = positions[: len(ids) - 1 - positions.start]
    n_tokens = len(positions)
    shape = (math.ceil(n_tokens / block_size), block_size)
    idx, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    idx.flat[:n_tokens] = ids[positions.start : positions.stop]
    next_positions = np.arange(positions.start, positions.stop) + 1
    next_tokens = ids[next_positions].astype(np.int64)
    if prompts:
        next_tokens[prompts.at(next_positions)] = IGNORE
    targets.flat[:n_tokens] = next_tokens
    return torch.from_numpy(idx), torch.from_numpy(targets)


def _ids_of(tokens: TokenFile | np.ndarray) -> np.ndarray:
    return tokens.tokens if isinstance(tokens, TokenFile) else tokens
