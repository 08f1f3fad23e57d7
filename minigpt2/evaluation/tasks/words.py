"""Text that was cut into words, as the Penn Treebank is, written as one writes it."""

from __future__ import annotations

from collections.abc import Sequence

# What they write -> what is usual; no blank stands after the first kind, none before the second.
OPENING = {"``": '"', "`": "'", "-LRB-": "(", "-LSB-": "[", "-LCB-": "{"}
OPENING |= {sign: sign for sign in ("(", "[", "{", "$", "#")}
CLOSING = {"''": '"', "-RRB-": ")", "-RSB-": "]", "-RCB-": "}"}
CLOSING |= {sign: sign for sign in (".", ",", ";", ":", "!", "?", ")", "]", "}", "'", "%", "...")}
ENDINGS = ("n't", "'s", "'ll", "'re", "'ve", "'m", "'d")  # of the word before, in any case


def pieces(words: Sequence[str]) -> list[str]:
    """The words with the blanks that belong before them; put together they are the text.

    What a piece is depends on its word and the one before.
    """
    found, opened = [], True
    for word in words:
        closes = word in CLOSING or word.lower() in ENDINGS
        blank = "" if opened or closes else " "
        found.append(blank + OPENING.get(word, CLOSING.get(word, word)))
        opened = word in OPENING
    return found


def joined(words: Sequence[str]) -> str:
    """The text of words."""
    return "".join(pieces(words))
