"""WikiText's articles and the Penn Treebank, against rows worked by hand."""

import math

import pytest

from judged import EOT, TOKENIZER, judge, plain
from minigpt2.errors import InputError
from minigpt2.evaluation.tasks.language_modelling import articles, sentences
from minigpt2.evaluation.tasks.records import TaskRow
from minigpt2.evaluation.tasks.table import run_task

LINES = [
    "",
    " = One = \n",
    "",
    " text of one , = 5 = is no title \n",
    " = = Part = = \n",
    " = Two ( three ) = \n",
    " two . \n",
]
PTB = [" it was n't $ N million \n", " \n", " <unk> 'll say so \n"]


def rows(name, values):
    return [TaskRow("here", {name: value}) for value in values]


def test_a_title_begins_an_article_and_a_part_of_one_does_not():
    first, second = articles(rows("text", LINES))
    assert first.before == " \n"
    assert first.page == "".join(LINES[1:2]) + " \n" + LINES[3] + LINES[4].removesuffix("\n")
    assert second.page == LINES[5] + LINES[6]


def test_lines_before_a_title_and_rows_that_are_articles_are_articles():
    assert [item.page for item in articles(rows("text", [" a \n", " b "]))] == [" a \n b "]
    assert [item.page for item in articles(rows("page", LINES[1:6:4]))] == LINES[1:6:4]
    assert articles(rows("text", ["", " \n"])) == []
    with pytest.raises(InputError, match="here: 'page' is no text"):
        articles(rows("page", [3]))


def test_the_penn_treebank_is_scored_per_word_of_the_original():
    found = judge(block_size=80)
    text = "it wasn't $N million\n<unk>'ll say so\n"
    ids = [EOT, *TOKENIZER.encode(text)]
    assert len(ids) <= 81
    nats, _ = plain(found.model, ids, len(ids) - 1)
    for field in ("sentence", "text"):
        score = run_task(found.model, TOKENIZER, "ptb", [{field: line} for line in PTB])
        n_words = 6 + 1 + 4 + 1  # with the ends of two lines
        n_bytes = len("it was n't $ N million\n<unk> 'll say so\n")
        assert score["word_perplexity"].value == pytest.approx(math.exp(nats / n_words))
        assert score["bits_per_byte"].value == pytest.approx(nats / n_bytes / math.log(2))
        assert score["word_perplexity"].error is None and score.n_items == 2
    assert len(sentences(rows("text", PTB))) == 2
