"""What is in a text: the numbers are those one counts by hand, and leaks are found where they were
planted.
"""

import re
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.corpus import survey as survey_module
from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.prepared import prepare
from minigpt2.corpus.survey import (
    KEPT_BITS,
    RUN,
    Survey,
    find_leaks,
    report_text,
    rough_duration,
    survey,
)
from minigpt2.corpus.token_file import DOCUMENT, SPAN, TokenFile, TokenFileInfo
from minigpt2.tokenizer import Tokenizer
from tokenizer_folders import with_words, word
from vocabularies import change_json

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
    info = TokenFileInfo("uint16", len(ids), 65536, "", "", "", "")
    labels = tuple(f"{name} {number}" for number in range(len(documents)))
    return TokenFile(None, ids, info, records, np.empty(0, SPAN), labels)  # pyright: ignore


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
    shown = report_text(found)
    for part in (
        f"{found.tokens:,}",
        "duplicates",
        "held out",
        f"{found.held_out_tokens:,} tokens",
    ):
        assert part in shown


def test_one_document_and_nothing_held_out_read_naturally(tmp_path):
    folder = texts(tmp_path / "texts", ["The sea says nothing. " * 99])
    shown = report_text(survey(prepare([folder], GPT2), GPT2))
    assert "the end of the text" in shown and "lengths" not in shown
    shown = report_text(survey(prepare([folder], GPT2, val_fraction=0), GPT2))
    assert "0 tokens (0.0%), so the model cannot be judged" in shown and "leaked" not in shown
    assert "by heart, and nothing is held out that would show it" in " ".join(shown.split())
    assert "--patience" not in shown


names = st.text("abcdefghij_", min_size=1, max_size=40).map(lambda name: f"n{name}n")


@given(st.dictionaries(names, st.integers(1, 10**12), max_size=5))
def test_between_a_label_and_its_number_is_a_gap_however_long_the_label(counts):
    nothing = {field.name: 0 for field in fields(Survey)}
    lists = {**dict.fromkeys(("leaks", "samples", "warnings", "left_out"), ()), "files": {}}
    found = Survey(**{**nothing, **lists, "lengths": {}, "counts": counts})
    shown = report_text(found).splitlines()
    for name, count in counts.items():
        assert any(re.fullmatch(rf"  {name.replace('_', ' ')} {{2,}}{count:,}", s) for s in shown)


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
    passage = RUN + 8 * 2**KEPT_BITS
    val[4][50 : 50 + passage] = train[17][100 : 100 + passage]
    val[5][10 : 10 + passage] = train[17][100 : 100 + passage]
    train[25][:passage] = train[17][100 : 100 + passage]  # the first of both is named
    val[19] = train[3].copy()
    number, share, examples = find_leaks(file_of(train), file_of(val, "val"), block=block)
    assert number == 3
    runs = 2 * (passage - RUN + 1) + 300 - RUN + 1
    assert share == pytest.approx(runs / (20 * 300), rel=0.5)
    assert examples == (("val 4", "train 17"), ("val 5", "train 17"), ("val 19", "train 3"))


def test_shorter_passages_and_random_text_are_no_leaks():
    train, val = random_documents(30, 300, 1), random_documents(20, 300, 2)
    for number in range(20):
        val[number][40 : 40 + RUN - 1] = train[number][70 : 70 + RUN - 1]
    assert find_leaks(file_of(train), file_of(val)) == (0, 0.0, ())
    short = [np.arange(5)]
    assert find_leaks(file_of(short), file_of(short)) == (0, 0.0, ())


