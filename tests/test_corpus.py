"""Text on disk to token ids on disk. Oracles: the text in one string, tokenized at once."""

import contextlib
import gzip
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt2 import corpus as module
from minigpt2.corpus import TokenFile, default_cache_dir, find_files, prepare, read_text
from minigpt2.errors import InputError, NotFoundError
from minigpt2.tokenizer import Tokenizer

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


class Words:
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


@contextlib.contextmanager
def chunks_of(n_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_text", partial(read_text, chunk_bytes=n_bytes))
        patch.setattr(module, "CHUNK_BYTES", n_bytes + n_bytes % 2)
        yield


@pytest.fixture
def tree(tmp_path):
    for name in (
        *("b.txt", "a.md", "c.rst", "D.TXT", "e.tex", "noextension", ".hidden.txt", "x[1].txt"),
        *("sub/deeper/f.txt", "sub/g.tex", ".git/h.txt", "sub/.cache/i.txt", "bare/j.tex"),
    ):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("given_paths", "expected"),
    [
        (["."], "D.TXT a.md b.txt c.rst sub/deeper/f.txt x[1].txt"),
        (["e.tex", "noextension"], "e.tex noextension"),
        ([".hidden.txt"], ".hidden.txt"),
        (["b.txt", "a.md", "b.txt", "sub/../b.txt"], "a.md b.txt"),
        (["*.tex"], "e.tex"),
        (["**/*.tex"], "bare/j.tex e.tex sub/g.tex"),
        (["**/?.t*", "b.txt"], "b.txt bare/j.tex e.tex sub/deeper/f.txt sub/g.tex"),
        (["[ab].*"], "a.md b.txt"),
        (["x[1].txt"], "x[1].txt"),
        (["s*", "bar?/*"], "bare/j.tex sub/deeper/f.txt"),
    ],
)
def test_files_folders_and_globs_are_found_sorted_and_once(
    tree, monkeypatch, given_paths, expected
):
    monkeypatch.chdir(tree)
    assert [path.as_posix() for path in find_files(given_paths)] == expected.split()
    absolute = [str(tree / path) for path in given_paths]
    assert [path.relative_to(tree) for path in find_files(absolute)] == [
        path.relative_to(tree) for path in find_files([tree / path for path in given_paths])
    ]
    assert {p.resolve() for p in find_files(absolute)} == {
        (tree / name).resolve() for name in expected.split()
    }


def test_one_path_that_is_no_list_is_that_path(tree):
    assert find_files(str(tree / "b.txt")) == find_files(tree / "b.txt") == [tree / "b.txt"]


def test_a_file_under_two_names_is_found_once(tree):
    (tree / "a.txt").symlink_to(tree / "b.txt")
    assert find_files([tree / "b.txt", tree / "a.txt"]) == [tree / "a.txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.txt", r"none\.txt does not exist"),
        ("*.csv", r"\*\.csv does not exist and matches no file"),
        ("**/*.csv", r"\*\*/\*\.csv does not exist and matches no file"),
        ("bare", r"bare has no \.txt, \.md, \.rst file"),
        ("bar?", r"bar\? does not exist and matches no file"),
    ],
)
def test_what_leads_to_no_file_is_named(tree, path, message):
    with pytest.raises(NotFoundError, match=message):
        find_files([tree / "b.txt", tree / path])


@pytest.fixture
def unprivileged():
    """A new folder of a user who may not read everything, even where tests run as root."""
    if os.name == "nt":
        pytest.skip("POSIX permissions")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o700)
    shutil.rmtree(folder)


def test_unreadable_files_and_folders_are_named(unprivileged):
    (unprivileged / "file.txt").write_text("text")
    (unprivileged / "folder").mkdir()
    for name in ("file.txt", "folder"):
        (unprivileged / name).chmod(0)
    with pytest.raises(InputError, match=r"file\.txt cannot be read: Permission denied"):
        list(read_text(unprivileged / "file.txt"))
    with pytest.raises(InputError, match=r"folder cannot be read: Permission denied"):
        find_files([unprivileged])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no regular file"):
        prepare([tmp_path / "pipe"], Bytes(), cache_dir=tmp_path / "cache")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux")
def test_an_error_while_reading_is_named():
    with pytest.raises(InputError, match=r"/proc/self/mem cannot be read: Input/output error"):
        list(read_text(Path("/proc/self/mem")))


