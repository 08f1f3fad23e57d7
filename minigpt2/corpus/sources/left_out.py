"""What lay among texts and was not taken as one, counted by kind and reason.

Knows names, nothing of what is in files.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .files import suffixes_of

FOLDER = "folder"
MOST_KINDS = 20  # that are listed one by one


@dataclass(frozen=True)
class LeftOut:
    """Entries of a folder or glob that are of one kind, and were left out for one reason."""

    kind: str  # a suffix, or "folder", "pipe", ...
    reason: str
    count: int
    example: str  # the path of one


class Tally:
    """Counts what is left out while it is found: each path once, however often it is met."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str]] = {}  # from a path to its kind and the reason

    def add(self, path: Path | str, reason: str, kind: str = "") -> None:
        """Count one entry, whose kind is by default its suffix."""
        self._found.setdefault(str(path), (kind or kind_of_name(str(path)), reason))

    def merge(self, other: Tally) -> None:
        """Count what was counted elsewhere."""
        self._found = {**other._found, **self._found}

    def all(self, but: Container[str] = ()) -> tuple[LeftOut, ...]:
        """All of it but for some paths, the most first."""
        ones = ((key, path) for path, key in sorted(self._found.items()) if path not in but)
        return added_up(LeftOut(*key, 1, path) for key, path in ones)


def added_up(left_out: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """Those of one kind and reason as one, the most first."""
    sums: dict[tuple[str, str], LeftOut] = {}
    for new in left_out:
        old = sums.get((new.kind, new.reason), replace(new, count=0))
        sums[new.kind, new.reason] = replace(old, count=old.count + new.count)
    return tuple(sorted(sums.values(), key=lambda left: (-left.count, left.kind, left.reason)))


def kind_of_name(name: str) -> str:
    """What files of this name are counted as."""
    return "".join(suffixes_of(name)) or "without suffix"


def numbers_in_words(numbers: Mapping[str, int]) -> str:
    """How many of each kind, the most first: "12 .txt, 3 .md, 5 of 2 other kinds"."""
    ranked = sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    listed, others = ranked[:MOST_KINDS], ranked[MOST_KINDS:]
    if len(others) == 1:
        listed, others = ranked, []
    parts = [f"{number:,} {_plural(kind, number)}" for kind, number in listed]
    if others:
        parts.append(f"{sum(number for _, number in others):,} of {len(others)} other kinds")
    return ", ".join(parts)


def reasons_in_words(left_out: Iterable[LeftOut]) -> dict[str, str]:
    """One line for each reason, "4 .png, 1 folder (hidden)", and the path of one such entry."""
    by_reason: dict[str, dict[str, int]] = {}
    examples: dict[str, str] = {}
    for left in left_out:
        by_reason.setdefault(left.reason, {})[left.kind] = left.count
        examples.setdefault(left.reason, left.example)
    return {
        f"{numbers_in_words(kinds)} ({reason})": examples[reason]
        for reason, kinds in by_reason.items()
    }


def _plural(kind: str, number: int) -> str:
    words = (FOLDER, "pipe", "socket", "device", "link")
    return kind + "s" * (number != 1 and kind in words)
