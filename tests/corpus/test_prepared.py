"""Text on disk to token ids on disk. Oracles: the text in one string, tokenized at once."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import (
    Bytes,
    Forbidden,
    Interfering,
    gpt2,
    ids_of,
    made_in,
    rows_of,
    stream_of,
    texts,
    write,
)
from minigpt2.corpus import tokenizing
from minigpt2.corpus.cached import default_cache_dir
from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.prepared import prepare
from minigpt2.corpus.token_file import TokenFile
from minigpt2.corpus.tokenizing import cut_at_words
from minigpt2.errors import InputError
from scripts import ROOT
from text_files import quick


@contextlib.contextmanager
def small_parts(n_bytes, n_characters):
    """Read, cut and tokenize a few characters at a time."""
    read = partial(tokenizing.read_documents, chunk_bytes=n_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "read_documents", read)
        cut = partial(cut_at_words, size=n_characters)
        patch.setattr(tokenizing, "cut_at_words", cut)
        patch.setattr(tokenizing, "BATCH_CHARACTERS", n_characters)
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


def test_the_second_time_nothing_is_tokenized(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="minigpt2.corpus.prepared")
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


def test_which_file_is_held_out_makes_new_files(tmp_path):
    a, b = write(tmp_path, a="one", b="two")
    options = {"val_fraction": 0, "cache_dir": tmp_path / "cache"}
    splits = [([a, b], []), ([a], [b]), ([b], [a])]
    corpora = [prepare(train, Bytes(), val_paths=val, **options) for train, val in splits]
    assert len({corpus.train.path for corpus in corpora}) == 3
    assert [corpus.val is None for corpus in corpora] == [True, False, False]


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


NO_TABLE = "no file is .csv or .tsv"
SAID_OF_TABLES = [  # files, options, what is said
    ({"a.csv": ";", "b.csv": ",", "c.tsv": "\t"}, {}, ["by ';' in 1 file, such as a.csv"]),
    ({"a.csv": "|", "b.csv": "\t", "c.csv": "|"}, {},
     [r"by '\t' in 1 file and by '|' in 2 files, such as b.csv"]),  # training text first
    ({"a.csv": ",", "b.tsv": "\t", "c.txt": ";"}, {}, []),
    ({"a.csv": ";", "b.tsv": ";"}, {"csv_delimiter": ";"}, []),
    ({"a.csv": ";"}, {"csv_columns": "n,text"}, ["by ';' in 1 file, such as a.csv"]),
    ({"a.jsonl": ","}, {"csv_columns": "text"}, [f"--csv-columns changes nothing: {NO_TABLE}"]),
    ({"a.txt": ","}, {"csv_delimiter": ";"}, [f"--csv-delimiter changes nothing: {NO_TABLE}"]),
    ({"a.txt": ","}, {"csv_plain_quotes": True},
     [f"--csv-plain-quotes changes nothing: {NO_TABLE}"]),
    ({"a.csv": ","}, {"csv_columns": "n", "text_field": "b"},
     ["--text-field changes nothing: --csv-columns names what is read"]),
    ({"a.csv": ",", "a.jsonl": ","}, {"csv_columns": "n", "text_field": "text"}, []),
    ({"a.csv": ",", "a.jsonl": ","}, {"csv_columns": "text", "text_field": "body"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("files", "options", "said"), SAID_OF_TABLES)
def test_of_tables_it_is_said_once_what_is_not_as_usual(tmp_path, caplog, files, options, said):
    caplog.set_level(logging.INFO)
    for name, delimiter in files.items():
        row = {"n": "1", "text": f"in {name}", "body": f"in {name}"}
        content = "".join(delimiter.join(part) + "\n" for part in (row, row.values()))
        (tmp_path / name).write_text(json.dumps(row) if name.endswith(".jsonl") else content)
    text, own = TextConfig(**options), [tmp_path / min(files)]
    train = [tmp_path / name for name in files if len(files) == 1 or name != min(files)]
    val = own if len(files) > 1 else []
    for _ in range(2):  # of what is in the cache too
        caplog.clear()
        prepare(train, Bytes(), val_paths=val, text=text, cache_dir=tmp_path / "cache")
        found = [line.replace(f"{tmp_path}{os.sep}", "") for line in caplog.messages]
        found = [line for line in found if "held out" not in line]
        ends = ": --csv-delimiter names another delimiter"
        assert found == [f"columns are divided {s}{ends}" if s[0] == "b" else s for s in said]


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
        from corpora import Interfering
        from minigpt2.corpus.prepared import prepare
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        prepare([sys.argv[1]], Interfering(kill), cache_dir=sys.argv[2])
    """
    done = in_a_process(code, paths[0], tmp_path / "cache", ROOT / "tests" / "helpers")
    assert done.returncode == -9, done.stderr
    assert len(list((tmp_path / "cache").glob(".*.tmp"))) == 1
    corpus = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert ids_of(corpus)[0] == stream_of(["one\n" * 99], Bytes())
    assert list((tmp_path / "cache").glob(".*.tmp")) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    paths = write(tmp_path, a="one")
    with pytest.raises(InputError, match=r"a\.txt/tokens cannot be written: .*MINIGPT2_CACHE"):
        prepare(paths, Bytes(), cache_dir=paths[0] / "tokens")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet.gz", "closed"])
