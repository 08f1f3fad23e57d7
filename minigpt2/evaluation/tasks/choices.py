"""HellaSwag and the Children's Book Test: of several continuations, which is the right one?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .costs import Judge, mean
from .records import Figures, TaskRow
from .words import joined, pieces

HELLASWAG_PROTOCOL = (
    "the four endings after 'activity: context', without the marks of WikiHow; accuracy: the "
    "likeliest ending; normalized_accuracy: the likeliest per character"
)
CBT_PROTOCOL = (
    "each candidate in the gap: the likeliest, together with the rest of the sentence, after the "
    "twenty sentences before and the sentence up to the gap, detokenised; on the validation part, "
    "as in the paper"
)
HELLASWAG_FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
CBT_FIELDS = ("sentences", "question", "answer", "options")
GAP = "XXXXX"
CBT_LINES = 21


class Choice(NamedTuple):
    """A context and several continuations, one of which is right."""

    context: str
    continuations: tuple[str, ...]
    right: int


def endings(rows: Iterable[TaskRow]) -> list[Choice]:
    """HellaSwag's rows; InputError for one without a label, as in its test part."""
    found = []
    for row in rows:
        context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
        query = _without_marks(f"{row.text('activity_label')}: {context}")
        choices = tuple(f" {_without_marks(ending)}" for ending in row.texts("endings"))
        label = str(row.values["label"])
        if label not in map(str, range(len(choices))):
            raise row.wrong(
                f"'label' is {label[:20]!r}, allowed is 0 to {len(choices) - 1}; the test part has "
                "no labels: take the validation part"
            )
        found.append(Choice(query, choices, int(label)))
    return found


def _without_marks(text: str) -> str:
    """Text without the [title], [header], [step] and the like that WikiHow's pages left in it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def score_hellaswag(judge: Judge, items: Sequence[Choice]) -> Figures:
    """Accuracy of the likeliest ending, and of the likeliest per character."""
    plain, normalised = [], []
    for item, nats in zip(items, _costs(judge, items)):
        sizes = [len(text) - 1 for text in item.continuations]  # the blank before is not counted
        per_character = [n / size if size else math.inf for n, size in zip(nats, sizes)]
        plain.append(float(nats.index(min(nats)) == item.right))
        normalised.append(float(per_character.index(min(per_character)) == item.right))
    return {"accuracy": mean(plain), "normalized_accuracy": mean(normalised)}


def gaps(rows: Iterable[TaskRow]) -> list[Choice]:
    """The Children's Book Test: rows with their parts as fields, or the lines of its own files, in
    which 20 sentences and one with the gap, its answer and the candidates are numbered.
    """
    found, lines = [], list[TaskRow]()
    for row in rows:
        if "sentences" in row.values:
            found.append(_filled(row, row.texts("sentences")))
        elif row.text("text").strip():
            lines.append(row)
            if len(lines) == CBT_LINES:
                found.append(_of_lines(lines))
                lines = []
    if lines:
        raise lines[-1].wrong(f"the last question has {len(lines)} lines, expected {CBT_LINES}")
    return found


def _of_lines(lines: Sequence[TaskRow]) -> Choice:
    sentences = []
    for number, row in enumerate(lines, 1):
        found, _, sentence = row.text("text").strip().partition(" ")
        if found != str(number):
            raise row.wrong(
                f"the line begins with {found[:20]!r}, expected {number} and a sentence"
            )
        sentences.append(sentence)
    last = lines[-1]
    parts = [part for part in sentences.pop().split("\t") if part]
    if len(parts) != 3:
        raise last.wrong("expected a sentence, its answer and the candidates, with tabs between")
    question, answer, options = parts
    values = {"question": question, "answer": answer, "options": options.split("|")}
    return _filled(TaskRow(last.where, values), sentences)


def _filled(row: TaskRow, sentences: Sequence[str]) -> Choice:
    """The sentence with each candidate in the gap, cut before the candidate."""
    question, options = row.text("question").split(), row.texts("options")
    places = [n for n, word in enumerate(question) if GAP in word]
    if not places:
        raise row.wrong(f"the question has no gap {GAP}")
    if row.text("answer") not in options:
        raise row.wrong("the answer is none of the candidates")
    before = [word for text in (*sentences, *question[: places[0]]) for word in text.split()]
    after = " ".join(question[places[0] :])
    continuations = (
        pieces([*before, *after.replace(GAP, option).split()])[len(before) :] for option in options
    )
    return Choice(
        joined(before), tuple(map("".join, continuations)), options.index(row.text("answer"))
    )


def score_cbt(judge: Judge, items: Sequence[Choice]) -> Figures:
    """Accuracy of the likeliest candidate."""
    costs = zip(items, _costs(judge, items))
    return {"accuracy": mean([float(nats.index(min(nats)) == item.right) for item, nats in costs])}


def _costs(judge: Judge, items: Sequence[Choice]) -> list[list[float]]:
    """Nats of every continuation of every item."""
    rows = (
        judge.continued(item.context, continuation)
        for item in items
        for continuation in item.continuations
    )
    costs = iter(judge.costs(rows, sum(len(item.continuations) for item in items)))
    return [[next(costs).nats for _ in item.continuations] for item in items]
