"""Text on disk to token ids on disk. Oracles: the text in one string, tokenized at once."""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import replace
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt2 import corpus as module
from minigpt2 import encoding, tokens
from minigpt2.corpus import default_cache_dir, prepare
from minigpt2.encoding import cut_at_words
from minigpt2.errors import InputError
from minigpt2.options import TextConfig
from minigpt2.tokenizer import Tokenizer
from minigpt2.tokens import TokenFile

FRAGMENTS = [
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\xa0", "\u3000", "\u2028", "\x1c", "\x85", "\x0b"),
    *("'s", "'ll", "don't", "Hello", "world", " the", "naïve", "日本", "²", "🤗", "e\u0301"),
    *("\ufeff", "\0", "1234", "!!", "_x", "<|endoftext|>"),
]
texts = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
).filter(lambda text: text.count("\0") <= 8)
quick = settings(max_examples=60, deadline=None)


class Bytes:
    """A tokenizer whose ids are the bytes of the text."""

    eot = 256
    vocab_size = 257
    identity = "bytes"

    def encode(self, text):
        return list(text.encode())

    def encode_array(self, text):
        return np.array(self.encode(text), np.int64)


class Words(Bytes):
    """A tokenizer with a vocabulary of any size: words are the numbers that they spell."""

    eot = 0

    def __init__(self, vocab_size):
        self.vocab_size, self.identity = vocab_size, f"words {vocab_size}"

    def encode(self, text):
        return [int(word) for word in text.split()]


class Forbidden(Bytes):
    """The bytes again, for text that must not be tokenized any more."""

    def encode(self, text):
        raise AssertionError("tokenized again")


@cache
def gpt2(vocab_size=50257):
    return Tokenizer.gpt2(vocab_size)


def write(folder, **contents):
    """Files a.txt, b.txt, ... with these texts (as UTF-8) or bytes; the list of them."""
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{name}.txt")
        paths[-1].write_bytes(content.encode() if isinstance(content, str) else content)
    return paths


def ids_of(corpus):
    """(training ids, held-out ids) as lists."""
    return corpus.train.tokens.tolist(), [] if corpus.val is None else corpus.val.tokens.tolist()


def stream_of(contents, tokenizer):
    """What training and held-out ids must be together."""
    return [id for text in contents if text for id in [*tokenizer.encode(text), tokenizer.eot]]


def made_in(cache):
    """The folders that a cache offers; hidden ones are its own business."""
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


@contextlib.contextmanager
def small_parts(n_bytes, n_characters):
    """Read, cut and tokenize a few characters at a time."""
    read = partial(encoding.read_documents, chunk_bytes=n_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "read_documents", read)
        patch.setattr(encoding, "cut_at_words", partial(encoding.cut_at_words, size=n_characters))
        patch.setattr(encoding, "BATCH_CHARACTERS", n_characters)
        yield


@quick
@given(
    st.lists(texts, min_size=1, max_size=6).filter(any),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0, 0.9),
)
def test_training_and_held_out_ids_are_all_documents_whole(
    contents, n_bytes, n_characters, val_fraction
):
    contents = [text.removeprefix("\ufeff") for text in contents]
    if not any(contents):
        return
    tokenizer = gpt2(300)
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), **{f"{n}": "\ufeff" + text for n, text in enumerate(contents)})
        options = {"val_fraction": val_fraction, "cache_dir": Path(folder) / "cache"}
        with small_parts(n_bytes, n_characters):
            corpus = prepare(paths, tokenizer, **options)
        whole = prepare(paths, tokenizer, **options | {"cache_dir": Path(folder) / "other"})
        train, val = ids_of(corpus)
        assert ids_of(whole) == (train, val) and whole.identity == corpus.identity
        documents = [*rows_of(corpus.train), *(rows_of(corpus.val) if corpus.val else [])]
        cut = [row for row, part in documents if part]
        together = [row for row, part in documents if not part]
        together += [[*chain(*cut)]] if cut else []
    assert sorted(together) == sorted([*tokenizer.encode(t), tokenizer.eot] for t in contents if t)
    assert len(cut) in (0, 2)
    assert (corpus.n_documents, corpus.n_characters, corpus.n_tokens) == (
        sum(map(bool, contents)),
        sum(map(len, contents)),
        len(train) + len(val),
    )
    assert corpus.val is not None or not val_fraction or every_text_has_a_copy(contents)


def every_text_has_a_copy(contents):
    """Or is too short to be cut."""
    some = [text for text in contents if text]
    return all(some.count(text) > 1 or len(gpt2(300).encode(text)) < 3 for text in some)


