"""A banned text is never written, however it is cut into tokens, and nothing else is banned."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minigpt2.decoding.banned import BannedTexts
from minigpt2.errors import InputError
from minigpt2.tokenizer import Tokenizer

LETTERS = [b"a", b"b", b"c", b"ab", b"bc", b"abc", b"ca", b"aa", b""]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text("abc", max_size=6),
)
def test_a_token_is_banned_where_it_would_complete_a_text(texts, written):
    tail = written.encode()
    expected = [
        any(
            text.encode() in (tail + token)[max(0, len(tail) - len(text) + 1) :] and token
            for text in texts
        )
        for token in LETTERS
    ]
    assert BannedTexts(LETTERS, texts).mask(tail).tolist() == list(map(bool, expected))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("abc", min_size=2, max_size=4), min_size=1, max_size=3), st.integers(0, 99))
def test_what_is_drawn_freely_never_holds_a_banned_text(texts, seed):
    banned, written = BannedTexts(LETTERS[:-1], texts), b""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        try:
            allowed = ~banned.mask(written)
        except InputError:
            assume(False)
        token = int(torch.multinomial(allowed.double(), 1, generator=generator))
        written += LETTERS[token]
        assert not any(text.encode() in written for text in texts)


def test_at_full_vocabulary_every_cut_of_a_word_is_found():
    tokenizer = Tokenizer.gpt2()
    banned = BannedTexts(tokenizer.written_bytes(), ["lighthouse", "\u00e9"])
    assert banned.mask(b"")[tokenizer.encode("\u00e9")].all()
    for cut in range(1, 10):
        mask = banned.mask(b"the " + b"lighthouse"[:cut])
        for rest in ("lighthouse"[cut:], "lighthouse"[cut:] + "s"):
            ids = tokenizer.encode(rest)
            if len(ids) == 1:
                assert mask[ids[0]]
        assert not mask[tokenizer.encode(" tower")[0]]
    assert not banned.mask(b"\xc3"[:0])[tokenizer.eot]


def test_a_character_is_banned_across_its_bytes():
    tokens = [bytes([byte]) for byte in range(256)]
    banned = BannedTexts(tokens, ["\u00e9"])
    assert not banned.mask(b"").any()
    assert banned.mask(b"caf\xc3").nonzero().flatten().tolist() == [0xA9]


def test_texts_that_leave_nothing_to_write_are_refused():
    with pytest.raises(InputError, match="is empty"):
        BannedTexts(LETTERS, ["a", ""])
    with pytest.raises(InputError, match=r"no token is left without \['a', 'b'\]"):
        BannedTexts([b"a", b"b"], ["a", "b"])
    with pytest.raises(InputError, match="no token is left that is not banned"):
        BannedTexts([b"a", b"b"], ["aa", "ab"]).mask(b"a")
