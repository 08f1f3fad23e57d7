"""A vocabulary of a text's own. Oracles: tokenizers trained by itself, and transformers' reading of
the folder.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

from corpora import rows_of, texts, write
from languages import LANGUAGES, text_in
from minigpt2.corpus import vocabulary
from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.prepared import prepare
from minigpt2.corpus.vocabulary import (
    bytes_per_token,
    in_own_vocabulary,
    own_vocabulary,
    train_vocabulary,
)
from minigpt2.errors import InputError, OptionError
from minigpt2.formats.vocabulary import BYTE_OF, merges_of
from minigpt2.tokenizer import Tokenizer
from scripts import ROOT
from text_files import quick
from vocabularies import gpt2, hf_encode, hf_reads
from vocabularies import texts as any_texts

ALL = "".join(map(text_in, LANGUAGES))


def merged_by_tokenizers(contents, vocab_size):
    """The tokens after the 256 bytes, in the order of merging, that the library learns alone."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        contents, vocab_size=vocab_size - 1, min_frequency=2, show_progress=False
    )
    ids = bpe.get_vocab()
    by_id = sorted(ids, key=lambda name: ids[name])
    return [bytes(BYTE_OF[char] for char in name) for name in by_id[256:]]


def tokens_of(tokenizer):
    return [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size - 1)]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A vocabulary of all languages, as it was saved, and transformers' reading of it."""
    folder = tmp_path_factory.mktemp("own")
    train_vocabulary([ALL], 700).save(folder)
    return Tokenizer.from_folder(folder), hf_reads(folder)


def test_it_has_gpt2s_layout_and_the_librarys_merges():
    tokenizer = train_vocabulary([ALL], 700)
    assert tokenizer.vocab_size == 700 and tokenizer.eot == 699
    assert tokens_of(tokenizer)[:256] == tokens_of(gpt2(257))
    assert tokens_of(tokenizer)[256:] == merged_by_tokenizers([ALL], 700)
    assert tokenizer.token_text(tokenizer.eot) == "<|endoftext|>"


@quick
@given(st.one_of(texts, any_texts, st.sampled_from([*map(text_in, LANGUAGES)])))
def test_our_ids_are_those_of_transformers_on_the_saved_folder(own, text):
    ours, hf = own
    assert ours.encode(text) == hf_encode(hf, text)
    assert ours.decode(ours.encode(text)) == text


@quick
@given(st.lists(any_texts, min_size=1, max_size=5), st.integers(257, 400))
def test_each_merge_is_what_earlier_ones_make(contents, vocab_size):
    contents = [text * 2 for text in contents]
    tokenizer = train_vocabulary(contents, vocab_size)
    tokens = tokens_of(tokenizer)
    assert all(len(parts) == 2 for parts in merges_of(tokens))
    assert len({*tokens}) == len(tokens) == tokenizer.vocab_size - 1 <= vocab_size - 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_token_holds_more_bytes_than_one_of_gpt2s(tmp_path, language):
    paths = write(tmp_path, a=text_in(language), b=text_in(language, 9))
    options = {"cache_dir": tmp_path / "cache"}
    corpus = prepare(paths, gpt2(), **options)
    tokenizer = own_vocabulary(corpus, 500, **options)
    again = in_own_vocabulary(corpus, tokenizer, **options)
    assert again.in_gpt2s and again.val and corpus.val
    for old, new, n in zip((corpus.train, corpus.val), (again.train, again.val), again.in_gpt2s):
        ours, theirs = bytes_per_token(new, tokenizer), bytes_per_token(new, tokenizer, n)
        assert theirs == pytest.approx(bytes_per_token(old, gpt2()), rel=0.02)
        assert ours > theirs
    rows = [tokenizer.token_bytes(id) for ids, _ in rows_of(again.train) for id in ids]
    text = [token for token in rows if token != b"<|endoftext|>"]
    assert bytes_per_token(again.train, tokenizer) == len(b"".join(text)) / len(text)