def rows_of(file):
    """(ids, part) of each document of a token file."""
    starts = [0, *file.documents["end"]]
    return [
        (file.tokens[start : document["end"]].tolist(), int(document["part"]))
        for start, document in zip(starts, file.documents)
    ]


@quick
@given(
    st.lists(st.sampled_from(["", "a", "bc", "the sea ", "x" * 40]), min_size=1).filter(any),
    st.floats(0, 0.9),
    st.booleans(),
)
@example(["x" * 40], 0.5, False)
@example(["x" * 40, "", "the sea "], 0.1, False)
def test_every_token_leads_to_its_document(contents, val_fraction, own_val):
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), **{f"{n:03}": text for n, text in enumerate(contents)})
        own = write(Path(folder), val1="", val2="held out", val3="too") if own_val else []
        options = {"val_fraction": val_fraction, "cache_dir": Path(folder) / "cache"}
        corpus = prepare(paths, Bytes(), val_paths=own, **options)
        texts = {str(path): path.read_text() for path in [*paths, *own]}
        for file in filter(None, (corpus.train, corpus.val)):
            start = 0
            for number, record in enumerate(file.documents):
                end = int(record["end"])
                for position in range(start, end):
                    (document,) = file.documents_at([position])
                    assert (document.number, document.start, document.end) == (number, start, end)
                name, _, part = document.label.partition(" (")
                ids = stream_of([texts[name]], Bytes())
                found = file.tokens[start:end].tolist()
                if part == "first part)":
                    assert ids[: len(found)] == found and len(found) < len(ids)
                elif part == "last part)":
                    assert ids[-len(found) :] == found and len(found) < len(ids)
                else:
                    assert (ids, part) == (found, "")
                start = end
            assert start == len(file.tokens)
            numbers = [document.number for document in file.documents_at(range(start)[::-1])]
            assert numbers == [*range(len(file.documents))]


def test_documents_have_the_names_that_the_user_gave_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a="one", b="two")
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", q="one", r="two")
    options = {"val_fraction": 0, "cache_dir": tmp_path / "cache"}
    old = prepare(["a.txt", "b.txt"], Bytes(), **options).train
    new = prepare(["new"], Forbidden(), **options).train
    assert new.path == old.path
    assert [document.label for document in old.documents_at([3, 4])] == ["a.txt", "b.txt"]
    assert [document.label for document in new.documents_at([3, 4])] == [
        str(Path("new", "q.txt")),
        str(Path("new", "r.txt")),
    ]
    alone = TokenFile.open(old.path)
    assert [document.label for document in alone.documents_at([3, 4])] == [
        "document 0",
        "document 1",
    ]


def test_a_row_of_a_file_is_named_with_it(tmp_path):
    paths = write(tmp_path, a="one", b="two")
    file = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache").train
    rows = np.array([(3, 1, 0, 1, 0), (8, 17, 0, 1, 1)], module.DOCUMENT)
    first, second = replace(file, documents=rows).documents_at([0, 7])
    assert (first.label, second.label) == (
        f"{paths[1]}:row 1",
        f"{paths[1]}:row 17 (first part)",
    )


def test_three_files_have_three_end_of_texts_and_empty_ones_none(tmp_path):
    contents = {"a": "one", "b": "", "c": "two\n", "d": b"\xef\xbb\xbf", "e": " "}
    paths = write(tmp_path, **contents)
    corpus = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert ids_of(corpus)[0] == [*b"one", 256, *b"two\n", 256, *b" ", 256]
    assert corpus.n_documents == 3


