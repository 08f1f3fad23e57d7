"""Documents that nearly repeat others: MinHash over runs of token ids, by datasketch.

Two documents are as alike as the share of their runs of N_GRAM ids that they have in common
(Jaccard), estimated by MinHash (Broder 1997). Knows ids, nothing of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import OptionError

N_GRAM = 5  # ids: short enough for a changed word to change few of them, long enough to be rare
THRESHOLD = 0.8  # as in Lee et al. 2022, "Deduplicating Training Data", section 4.2
N_PERMUTATIONS = 128  # the estimate of a likeness of 0.8 is within 0.07 in 95 of 100 cases
BLOCK = 2**14  # runs that are hashed at once


def near_duplicates(documents: Iterable[np.ndarray], *, threshold: float = THRESHOLD) -> np.ndarray:
    """For each document (T,) of ids the number of the earliest kept one that it nearly repeats, or
    -1: then it is kept itself, and later ones are compared with it.

    So what is dropped is like something that is kept, not only like something else that is dropped.
    A document shorter than N_GRAM ids is its own only run. Takes 1 kB of memory and more for a
    document. Raises InputError without datasketch.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as problem:
        raise OptionError(
            "duplicates drop-near needs datasketch: pip install datasketch", "duplicates"
        ) from problem

    empty = MinHash(N_PERMUTATIONS, seed=1, hashfunc=int)
    index, kept, found = MinHashLSH(threshold, N_PERMUTATIONS), dict[int, MinHash](), list[int]()
    for number, ids in enumerate(documents):
        signature = empty.copy()
        for hashes in _hashes(np.asarray(ids)):
            signature.update_batch(hashes.tolist())
        near = (int(str(other)) for other in index.query(signature))
        similar = [other for other in near if kept[other].jaccard(signature) >= threshold]
        found.append(min(similar, default=-1))
        if not similar:
            index.insert(number, signature)
            kept[number] = signature
    return np.array(found, np.int64)


def _hashes(ids: np.ndarray) -> Iterator[np.ndarray]:
    """A number below 2^32 for each run of ids, the same for equal runs, in blocks."""
    if len(ids) < N_GRAM:
        ids = np.concatenate([ids, np.full(N_GRAM - len(ids), 2**32 - 1)])
    for start in range(0, len(ids) - N_GRAM + 1, BLOCK):
        block = ids[start : start + BLOCK + N_GRAM - 1].astype(np.uint64)
        runs = np.lib.stride_tricks.sliding_window_view(block, N_GRAM)
        mixed = np.zeros(len(runs), np.uint64)
        for column in range(N_GRAM):
            mixed = _mixed(mixed ^ runs[:, column])
        yield np.unique(mixed >> np.uint64(32))


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every bit of a value changes half the bits of the result."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
