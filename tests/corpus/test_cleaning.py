"""What is changed in texts on request. Oracle: each step on the whole text at once."""

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt2.corpus import cleaning
from minigpt2.corpus.cleaning import Cleaner, _composed, _composes_with_none, _ordered
from minigpt2.corpus.options import TextConfig

FRAGMENTS = [
    *("e", "\u0301", "\u0323", "a\u030a", "\u1112", "\u1161", "\u11ab", "한", "\u09c7", "\u09be"),
    *("\r", "\n", "\r\n", "\0", "\x07", "\x7f", "\x85", "\u200b", "\ufeff", " ", "\t", "x"),
    *("か", "\u3099", "日本", "\u2126", "\uf900", "Å", "\u0344", "\u0f73", "\u0f71", "\u0345"),
    *("\u0dd9", "\u0dca", "\u0dcf", "\U00016d63", "\U00016d67", "\U00011347", "\U0001133e", "…"),
]
MARKS = [
    "\u0301",
    "\u0323",
    "\u0334",
    "\u0345",
    "\u0344",
    "\u0f73",
    "\u05b0",
    "\u0308",
    "…",
    "\u0488",
]
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS)).map("".join))
cuts = st.lists(st.integers(0, 60), max_size=8)
ALL = {
    "remove_control_characters": True,
    "normalize_newlines": True,
    "normalize_unicode": True,
}


def expected(text, settings):
    """The definition of each step, on the whole text."""
    if settings.get("remove_control_characters"):
        text = "".join(c for c in text if unicodedata.category(c) != "Cc" or c in "\t\n\r")
    if settings.get("normalize_newlines"):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if settings.get("normalize_unicode"):
        text = unicodedata.normalize("NFC", text)
    return text


def in_chunks(text, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


@given(texts, cuts, st.sets(st.sampled_from(sorted(ALL))))
@example("e\u0301", [1], {"normalize_unicode"})
@example("\u1112\u1161\u11ab", [1, 2], {"normalize_unicode"})
@example("a\r\nb", [2], {"normalize_newlines"})
@example("\r\0\n e\0\u0301", [1, 2, 5, 6], set(ALL))
def test_chunks_cut_anywhere_become_what_the_whole_becomes(text, cuts, names):
    settings = dict.fromkeys(names, True)
    cleaner = Cleaner(TextConfig(**settings))
    assert "".join(cleaner.clean(in_chunks(text, cuts))) == expected(text, settings)
    assert cleaner.active == bool(names)


@given(texts, cuts)
def test_by_default_nothing_is_changed_or_counted(text, cuts):
    cleaner = Cleaner(TextConfig())
    assert not cleaner.active
    assert "".join(cleaner.clean(in_chunks(text, cuts))) == text
    assert not cleaner.counts


@given(st.lists(texts, max_size=6))
def test_each_document_counts_once_for_each_step_that_changes_it(documents):
    cleaner = Cleaner(TextConfig(**ALL))
    for text in documents:
        list(cleaner.clean(in_chunks(text, range(0, len(text), 2))))
    changed = dict.fromkeys(ALL, 0)
    for text in documents:
        for name in ALL:
            new = expected(text, {name: True})
            changed[name] += new != text
            text = new
    assert dict(cleaner.counts) == changed


def test_control_characters_are_removed_before_what_they_kept_apart_is_composed():
    cleaner = Cleaner(TextConfig(**ALL))
    assert "".join(cleaner.clean(["e\0\u0301 \r\0\n"])) == "\xe9 \n"


def test_no_character_that_a_text_may_be_cut_before_changes_with_what_stands_before_it():
    safe = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    safe = {c for c in safe if _composes_with_none(c)}
    parts = (unicodedata.decomposition(chr(c)).split() for c in range(0x110000))
    second = {chr(int(part[1], 16)) for part in parts if len(part) > 1 and "<" not in part[0]}
    jamo = {chr(c) for c in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    assert not {unicodedata.normalize("NFD", c)[0] for c in safe} & (second | jamo)
    assert not any(unicodedata.combining(unicodedata.normalize("NFD", c)[0]) for c in safe)
    assert {"a", " ", "я", "日", "한", "か", "क", "ش", "א", "ก", "🤗", "\n", "\r"} <= safe


@given(st.lists(st.sampled_from([*MARKS, "e", "é", "한"]), max_size=300).map("".join))
@example("e" + "".join(MARKS) * 20)
@example("\u1e69" + "\u0334\u0323\u0301" * 50 + "x")
def test_many_marks_are_composed_and_ordered_as_unicode_has_it(text):
    assert _composed(text) == unicodedata.normalize("NFC", text)
    assert unicodedata.normalize("NFC", _ordered(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("marks", ["\u0301\u0323", "\u0345\u0344\u0334", "\u0301"])
def test_a_letter_with_260_000_marks_is_composed_in_one_go(marks):
    text = "a" + marks * (260_000 // len(marks)) + "b"
    new = "".join(Cleaner(TextConfig(normalize_unicode=True)).clean(in_chunks(text, [9, 99_999])))
    short = unicodedata.normalize("NFC", "a" + marks * 99 + "b")
    assert len(new) > 250_000 and sorted(set(new)) == sorted(set(short))
    assert unicodedata.is_normalized("NFC", new) and new[0] == short[0]


def test_more_marks_than_fit_into_memory_are_cut_and_counted(monkeypatch):
    monkeypatch.setattr(cleaning, "LONGEST_HELD", 1000)
    cleaner = Cleaner(TextConfig(normalize_unicode=True))
    text = "e" + "\u0301\u0323" * 4000
    parts = list(cleaner.clean(in_chunks(text, range(0, 8001, 500))))
    assert max(map(len, parts)) <= 1500 and len("".join(parts)) == 8000
    assert cleaner.counts["cut_in_marks"] == 5
    cleaner = Cleaner(TextConfig(normalize_unicode=True))
    assert "".join(cleaner.clean(["x" * 5000])) == "x" * 5000
    assert "cut_in_marks" not in cleaner.counts


@pytest.mark.parametrize(
    "text",
    [c * 20_000 for c in ["日", "word ", "я", "\n", "\r\n", "नमस्ते", "مَرْحَبًا", "שָׁלוֹם", "ก็", "👩‍👧"]],
)
def test_little_is_held_back(text):
    cleaner, longest = Cleaner(TextConfig(**ALL)), 0
    chunks = in_chunks(text, range(0, len(text), 1000))
    for part in cleaner.clean(chunks):
        longest = max(longest, len(part))
    assert longest <= 1003
