"""Oracles: transformers' GPT2Tokenizer and published ids."""

import re
import subprocess
import sys
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vocabularies
from minigpt2 import tokenizer as tokenizer_module
from minigpt2.errors import InputError
from minigpt2.tokenizer import (
    SPACES,
    TextStream,
    Tokenizer,
    split_long_runs,
    split_long_whitespace,
)
from tokenizer_folders import with_words, word
from vocabularies import FRAGMENTS, SIZES, gpt2, hf_encode, quick, texts

saved = vocabularies.saved
PUBLISHED = {  # minGPT bpe.py, LLMs-from-scratch, transformers test_modeling_gpt2.py, tiktoken
    "Hello!! I'm Andrej Karpathy. It's 2022. w00t :D 🤗": [
        *(15496, 3228, 314, 1101, 10948, 73, 509, 5117, 10036, 13, 632, 338, 33160, 13, 266, 405),
        *(83, 1058, 35, 12520, 97, 245),
    ],
    "Hello, I am": [15496, 11, 314, 716],
    "The dog": [464, 3290],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
    "\0": [188],
    "\n\n": [628],
    "": [],
}


# Encoding and decoding


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_ids(text):
    assert gpt2().encode(text) == PUBLISHED[text]
    assert gpt2().decode(PUBLISHED[text]) == text


@pytest.mark.parametrize("vocab_size", SIZES)
def test_ids_equal_those_of_transformers(saved, vocab_size):
    _, hf = saved(vocab_size)

    @quick
    @example(" ".join(FRAGMENTS))
    @given(texts)
    def law(text):
        assert gpt2(vocab_size).encode(text) == hf_encode(hf, text)

    law()


@quick
@given(texts, st.sampled_from(SIZES))
def test_decoding_gives_the_text_back(text, vocab_size):
    assert gpt2(vocab_size).decode(gpt2(vocab_size).encode(text)) == text


@quick
@given(st.lists(st.integers(0, 50256), max_size=30))
def test_any_ids_decode_as_in_transformers(saved, ids):
    _, hf = saved(50257)
    assert gpt2().decode(ids) == hf.decode(ids)


@settings(max_examples=25, deadline=None)
@given(texts, st.integers(257, 50257))
def test_a_small_vocabulary_has_the_first_tokens_of_the_large_one(text, vocab_size):
    small = gpt2.__wrapped__(vocab_size)
    assert (small.vocab_size, small.eot) == (vocab_size, vocab_size - 1)
    ids = small.encode(text)
    assert all(id < small.eot for id in ids)
    assert [small.token_bytes(id) for id in ids] == [gpt2().token_bytes(id) for id in ids]
    # Only merges that the small vocabulary lacks can make the large one's ids differ.
    if max(gpt2().encode(text), default=0) < small.eot:
        assert ids == gpt2().encode(text)


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 50258])
def test_vocabulary_sizes_out_of_range_are_refused(vocab_size):
    with pytest.raises(InputError, match=f"vocab_size is {vocab_size}, allowed is 257 to 50257"):
        Tokenizer.gpt2(vocab_size)


@quick
@given(texts, st.sampled_from(SIZES))
def test_tokens_as_texts_are_the_text_wherever_no_character_is_cut(text, vocab_size):
    tokenizer = gpt2(vocab_size)
    ids = tokenizer.encode(text)
    tokens = [tokenizer.token_text(id) for id in ids]
    assert tokens == [tokenizer.decode(id) for id in ids]
    if not any("\ufffd" in token for token in tokens):
        assert "".join(tokens) == text
    assert tokenizer.token_text(tokenizer.eot) == "<|endoftext|>"
    assert tokenizer.token_text(vocab_size) == ""


@pytest.mark.parametrize("id", [-1, 50257, 10**12])
def test_an_unknown_id_is_named(id):
    for use in (gpt2().token_bytes, lambda id: gpt2().decode([464, id]), TextStream(gpt2()).push):
        with pytest.raises(InputError, match=f"token id {id} is not in the vocabulary of 50,257"):
            use(id)


@pytest.mark.parametrize("text", ["abc\ud83e", "abc\udd17\ud83e", "abc\udc80d"])
def test_a_lone_surrogate_is_refused_with_its_position(text):
    with pytest.raises(InputError, match=r"lone surrogate '\\ud.{3}' at character 3:"):
        gpt2().encode(text)


def test_bytes_that_are_not_utf8_decode_to_replacement_characters():
    assert gpt2().decode([8582, 97]) == "\ufffd"
    assert gpt2().decode([8582, 97, 245]) == "🤗"


