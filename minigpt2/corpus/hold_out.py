"""Which documents are held out to judge a model.

Knows lengths and equality of documents, nothing of what is in them.

Whole documents are held out, so that no held-out sentence continues one that was learned. A
document is decided on when it is met, from those before it alone. Documents added at the end move
none of those before, if these decisions hold out half of the share or more, before and after; where
they do not, another document is chosen, or cut, which later ones may undo. That takes few
documents: with a share of 0.1 and lengths of 200 to 800 tokens, up to 50 more documents moved some
in 684 of 1,000 texts of 5 documents, in 1 of 1,000 of 20, and in none of 25 or more; with a share
of 0.01 in 5 of 1,000 of 100; with very uneven lengths (log-normal, sigma 2) and a share of 0.1 in
34 of 1,000 of 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MUCH_LONGER = 4  # in doublings: a document this much longer than another counts as if no longer
FEWEST = 2  # tokens of a part of a document: one to look at and one to predict


@dataclass(frozen=True)
class Split:
    """What is held out: whole documents, and, where they are too few for that, the end of one."""

    held: np.ndarray  # (documents,) bool
    cut_document: int = -1  # -1 for none
    cut_at: int = 0  # its first held-out token

    @property
    def holds_out(self) -> bool:
        return bool(self.held.any()) or self.cut_document >= 0


def hold_out(lengths: np.ndarray, keys: Sequence[bytes], fraction: float) -> Split:
    """Hold out about `fraction` of the tokens; copies, documents of equal keys, go together.

    lengths (documents,) in tokens; keys are hashes of the documents. A document is held out if the
    share of the tokens met so far, itself included, allows it, give or take half of it, by its
    hash. If less than half the share was found so, which takes few documents, or large ones that
    outweigh the others, the document nearest to what is missing is added if it is between half and
    twice that, or else the end of the longest document that has no copy. Nothing at all is held out
    where no document has 2 * FEWEST tokens, or where each of the few documents has a copy.
    """
    first = _first_copies(keys)
    original = first == np.arange(len(lengths))
    whole = np.bincount(first, weights=lengths, minlength=len(lengths)).astype(np.int64)
    held = _as_they_come(np.where(original, lengths, 0), keys, fraction)
    if held[original].all():
        held[whole.argmax()] = False  # there must be something to train on
    wanted = fraction * float(lengths.sum())
    missing = wanted - float(whole[held].sum())
    cut_document, cut_at = -1, 0
    if missing > wanted / 2:
        free = original & ~held
        fitting = np.flatnonzero(free & (whole >= missing / 2) & (whole <= 2 * missing))
        single = np.flatnonzero(free & (whole == lengths) & (lengths >= 2 * FEWEST))
        if len(fitting) and free.sum() > 1:
            held[fitting[np.abs(whole[fitting] - missing).argmin()]] = True
        elif len(single):
            cut_document = int(single[lengths[single].argmax()])
            length = int(lengths[cut_document])
            cut_at = length - min(max(FEWEST, round(missing)), length - FEWEST)
    return Split(held[first], cut_document, cut_at)


def _first_copies(keys: Sequence[bytes]) -> np.ndarray:
    """For each document the number of the first that is equal to it: its own, mostly."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(key, n) for n, key in enumerate(keys)], np.int64)


def _as_they_come(lengths: np.ndarray, keys: Sequence[bytes], fraction: float) -> np.ndarray:
    """Which documents are held out, each decided by those before it; length 0 is none.

    A book weighs little in the decision about a note, or all notes after it would be held out in
    place of a tenth of it. So lengths are summed by their number of binary digits.
    """
    held = np.zeros(len(lengths), bool)
    all_lengths, held_lengths = _LengthSum(), _LengthSum()
    for number, (length, key) in enumerate(zip(lengths.tolist(), keys)):
        if not length:
            continue
        all_lengths.add(length)
        # from half a document early to exactly on time: no rhythm that a text could share
        patience = 0.5 + int.from_bytes(key[:4], "big") / 2**33
        seen, held_seen = all_lengths.seen_by(length), held_lengths.seen_by(length)
        if held_seen + patience * length <= fraction * seen:
            held_lengths.add(length)
            held[number] = True
    return held


class _LengthSum:
    """The sum of lengths, as a document of some length sees it."""

    def __init__(self) -> None:
        self._seen = np.zeros(64, np.int64)  # by documents of so many digits
        self._caps = 2 ** np.minimum(np.arange(64) + MUCH_LONGER - 1, 62)

    def add(self, length: int) -> None:
        first = max(0, length.bit_length() - MUCH_LONGER + 1)  # digits that see all of it
        self._seen[first:] += length
        self._seen[:first] += self._caps[:first]

    def seen_by(self, length: int) -> int:
        return int(self._seen[length.bit_length()])