@pytest.mark.parametrize("own_val", [False, True])
def test_what_stands_in_held_out_text_alone_is_not_learned(tmp_path, own_val):
    """Every document has a word of its own, many times, which it would be worth learning."""
    words = [f"{word}nk" * 3 for word in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr")]
    contents = {str(n): f"the lamp {word} is lit, " * 30 for n, word in enumerate(words)}
    *paths, last = write(tmp_path, **contents)
    split = {"val_paths": [last]} if own_val else {"val_fraction": 0.2}
    named = paths if own_val else [*paths, last]
    options = {"cache_dir": tmp_path / "cache"}
    corpus = prepare(named, gpt2(), **split, **options)
    tokenizer = own_vocabulary(corpus, 2000, **options)
    again = in_own_vocabulary(corpus, tokenizer, **options)
    assert corpus.val and again.val
    learned = [tokenizer.decode(ids[:-1]) for ids, _ in rows_of(again.train)]
    held_out = [tokenizer.decode(ids[:-1]) for ids, _ in rows_of(again.val)]
    assert sorted([*learned, *held_out]) == sorted(contents.values()) and held_out
    assert tokens_of(tokenizer)[256:] == merged_by_tokenizers(learned, 2000)
    tokens = {*tokens_of(tokenizer)}
    for text in learned:
        assert b" " + text.split()[2].encode() in tokens
    for text in held_out:
        assert all(token not in text.split()[2].encode() for token in tokens if len(token) > 4)


def test_of_a_document_that_is_cut_the_first_part_alone_is_learned(tmp_path):
    text = text_in("korean", 90)
    options = {"cache_dir": tmp_path / "cache"}
    for fraction in (0.1, 0.21, 0.32, 0.43):
        corpus = prepare(write(tmp_path, a=text), gpt2(), val_fraction=fraction, **options)
        first = b"".join(map(gpt2().token_bytes, corpus.train.tokens.tolist()))
        expected = merged_by_tokenizers([first.decode(errors="ignore")], 400)
        assert tokens_of(own_vocabulary(corpus, 400, **options))[256:] == expected


def test_special_tokens_that_were_read_as_tokens_are_not_learned(tmp_path):
    text = "a lamp<|endoftext|>a wall<|endoftext|>" * 50
    options = {"cache_dir": tmp_path / "cache"}
    for special in (False, True):
        text_options = TextConfig(special_tokens=special)
        corpus = prepare(
            write(tmp_path, a=text), gpt2(), val_fraction=0, text=text_options, **options
        )
        tokenizer = own_vocabulary(corpus, 400, **options)
        assert (b"endoftext" in tokens_of(tokenizer)) == (not special)
        again = in_own_vocabulary(corpus, tokenizer, **options)
        ids = [*tokenizer.encode(text, special=special), tokenizer.eot]
        assert again.train.tokens.tolist() == ids


TRAINED = """
import sys
from pathlib import Path
from minigpt2.corpus.vocabulary import train_vocabulary
print(train_vocabulary([Path(sys.argv[1]).read_text()] * 3, 1500).identity)
"""


def test_it_is_the_same_in_every_process_and_with_any_number_of_threads():
    path = ROOT / "data" / "sallow-point.txt"
    here = train_vocabulary(iter([path.read_text()] * 3), 1500)
    for setting in ({"TOKENIZERS_PARALLELISM": "false"}, {"RAYON_NUM_THREADS": "7"}):
        words = [sys.executable, "-c", TRAINED, str(path)]
        environment = {**os.environ, "PYTHONHASHSEED": "random", **setting}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == here.identity


def test_what_was_trained_before_is_found_and_what_is_damaged_trained_again(
    tmp_path, monkeypatch, caplog
):
    options = {"cache_dir": tmp_path / "cache"}
    corpus = prepare(write(tmp_path, a=ALL), gpt2(), **options)
    first = own_vocabulary(corpus, 400, **options)
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "train_vocabulary", lambda *given: pytest.fail("trained again"))
        assert own_vocabulary(corpus, 400, **options).identity == first.identity
    (folder,) = (tmp_path / "cache").glob("vocabulary-*")
    (folder / "tokenizer.json").write_text("{")
    assert own_vocabulary(corpus, 400, **options).identity == first.identity
    assert "training it again" in caplog.text
    assert own_vocabulary(corpus, 401, **options).vocab_size == 401


def test_a_small_text_makes_a_smaller_vocabulary_and_says_so(tmp_path, caplog):
    options = {"cache_dir": tmp_path / "cache"}
    corpus = prepare(write(tmp_path, a="abab"), gpt2(), val_fraction=0, **options)
    tokenizer = own_vocabulary(corpus, 5000, **options)
    assert tokens_of(tokenizer)[256:] == [b"ab"] and tokenizer.eot == 257
    assert "the vocabulary has 258 tokens, not 5,000" in caplog.text


def test_no_token_is_longer_than_gpt2s_longest():
    tokenizer = train_vocabulary(["=" * 5000, "=" * 5000], 400)
    longest = max(map(len, tokens_of(tokenizer)))
    assert longest == 128 == max(map(len, tokens_of(gpt2())))


def test_without_the_library_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(OptionError, match=r"train_vocabulary needs tokenizers: pip install"):
        train_vocabulary(["text"], 300)


def test_an_error_of_the_text_is_raised_as_it_is():
    def broken():
        yield "lamp"
        raise InputError("the file is gone")

    with pytest.raises(InputError, match="the file is gone"):
        train_vocabulary(broken(), 300)


def test_a_signal_is_answered_at_once_and_the_text_is_read_no_further():
    read = count()
    endless = (f"lamp {next(read)}\n" for _ in count())
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_vocabulary(endless, 300)
    for thread in threading.enumerate():
        if thread.name == "minigpt2":
            thread.join(30)
            assert not thread.is_alive()
    assert time.monotonic() - began < 30


def test_documents_in_memory_are_the_parts_of_a_text(tmp_path, monkeypatch):
    """However the text is handed over, the vocabulary is the same."""
    corpus = prepare(write(tmp_path, a=ALL), gpt2(), cache_dir=tmp_path / "cache")
    found = set()
    for size in (1, 50, 2**14):
        monkeypatch.setattr(vocabulary, "PART", size)
        cache = Path(tmp_path, f"cache-{size}")
        found.add(own_vocabulary(corpus, 600, cache_dir=cache).identity)
    assert len(found) == 1