# What ids add to a text


@quick
@given(texts, st.sampled_from(SIZES))
def test_the_tokens_of_a_text_add_up_to_its_bytes_and_characters(text, vocab_size):
    words = [" the ", "日本", "🤗a"]
    for tokenizer in (gpt2(vocab_size), worded(vocab_size)):
        n_bytes, n_characters = sizes_of(tokenizer)
        assert len(n_bytes) == len(n_characters) == tokenizer.vocab_size
        ids = tokenizer.encode("".join([text, *words, text]))
        assert n_bytes[ids].sum() == 2 * len(text.encode()) + len("".join(words).encode())
        assert n_characters[ids].sum() == 2 * len(text) + len("".join(words))


@cache
def worded(vocab_size):
    """A tokenizer with added words."""
    return gpt2(vocab_size).with_words([" lamp post", "🤗", "日本 naïve"])


@quick
@given(texts, st.sampled_from(SIZES))
@example(" lamp post and 🤗\n  it's", 1000)
def test_pieces_are_the_text_and_their_merges_end_with_its_ids(text, vocab_size):
    tokenizer, ids, whole = worded(vocab_size), [], b""
    merged = {token: id for id, token in enumerate(tokenizer.vocabulary.tokens)}
    for piece in tokenizer.pieces(text):
        if isinstance(piece, int):
            ids.append(piece)
            whole += tokenizer.token_bytes(piece)
            continue
        steps = tokenizer.merge_steps(piece)
        assert steps[0] == [bytes([byte]) for byte in piece.encode()]
        for before, after in pairwise(steps):
            assert len(after) == len(before) - 1 and b"".join(after) == b"".join(before)
        ids += [merged[token] for token in steps[-1]]
        whole += piece.encode()
    assert whole == text.encode() and ids == tokenizer.encode(text)


@cache
def sizes_of(tokenizer):
    return tokenizer.written_sizes()


def test_every_id_adds_the_bytes_that_it_stands_for_but_end_of_text_and_unused_ids():
    """Whatever is in front: here end-of-text is the first id, and ids are left out."""
    found, id_of = gpt2(300), {"<s>": 0, "é✓": 401, "unused": 9}
    tokens = [found.token_bytes(id) for id in range(299)]
    tokenizer = Tokenizer(tokens, range(10, 309), id_of, "<s>")
    n_bytes, n_characters = tokenizer.written_sizes()
    written = tokenizer.written_bytes()
    assert n_bytes.tolist() == [len(token) for token in written]
    for token, n in zip(written, n_characters):  # whole characters, and the first bytes of others
        assert n == sum(byte < 0x80 or byte >= 0xC0 for byte in token)
    assert (n_bytes[0], n_bytes[350], n_bytes[401], n_characters[401]) == (0, 0, 5, 2)


# Special tokens in a text


def test_special_tokens_are_text_and_named_once_unless_they_are_asked_for(caplog):
    tokenizer = Tokenizer.gpt2(300)
    text = "a<|endoftext|>b"
    plain = tokenizer.encode(text)
    assert tokenizer.encode(text) == plain and len(plain) > 10
    (message,) = caplog.messages
    assert message.startswith("<|endoftext|> in a text is read as plain text: --special-tokens, or")
    ids = tokenizer.encode(text, special=True)
    assert ids == [*tokenizer.encode("a"), 299, *tokenizer.encode("b")]
    assert ids == tokenizer.encode_array(text, special=True).tolist()
    assert tokenizer.decode(ids) == tokenizer.decode(plain) == text
    assert tokenizer.encode_array("", special=True).tolist() == []
    assert len(caplog.records) == 1


def test_several_special_tokens_are_named_in_one_sentence(caplog, tmp_path, tmp_path_factory):
    folder = with_words(tmp_path / "words", tmp_path_factory, word("<user>"), word("<model>"))
    Tokenizer.from_folder(folder).encode("<user> a <model>")
    (message,) = caplog.messages
    assert message == (
        "<model>, <user> in a text are read as plain text: --special-tokens, or special=True, "
        "reads them as tokens"
    )


# Long runs of whitespace


