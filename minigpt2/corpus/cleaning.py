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

from .options import TextConfig

CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # category Cc but \t, \n and \r
LINE_END = re.compile("\r\n?")
# No character of these blocks (Latin, Greek, Cyrillic, kana, Chinese, Korean) changes because of
# what stands before it, so a text may be cut before one; but "\n" may belong to a "\r".
SAFE = "".join(
    [
        r"\0-\x09\x0b-\u02ff\u0370-\u0482\u048a-\u058f",
        r"\u3000-\u3029\u3041-\u3096\u30a1-\u30fa\u3400-\u9fff\uac00-\ud7a3",
    ]
)
SAFE_CUT = re.compile(f"(?s:.*)(?=[{SAFE}])")


class Cleaner:
    """The steps that a TextConfig asks for, in their order: control characters, line ends, Unicode.

    Removing a control character can bring two others together that compose or make a line end, so
    it comes first.
    """

    counts: Counter[str]
    """Documents that each step has changed so far, by its name in TextConfig."""

    def __init__(self, text: TextConfig) -> None:
        steps: dict[str, Callable[[str], str]] = {
            "remove_control_characters": lambda part: CONTROL.sub("", part),
            "normalize_newlines": lambda part: LINE_END.sub("\n", part) if "\r" in part else part,
            "normalize_unicode": lambda part: unicodedata.normalize("NFC", part),
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
        for name, step in self._steps.items():
            parts = self._applied(name, step, parts, changed)
        yield from filter(None, parts)
        self.counts.update(changed)

    def _applied(
        self, name: str, step: Callable[[str], str], chunks: Iterable[str], changed: set[str]
    ) -> Iterator[str]:
        for part in _cut_safely(chunks):
            new = step(part)
            if new != part:
                changed.add(name)
            yield new


def _cut_safely(chunks: Iterable[str]) -> Iterator[str]:
    """The same text, cut only where each part can be changed by itself."""
    held = ""
    for chunk in chunks:
        held += chunk
        if (cut := SAFE_CUT.match(held)) and cut.end():
            yield held[: cut.end()]
            held = held[cut.end() :]
    if held:
        yield held
