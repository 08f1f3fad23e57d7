"""Tokenizers whose ids are easy to tell, and the texts and ids of small corpora."""

import os
import time
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from minigpt2.formats.chat import ChatTemplate, unshielded
from minigpt2.tokenizer import Tokenizer

FRAGMENTS = [
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\xa0", "\u3000", "\u2028", "\x1c", "\x85", "\x0b"),
    *("'s", "'ll", "don't", "Hello", "world", " the", "naïve", "日本", "²", "🤗", "e\u0301"),
    *("\ufeff", "\0", "1234", "!!", "_x", "<|endoftext|>"),
]
texts = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
).filter(lambda text: text.count("\0") <= 8)


class Bytes:
    """A tokenizer whose ids are the bytes of the text."""

    eot = 256
    vocab_size = 257
    identity = "bytes"
    uncut = ()
    added_names = ()
    chat = ChatTemplate()
    cut_before = " \t\r\n"

    def encode(self, text):
        return list(text.encode())

    def special_in(self, text):
        return {}

    def encode_array(self, text, *, special=False, shielded=False):
        return np.array(self.encode(unshielded(text) if shielded else text), np.int64)


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


class Interfering(Bytes):
    """Does something else while it tokenizes."""

    def __init__(self, action):
        self.action = action

    def encode(self, text):
        self.action()
        return super().encode(text)


class Sleeping(Bytes):
    """Says which process it works in, and goes on working."""

    def encode_array(self, text):
        Path(text.split()[0]).write_text(str(os.getpid()))
        time.sleep(600)


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


def rows_of(file):
    """(ids, part) of each document of a token file."""
    starts = [0, *file.documents["end"]]
    return [
        (file.tokens[start : document["end"]].tolist(), int(document["part"]))
        for start, document in zip(starts, file.documents)
    ]