def test_passages_of_equal_hash_are_compared(monkeypatch):
    def all_equal(file, start, block, bits):
        places = np.arange(start, min(start + block, len(file.tokens) - RUN + 1))
        return np.zeros(len(places), np.uint64), places

    monkeypatch.setattr(survey_module, "_kept_runs", all_equal)
    train, val = random_documents(3, 90, 1), random_documents(2, 90, 2)
    assert find_leaks(file_of(train), file_of(val)) == (0, 0.0, ())
    val[1][:RUN] = train[0][:RUN]
    assert find_leaks(file_of(train), file_of(val, "val"))[2] == (("val 1", "train 0"),)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_found_is_really_in_both(data):
    period = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
    noise = st.lists(st.integers(0, 1), max_size=60)
    train, *val = (np.array([*data.draw(noise), *40 * period, *data.draw(noise)]) for _ in range(4))
    val = [ids if data.draw(st.booleans()) else ids + 7 for ids in val]
    files = file_of([train], "train"), file_of(val, "val")
    number, share, examples = find_leaks(*files, block=data.draw(st.integers(1, 90)))
    ends, known = files[1].documents["end"], {run for _, run in runs_of(files[0])}
    shared = [at for at, run in runs_of(files[1]) if run in known]
    there = {int(number) for number in np.searchsorted(ends, shared, side="right")}
    assert number <= len(there) and {one for one, _ in examples} <= {f"val {n}" for n in there}
    assert bool(share) == bool(number) == bool(examples)


def runs_of(file):
    ids = file.tokens.tolist()
    return [(at, tuple(ids[at : at + RUN])) for at in range(len(ids) - RUN + 1)]


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


def test_durations_read_as_people_say_them():
    given = [0.2, 44, 119, 121, 5000, 9000, 200_000]
    expected = ["a second", "44 seconds", "119 seconds", "2 minutes"]
    expected += ["83 minutes", "2 hours", "2 days"]
    assert [rough_duration(seconds) for seconds in given] == expected
    assert all(one <= other for one, other in pairwise(given))


def test_no_line_is_too_wide_and_few_leaked_words_are_no_warning(tmp_path):
    folder = texts(tmp_path / "texts", ["The sea says nothing. " * 9])
    found = survey(prepare([folder], GPT2), GPT2)
    leaks = (("held-out/" * 30 + "one.txt", "two.txt"),)
    leaky = replace(found, leaked_documents=3, leaked_share=0.3, leaks=leaks)
    leaky = replace(leaky, warnings=tuple(survey_module._warnings(leaky)))
    shown = report_text(leaky)
    assert "about 30.0% of the held-out text, in 3 held-out documents" in shown
    assert "about 30% of the held-out text can be learned by heart" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100
    few = replace(found, leaked_documents=1, leaked_share=0.0004)
    assert "less than 0.1%" in report_text(few)
    assert not [told for told in survey_module._warnings(few) if "by heart from" in told]


def test_separators_that_are_read_as_text_are_counted_and_the_flag_is_named(tmp_path):
    folder = texts(tmp_path / "texts", ["One.<|endoftext|>Two.<|endoftext|>Three. " * 30])
    found = survey(prepare([folder], GPT2), GPT2)
    assert found.special_as_text == {"<|endoftext|>": 60} and found.documents == 1
    shown = " ".join(report_text(found).split())
    assert "<|endoftext|> stands in the text 60 times and is read as plain text" in shown
    assert '--document-separator "<|endoftext|>" does so, --special-tokens reads it' in shown
    separated = TextConfig(document_separator="<|endoftext|>")
    assert not survey(prepare([folder], GPT2, text=separated), GPT2).special_as_text
    special = TextConfig(special_tokens=True)
    found = survey(prepare([folder], GPT2, text=special), GPT2, special_tokens=True)
    assert not found.special_as_text


def test_other_special_tokens_are_named_and_separators_even_where_no_token_is_called_so(
    tmp_path, tmp_path_factory
):
    folder = with_words(
        tmp_path / "words", tmp_path_factory, word("<u>"), word("no", special=False)
    )
    (tmp_path / "words" / "vocab.json").write_text(
        (tmp_path / "words" / "vocab.json").read_text().replace("<|endoftext|>", "</s>")
    )
    path = tmp_path / "words" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "</s>"))
    change_json(path, eos_token="</s>")
    tokenizer = Tokenizer.from_folder(folder)
    paths = [texts(tmp_path / "texts", ["a no <u> b <|endoftext|> <u> c"])]
    found = survey(prepare(paths, tokenizer), tokenizer)
    shown = " ".join(report_text(found).split())
    assert "special tokens stand in the text and are read as plain text: <u> (2);" in shown
    assert "does so note:" in shown.replace(".", "")  # and no flag reads it as a token
    special = TextConfig(special_tokens=True)
    found = survey(prepare(paths, tokenizer, text=special), tokenizer, special_tokens=True)
    assert found.special_as_text == {"<|endoftext|>": 1}
