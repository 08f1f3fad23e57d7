"""Tokenizers, texts for them, and their folders as transformers reads them."""

import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from minigpt2.formats import vocabulary
from minigpt2.tokenizer import Tokenizer

SIZES = [257, 300, 1024, 50257]
FRAGMENTS = [
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\xa0", "\u3000", "\u2028", "\x1c", "\x85", "\x0b"),
    *(
        "'s",
        "'ll",
        "'RE",
        "IT'TING",
        "’s",
        "don't",
        "Hello",
        "world",
        " the",
        "naïve",
        "日本",
        "ß",
        "²",
        "Ⅷ",
    ),
    *(
        "🤗",
        "👩‍👩‍👧",
        "e\u0301",
        "\ufeff",
        "\ufffd",
        "\0",
        "1234",
        "!!",
        "_x",
        "def f(x):\n    return x**2",
    ),
    *("<|endoftext|>", "</s>", "Ġ", "\\u0120"),
]
texts = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
)
quick = settings(max_examples=60, deadline=None)


@cache
def gpt2(vocab_size: int = 50257) -> Tokenizer:
    return Tokenizer.gpt2(vocab_size)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hf_reads(folder: Path):
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return AutoTokenizer.from_pretrained(folder)


def hf_encode(hf, text: str) -> list[int]:
    return hf.encode(text, split_special_tokens=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """vocab_size -> the folder that `save` wrote, and transformers' tokenizer of it."""

    @cache
    def of(vocab_size: int):
        folder = tmp_path_factory.mktemp(f"gpt2-{vocab_size}")
        gpt2(vocab_size).save(folder, model_max_length=64)
        return folder, hf_reads(folder)

    return of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A GPT-2-style folder with merges and ids of its own, and special tokens in front."""
    folder = tmp_path_factory.mktemp("trained")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [Path(vocabulary.__file__).read_text(encoding="utf-8"), "日本 naïve 🤗 " * 9],
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>"],
        show_progress=False,
    )
    bpe.save_model(str(folder))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def copy(folder: Path, destination: Path, *names: str) -> Path:
    """A folder's files; without names all but tokenizer.json, so that the others are read."""
    others = [path.name for path in folder.iterdir() if path.name != "tokenizer.json"]
    for name in names or others:
        (destination / name).write_bytes((folder / name).read_bytes())
    return destination


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
