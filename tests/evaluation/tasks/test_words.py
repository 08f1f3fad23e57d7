"""Words of the Penn Treebank's kind, as one writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.evaluation.tasks.words import CLOSING, ENDINGS, OPENING, joined, pieces
from text_files import quick

WORDS = ["lamp", "a", "<unk>", "N", "--", *OPENING, *CLOSING, *ENDINGS, "N'T"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("`` I do n't know , '' said Tom .", '"I don\'t know," said Tom.'),
        (
            "the owl -LRB- asleep -RRB- and the miller 's wife",
            "the owl (asleep) and the miller's wife",
        ),
        ("it cost $ N million -- N % more", "it cost $N million -- N% more"),
        ("she 'll , he 'd , we 've", "she'll, he'd, we've"),
        ("` Come ! ' they CA N'T", "'Come!' they CAN'T"),
        ("", ""),
        (". a", ". a"),
    ],
)
def test_words_are_written_as_one_writes_them(words, text):
    assert joined(words.split()) == text


@given(st.lists(st.sampled_from(WORDS)), st.lists(st.sampled_from(WORDS), min_size=1))
@quick
def test_what_comes_later_changes_nothing_before_it(before, after):
    assert pieces([*before, *after])[: len(before)] == pieces(before)
    # a piece depends on the word before it alone
    assert pieces([*before, "a", *after])[len(before) + 1 :] == pieces(["a", *after])[1:]
