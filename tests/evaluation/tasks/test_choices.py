"""CBT and HellaSwag, against rows worked by hand."""

import re

import pytest

from judged import TOKENIZER, judge, plain
from minigpt2.errors import InputError
from minigpt2.evaluation.tasks.choices import CBT_LINES, endings, gaps
from minigpt2.evaluation.tasks.records import TaskRow
from minigpt2.evaluation.tasks.table import run_task

SENTENCES = ["`` The lamp is lit , '' said Tom .", *["It was n't ."] * 19]
OPENED = '"The lamp is lit," said Tom.' + " It wasn't." * 19
QUESTION = "`` No , '' said XXXXX , and the sea -LRB- green -RRB- was 's ."
ROW = {
    "sentences": SENTENCES,
    "question": QUESTION,
    "answer": "Tom",
    "options": ["Ann", "Tom", "the owl", "'t is"],
}
HELLASWAG = {
    "activity_label": "How to [x] row",
    "ctx_a": "[header] Rowing [title] Sit  down.",
    "ctx_b": "THEN you [step]",
    "endings": ["row [title] away", "", "[x] wait ", "é"],
    "label": "2",
}


def by_lines(row):
    lines = [f"{n} {text}\n" for n, text in enumerate(row["sentences"], 1)]
    last = f"21 {row['question']}\t{row['answer']}\t\t{'|'.join(row['options'])}\n"
    return [*lines, last, "\n"]


def task_rows(lines):
    return [TaskRow(f"line {n}", {"text": line}) for n, line in enumerate(lines, 1)]


def test_a_gap_is_filled_by_each_candidate_with_what_follows():
    (item,) = gaps([TaskRow("here", ROW)])
    rest = ", and the sea (green) was's."
    assert item.context == f'{OPENED} "No," said'
    assert item.continuations == (f" Ann{rest}", f" Tom{rest}", f" the owl{rest}", f" 't is{rest}")
    assert item.right == 1
    assert gaps(task_rows(by_lines(ROW) * 2)) == [item] * 2


def test_a_gap_at_the_beginning_or_in_quotes_needs_no_blank():
    starts = {**ROW, "question": "`` XXXXX 's , '' he said ."}
    (item,) = gaps([TaskRow("here", starts)])
    assert item.context == f'{OPENED} "'
    assert item.continuations[0] == "Ann's,\" he said."


def test_cbt_takes_the_candidate_with_which_the_sentence_is_likeliest():
    found, right = judge(block_size=300), []
    likeliest = []
    for question in (QUESTION, "`` XXXXX , '' said he .", "It was XXXXX ."):
        row = {**ROW, "question": question}
        (item,) = gaps([TaskRow("here", row)])
        context = TOKENIZER.encode(item.context)
        nats = []
        for continuation in item.continuations:
            ids = TOKENIZER.encode(item.context + continuation)
            nats.append(plain(found.model, ids, len(ids) - len(context))[0])
        likeliest.append({**row, "answer": row["options"][nats.index(min(nats))]})
        right.append(nats.index(min(nats)) == 1)
    score = run_task(found.model, TOKENIZER, "cbt_cn", likeliest)
    assert score["accuracy"].value == 1
    unlikely = [
        {**row, "answer": next(option for option in row["options"] if option != row["answer"])}
        for row in likeliest
    ]
    score = run_task(found.model, TOKENIZER, "cbt_ne", [likeliest[0], *unlikely])
    assert score["accuracy"].value == 1 / 4 and score.n_items == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": "no gap"}, "here: the question has no gap XXXXX"),
        ({"answer": "Sue"}, "here: the answer is none of the candidates"),
        ({"options": []}, "here: 'options' is no list of texts"),
        ({"options": [1]}, "here: 'options' is no list of texts"),
        ({"sentences": "a"}, "here: 'sentences' is no list of texts"),
        ({"question": 1}, "here: 'question' is no text"),
    ],
)
def test_a_row_that_is_no_question_is_refused(change, reason):
    with pytest.raises(InputError, match=re.escape(reason)):
        gaps([TaskRow("here", {**ROW, **change})])


def test_lines_that_are_no_question_are_refused():
    lines = by_lines(ROW)
    with pytest.raises(InputError, match=r"^line 20: the last question has 20 lines, expected 21"):
        gaps(task_rows(lines[:20]))
    with pytest.raises(InputError, match="line 3: the line begins with '4', expected 3"):
        gaps(task_rows([*lines[:2], *lines[3:], lines[2]]))
    with pytest.raises(InputError, match="line 21: expected a sentence, its answer and"):
        gaps(task_rows([*lines[:20], "21 XXXXX ."]))
    assert CBT_LINES == 21


def test_hellaswag_is_read_without_the_marks_of_wikihow():
    (item,) = endings([TaskRow("here", HELLASWAG)])
    assert item.context == "How to row: Rowing. Sit down. Then you "
    # the blank that follows a mark stays
    assert item.continuations == (" row. away", " ", "  wait", " é") and item.right == 2
    score = run_task(judge().model, TOKENIZER, "hellaswag", [HELLASWAG])
    assert score["normalized_accuracy"].error is None


@pytest.mark.parametrize("label", ["", "4", -1, "x", None])
def test_an_ending_without_a_label_is_refused(label):
    with pytest.raises(InputError, match=r"here: 'label' is .*take the validation part"):
        endings([TaskRow("here", {**HELLASWAG, "label": label})])
