"""LAMBADA: the last word of a passage, which only who has understood the passage can guess."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...loss import perplexity
from .costs import Estimate, Judge, mean
from .records import Figures, TaskRow

PROTOCOL = (
    "the last word, with the blank before it, after the rest of the passage; accuracy: all its "
    "tokens are the model's first choice; perplexity: per word; last_token_accuracy: of its last "
    "token, the others being given"
)


class Passage(NamedTuple):
    """A passage and the last word that is to be guessed."""

    context: str
    word: str


def passages(rows: Iterable[TaskRow]) -> list[Passage]:
    """Rows with the `text` of a passage, or lines that are one each; empty ones are none."""
    found = []
    for row in rows:
        text = row.text("text").removesuffix("\n")
        if text.strip():
            context, _, word = text.rpartition(" ")
            found.append(Passage(context, f" {word}"))
    return found


def score_lambada(judge: Judge, items: Sequence[Passage]) -> Figures:
    """Accuracy and perplexity of the last words."""
    costs = judge.costs((judge.continued(*item) for item in items), len(items))
    nats, error = mean([cost.nats for cost in costs])
    value = perplexity(nats)
    return {
        "accuracy": mean([float(cost.greedy) for cost in costs]),
        "perplexity": Estimate(value, None if error is None else value * error),
        "last_token_accuracy": mean([float(cost.last_greedy) for cost in costs]),
    }
