"""Documents to ids, here and in other processes. Oracle: the text in one string, tokenized."""

import gzip
import hashlib
import json
import logging
import lzma
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corpora import Bytes, Words, gpt2, ids_of, made_in, rows_of, texts, write
from minigpt2.corpus import tokenizing
from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.prepared import prepare
from minigpt2.corpus.tokenizing import LAST_CUT, cut_at_words, last_cut
from minigpt2.errors import InputError
from minigpt2.tokenizer import Tokenizer
from scripts import ROOT
from text_files import quick
from tokenizer_folders import with_words, word


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


def test_a_million_spaces_are_tokenized(tmp_path):
    text = "so" + " " * 1_000_001 + "x"
    corpus = prepare(write(tmp_path, a=text), gpt2(), val_fraction=0, cache_dir=tmp_path / "cache")
    ids = ids_of(corpus)[0]
    assert ids[-1] == gpt2().eot and gpt2().decode(ids[:-1]) == text


@pytest.mark.parametrize("unit", ["a", "x1!", "!?", "日本語", "a<|endoftext|>"])
def test_a_text_without_spaces_is_looked_at_in_proportion_to_its_length(monkeypatch, unit):
    work = Counter()

    def counted(function):
        def counting(text, *more):
            work[function.__name__] += len(text)
            return function(text, *more)

        return counting

    for name in ("_cut_elsewhere", "split_long_runs", "kind_of_character"):
        monkeypatch.setattr(tokenizing, name, counted(getattr(tokenizing, name)))
    sought = SimpleNamespace(match=counted(LAST_CUT.pattern.match))

    def characters_seen(n):
        work.clear()
        text = unit * (n // len(unit))
        chunks = [text[at : at + 100] for at in range(0, len(text), 100)]
        last = LAST_CUT._replace(pattern=sought)
        assert "".join(cut_at_words(chunks, 100, last=last, longest=500)) == text
        return work.total()

    one, two = characters_seen(2**14), characters_seen(2**15)
    assert 2**15 <= two <= 10 * 2**15 and two <= 2.5 * one
    assert not work["match"], "where no whitespace is, no border is sought"


def test_long_work_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tokenizing, "NOTICE_SECONDS", 0)
    prepare(write(tmp_path, a="x" * 30, b="y" * 90), Bytes(), cache_dir=tmp_path / "cache")
    notices = [message.split(",")[0] for message in caplog.messages[:2]]
    assert notices == ["read 25% of the files", "read 100% of the files"]


def test_prompts_are_tokenized_by_themselves_and_their_lengths_are_known(tmp_path):
    rows = [{"prompt": "How ma", "completion": "ny?"}, {"prompt": "", "completion": "x"}]
    rows += [{"text": "plain"}, {"prompt": "only", "completion": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare([path], gpt2(), val_fraction=0, cache_dir=tmp_path / "cache")
    encode, eot = gpt2().encode, gpt2().eot
    expected = [encode("How ma") + encode("ny?"), encode("x"), encode("plain"), encode("only")]
    assert [ids for ids, _ in rows_of(corpus.train)] == [[*ids, eot] for ids in expected]
    starts = [0, *corpus.train.documents["end"].tolist()]
    n_first, n_last = len(encode("How ma")), len(encode("only"))
    spans = [(0, n_first), (starts[3], starts[3] + n_last)]
    assert corpus.train.prompts.tolist() == spans
    assert corpus.train.documents["row"].tolist() == [1, 2, 3, 4]


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


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """Tokenizers with added words of every kind: without and with a space in front."""
    words = [word("<u>"), word("the sea", special=False), word("x", special=False, rstrip=True)]
    words += [word("y\tz", lstrip=True, single_word=True), word(" \n", special=False)]
    words[2]["content"] = "<x>"
    flags = {"add_prefix_space": False}, {"add_prefix_space": True}
    folders = [tmp_path_factory.mktemp("worded") for _ in flags]
    return [
        Tokenizer.from_folder(with_words(folder, tmp_path_factory, *words, **given))
        for folder, given in zip(folders, flags)
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["the sea", "<x>", "<u>", "y\tz", *" \n\tathe"]), max_size=20),
    st.integers(1, 9),
    st.booleans(),
)
def test_no_added_word_is_cut(worded, parts, size, special):
    for tokenizer in worded:
        text = "".join(parts)
        pieces = cut_at_words([text[at : at + 2] for at in range(0, len(text), 2)], size,
                              last=last_cut(tokenizer))  # fmt: skip
        ids = [id for part in pieces for id in tokenizer.encode(part, special=special)]
        assert ids == tokenizer.encode(text, special=special)
        assert ids == tokenizer.encode_array(text, special=special).tolist()


