"""What is in a text: the numbers are those one counts by hand, and leaks are found where they were
planted.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.corpus import prepare
from minigpt2.options import CorpusOptions, TextConfig
from minigpt2.survey import (
    KEPT_OF,
    RUN,
    describe,
    duration,
    estimate_seconds,
    find_leaks,
    main,
    measured_speed,
    survey,
)
from minigpt2.tokenizer import Tokenizer
from minigpt2.tokens import DOCUMENT, TokenFile, TokenFileInfo

GPT2 = Tokenizer.gpt2()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))


def texts(folder, contents):
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number:03}.txt").write_text(content, encoding="utf-8")
    return folder


def file_of(documents, name="train"):
    """A token file in memory whose documents are labelled NAME 0, NAME 1, ..."""
    records = np.zeros(len(documents), DOCUMENT)
    records["end"] = np.cumsum([len(document) for document in documents])
    records["source"] = np.arange(len(documents))
    ids = np.concatenate(documents).astype(np.uint16)
    info = TokenFileInfo("uint16", len(ids), 65536, "", "", "")
    labels = tuple(f"{name} {number}" for number in range(len(documents)))
    return TokenFile(None, ids, info, records, labels)  # pyright: ignore


def random_documents(number, length, seed):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 50_000, length) for _ in range(number)]


def test_the_numbers_are_those_one_counts(tmp_path):
    contents = [f"Lamp {n} " + "is lit. " * n for n in range(1, 40)] + ["Lamp 1 is lit. "]
    corpus = prepare([texts(tmp_path / "texts", contents)], GPT2, val_fraction=0.2)
    found = survey(corpus, GPT2)
    lengths = sorted(len(GPT2.encode(text)) + 1 for text in contents)
    assert (found.documents, found.characters) == (40, sum(map(len, contents)))
    assert found.tokens == sum(lengths)
    assert found.tokens_per_character == sum(lengths) / sum(map(len, contents))
    assert list(found.lengths.values()) == [lengths[n] for n in (0, 9, 19, 35, 39)]
    assert found.counts["duplicates"] == 1
    assert corpus.val is not None
    assert found.held_out_tokens == len(corpus.val.tokens)
    assert 4 <= found.held_out_documents == len(corpus.val.documents) <= 12
    shown = describe(found)
    for part in (
        f"{found.tokens:,}",
        "duplicates",
        "held out",
        f"{found.held_out_tokens:,} tokens",
    ):
        assert part in shown


def test_one_document_and_nothing_held_out_read_naturally(tmp_path):
    folder = texts(tmp_path / "texts", ["The sea says nothing. " * 99])
    shown = describe(survey(prepare([folder], GPT2), GPT2))
    assert "the end of the text" in shown and "lengths" not in shown
    shown = describe(survey(prepare([folder], GPT2, val_fraction=0), GPT2))
    assert "0 tokens (0.0%), so the model cannot be judged" in shown and "leaked" not in shown


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("The sea says nothing at all. ", False),
        ("今日は海が静かです。", True),
        ("море молчит ", True),
    ],
)
def test_a_script_that_the_tokens_do_not_fit_is_told(tmp_path, text, warned):
    found = survey(prepare([texts(tmp_path / "texts", [text * 99])], GPT2), GPT2)
    told = [warning for warning in found.warnings if "made for English" in warning]
    assert bool(told) == warned == (found.tokens_per_character > 0.6)
    if warned:
        assert f"takes {found.tokens_per_character / 0.25:.1f} times the tokens" in told[0]


def test_samples_put_together_are_how_the_texts_begin(tmp_path):
    contents = ["The lamp|is lit\n", "x 🤗 y", "an end"]
    found = survey(prepare([texts(tmp_path / "texts", contents)], GPT2, val_fraction=0), GPT2)
    assert found.samples[0] == r"The| lamp|||is| lit|\n|<|endoftext|>"
    assert found.samples[1] == "x| <f0><9f>|<a4>|<97>| y|<|endoftext|>"


@pytest.mark.parametrize("block", [RUN, 100, 2**20])
def test_planted_passages_are_found_with_their_documents(block):
    train, val = random_documents(30, 300, 1), random_documents(20, 300, 2)
    passage = RUN + 8 * KEPT_OF
    val[4][50 : 50 + passage] = train[17][100 : 100 + passage]
    val[5][10 : 10 + passage] = train[17][100 : 100 + passage]
    val[19] = train[3].copy()
    number, examples = find_leaks(file_of(train), file_of(val, "val"), block=block)
    assert number == 3
    assert examples == (("val 4", "train 17"), ("val 5", "train 17"), ("val 19", "train 3"))


def test_shorter_passages_and_random_text_are_no_leaks():
    train, val = random_documents(30, 300, 1), random_documents(20, 300, 2)
    for number in range(20):
        val[number][40 : 40 + RUN - 1] = train[number][70 : 70 + RUN - 1]
    assert find_leaks(file_of(train), file_of(val)) == (0, ())
    short = [np.arange(5)]
    assert find_leaks(file_of(short), file_of(short)) == (0, ())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=400), st.integers(1, 300), st.data())
def test_what_is_found_is_really_in_both(ids, cut, data):
    cut = min(cut, len(ids))
    train, val = np.array(ids), np.array(ids[:cut])
    number, examples = find_leaks(
        file_of([train]), file_of([val]), block=data.draw(st.integers(1, 90))
    )
    runs = {tuple(val[at : at + RUN].tolist()) for at in range(len(val) - RUN + 1)}
    assert number <= bool(runs) and bool(examples) == bool(number)


def test_leaks_copies_and_small_texts_are_warned_of(tmp_path):
    draw = np.random.default_rng(1)
    words = [" ".join(map(str, draw.integers(0, 10**6, 60))) for _ in range(30)]
    contents = [f"{n} {text}" for text in words for n in range(2)] + words[:9]
    corpus = prepare([texts(tmp_path / "texts", contents + contents[:9])], GPT2)
    found = survey(corpus, GPT2)
    assert found.leaked_documents > 0
    told = " ".join(found.warnings)
    for part in ("--duplicates drop-near", "--duplicates drop leaves", "--patience"):
        assert part in told
    clean = TextConfig(duplicates="drop-near")
    assert survey(prepare([tmp_path / "texts"], GPT2, text=clean), GPT2).leaked_documents == 0


def test_the_command_prints_a_report_or_json(tmp_path, capsys):
    folder = texts(tmp_path / "texts", ["The sea says nothing. " * 400])
    assert main(CorpusOptions(paths=(str(folder),), preset="nano")) == 0
    shown = capsys.readouterr().out
    assert "training nano with the default settings: 800 steps of 16 x 128 tokens" in shown
    assert main(CorpusOptions(paths=(str(folder),), preset="gpt2", json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    tokens = report["tokens"] - report["held_out_tokens"]
    assert report["steps"] == -(-3 * -(-tokens // 1024) // 8)
    assert report["seconds"] > 0 and report["documents"] == 1


def test_time_is_operations_over_speed():
    assert estimate_seconds(124_439_808, 1024, 1e11) == pytest.approx(7.6456, rel=1e-4)
    assert measured_speed(torch.device("cpu"), torch.float32) > 1e8


def test_durations_read_as_people_say_them():
    given = [0.2, 44, 119, 121, 5000, 9000, 200_000]
    expected = ["a second", "44 seconds", "119 seconds", "2 minutes"]
    expected += ["83 minutes", "2 hours", "2 days"]
    assert [duration(seconds) for seconds in given] == expected
    assert all(one <= other for one, other in pairwise(given))
