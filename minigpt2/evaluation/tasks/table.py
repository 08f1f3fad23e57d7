"""The table of tasks: each by its name, run on rows or on files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...arguments import did_you_mean, require_loaded
from ...corpus.sources.documents import kind_of
from ...corpus.sources.files import CHUNK_BYTES, Source, UnpackedFile
from ...corpus.sources.find import find_sources
from ...corpus.sources.rows import lines_of, records
from ...errors import InputError
from ...model import GPT2
from ...tokenizer import Tokenizer
from .choices import (
    CBT_FIELDS,
    CBT_PROTOCOL,
    HELLASWAG_FIELDS,
    HELLASWAG_PROTOCOL,
    endings,
    gaps,
    score_cbt,
    score_hellaswag,
)
from .costs import Judge, Progress
from .lambada import PROTOCOL as LAMBADA_PROTOCOL
from .lambada import passages, score_lambada
from .language_modelling import (
    PTB_PROTOCOL,
    WIKITEXT_PROTOCOL,
    articles,
    score_ptb,
    score_wikitext,
    sentences,
)
from .published import published, size_of
from .records import Metric, Task, TaskRow, TaskScore

LINES = ("text",)  # what a line of a text file is, as a row
HUB = "hf://datasets"
TEST = "test-00000-of-00001.parquet"
VALIDATION = "validation-00000-of-00001.parquet"


def _wikitext(size: int) -> Task:
    return Task(
        f"articles of Wikipedia (WikiText-{size})",
        f"{HUB}/Salesforce/wikitext/wikitext-{size}-raw-v1/{TEST}",
        (("page",), LINES),
        articles,
        score_wikitext,
        WIKITEXT_PROTOCOL,
    )


def _cbt(kind: str, words: str) -> Task:
    return Task(
        f"{words} missing in children's books (CBT)",
        f"{HUB}/cam-cst/cbt/{kind}/{VALIDATION}",
        (CBT_FIELDS, LINES),
        gaps,
        score_cbt,
        CBT_PROTOCOL,
    )


TASKS: dict[str, Task] = {
    "wikitext2": _wikitext(2),
    "wikitext103": _wikitext(103),
    "ptb": Task(
        "news of the Wall Street Journal (Penn Treebank)",
        f"{HUB}/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/test/0000.parquet",
        (("sentence",), LINES),
        sentences,
        score_ptb,
        PTB_PROTOCOL,
    ),
    "lambada_openai": Task(
        "last words of passages of novels (LAMBADA), as OpenAI wrote them",
        f"{HUB}/EleutherAI/lambada_openai/data/lambada_test_en.jsonl",
        (LINES,),
        passages,
        score_lambada,
        LAMBADA_PROTOCOL,
    ),
    "lambada_standard": Task(
        "the same passages as they were published: lower case, cut into words",
        f"{HUB}/cimec/lambada/plain_text/{TEST}",
        (LINES,),
        passages,
        score_lambada,
        LAMBADA_PROTOCOL,
    ),
    "hellaswag": Task(
        "what happens next (HellaSwag)",
        f"{HUB}/Rowan/hellaswag/data/{VALIDATION}",
        (HELLASWAG_FIELDS,),
        endings,
        score_hellaswag,
        HELLASWAG_PROTOCOL,
    ),
    "cbt_cn": _cbt("CN", "common nouns"),
    "cbt_ne": _cbt("NE", "names"),
}


def task_named(name: str) -> Task:
    """The task of this name; InputError if there is none."""
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise InputError(f"there is no task {name!r}{did_you_mean(name, TASKS)}: known are {known}")
    return TASKS[name]


def run_task(
    model: GPT2,
    tokenizer: Tokenizer,
    name: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    progress: Progress | None = None,
) -> TaskScore:
    """What a model makes of a task's rows, each an object with the fields of one of the task's
    groups; `progress` is called with how much is done, and of how much.

    Raises InputError for a task that does not exist, and for rows that are not of it.
    """
    task = task_named(name)
    numbered = (_given(number, row, name) for number, row in enumerate(rows, 1))
    return score_items(model, tokenizer, name, task.items(numbered), progress=progress)


def score_items(
    model: GPT2,
    tokenizer: Tokenizer,
    name: str,
    items: Sequence[Any],
    *,
    progress: Progress | None = None,
) -> TaskScore:
    """`run_task` for items that were read, which may be judged by several models."""
    require_loaded("tokenizer", tokenizer, "Tokenizer", "eot")
    require_loaded("model", model, "GPT2", "hidden")
    task, size = task_named(name), size_of(model.config)
    if not items:
        raise InputError(f"there is nothing of {name} to score: the text is empty")
    figures = task.score(Judge(model, tokenizer, progress), items)
    metrics = tuple(
        Metric(metric, found.value, found.error, published(name, metric, size))
        for metric, found in figures.items()
    )
    return TaskScore(name, metrics, len(items), task.protocol, size)


def read_items(name: str, paths: Sequence[str | Path] = ()) -> Sequence[Any]:
    """The items of a task in files of any format that holds its rows; by default, and with network,
    the task's own on the Hub.

    Raises InputError for what cannot be read or is not of the task.
    """
    task = task_named(name)
    if "-" in map(str, paths):
        raise InputError(
            f"the rows of {name} come from files, not from stdin (-): save them to one"
        )
    sources = find_sources(list(paths) or [task.source]).sources
    items = task.items(row for source in sources for row in _rows_of(source, name))
    if not items:
        labels = ", ".join(source.label for source in sources)
        raise InputError(f"{labels} holds nothing of {name}: {_wanted(task)}")
    return items


def _rows_of(source: Source, name: str) -> Iterable[TaskRow]:
    task = TASKS[name]
    file, kind = UnpackedFile(source, CHUNK_BYTES), kind_of(source)
    if kind == "rows":
        for number, values in records(file, task.fields):
            yield TaskRow(f"{source.label}:row {number}", values)
    elif kind == "text" and LINES in task.fields:
        held = None
        for number, line in enumerate(lines_of(file)):
            if held is not None:
                yield TaskRow(f"{source.label}:line {number}", {"text": f"{held}\n"})
            held = line
        if held:
            yield TaskRow(f"{source.label}: its last line", {"text": held})
    else:
        raise InputError(f"{source.label} is not of {name}: {_wanted(task)}")


def _given(number: int, row: Mapping[str, Any], name: str) -> TaskRow:
    if not any(set(group) <= set(row) for group in TASKS[name].fields):
        raise InputError(f"row {number} is not of {name}: {_wanted(TASKS[name])}")
    return TaskRow(f"row {number}", row)


def _wanted(task: Task) -> str:
    groups = ", or ".join(" ".join(group) for group in task.fields)
    lines = "; or lines of text" if LINES in task.fields else ""
    return f"it has rows (.jsonl, .json, .parquet) with the fields {groups}{lines}"