RUNS = [
    "aaa",
    "b1",
    "日",
    "12",
    "!?",
    "'s",
    "'",
    "e\u0301",
    " ",
    "\n\n",
    "\xa0",
    "<x>",
    "<u>",
    "the sea",
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(RUNS), max_size=30).map("".join),
    st.integers(1, 9),
    st.integers(2, 8),
    st.booleans(),
)
def test_long_runs_and_text_without_whitespace_are_cut_as_the_tokenizer_cuts_them(
    worded, text, size, longest, special
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt2.tokenizer.LONGEST_PIECE", longest)
        for tokenizer in (gpt2(), *worded):
            chunks = [text[at : at + 3] for at in range(0, len(text), 3)]
            parts = cut_at_words(chunks, size, last=last_cut(tokenizer), longest=longest)
            ids = [id for part in parts for id in tokenizer.encode(part, special=special)]
            assert ids == tokenizer.encode(text, special=special)


@pytest.mark.parametrize("unit", ["a", "\n", "7", "x1", "日。", "!", "a\xa0", "\u0301"])
def test_little_is_held_back_whatever_the_text_is(unit):
    chunks = [unit * 1000] * 100
    parts = list(cut_at_words(chunks, 1000, longest=2000))
    assert "".join(parts) == "".join(chunks) and max(map(len, parts)) <= 5000


def test_long_pieces_that_were_cut_are_counted(tmp_path):
    paths = write(tmp_path, a="so " + "a" * 2_000_001, b="\n" * 1_500_000 + "x", c="x1!" * 700_000)
    corpus = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert corpus.counts["cut_long_pieces"] == 2 + 1
    corpus = prepare(paths[2:], Bytes(), val_fraction=0, cache_dir=tmp_path / "cache")
    assert not corpus.counts.get("cut_long_pieces")


READING = """
    import resource, sys
    from pathlib import Path
    from minigpt2.corpus.options import TextConfig
    from minigpt2.corpus.sources.documents import read_documents
    from minigpt2.corpus.sources.files import Source
    from minigpt2.corpus.tokenizing import cut_at_words

    path, begun = Path(sys.argv[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunks = read_documents(Source(path, path.name, path.stat().st_size), TextConfig())
    size = sum(map(len, cut_at_words(chunk.text for chunk in chunks)))
    print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
@pytest.mark.parametrize(
    ("unit", "packing"), [("a", ".gz"), ("\n", ".gz"), ("a", ".zst"), ("\n", ".xz")]
)
def test_300_mb_of_one_character_need_little_memory(tmp_path, unit, packing):
    path = tmp_path / f"a.txt{packing}"
    opened = {".gz": partial(gzip.open, compresslevel=1), ".xz": partial(lzma.open, preset=0)}
    with {**opened, ".zst": zstandard.open}[packing](path, "wb") as file:
        for _ in range(300):
            file.write(unit.encode() * 10**6)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READING), path], capture_output=True, text=True
    )
    size, megabytes = map(int, done.stdout.split())
    assert size == 300 * 10**6 and megabytes < 100, done.stderr


def test_special_tokens_are_read_as_tokens_where_that_is_asked_for(worded, tmp_path):
    tokenizer, _ = worded
    paths = write(tmp_path, a="the sea<u> <|endoftext|>a <u>", b="b")
    for special in (False, True):
        corpus = prepare(
            paths,
            tokenizer,
            val_fraction=0,
            text=TextConfig(special_tokens=special),
            cache_dir=tmp_path / "cache",
        )
        encoded = [tokenizer.encode(path.read_text(), special=special) for path in paths]
        assert ids_of(corpus)[0] == [*encoded[0], 299, *encoded[1], 299]
        assert corpus.special == {"<|endoftext|>": 1, "<u>": 2}
    assert len(made_in(tmp_path / "cache")) == 2


def test_special_tokens_that_are_nowhere_change_nothing_and_that_is_said(tmp_path, caplog):
    text = TextConfig(special_tokens=True)
    prepare(write(tmp_path, a="b"), gpt2(300), text=text, cache_dir=tmp_path / "cache")
    assert "--special-tokens changes nothing: no special token is in the text" in caplog.text


def test_cutting_anywhere_would_change_ids():
    ids = gpt2().encode("the t") + gpt2().encode("he")
    assert ids != gpt2().encode("the the")


def test_parts_stay_near_their_size():
    words = ["word " * 10_000]
    assert max(map(len, cut_at_words(words, 1000))) <= 1005


@pytest.fixture
def several_processes(monkeypatch):
    """Use them for short texts too."""
    monkeypatch.setattr(tokenizing, "ENOUGH_FOR_PROCESSES", 0)
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 500)


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
    with pytest.raises(InputError, match=r"a process that tokenizes was killed.*fewer workers"):
        prepare(paths, Killing(), workers=2, cache_dir=tmp_path / "cache")
    assert made_in(tmp_path / "cache") == []


def test_an_error_in_a_worker_is_the_same_error(tmp_path, several_processes):
    paths = write(tmp_path, a="7 " * 999 + "300")
    with pytest.raises(InputError, match="made the id 300, its vocab_size is 300"):
        prepare(paths, Words(300), workers=2, cache_dir=tmp_path / "cache")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_workers_end_with_their_killed_parent(tmp_path):
    code = """
        import sys
        sys.path.insert(0, sys.argv[3])
        from minigpt2.corpus import tokenizing
        from corpora import Sleeping
        from minigpt2.corpus.prepared import prepare
        if __name__ == "__main__":
            tokenizing.ENOUGH_FOR_PROCESSES = 0
            prepare([sys.argv[1]], Sleeping(), workers=2, cache_dir=sys.argv[2])
    """
    started = tmp_path / "started"
    script, (path,) = tmp_path / "script.py", write(tmp_path, a=str(started) + " x")
    script.write_text(textwrap.dedent(code))
    command = [sys.executable, script, path, tmp_path / "cache", ROOT / "tests" / "helpers"]
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


UNGUARDED = """
    import sys
    from minigpt2 import finetune
    from minigpt2.corpus import prepare, tokenizing
    from minigpt2.tokenizer import Tokenizer

    name, text, cache = sys.argv[1:]
    tokenizing.ENOUGH_FOR_PROCESSES = 0
    if name == "imported twice":
        assert __name__ == "__main__"
    if name == "finetune":
        finetune(preset="nano", data=text, workers=2, max_steps=1, out=cache + "/run")
    else:
        print(prepare([text], Tokenizer.gpt2(), workers=2, cache_dir=cache).n_documents)
"""
GUARD = 'use workers=1, or put the call below if __name__ == "__main__":'


@pytest.mark.parametrize(
    ("name", "told", "tracebacks"),
    [
        ("prepare", GUARD, 1),
        pytest.param("finetune", GUARD, 1, marks=pytest.mark.slow),
        ("imported twice", "could not import the program that starts it", 2),
    ],
)
def test_a_program_that_processes_cannot_import_ends_with_the_reason(
    tmp_path, name, told, tracebacks
):
    script, (path,) = tmp_path / "script.py", write(tmp_path, a="one two " * 999)
    script.write_text(textwrap.dedent(UNGUARDED))
    done = subprocess.run(
        [sys.executable, script, name, path, tmp_path / "cache"],
        env={**os.environ, "MINIGPT2_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1 and told in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback (most recent call last)") == tracebacks
    assert not list(tmp_path.rglob("ids.tmp")) and not (tmp_path / "cache" / "run").exists()


def test_a_program_from_stdin_which_no_process_can_import_tokenizes_alone(tmp_path):
    (path,) = write(tmp_path, a="one two " * 999)
    done = subprocess.run(
        [sys.executable, "-", "prepare", path, tmp_path / "cache"],
        input=textwrap.dedent(UNGUARDED), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status


INTERRUPTED = """
    import sys, time
    from pathlib import Path
    from minigpt2.system.signals import exit_on_signals

    if __name__ == "__main__":
        exit_on_signals()  # as the command does
    from minigpt2.corpus import tokenizing

    moment, text, reached = sys.argv[1:]

    def reach():
        Path(reached).touch()
        time.sleep(1)

    if __name__ == "__main__":
        from minigpt2.cli.corpus import run

        tokenizing.ENOUGH_FOR_PROCESSES, tokenizing.BATCH_CHARACTERS = 0, 500
        tokenizing.NOTICE_SECONDS = 600  # a busy machine
        sys.exit(run([text, "--preset", "nano", "--workers", "2"]))
    elif moment == "importing":
        reach()
    else:
        encode = tokenizing._encode
        tokenizing._encode = lambda *batch: reach() or encode(*batch)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("moment", ["importing", "tokenizing"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_to_all_processes_ends_them_in_silence(tmp_path, moment, name, code):
    script, reached = tmp_path / "script.py", tmp_path / "reached"
    script.write_text(textwrap.dedent(INTERRUPTED))
    (path,) = write(tmp_path, a="".join(f"The lamp of {n} is lit.\n" for n in range(999)))
    parent = subprocess.Popen(
        [sys.executable, script, moment, path, reached],
        env={**os.environ, "MINIGPT2_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not reached.exists():
        assert parent.poll() is None, parent.communicate()
        time.sleep(0.05)
    os.killpg(parent.pid, getattr(signal, name))
    out, err = parent.communicate(timeout=60)  # the pipes close when all processes have ended
    assert (parent.returncode, out, err.strip()) == (code, "", "")
    assert made_in(tmp_path / "cache" / "tokens") == []


turns = st.lists(st.tuples(texts, texts), max_size=3)


@quick
@given(st.lists(turns, min_size=1, max_size=4))
def test_of_chats_all_but_the_answers_and_their_ends_are_prompts(chats):
    tokenizer = gpt2()
    assume(any(chats))
    rows = [
        [{"role": role, "content": said} for turn in chat for role, said in zip(ROLES, turn)]
        for chat in chats
    ]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "chats.jsonl")
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        corpus = prepare([path], tokenizer, val_fraction=0, cache_dir=Path(name, "cache"))
    ids, spans, n_chats = [], [], 0
    for row in filter(None, rows):
        n_chats += 1
        for at in range(0, len(row), 2):
            # what is asked, and where the answer begins
            asked = tokenizer.encode_chat(row[at : at + 1])
            spans.append((len(ids), len(ids) + len(asked)))
            ids += [*asked, *tokenizer.encode(row[at + 1]["content"]), tokenizer.eot]
    assert corpus.train.tokens.tolist() == ids
    assert corpus.train.prompts.tolist() == spans
    assert corpus.counts["chats"] == n_chats
    assert corpus.counts["chats_of_several_answers"] == sum(len(row) > 2 for row in rows)
    assert corpus.special == {}  # end-of-text that is said is not counted as a separator


ROLES = ("user", "assistant")


def test_answers_of_a_chat_that_is_cut_for_what_is_held_out_stay_answers(tmp_path):
    said = [{"role": ROLES[n % 2], "content": f"{n} " * 40} for n in range(40)]
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"messages": said}]))
    options = {"workers": 1, "cache_dir": tmp_path / "cache"}
    whole = prepare([path], gpt2(), val_fraction=0, **options).train
    parts = prepare([path], gpt2(), val_fraction=0.37, **options)
    assert parts.val is not None
    masks = [mask_of(file) for file in (parts.train, parts.val)]
    assert masks[0] + masks[1] == mask_of(whole)
    assert 0 < sum(masks[1]) < len(masks[1])
    assert parts.train.tokens.tolist() + parts.val.tokens.tolist() == whole.tokens.tolist()


