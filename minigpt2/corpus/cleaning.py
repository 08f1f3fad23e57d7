"""What is changed in texts on request, and how many documents each step changed.

Knows characters, nothing of files and tokens.

A text comes in chunks that were cut anywhere, and what is made of them is what would be made of the
whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby

from .options import TextConfig

CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # category Cc but \t, \n and \r
LINE_END = re.compile("\r\n?")
# Letters that compose with one before them: Hangul's vowels and ends, and a vowel of Kirat Rai.
JOINING = re.compile("[\u1160-\u11ff\ud7b0-\ud7ff\U00016d67]")
MARKS = re.compile(r"[^\w\s\0-\x7f]{64,}")  # is what may be so many marks on one letter
LONGEST_HELD = 2**20  # characters

Border = Callable[[str, str], bool]  # whether a text can be cut between these two characters


class Cleaner:
    """The steps that a TextConfig asks for, in their order: control characters, line ends, Unicode.

    Removing a control character can bring two others together that compose or make a line end, so
    it comes first.
    """

    counts: Counter[str]
    """Documents that each step has changed so far, by its name in TextConfig; and, if there were
    any, places where a letter with more than a million marks was cut, which are only composed and
    ordered up to there."""

    def __init__(self, text: TextConfig) -> None:
        steps: dict[str, tuple[Callable[[str], str], Border]] = {
            "remove_control_characters": (lambda part: CONTROL.sub("", part), lambda *_: True),
            "normalize_newlines": (
                lambda part: LINE_END.sub("\n", part) if "\r" in part else part,
                lambda before, after: before + after != "\r\n",
            ),
            "normalize_unicode": (_composed, lambda _, after: _composes_with_none(after)),
        }
        self._steps = {name: step for name, step in steps.items() if getattr(text, name)}
        self.counts = Counter(dict.fromkeys(self._steps, 0))

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self._steps)

    def clean(self, chunks: Iterable[str]) -> Iterator[str]:
        """One document in chunks -> the cleaned document in chunks."""
        parts, changed = iter(chunks), set[str]()
        for name, (step, border) in self._steps.items():
            parts = self._applied(name, step, self._cut(parts, border), changed)
        yield from filter(None, parts)
        self.counts.update(changed)

    def _applied(
        self, name: str, step: Callable[[str], str], parts: Iterable[str], changed: set[str]
    ) -> Iterator[str]:
        for part in parts:
            new = step(part)
            if new != part:
                changed.add(name)
            yield new

    def _cut(self, chunks: Iterable[str], border: Border) -> Iterator[str]:
        """The same text, cut only where each part can be changed by itself."""
        held, n_held, before = list[str](), 0, ""
        for chunk in filter(None, chunks):
            # From behind: most characters are borders, and each is looked at once.
            places = range(len(chunk) - 1, -1, -1)
            cut = next((at for at in places if border(chunk[at - 1 : at] or before, chunk[at])), 0)
            if cut or border(before, chunk[0]):
                yield "".join([*held, chunk[:cut]])
                held, n_held = [], 0
            held.append(chunk[cut:])
            n_held, before = n_held + len(chunk) - cut, chunk[-1]
            if n_held > LONGEST_HELD:
                self.counts["cut_in_marks"] += 1
                yield "".join(held)
                held, n_held = [], 0
        yield "".join(held)


@cache
def _composes_with_none(character: str) -> bool:
    """Whether neither it nor what stands before it changes when both are composed (NFC)."""
    first = unicodedata.normalize("NFD", character)[0]
    return not (unicodedata.category(first).startswith("M") or JOINING.match(first))


def _composed(text: str) -> str:
    # unicodedata orders the marks of a letter in quadratic time, unless they are in order.
    return unicodedata.normalize("NFC", MARKS.sub(lambda found: _ordered(found[0]), text))


def _ordered(text: str) -> str:
    """A text of the same meaning in which marks are in the order of Unicode (UAX #15)."""
    single = "".join(map(_decomposed, text))
    runs = groupby(single, lambda character: unicodedata.combining(character) > 0)
    return "".join(
        "".join(sorted(run, key=unicodedata.combining) if are_marks else run)
        for are_marks, run in runs
    )


@cache
def _decomposed(character: str) -> str:
    return unicodedata.normalize("NFD", character)
