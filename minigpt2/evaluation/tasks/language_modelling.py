"""WikiText and the Penn Treebank: running text, judged per word of the original.

Both were cut into words by other programs. A model reads the text as it is usually written, and the
cost is divided by the words that the original has, so that models with other tokens, and papers,
can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...loss import perplexity
from .costs import Estimate, Judge, Row, ratio
from .records import Figures, TaskRow
from .words import joined

WIKITEXT_PROTOCOL = (
    "each article alone after end-of-text, detokenised, in windows of the model's block_size that "
    "do not overlap (the last one begins earlier); words and bytes are counted in the original "
    "text; token_perplexity: lines as in the file, joined by blank lines, windows of block_size, "
    "the first token of each not scored"
)
PTB_PROTOCOL = (
    "one text after end-of-text, a sentence a line, contractions joined (do n't: don't), $ and # "
    "joined to the number, <unk> and N kept, in windows of the model's block_size that do not "
    "overlap (the last one begins earlier); a line's end counts as a word"
)
PAIRS = ("()", "[]", "{}", '""', "''")
TITLE = re.compile(r"\s*= (?!= ).*(?<! =) =\s*")


class Article(NamedTuple):
    """A document of WikiText as it is in the file, and the blank lines before the first one."""

    page: str
    before: str = ""


def articles(rows: Iterable[TaskRow]) -> list[Article]:
    """Rows with a `page` are articles; rows with `text` are lines, and a title begins an article.

    Lines may have lost their blanks: where a row is empty, the file has one with a blank.
    """
    pages, lines = [], []
    for row in rows:
        if "page" in row.values:
            pages.append(Article(row.text("page")))
        else:
            lines.append(row.text("text") or " \n")
    return pages + _split("".join(lines))


def _split(text: str) -> list[Article]:
    pages: list[list[str]] = [[]]
    for line in text.split("\n") if text else []:
        if TITLE.fullmatch(line):
            pages.append([])
        pages[-1].append(line)
    first, *others = map("\n".join, pages)
    if first.strip() or not others:
        return [Article(page) for page in (first, *others) if page.strip()]
    return [Article(others[0], f"{first}\n" * bool(pages[0])), *map(Article, others[1:])]


def detokenised(page: str) -> str:
    """An article as it is usually written, by the rules that lm-evaluation-harness and others use.

    They are rough: of two apostrophes the blanks between go. (A rule that changes only what stands
    between slashes is left out.)
    """
    text = page.replace("s '", "s'")
    for sign in "-,.":
        text = text.replace(f" @{sign}@ ", sign)
    for sign in ":;.!?,":
        text = text.replace(f" {sign} ", f"{sign} ")
    for left, right in PAIRS:
        inner = rf"\{left}\s*([^\{right}]*?)\s*\{right}"
        text = re.sub(inner, lambda found, pair=(left, right): found[1].join(pair), text)
    for level in (4, 3, 2):
        text = text.replace(" ".join("=" * level), "=" * level)
    for spaced, close in (
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ):
        text = text.replace(spaced, close)
    return text


def score_wikitext(judge: Judge, items: Sequence[Article]) -> Figures:
    """Perplexity per word and per byte, bits per byte, and perplexity per token as it is often
    given.
    """
    nats = _rolling_costs(judge, [detokenised(item.page) for item in items])
    words = [len(re.split(r"\s+", item.page)) for item in items]
    n_bytes = [len(item.page.encode()) for item in items]
    return {
        "word_perplexity": _exponential(ratio(nats, words)),
        "byte_perplexity": _exponential(ratio(nats, n_bytes)),
        "bits_per_byte": _bits(ratio(nats, n_bytes)),
        "token_perplexity": _exponential(_plain(judge, items)),
    }


def _plain(judge: Judge, items: Sequence[Article]) -> Estimate:
    """Nats per token in windows of block_size over all lines, joined by blank lines."""
    lines = "\n".join(f"{item.before}{item.page}" for item in items).removesuffix("\n").split("\n")
    text = "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
    ids, size = judge.tokenizer.encode(text), judge.block_size
    rows = [
        Row(row, len(row) - 1) for at in range(0, len(ids), size) if (row := ids[at : at + size])
    ]
    rows = [row for row in rows if row.n_scored]
    return ratio(
        [cost.nats for cost in judge.costs(rows, len(rows))], [row.n_scored for row in rows]
    )


class Sentence(NamedTuple):
    """A line of the Penn Treebank, in words."""

    words: list[str]
    n_bytes: int


def sentences(rows: Iterable[TaskRow]) -> list[Sentence]:
    """Rows with a `sentence` or lines of `text`, without empty ones."""
    found = []
    for row in rows:
        line = row.text("sentence" if "sentence" in row.values else "text")
        if line.strip():
            found.append(Sentence(line.split(), len(line.strip().encode()) + 1))
    return found


def score_ptb(judge: Judge, items: Sequence[Sentence]) -> Figures:
    """Perplexity per word, and bits per byte of the original."""
    text = "".join(f"{joined(item.words)}\n" for item in items)
    nats = _rolling_costs(judge, [text])
    return {
        "word_perplexity": _exponential(ratio(nats, [sum(len(i.words) + 1 for i in items)])),
        "bits_per_byte": _bits(ratio(nats, [sum(item.n_bytes for item in items)])),
    }


def _rolling_costs(judge: Judge, texts: Sequence[str]) -> list[float]:
    """Nats of each text."""
    rows_of = [judge.rolling(text) for text in texts]
    all_rows = [row for rows in rows_of for row in rows]
    costs = iter(judge.costs(all_rows, len(all_rows)))
    return [math.fsum(next(costs).nats for _ in rows) for rows in rows_of]


def _exponential(nats: Estimate) -> Estimate:
    value = perplexity(nats.value)
    return Estimate(value, None if nats.error is None else value * nats.error)


def _bits(nats: Estimate) -> Estimate:
    value, error = nats
    return Estimate(value / math.log(2), None if error is None else error / math.log(2))