def test_spaces_are_exactly_what_tiktoken_calls_whitespace():
    every = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    ranks = {bytes([byte]): byte for byte in range(256)}
    finder = tiktoken.Encoding("s", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    found = finder.decode(finder.encode(every, disallowed_special=()))  # the rest falls out
    assert found == "".join(re.findall(f"[{SPACES}]", every)) and len(found) == 25


@quick
@example("a \n\n b", 2)
@example("a\n\n", 2)
@given(texts, st.integers(2, 6))
def test_cutting_at_whitespace_changes_no_id(text, longest):
    parts = list(split_long_whitespace(text, longest))
    assert "".join(parts) == text
    assert [id for part in parts for id in gpt2().encode(part)] == gpt2().encode(text)


def runs_cut_one_by_one(text, longest):
    """The definition: of each kind of character so many in a row, then a cut."""
    parts, before, n = [""], "", 0
    for character in text:
        kind = "S" if character in re.findall(f"[{SPACES}]", character) else "P"
        category = unicodedata.category(character)[0]
        kind = category if kind == "P" and category in "LN" else kind
        n = n + 1 if kind == before else 1
        if n > longest:
            parts.append("")
            n = 1
        parts[-1] += character
        before = kind
    return parts


long_runs = st.lists(
    st.sampled_from(["aaa", "b", "日", "12", "²", "!?", "'s", "\u0301", " ", "\n\n", "\x1c"])
)


@quick
@given(long_runs.map("".join), st.integers(2, 5))
def test_long_runs_are_cut_by_their_definition_and_so_is_what_is_left(text, longest):
    parts = list(split_long_runs(text, longest))
    assert parts == runs_cut_one_by_one(text, longest)
    for at in range(len(parts)):
        assert list(split_long_runs("".join(parts[at:]), longest)) == parts[at:]


def test_a_piece_of_more_than_a_million_characters_is_cut(monkeypatch):
    text = "so " + "a" * 2_000_001
    assert gpt2(257).decode(gpt2(257).encode(text)) == text
    monkeypatch.setattr(tokenizer_module, "LONGEST_PIECE", 10)
    ids = [id for part in ["so " + "a" * 10, "a" * 10, "aaa"] for id in gpt2()._bpe.encode(part)]
    assert gpt2().encode("so " + "a" * 23) == gpt2().encode_array("so " + "a" * 23).tolist() == ids


@pytest.mark.parametrize("end", ["", "x", "\n"])
@pytest.mark.parametrize("unit", [" ", "\n", "\t", "\xa0", "\r\n", " \n\u3000"])
def test_a_long_run_has_the_ids_of_a_short_one_repeated(saved, unit, end):
    _, hf = saved(257)
    text = f"a{unit * 150_000}{end} b"
    assert gpt2(257).encode(text) == hf_encode(hf, text)


@pytest.mark.parametrize("unit", [" ", "\n", "\t", "\xa0", "\r\n"])
def test_a_million_whitespace_characters_are_no_problem(unit):
    text = unit * 1_000_001
    ids = gpt2().encode(text + "x")
    assert ids == gpt2().encode(text[:-1]) + gpt2().encode(text[-1] + "x")
    assert gpt2().decode(ids) == text + "x"


def test_a_million_spaces_have_the_ids_of_transformers(saved):
    _, hf = saved(50257)
    text = "a" + " " * 1_000_001 + "b" + "\n" * 1_000_001 + "c"
    assert gpt2().encode(text) == hf_encode(hf, text)


def test_a_megabyte_without_any_space():
    for text in ("a" * 1_000_000, "!?" * 500_000, "日" * 330_000):
        assert gpt2().decode(gpt2().encode(text)) == text


# TextStream


def stream(ids: list[int], stop=(), vocab_size: int = 50257) -> tuple[list[str], TextStream]:
    """What each push and the last finish return."""
    stream = TextStream(gpt2(vocab_size), stop)
    return [*(stream.push(id) for id in ids), stream.finish()], stream


def cut(text: str, stop) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


@quick
@given(st.one_of(texts.map(gpt2().encode), st.lists(st.integers(0, 50256), max_size=20)))
@example([8582, 97])
def test_a_stream_gives_the_decoded_text(ids):
    pieces, _ = stream(ids)
    assert "".join(pieces) == gpt2().decode(ids)


@quick
@given(st.lists(st.integers(0, 255), max_size=20))
def test_a_stream_of_single_bytes_gives_the_decoded_text(ids):
    assert "".join(stream(ids, vocab_size=257)[0]) == gpt2().decode(ids)


def test_characters_come_out_whole_and_as_soon_as_they_are():
    pieces, _ = stream(gpt2().encode("a🤗b"))
    assert pieces == ["a", "", "", "🤗", "b", ""]
    assert stream(gpt2().encode("a🤗")[:-1])[0] == ["a", "", "", "\ufffd"]


stops = st.lists(st.text("ab\n ", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.text("ab\n ", max_size=12), stops, st.sampled_from([257, 50257]))
@example("abc", ["abc", "b"], 257)
def test_a_stream_ends_before_the_earliest_stop(text, stop, vocab_size):
    pieces, done = stream(gpt2(vocab_size).encode(text), stop, vocab_size)
    assert "".join(pieces) == cut(text, stop)
    assert done.stopped == any(s in text for s in stop)


@quick
@given(st.lists(st.integers(0, 50256), max_size=12), st.data())
def test_a_stop_inside_any_ids(ids, data):
    text = gpt2().decode(ids)
    start = data.draw(st.integers(0, len(text)))
    stop = text[start : start + data.draw(st.integers(1, 5))] or "x"
    assert "".join(stream(ids, [stop])[0]) == cut(text, [stop])


@quick
@given(st.text("ab\n ", max_size=12), st.text("ab\n ", min_size=1, max_size=4))
def test_one_stop_is_seen_at_once_and_little_is_held_back(text, stop):
    unit, seen, out = TextStream(gpt2(257), [stop]), "", ""
    for char in text:
        out += unit.push(*gpt2(257).encode(char))
        seen += "" if unit.stopped and stop in seen else char
        assert unit.stopped == (stop in seen)
        assert unit.stopped or len(seen) - len(out) < len(stop)


@pytest.mark.parametrize("ids", [[40, 198, 198, 40], [40, 628, 40]])
def test_a_stop_split_over_tokens_is_found_and_never_printed(ids):
    pieces, done = stream(ids, ["\n\n"])
    assert "".join(pieces) == "I" and done.stopped
    assert done.push(40) == "" == done.finish()


def test_of_two_stops_with_one_beginning_the_shorter_ends_the_stream():
    unit = TextStream(gpt2(257), ["ab", "abc"])
    assert [(unit.push(*gpt2(257).encode(char)), unit.stopped) for char in "xab"] == [
        *(("x", False), ("", False), ("", True)),
    ]


def test_what_looked_like_a_stop_comes_out_after_all():
    ids = gpt2(257).encode("x\nUsed")
    assert stream(ids, ["\nUser:"], 257)[0] == ["x", "", "", "", "", "\nUsed", ""]
    assert stream(ids[:4], ["\nUser:"], 257)[0] == ["x", "", "", "", "\nUs"]


def test_a_stop_given_as_one_string_is_one_stop():
    assert "".join(stream(gpt2().encode("a b c"), " b")[0]) == "a"


def test_an_empty_stop_is_refused():
    with pytest.raises(InputError, match="a stop text is empty"):
        TextStream(gpt2(), ["x", ""])


# Starting up


def test_neither_torch_nor_the_hub_client_is_loaded():
    code = (
        "import sys; from minigpt2.tokenizer import Tokenizer; Tokenizer.gpt2().encode('x');"
        "print(*sorted({'torch', 'numpy', 'huggingface_hub', 'requests'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("text", [b"bytes", 5, None, ["a", "b"], Path("a")])
def test_only_texts_are_encoded(text):
    for encode in (Tokenizer.gpt2().encode, Tokenizer.gpt2().encode_array):
        with pytest.raises(InputError, match=r"^text is .*, allowed is one text, of type str$"):
            encode(text)


def test_ids_are_decoded_wherever_they_come_from():
    torch, np = pytest.importorskip("torch"), pytest.importorskip("numpy")
    tokenizer = Tokenizer.gpt2()
    ids = tokenizer.encode("One day in May")
    for same in (ids, tuple(ids), iter(ids), torch.tensor(ids), np.array(ids),
                 tokenizer.encode_array("One day in May")):  # fmt: skip
        assert tokenizer.decode(same) == "One day in May"
    assert tokenizer.decode(ids[0]) == tokenizer.decode(torch.tensor(ids[0])) == "One"


@pytest.mark.parametrize("ids", ["text", b"bytes", [1.0], ["1"], [[1, 2]], None, True])
def test_what_are_no_ids_is_not_decoded(ids):
    with pytest.raises(InputError, match=r"^ids (is|holds) "):
        Tokenizer.gpt2().decode(ids)


@pytest.mark.parametrize("size", ["300", 300.0, None, 256, 50258])
def test_a_size_that_the_tokenizer_cannot_have_is_refused(size):
    with pytest.raises(InputError, match=f"^vocab_size is {size!r}, allowed is "):
        Tokenizer.gpt2(size)
