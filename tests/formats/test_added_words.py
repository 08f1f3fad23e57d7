"""Added words are found where the `tokenizers` library finds them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from minigpt2.formats.added_words import AddedWord, AddedWords
from minigpt2.formats.vocabulary import BYTE_OF

NAMES = ["<u>", "u", "<|user|>", "a b", " b", "b ", "\n\n", "aa", "aab", "é", "日本", "_x", "-"]
flags = st.fixed_dictionaries(
    {name: st.booleans() for name in ("special", "single_word", "lstrip", "rstrip", "normalized")}
)
words = st.dictionaries(st.sampled_from(NAMES), flags, min_size=1, max_size=5)
FRAGMENTS = [*NAMES, *" ab\n\t", "\xa0", "\u3000", "²", "\u0301", "Ⓐ", "‿", "\u200d", "3", "x"]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


def library(found: dict[str, dict]) -> Library:
    """The library with single bytes as tokens, and these words from id 256 on."""
    tokenizer = Library(models.BPE(vocab={c: b for b, c in enumerate(BYTE_OF)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, **given) for name, given in found.items()])
    return tokenizer


@settings(max_examples=400, deadline=None)
@given(words, texts, st.booleans())
def test_words_are_found_where_the_library_finds_them(found, text, special):
    theirs = library(found)
    theirs.encode_special_tokens = not special
    ids = {name: theirs.token_to_id(name) for name in found}
    ours = AddedWords([AddedWord(name, ids[name], **given) for name, given in found.items()])
    id_of = {byte: id for id, byte in enumerate(BYTE_OF.values())}
    found_ids: list[int] = []
    for part in ours.split(text, special=special):
        found_ids += [part] if isinstance(part, int) else [id_of[byte] for byte in part.encode()]
    assert found_ids == theirs.encode(text).ids


def test_text_between_words_is_kept_whole():
    found = AddedWords([AddedWord("<u>", 300), AddedWord("no", 301, special=False)])
    assert [*found.split("a<u>no b", special=True)] == ["a", 300, 301, " b"]
    assert [*found.split("a<u>no b", special=False)] == ["a<u>", 301, " b"]
    assert [*found.split("", special=True)] == []


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("ab", []),
        (" ab", []),
        ("a b", ["a"]),
        ("ab ", ["ab"]),
        ("a b\n c", ["a", "a b"]),
        ("\n", []),
    ],
)
def test_what_a_word_has_before_whitespace(name, before):
    assert AddedWord(name, 0).before_space == before
    assert AddedWord(name, 0, rstrip=True).before_space == [*before, name]