def test_what_is_wrong_with_a_text_is_not_said_of_the_cache(tmp_path, monkeypatch, name):
    folder = tmp_path / "texts"
    (folder / "closed").mkdir(parents=True)
    (folder / name).is_dir() or (folder / name).write_text("one")
    problem = OSError(5, "Input/output error")
    names = {"stat", "open"} if name != "closed" else set()

    def broken(real):
        def call(path, *arguments, **options):
            if Path(path) == folder / name:
                raise problem
            return real(path, *arguments, **options)

        return call

    message = rf"{name} cannot be read: Input/output error$"
    monkeypatch.setattr(os, "scandir", broken(os.scandir))
    for method in [*names, None]:
        with monkeypatch.context() as patch:
            if method:
                patch.setattr(Path, method, broken(getattr(Path, method)))
            elif name != "closed":
                continue
            for given in (folder / name, folder):
                with pytest.raises(InputError, match=message):
                    prepare([given], Bytes(), cache_dir=tmp_path / "cache")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_that_nobody_writes_to_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=r"pipe\.txt is no regular file: .*stdin as -$"):
        prepare([tmp_path / "pipe.txt"], Bytes(), cache_dir=tmp_path / "cache")


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
    with pytest.raises(InputError, match=r"nothing is left to train on: .* other val_paths"):
        prepare([a], Bytes(), val_paths=[b], cache_dir=tmp_path / "cache")


def test_held_out_text_that_is_all_too_short_is_refused(tmp_path):
    a, b = write(tmp_path, a="one" * 9, b="two")
    options = {"text": TextConfig(min_characters=5), "cache_dir": tmp_path / "cache"}
    with pytest.raises(InputError, match="nothing is left to judge by"):
        prepare([a], Bytes(), val_paths=[b], **options)


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


def test_what_is_read_as_plain_text_does_not_count_as_html(tmp_path):
    paths = [tmp_path / name for name in ("a.html.txt", "b.htm.md", "c.HTM")]
    for path in paths:
        path.write_text(f"<p>{path.name}</p>")
    corpus = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert corpus.counts["html"] == 1
    expected = ["<p>a.html.txt</p>", "<p>b.htm.md</p>", "c.HTM"]
    assert ids_of(corpus)[0] == stream_of(expected, Bytes())


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
    with pytest.raises(InputError, match=r"nothing is left to train on: .* lower min_characters"):
        prepare(paths, Bytes(), text=TextConfig(min_characters=99), **options)


def test_nothing_is_held_out_of_a_text_too_short_for_it_and_that_is_said(tmp_path, caplog):
    corpus = prepare(write(tmp_path, a="ab"), Bytes(), cache_dir=tmp_path / "cache")
    assert corpus.val is None and ids_of(corpus)[0] == [*b"ab", 256]
    assert "nothing is held out" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_memory_does_not_grow_with_the_file(tmp_path):
    line = "The lamp is lit, and the sea says nothing; line {:010} of the keeper's log.\n"
    code = """
        import re, sys
        from pathlib import Path
        from minigpt2.corpus.prepared import prepare
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
