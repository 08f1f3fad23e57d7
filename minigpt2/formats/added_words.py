"""Words added to a vocabulary: found in a text before it is cut into pieces.

What transformers calls added tokens: special ones, such as <|user|>, and plain ones, such as a name
that shall be one token. The rules are those of the `tokenizers` library (added_vocabulary.rs): of
the words that begin first the longest counts, and the `normalized` ones are looked for in what the
others leave. Knows words and ids; nothing is merged here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# Whitespace of Unicode, as \s is in Rust; Python's own \s has U+001C to U+001F too.
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
SPACE = re.compile(f"[{SPACES}]")


@dataclass(frozen=True)
class AddedWord:
    """A word with an id of its own, and where in a text it counts."""

    name: str
    id: int
    special: bool = True  # a token only where that is asked for, else text like any other
    single_word: bool = False  # not inside a longer word
    lstrip: bool = False  # takes the whitespace on its left with it
    rstrip: bool = False  # on its right
    normalized: bool = False

    @property
    def before_space(self) -> list[str]:
        """The text that it has before each whitespace that follows something else."""
        borders = re.finditer(f"(?<=[^{SPACES}])[{SPACES}]", self.name)
        return [self.name[: border.start()] for border in borders] + [self.name] * self.rstrip


class AddedWords:
    """The added words of a vocabulary, to be found in texts."""

    def __init__(self, words: Sequence[AddedWord] = ()) -> None:
        parts = [[w for w in words if w.name and w.normalized == last] for last in (False, True)]
        self._passes = [(_pattern(part), {word.name: word for word in part}) for part in parts]
        self._has_plain = any(not word.special for word in words)
        self._has_words = any(parts)
        self.before_space = tuple({text: None for word in words for text in word.before_space})

    def split(self, text: str, *, special: bool) -> Iterator[str | int]:
        """The text between the words, and the words as their ids; those that are special count as
        text unless `special`.
        """
        if not (self._has_words if special else self._has_plain):
            yield text
            return
        first, second = self._passes
        for part in _split(text, *first, special=special):
            if isinstance(part, int):
                yield part
            else:
                yield from _split(part, *second, special=special)


def _pattern(words: Sequence[AddedWord]) -> re.Pattern[str]:
    """The names, the longest first; for none, what is never found."""
    names = sorted((word.name for word in words), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _split(
    text: str, pattern: re.Pattern[str], words: Mapping[str, AddedWord], *, special: bool
) -> Iterator[str | int]:
    start = 0
    for found in pattern.finditer(text):
        word, left, right = words[found[0]], found.start(), found.end()
        if word.special and not special:
            continue
        if word.single_word and (
            _in_word(text[left - 1 : left]) or _in_word(text[right : right + 1])
        ):
            continue
        while word.lstrip and left > start and SPACE.match(text, left - 1):
            left -= 1
        left = max(left, start) if word.lstrip else left  # an earlier word may have taken it
        while word.rstrip and SPACE.match(text, right):
            right += 1
        if start < left:
            yield text[start:left]
        if left < right:
            yield word.id
        start = right
    if start < len(text):
        yield text[start:]


def _in_word(character: str) -> bool:
    r"""Whether it is \w in Rust: a letter, mark, digit, connector or joiner; "" is none."""
    kinds = ("L", "M", "Nl", "Nd", "Pc")
    circled = "\u24b6" <= character <= "\u24e9" or "\U0001f130" <= character <= "\U0001f189"
    category = unicodedata.category(character) if character else ""
    return category.startswith(kinds) or circled or character in ("\u200c", "\u200d")