def test_end_of_text_written_in_a_text_is_text(tmp_path):
    paths = write(tmp_path, a="<|endoftext|>")
    corpus = prepare(paths, gpt2(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert ids_of(corpus)[0] == [27, 91, 437, 1659, 5239, 91, 29, 50256]


@pytest.mark.parametrize("val_fraction", [0, 0.1, 0.5])
def test_with_held_out_text_of_ones_own_the_rest_is_all_for_training(tmp_path, val_fraction):
    a, b, c = write(tmp_path, a="one" * 50, b="two" * 50, c="three")
    options = {"val_fraction": val_fraction, "cache_dir": tmp_path / "cache"}
    corpus = prepare([a, b], Bytes(), val_paths=[c], **options)
    assert ids_of(corpus) == (
        stream_of(["one" * 50, "two" * 50], Bytes()),
        stream_of(["three"], Bytes()),
    )
    assert corpus.n_documents == 3
    options["val_fraction"] = 0.3  # has no meaning here, so it changes nothing
    assert prepare([a, b], Forbidden(), val_paths=[c], **options).identity == corpus.identity


def test_a_file_in_both_parts_is_refused(tmp_path):
    a, b = write(tmp_path, a="one", b="two")
    with pytest.raises(InputError, match=r"b\.txt is both training and held-out text"):
        prepare([tmp_path], Bytes(), val_paths=[b], cache_dir=tmp_path / "cache")
    prepare([a], Bytes(), val_paths=[b], cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("val_fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path, val_fraction):
    with pytest.raises(InputError, match=r"allowed is from 0 to below 1"):
        prepare(write(tmp_path, a="one"), Bytes(), val_fraction=val_fraction)


@pytest.mark.parametrize(
    ("contents", "name"),
    [({"a": ""}, r"a\.txt"), ({"a": b"\xef\xbb\xbf", "b": ""}, r"a\.txt"), ({}, "no file")],
)
def test_no_text_at_all_is_refused(tmp_path, contents, name):
    with pytest.raises(InputError, match=rf"{name}: 0 tokens"):
        prepare(write(tmp_path, **contents), Bytes(), cache_dir=tmp_path / "cache")
    (tmp_path / "z.txt").write_text("text")
    if contents:
        with pytest.raises(InputError, match=rf"{name}: 0 tokens"):
            prepare(
                [tmp_path / "z.txt"],
                Bytes(),
                val_paths=write(tmp_path, **contents),
                cache_dir=tmp_path / "cache",
            )


def test_whitespace_alone_is_text(tmp_path):
    corpus = prepare(write(tmp_path, a=" \n" * 50), gpt2(), cache_dir=tmp_path / "cache")
    train, val = ids_of(corpus)
    assert train + val == stream_of([" \n" * 50], gpt2())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_no_id_ever_wraps(tmp_path, vocab_size, dtype):
    paths = write(tmp_path, a=f"7 {vocab_size - 1} 65535")
    corpus = prepare(paths, Words(vocab_size), val_fraction=0, cache_dir=tmp_path / "cache")
    assert ids_of(corpus)[0] == [7, vocab_size - 1, 65535, 0]
    assert corpus.train.info.dtype == corpus.train.tokens.dtype.name == dtype
    expected = np.array([7, vocab_size - 1, 65535, 0]).astype(f"<u{corpus.train.tokens.itemsize}")
    assert corpus.train.path.read_bytes() == expected.tobytes()


@pytest.mark.parametrize("id", [300, 65536, 65536 + 7, -1])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, id):
    with pytest.raises(InputError, match=rf"made the id {id}, its vocab_size is 300"):
        prepare(write(tmp_path, a=f"7 {id}"), Words(300), cache_dir=tmp_path / "cache")
    assert made_in(tmp_path / "cache") == []


def test_the_json_beside_a_token_file_says_what_it_is(tmp_path):
    paths = write(tmp_path, a="one two three")
    corpus = prepare(paths, Bytes(), val_fraction=0.5, cache_dir=tmp_path / "cache")
    for file in (corpus.train, corpus.val):
        assert file is not None
        stored = json.loads(file.path.with_suffix(".json").read_text())
        assert stored == {
            "dtype": "uint16",
            "count": len(file.tokens),
            "vocab_size": 257,
            "tokenizer": "bytes",
            "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest(),
            "documents_sha256": hashlib.sha256(
                file.path.with_suffix(".documents").read_bytes()
            ).hexdigest(),
        }
        again = TokenFile.open(file.path)
        assert again.tokens.tolist() == file.tokens.tolist() and again.info == file.info
        assert isinstance(file.tokens, np.memmap) and not file.tokens.flags.writeable
    folder = corpus.train.path.parent
    assert TokenFile.open(folder).tokens.tolist() == corpus.train.tokens.tolist()
    assert TokenFile.open(str(folder)).info == corpus.train.info


def test_a_million_spaces_are_tokenized(tmp_path):
    text = "so" + " " * 1_000_001 + "x"
    corpus = prepare(write(tmp_path, a=text), gpt2(), val_fraction=0, cache_dir=tmp_path / "cache")
    ids = ids_of(corpus)[0]
    assert ids[-1] == gpt2().eot and gpt2().decode(ids[:-1]) == text


@pytest.mark.parametrize("character", ["a", "x1!"])
def test_a_megabyte_without_spaces_takes_less_than_five_seconds(tmp_path, character):
    paths = write(tmp_path, a=character * (1_000_000 // len(character)))
    began = time.perf_counter()
    prepare(paths, gpt2(), cache_dir=tmp_path / "cache")
    assert time.perf_counter() - began < 5


def test_the_second_time_nothing_is_tokenized(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="minigpt2.corpus")
    paths = write(tmp_path, a="one\n" * 30, b="two")
    first = prepare(paths, Bytes(), cache_dir=tmp_path / "cache")
    assert caplog.messages == [
        "2 documents, 123 characters, 125 tokens (1.02 per character): "
        f"{len(first.train.tokens)} to train on, {125 - len(first.train.tokens)} held out"
    ]
    for path in paths:
        os.utime(path, (1, 1))
    second = prepare(paths, Forbidden(), cache_dir=tmp_path / "cache")
    assert caplog.messages[1] == caplog.messages[0] + ", from cache"
    assert ids_of(second) == ids_of(first)
    assert second.identity == first.identity
    assert (second.n_documents, second.n_characters, second.n_tokens) == (2, 123, 125)


def test_where_the_text_lies_does_not_matter(tmp_path):
    first = prepare(write(tmp_path, a="one", b="two"), Bytes(), cache_dir=tmp_path / "cache")
    (tmp_path / "new").mkdir()
    moved = write(tmp_path / "new", q="one", r="two")
    second = prepare(moved, Forbidden(), cache_dir=tmp_path / "cache")
    assert second.train.path == first.train.path


def changed_byte(paths, arguments):
    paths[0].write_bytes(paths[0].read_bytes().replace(b"n", b"m"))
    os.utime(paths[0], (1, 1))


def changed_order(paths, arguments):
    texts = [path.read_bytes() for path in paths]
    for path, text in zip(paths, reversed(texts)):
        path.write_bytes(text)


def moved_border(paths, arguments):
    paths[0].write_bytes(b"onet")
    paths[1].write_bytes(b"wo")


def held_out(paths, arguments):
    arguments["val_paths"] = [paths.pop()]


def nothing_held_out(paths, arguments):
    arguments["val_fraction"] = 0


def other_share(paths, arguments):
    arguments["val_fraction"] = 0.4


def other_tokenizer(paths, arguments):
    arguments["tokenizer"] = gpt2(257)


@pytest.mark.parametrize(
    "change",
    [
        *(changed_byte, changed_order, moved_border),
        *(held_out, nothing_held_out, other_share, other_tokenizer),
    ],
)
def test_what_changes_the_ids_makes_new_files(tmp_path, change):
    paths = write(tmp_path, a="one", b="two")
    os.utime(paths[0], (1, 1))
    arguments = {"tokenizer": Bytes(), "cache_dir": tmp_path / "cache"}
    before = prepare(paths, **arguments)
    kept = before.train.tokens.tolist()
    change(paths, arguments)
    after = prepare(paths, **arguments)
    assert after.train.path.parent != before.train.path.parent
    assert (ids_of(after) != ids_of(before)) == (after.identity != before.identity)
    assert change is other_tokenizer or after.identity != before.identity
    # who has the older files open goes on with what they were
    assert before.train.tokens.tolist() == kept
    assert TokenFile.open(before.train.path).tokens.tolist() == kept


def damage_odd(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_short(path):
    path.write_bytes(path.read_bytes()[:-2])


def damage_empty(path):
    path.write_bytes(b"")


def damage_long(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)


def damage_id(path):
    data = bytearray(path.read_bytes())
    data[4:6] = (301).to_bytes(2, "little")
    path.write_bytes(data)


def damage_gone(path):
    path.unlink()


def damage_no_json(path):
    path.with_suffix(".json").unlink()


def damage_bad_json(path):
    path.with_suffix(".json").write_text("{")


def damage_no_documents(path):
    path.with_suffix(".documents").unlink()


def damage_documents(path):
    path.with_suffix(".documents").write_bytes(bytes(32))


def change_json(**values):
    def change(path):
        stored = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(stored | values))

    return change


def damage_field_missing(path):
    path.with_suffix(".json").write_text('{"dtype": "uint16"}')


def both_empty(path):
    damage_empty(path)
    change_json(count=0, sha256=hashlib.sha256(b"").hexdigest())(path)


DAMAGES = [
    (damage_odd, "99 bytes are not 50 ids of uint16"),
    (damage_short, "98 bytes are not 50 ids of uint16"),
    (damage_long, "102 bytes are not 50 ids"),
    (damage_empty, "0 bytes are not 50 ids"),
    (damage_bit, "its bytes are not those written"),
    (damage_id, "id 301 at index 2 is outside the vocabulary of 257"),
    (damage_gone, r"\.bin does not exist"),
    (damage_no_json, r"\.json is missing or"),
    (damage_bad_json, r"\.json is missing or does not describe a token file"),
    (damage_field_missing, r"\.json is missing or does not describe a token file"),
    (change_json(count="50"), r"\.json is missing or does not describe a token file"),
    (change_json(dtype="uint32"), "is damaged"),
    (change_json(vocab_size=100_000), "is damaged"),
    (change_json(vocab_size=100), "id 1[0-9][0-9] at index 0 is outside the vocabulary of 100"),
    (change_json(more=1), r"\.json is missing or does not describe a token file"),
    (both_empty, "is damaged"),
    (damage_no_documents, r"\.documents is missing or damaged"),
    (damage_documents, r"\.documents is missing or damaged"),
]


def test_which_file_is_held_out_makes_new_files(tmp_path):
    a, b = write(tmp_path, a="one", b="two")
    options = {"val_fraction": 0, "cache_dir": tmp_path / "cache"}
    splits = [([a, b], []), ([a], [b]), ([b], [a])]
    corpora = [prepare(train, Bytes(), val_paths=val, **options) for train, val in splits]
    assert len({corpus.train.path for corpus in corpora}) == 3
    assert [corpus.val is None for corpus in corpora] == [True, False, False]


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_token_file_is_refused_or_made_again(
    tmp_path, monkeypatch, caplog, part, damage, message
):
    monkeypatch.setattr(tokens, "BLOCK_BYTES", 4)
    paths = write(tmp_path, a="x" * 99)
    whole = ids_of(prepare(paths, Bytes(), val_fraction=0.5, cache_dir=tmp_path / "cache"))
    (folder,) = made_in(tmp_path / "cache")
    path = folder / f"{part}.bin"
    damage(path)
    with pytest.raises(InputError, match=message):
        TokenFile.open(path)
    caplog.clear()
    again = prepare(paths, Bytes(), val_fraction=0.5, cache_dir=tmp_path / "cache")
    assert ids_of(again) == whole
    (notice,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(path.with_suffix("")) in notice.getMessage()
    assert notice.getMessage().endswith("; prepare the text again: doing that now")
    assert made_in(tmp_path / "cache") == [folder]
    prepare(paths, Forbidden(), val_fraction=0.5, cache_dir=tmp_path / "cache")


def test_making_files_again_leaves_an_open_corpus_alone(tmp_path):
    paths = write(tmp_path, a="x" * 99)
    corpus = prepare(paths, Bytes(), cache_dir=tmp_path / "cache")
    before = ids_of(corpus)
    corpus.train.path.with_suffix(".json").unlink()
    prepare(paths, Bytes(), cache_dir=tmp_path / "cache")
    assert ids_of(corpus) == before


class Interfering(Bytes):
    """Does something else while it tokenizes."""

    def __init__(self, action):
        self.action = action

    def encode(self, text):
        self.action()
        return super().encode(text)


@pytest.mark.parametrize("change", ["grows", "same size", "shrinks", "goes"])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, change):
    a, b = write(tmp_path, a="one", b="two")
    actions = {
        "grows": lambda: b.write_bytes(b"two and a half"),
        "same size": lambda: b.write_bytes(b"too"),
        "shrinks": lambda: b.write_bytes(b""),
        "goes": lambda: b.unlink(missing_ok=True),
    }
    stamp = b.stat().st_atime, b.stat().st_mtime

    def act():
        actions[change]()
        if b.exists():
            os.utime(b, stamp)

    with pytest.raises(InputError, match=r"b\.txt (changed while it was read|cannot be read)"):
        prepare([a, b], Interfering(act), cache_dir=tmp_path / "cache")
    assert made_in(tmp_path / "cache") == []


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_what_stops_the_work_leaves_nothing_behind(tmp_path, problem):
    def stop():
        raise problem

    paths = write(tmp_path, a="one")
    with pytest.raises(problem):
        prepare(paths, Interfering(stop), cache_dir=tmp_path / "cache")
    assert made_in(tmp_path / "cache") == []


def test_of_two_at_once_one_works_and_the_other_waits_for_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    paths = write(tmp_path, a="one\n" * 99)
    other_waits, got = threading.Event(), []

    def waits():
        other_waits.wait(30)

    def work(tokenizer):
        got.append(prepare(paths, tokenizer, cache_dir=tmp_path / "cache"))

    first = threading.Thread(target=work, args=[Interfering(waits)])
    first.start()
    while not list((tmp_path / "cache").glob(".*.tmp")):
        time.sleep(0.01)
    second = threading.Thread(target=work, args=[Forbidden()])
    second.start()
    while "another process prepares the same text: waiting for it" not in caplog.messages:
        time.sleep(0.01)
    other_waits.set()
    first.join()
    second.join()
    assert ids_of(got[0]) == ids_of(got[1])
    assert made_in(tmp_path / "cache") == [got[0].train.path.parent]


def in_a_process(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_killed_process_leaves_nothing_that_counts(tmp_path):
    paths = write(tmp_path, a="one\n" * 99)
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[3])
        from test_corpus import Interfering, prepare
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        prepare([sys.argv[1]], Interfering(kill), cache_dir=sys.argv[2])
    """
    done = in_a_process(code, paths[0], tmp_path / "cache", Path(__file__).parent)
    assert done.returncode == -9, done.stderr
    assert len(list((tmp_path / "cache").glob(".*.tmp"))) == 1
    corpus = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert ids_of(corpus)[0] == stream_of(["one\n" * 99], Bytes())
    assert list((tmp_path / "cache").glob(".*.tmp")) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    paths = write(tmp_path, a="one")
    with pytest.raises(InputError, match=r"a\.txt/tokens cannot be written: .*MINIGPT2_CACHE"):
        prepare(paths, Bytes(), cache_dir=paths[0] / "tokens")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    paths = write(tmp_path, a="one\n" * 9999)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(InputError, match="cache cannot be written: File too large"):
            prepare(paths, Bytes(), cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert made_in(tmp_path / "cache") == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own" / "tokens"
    corpus = prepare(write(tmp_path, a="one"), Bytes())
    assert corpus.train.path.parent.parent == tmp_path / "own" / "tokens"
    monkeypatch.delenv("MINIGPT2_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "minigpt2" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "minigpt2" / "tokens"


def test_long_work_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(encoding, "NOTICE_SECONDS", 0)
    prepare(write(tmp_path, a="x" * 30, b="y" * 90), Bytes(), cache_dir=tmp_path / "cache")
    notices = [message.split(",")[0] for message in caplog.messages[:2]]
    assert notices == ["read 25% of the files", "read 100% of the files"]


def test_ten_thousand_files_are_ten_thousand_documents_in_order(tmp_path):
    (tmp_path / "texts").mkdir()
    numbers = [f"{n:05}" for n in range(10_000)]
    write(tmp_path / "texts", **{n: n for n in reversed(numbers)})
    corpus = prepare(
        [tmp_path / "texts" / "*.txt"], Bytes(), val_fraction=0.1, cache_dir=tmp_path / "cache"
    )
    train, val = ids_of(corpus)
    held_out = [number for number in numbers if number in decoded(val)]
    assert len(held_out) == 1000
    assert val == stream_of(held_out, Bytes())
    assert train == stream_of([n for n in numbers if n not in set(held_out)], Bytes())


def decoded(ids):
    """The documents that the ids of `Bytes` are."""
    text = "".join(chr(id) for id in ids)
    return set(text.split(chr(Bytes.eot)))


@pytest.mark.parametrize(
    "parts",
    [["the sea"], ["the", " sea", " ", "\n", "\tx"], ["a", "b", "c"], [" ", " ", "x y", "z"], []],
)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_cut_parts_put_together_are_the_text(parts, size):
    assert "".join(cut_at_words(parts, size)) == "".join(parts)


@quick
@given(texts, st.lists(st.integers(0, 60), max_size=6), st.integers(1, 40))
def test_ids_of_the_parts_are_the_ids_of_the_text(text, cuts, size):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[start:end] for start, end in pairwise(borders)]
    ids = [id for part in cut_at_words(chunks, size) for id in gpt2().encode(part)]
    assert ids == gpt2().encode(text)


def test_cutting_anywhere_would_change_ids():
    ids = gpt2().encode("the t") + gpt2().encode("he")
    assert ids != gpt2().encode("the the")


def test_parts_stay_near_their_size():
    words = ["word " * 10_000]
    assert max(map(len, cut_at_words(words, 1000))) <= 1005


@pytest.fixture
def several_processes(monkeypatch):
    """Use them for short texts too."""
    monkeypatch.setattr(encoding, "ENOUGH_FOR_PROCESSES", 0)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)


@pytest.mark.parametrize("workers", [2, 3])
def test_several_processes_make_the_same_files(tmp_path, several_processes, workers):
    contents = {f"{n:02}": f"The lamp of {n} is lit.\n" * (3 * n) for n in range(20)}
    paths = write(tmp_path, **contents)
    alone = prepare(paths, gpt2(), cache_dir=tmp_path / "alone")
    together = prepare(paths, gpt2(), workers=workers, cache_dir=tmp_path / "together")
    for name in ("train.bin", "train.documents", "val.bin", "val.documents", "corpus.json"):
        one, other = (corpus.train.path.parent / name for corpus in (alone, together))
        assert one.read_bytes() == other.read_bytes()


class Killing(Bytes):
    """Kills the process it works in, which is another one than the test's."""

    def encode_array(self, text):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_named(tmp_path, several_processes):
    paths = write(tmp_path, a="one\n" * 999)
    with pytest.raises(InputError, match=r"a process that tokenizes was killed.*fewer --workers"):
        prepare(paths, Killing(), workers=2, cache_dir=tmp_path / "cache")
    assert made_in(tmp_path / "cache") == []


def test_an_error_in_a_worker_is_the_same_error(tmp_path, several_processes):
    paths = write(tmp_path, a="7 " * 999 + "300")
    with pytest.raises(InputError, match="made the id 300, its vocab_size is 300"):
        prepare(paths, Words(300), workers=2, cache_dir=tmp_path / "cache")


class Sleeping(Bytes):
    """Says which process it works in, and goes on working."""

    def encode_array(self, text):
        Path(text.split()[0]).write_text(str(os.getpid()))
        time.sleep(600)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_workers_end_with_their_killed_parent(tmp_path):
    code = """
        import sys
        sys.path.insert(0, sys.argv[3])
        from minigpt2 import corpus, encoding
        from test_corpus import Sleeping
        if __name__ == "__main__":
            encoding.ENOUGH_FOR_PROCESSES = 0
            corpus.prepare([sys.argv[1]], Sleeping(), workers=2, cache_dir=sys.argv[2])
    """
    started = tmp_path / "started"
    script, (path,) = tmp_path / "script.py", write(tmp_path, a=str(started) + " x")
    script.write_text(textwrap.dedent(code))
    command = [sys.executable, script, path, tmp_path / "cache", Path(__file__).parent]
    parent = subprocess.Popen(list(map(str, command)))
    while not started.exists() or not started.read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    worker = int(started.read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)


def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status


def test_copies_are_counted_and_stay_on_one_side(tmp_path):
    contents = {f"{n:03}": f"text number {n % 30}" for n in range(90)}
    corpus = prepare(write(tmp_path, **contents), Bytes(), cache_dir=tmp_path / "cache")
    train, val = (decoded(ids) - {""} for ids in ids_of(corpus))
    assert corpus.counts["duplicates"] == 60 and corpus.counts["dropped_duplicates"] == 0
    assert len(train) + len(val) == 30 and val and not train & val
    assert corpus.n_documents == 90


def test_copies_can_be_dropped(tmp_path):
    contents = {f"{n:03}": f"text number {n % 30}" for n in range(90)}
    options = {"text": TextConfig(duplicates="drop"), "val_fraction": 0}
    corpus = prepare(write(tmp_path, **contents), Bytes(), cache_dir=tmp_path / "c", **options)
    expected = [f"text number {n}" for n in range(30)]
    assert ids_of(corpus)[0] == stream_of(expected, Bytes())
    assert corpus.counts["dropped_duplicates"] == 60 and corpus.n_documents == 30


def test_training_text_that_is_also_held_out_text_of_ones_own_is_left_out_and_said(
    tmp_path, caplog
):
    a, b, c, d = write(tmp_path, a="one", b="two", c="two", d="four")
    corpus = prepare([a, b], Bytes(), val_paths=[c, d], cache_dir=tmp_path / "cache")
    assert ids_of(corpus) == (stream_of(["one"], Bytes()), stream_of(["two", "four"], Bytes()))
    assert corpus.counts["dropped_duplicates"] == 1
    assert "1 document of the training text is held-out text too: left out" in caplog.text


def test_a_training_text_that_is_all_held_out_is_refused(tmp_path):
    a, b = write(tmp_path, a="one", b="one")
    with pytest.raises(InputError, match=r"nothing is left to train on: .* other --val-data"):
        prepare([a], Bytes(), val_paths=[b], cache_dir=tmp_path / "cache")


def test_held_out_text_that_is_all_too_short_is_refused(tmp_path):
    a, b = write(tmp_path, a="one" * 9, b="two")
    options = {"text": TextConfig(min_characters=5), "cache_dir": tmp_path / "cache"}
    with pytest.raises(InputError, match="nothing is left to judge by"):
        prepare([a], Bytes(), val_paths=[b], **options)


def test_a_block_is_a_copy_of_the_tokens_that_are_there(tmp_path):
    paths = write(tmp_path, a="abcdef")
    file = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache").train
    for start, end in [(0, 7), (2, 4), (5, 99), (7, 9)]:
        block = file.block(start, end)
        assert block.tolist() == file.tokens[start:end].tolist() and type(block) is np.ndarray


def test_prompts_make_another_corpus_of_the_same_tokens(tmp_path):
    pairs = [("a b", " c d"), ("a b c", " d")]
    identities = []
    for number, (prompt, completion) in enumerate(pairs):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"prompt": prompt, "completion": completion}))
        corpus = prepare([path], Bytes(), val_fraction=0, cache_dir=tmp_path / "cache")
        identities.append((corpus.train.info.sha256, corpus.identity))
    (tokens, one), (same_tokens, other) = identities
    assert tokens == same_tokens and one != other


def test_what_was_changed_and_found_is_counted(tmp_path):
    contents = {"a": "one\r\ntwo", "b": "e\u0301", "c": "x\0y", "d": "plain", "e": "plain"}
    paths = write(tmp_path, **contents)
    page = tmp_path / "p.html"
    page.write_text("<p>One</p>")
    steps = ("normalize_unicode", "normalize_newlines", "remove_control_characters")
    config = TextConfig(duplicates="drop", **dict.fromkeys(steps, True))
    options = {"val_fraction": 0, "cache_dir": tmp_path / "cache"}
    corpus = prepare([*paths, page], Bytes(), text=config, **options)
    expected = ["one\ntwo", "\xe9", "xy", "plain", "One"]
    assert ids_of(corpus)[0] == stream_of(expected, Bytes())
    again = prepare([*paths, page], Forbidden(), text=config, **options)
    for counts in (corpus.counts, again.counts):
        found = {name: count for name, count in counts.items() if count}
        assert found == {"html": 1, "duplicates": 1, "dropped_duplicates": 1} | dict.fromkeys(
            steps, 1
        )
    assert not prepare([page], Bytes(), **options).counts.get("duplicates")


def test_near_copies_are_dropped_on_request(tmp_path):
    words = [f"word{n} " for n in range(200)]
    near = [*words[:100], "other ", *words[101:]]
    paths = write(tmp_path, a="".join(words), b="".join(near), c="something else entirely")
    options = {"val_fraction": 0, "cache_dir": tmp_path / "cache"}
    assert prepare(paths, gpt2(), **options).n_documents == 3
    corpus = prepare(paths, gpt2(), text=TextConfig(duplicates="drop-near"), **options)
    assert (corpus.n_documents, corpus.counts["dropped_near_duplicates"]) == (2, 1)
    val = prepare([paths[0], paths[2]], gpt2(), val_paths=[paths[1]], cache_dir=tmp_path / "cache")
    assert len(val.train.documents) == 2


def test_short_documents_are_dropped_only_when_asked_to(tmp_path):
    paths = write(tmp_path, a="a" * 9, b="b" * 10, c="c" * 11)
    options = {"val_fraction": 0, "cache_dir": tmp_path / "cache"}
    assert prepare(paths, Bytes(), **options).n_documents == 3
    corpus = prepare(paths, Bytes(), text=TextConfig(min_characters=10), **options)
    assert ids_of(corpus)[0] == stream_of(["b" * 10, "c" * 11], Bytes())
    assert corpus.counts["dropped_short"] == 1
    with pytest.raises(InputError, match=r"nothing is left to train on: .* lower --min-characters"):
        prepare(paths, Bytes(), text=TextConfig(min_characters=99), **options)


def test_nothing_is_held_out_of_a_text_too_short_for_it_and_that_is_said(tmp_path, caplog):
    corpus = prepare(write(tmp_path, a="ab"), Bytes(), cache_dir=tmp_path / "cache")
    assert corpus.val is None and ids_of(corpus)[0] == [*b"ab", 256]
    assert "nothing is held out" in caplog.text


def test_prompts_are_tokenized_by_themselves_and_their_lengths_are_known(tmp_path):
    rows = [{"prompt": "How ma", "completion": "ny?"}, {"prompt": "", "completion": "x"}]
    rows += [{"text": "plain"}, {"prompt": "only", "completion": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare([path], gpt2(), val_fraction=0, cache_dir=tmp_path / "cache")
    encode, eot = gpt2().encode, gpt2().eot
    expected = [encode("How ma") + encode("ny?"), encode("x"), encode("plain"), encode("only")]
    assert [ids for ids, _ in rows_of(corpus.train)] == [[*ids, eot] for ids in expected]
    prompts = corpus.train.documents["prompt"].tolist()
    assert prompts == [len(encode("How ma")), 0, 0, len(encode("only"))]
    assert corpus.train.documents["row"].tolist() == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_memory_does_not_grow_with_the_file(tmp_path):
    line = "The lamp is lit, and the sea says nothing; line {:010} of the keeper's log.\n"
    code = """
        import re, sys
        from pathlib import Path
        from minigpt2.corpus import prepare
        from minigpt2.tokenizer import Tokenizer
        corpus = prepare([sys.argv[1]], Tokenizer.gpt2(), cache_dir=sys.argv[2])
        status = Path("/proc/self/status").read_text()
        print(corpus.n_characters, re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
    """
    peak_mb = {}
    for megabytes in (20, 200):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            n_lines = megabytes * 10**6 // len(line.format(0))
            file.writelines(line.format(n) for n in range(n_lines))
        done = in_a_process(code, path, tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        characters, peak_kb = map(int, done.stdout.split())
        assert characters == path.stat().st_size
        peak_mb[megabytes] = peak_kb / 1000
    assert peak_mb[200] < 400
    assert peak_mb[200] - peak_mb[20] < 40