@quick
@given(texts, st.integers(1, 40), st.sampled_from([257, 300, 50257]))
@example("so the the", 6, 50257)
@example("a\n\nb", 2, 50257)
@example("x   y", 2, 50257)
@example("one\x1c two", 4, 50257)
def test_ids_do_not_depend_on_the_chunk_size(text, chunk_bytes, vocab_size):
    with tempfile.TemporaryDirectory() as folder:
        (path,) = write(Path(folder), a=text)
        parts = list(read_text(path, chunk_bytes=chunk_bytes))
    assert "".join(parts) == text.removeprefix("\ufeff")
    encode = gpt2(vocab_size).encode
    assert [id for part in parts for id in encode(part)] == encode("".join(parts))


def test_cutting_anywhere_would_change_ids():
    encode = gpt2().encode
    assert encode("the t") + encode("he") != encode("the the")
    assert encode("a\n\n") + encode("b") != encode("a\n\nb")


@pytest.mark.parametrize(
    ("text", "chunk_bytes", "expected"),
    [
        ("ab cd ef", 2, ["ab", " cd", " ef"]),  # word borders that are borders of chunks too
        ("ab cd ef", 3, ["ab", " cd", " ef"]),
        ("ab cd ef", 99, ["ab cd", " ef"]),
        ("ab  \n cd", 3, ["ab", "  \n cd"]),
        ("", 3, []),
    ],
)
def test_the_cut_is_the_last_word_border(tmp_path, text, chunk_bytes, expected):
    (path,) = write(tmp_path, a=text)
    assert list(read_text(path, chunk_bytes=chunk_bytes)) == expected


def test_parts_stay_near_the_chunk_size(tmp_path):
    (path,) = write(tmp_path, a="The lamp is lit, and\n\n  the sea says nothing. " * 500)
    parts = list(read_text(path, chunk_bytes=1000))
    assert max(map(len, parts)) < 1020 and len(parts) > 20


@pytest.mark.parametrize("piece", ["a", "日", "\u3000", " "])
def test_a_piece_without_a_border_is_kept_whole_in_linear_time(tmp_path, piece):
    n = 3_000_000
    (path,) = write(tmp_path, a=f"so {piece * n} on")
    began = time.perf_counter()
    parts = list(read_text(path, chunk_bytes=10_000))
    assert time.perf_counter() - began < 10
    assert "".join(parts) == f"so {piece * n} on"
    assert max(map(len, parts)) >= n


@quick
@given(texts.map(lambda text: text.replace("\r", "\r\n")), st.integers(1, 9))
@example("\ufeff\ufeffx\ufeff", 1)
@example("a\r\n\rb\0\r\n", 2)
def test_every_byte_is_kept_but_one_leading_mark(text, chunk_bytes):
    with tempfile.TemporaryDirectory() as folder:
        (path,) = write(Path(folder), a=text)
        got = "".join(read_text(path, chunk_bytes=chunk_bytes)).encode()
    assert got == text.encode().removeprefix(b"\xef\xbb\xbf")