def mask_of(file):
    """For each token whether it is a prompt's."""
    mask = [False] * len(file.tokens)
    for start, end in file.prompts.tolist():
        mask[start:end] = [True] * (end - start)
    return mask


def test_where_prompts_stand_decides_what_a_corpus_is_and_runs_know_what_they_had(tmp_path):
    rows = [{"prompt": "How ma", "completion": "ny?"}, {"prompt": "", "completion": "x"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare([path], gpt2(), val_fraction=0, cache_dir=tmp_path / "cache")
    lengths = np.array([len(gpt2().encode("How ma")), 0], np.int64)
    digests = [hashlib.sha256(lengths.tobytes()).hexdigest()]
    content = json.dumps([[corpus.train.info.sha256], digests])
    assert corpus.identity == hashlib.sha256(content.encode()).hexdigest()[:16]
    moved = corpus.train.prompts.copy()
    moved["start"] += 1
    other = replace(corpus, train=replace(corpus.train, prompts=moved))
    none = replace(corpus, train=replace(corpus.train, prompts=moved[:0]))
    assert len({corpus.identity, other.identity, none.identity}) == 3


def test_rows_that_hold_nothing_and_chats_without_an_answer_are_counted(tmp_path):
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rows = [{"messages": said}, {"messages": []}, {"text": None}, {"messages": said[:1]}]
    rows += [{"question": "?", "answer": ""}, {"text": "x"}, {"text": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare([path], gpt2(), val_fraction=0, cache_dir=tmp_path / "cache")
    expected = {"chats": 3, "chats_without_answer": 2, "empty_rows": 3}
    assert expected.items() <= corpus.counts.items() and corpus.n_documents == 4