@quick
@given(
    st.text(max_size=20).filter(lambda text: text.count("\0") <= 8),
    st.sampled_from([b"\xff", b"\xe9 ", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x9f\xa4", b"\x80"]),
    st.sampled_from(["", "after", "日本"]),
    st.booleans(),
    st.integers(1, 9),
)
def test_invalid_utf8_is_refused_with_its_place_in_the_file(before, bad, after, bom, chunk_bytes):
    data = b"\xef\xbb\xbf" * bom + b"x" + before.encode() + bad + after.encode()
    with pytest.raises(UnicodeDecodeError) as oracle:
        data.decode()
    with tempfile.TemporaryDirectory() as folder:
        (path,) = write(Path(folder), a=data)
        with pytest.raises(InputError, match=r"a\.txt is not UTF-8 at byte (\d+): .*iconv") as got:
            list(read_text(path, chunk_bytes=chunk_bytes))
    assert f"at byte {oracle.value.start}:" in str(got.value)


def zipped(folder):
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("word/document.xml", "<w:t>text</w:t>")
    return (folder / "zip").read_bytes()


LATIN = "The lamp is lit.\n"
OTHER_FILES = [
    (lambda folder: LATIN.encode("utf-16"), r"looks like UTF-16: .* iconv -f UTF-16 -t UTF-8"),
    (lambda folder: b"\xfe\xff" + "日本".encode("utf-16-be"), "looks like UTF-16: "),
    (lambda folder: LATIN.encode("utf-16-le"), "looks like UTF-16LE: .* iconv -f UTF-16LE"),
    (lambda folder: "naïve ışık ".encode("utf-16-be") * 9999, "looks like UTF-16BE: "),
    (lambda folder: LATIN.encode("utf-32"), "looks like UTF-32: "),
    (lambda folder: b"%PDF-1.7\n...", "is a PDF: .*pdftotext"),
    (zipped, "is a zip archive, as Word's files are too: "),
    (lambda folder: gzip.compress(LATIN.encode()), "is compressed with gzip: .*gunzip"),
    (lambda folder: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    (lambda folder: b"ELF text\0\0\0\0\0" * 99, "is a binary file"),
    (lambda folder: bytes(1000), "is a binary file"),
    (lambda folder: b"x" * 60_000 + bytes(1000), "is a binary file"),
]


@pytest.mark.parametrize(("make", "message"), OTHER_FILES)
def test_other_files_than_text_are_refused_by_name(tmp_path, make, message):
    (path,) = write(tmp_path, a=make(tmp_path))
    with pytest.raises(InputError, match=rf"a\.txt {message}"):
        prepare([path], Bytes(), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("text", ["a\0b", "\0", "x" * 9990 + "\0" * 90, "<html>PK\x03\x04 %PDF-"])
def test_a_few_nuls_and_harmless_beginnings_are_text(tmp_path, text):
    paths = write(tmp_path, a=text)
    corpus = prepare(paths, gpt2(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert ids_of(corpus)[0] == stream_of([text], gpt2())


@quick
@given(
    st.lists(texts, min_size=1, max_size=6).filter(any),
    st.integers(1, 40),
    st.floats(0, 1, exclude_max=True),
)
def test_training_and_held_out_ids_are_the_whole_stream(contents, chunk_bytes, val_fraction):
    contents = [text.removeprefix("\ufeff") for text in contents]
    if not any(contents):
        return
    tokenizer = gpt2(300)
    stream = stream_of(contents, tokenizer)
    with tempfile.TemporaryDirectory() as folder, chunks_of(chunk_bytes):
        named = {f"{number}": "\ufeff" + text for number, text in enumerate(contents)}
        paths = write(Path(folder), **named)
        corpus = prepare(
            paths, tokenizer, val_fraction=val_fraction, cache_dir=Path(folder) / "cache"
        )
        train, val = ids_of(corpus)
    assert train + val == stream
    assert train.count(tokenizer.eot) + val.count(tokenizer.eot) == sum(map(bool, contents))
    assert (corpus.n_documents, corpus.n_characters, corpus.n_tokens) == (
        sum(map(bool, contents)),
        sum(map(len, contents)),
        len(stream),
    )
    if val_fraction == 0:
        assert corpus.val is None
        return
    assert train and val
    share = min(max(1, round(val_fraction * len(stream))), len(stream) - 1)
    assert len(val) == share or (train[-1] == tokenizer.eot and abs(len(val) - share) <= share / 4)


@quick
@given(
    st.lists(st.sampled_from(["", "a", "bc", "the sea ", "x" * 40]), min_size=1).filter(any),
    st.floats(0, 1, exclude_max=True),
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
    texts = [(path, text) for path, text in zip(paths, contents) if text]
    owners = [path for path, text in texts for _ in stream_of([text], Bytes())]
    n_train = len(corpus.train.tokens)
    n_part = len(owners) - n_train
    cut = None if own_val or not n_part else owners[n_train - 1]
    if cut and cut != owners[n_train]:
        cut = None
    check_documents(corpus.train, owners[:n_train], cut, "first part")
    if own_val:
        check_documents(corpus.val, [own[1]] * 9 + [own[2]] * 4, None, "")
    elif n_part:
        check_documents(corpus.val, owners[n_train:], cut, "last part")


def check_documents(file, owners, cut, part):
    """`owners` has the path that each token came from; of `cut` only a part is here."""
    in_order = list(dict.fromkeys(owners))
    for position, owner in enumerate(owners):
        (document,) = file.documents_at([position])
        assert document.number == in_order.index(owner)
        assert document.label == (f"{owner} ({part})" if owner == cut else str(owner))
        assert document.start == owners.index(owner)
        assert document.end - document.start == owners.count(owner)
    documents = file.documents_at(range(len(owners))[::-1])
    assert [document.number for document in documents] == [*range(len(in_order))]


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
    rows = np.array([(3, 1, 1, 0), (8, 17, 1, 1)], module.DOCUMENT)
    first, second = replace(file, documents=rows).documents_at([0, 7])
    assert (first.label, second.label) == (
        f"{paths[1]}:row 1",
        f"{paths[1]}:row 17 (first part)",
    )


@pytest.mark.parametrize(
    ("lengths", "val_fraction", "n_val"),
    [
        ([999], 0.1, 100),  # no border within reach
        ([99] * 10, 0.1, 100),  # a border in the very place
        ([99] * 10, 0.09, 100),  # the nearest border is 10 away, 22 are allowed
        ([99] * 10, 0.12, 100),
        ([99] * 10, 0.15, 150),  # 50 away, 37 are allowed
        ([499, 99, 399], 0.44, 400),
        ([499, 99, 399], 0.6, 500),
        ([1], 0.001, 1),
        ([1], 0.999, 1),
    ],
)
def test_the_cut_moves_to_a_border_within_a_quarter_of_the_held_out_part(
    tmp_path, lengths, val_fraction, n_val
):
    paths = write(tmp_path, **{f"{i:03}": "x" * n for i, n in enumerate(lengths)})
    corpus = prepare(paths, Bytes(), val_fraction=val_fraction, cache_dir=tmp_path / "cache")
    assert len(ids_of(corpus)[1]) == n_val


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
    assert list((tmp_path / "cache").iterdir()) == []


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
            "source": corpus.train.info.source,
            "options": {"val_fraction": 0.5},
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
    caplog.set_level(logging.INFO)
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
    moved = write(tmp_path / "new", q="\ufeffone", r="two")
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
    path.with_suffix(".documents").write_bytes(bytes(24))


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
    monkeypatch.setattr(module, "CHUNK_BYTES", 4)
    paths = write(tmp_path, a="x" * 99)
    whole = ids_of(prepare(paths, Bytes(), val_fraction=0.5, cache_dir=tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
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
    assert list((tmp_path / "cache").iterdir()) == [folder]
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
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_what_stops_the_work_leaves_nothing_behind(tmp_path, problem):
    def stop():
        raise problem

    paths = write(tmp_path, a="one")
    with pytest.raises(problem):
        prepare(paths, Interfering(stop), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_at_once_make_one_folder(tmp_path):
    paths = write(tmp_path, a="one\n" * 99)
    together, got = threading.Barrier(2, timeout=30), []

    def work():
        tokenizer = Interfering(together.wait)  # neither is done before both are at work
        got.append(prepare(paths, tokenizer, cache_dir=tmp_path / "cache"))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    first, second = got
    assert ids_of(first) == ids_of(second)
    assert list((tmp_path / "cache").iterdir()) == [first.train.path.parent]


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
    corpus = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert ids_of(corpus)[0] == stream_of(["one\n" * 99], Bytes())


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
    assert list((tmp_path / "cache").iterdir()) == []


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
    monkeypatch.setattr(module, "NOTICE_SECONDS", 0)
    prepare(write(tmp_path, a="x" * 30, b="y" * 90), Bytes(), cache_dir=tmp_path / "cache")
    assert caplog.messages[:2] == ["tokenized 25% of the text", "tokenized 100% of the text"]


def test_ten_thousand_files_are_ten_thousand_documents_in_order(tmp_path):
    (tmp_path / "texts").mkdir()
    numbers = [f"{n:05}" for n in range(10_000)]
    write(tmp_path / "texts", **{n: n for n in reversed(numbers)})
    corpus = prepare(
        [tmp_path / "texts" / "*.txt"], Bytes(), val_fraction=0.1, cache_dir=tmp_path / "cache"
    )
    train, val = ids_of(corpus)
    assert train == stream_of(numbers[:9000], Bytes())
    assert val == stream_of(numbers[9000:], Bytes())


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
