"""Tokenizer folders as people have them: written by hand, as each age of transformers left them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minigpt2.model import GPT2, GPT2Config
from vocabularies import gpt2

END = "<|endoftext|>"
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}
Merged = tuple[dict[str, int], list[str]]  # vocab.json, and the lines of merges.txt


@cache
def _small(folder: Path, vocab_size: int) -> Merged:
    gpt2(vocab_size).save(folder)
    return merged_in(folder)


def small(tmp_path_factory, vocab_size: int = 300) -> Merged:
    """The first tokens of GPT-2 without end-of-text, as vocab.json and merges.txt have them."""
    vocab, merges = _small(tmp_path_factory.getbasetemp() / f"small-{vocab_size}", vocab_size)
    return {name: id for name, id in vocab.items() if name != END}, list(merges)


def merged_in(folder: Path) -> Merged:
    """vocab.json and merges.txt of a folder."""
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    return vocab, [line for line in lines if line and not line.startswith("#version")]


def write(folder: Path, **files: Any) -> Path:
    """Files by their names without a suffix, which the kind of their content decides."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for name, content in files.items():
        if isinstance(content, dict):
            (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
        elif isinstance(content, list):
            lines = "".join(f"{line}\n" for line in ["#version: 0.2", *content])
            (folder / f"{name}.txt").write_text(lines, "utf-8")
        else:
            (folder / f"{name}.jinja").write_text(content, "utf-8")
    return folder


def word(content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An added word as transformers has written it since 4.34."""
    given = {**PLAIN, "normalized": not special, **flags}
    return {"content": content, **given, "special": special}


def whole(merged: Merged, words: dict[int, dict], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json of GPT-2's kind."""
    vocab, merges = merged
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {"dropout": None, "unk_token": None, "continuing_subword_prefix": ""}
    model |= {"end_of_word_suffix": "", "fuse_unk": False, "vocab": vocab, "merges": merges}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, **fields} for id, fields in words.items()],
        "normalizer": None,
        "pre_tokenizer": pieces,
        "post_processor": {**pieces, "trim_offsets": False},
        "decoder": {**pieces, "add_prefix_space": True},
        "model": model,
        **parts,
    }


@torch.no_grad()
def preferring(ids: list[int], n_rows: int) -> GPT2:
    """A model that finds the first of these ids the likeliest, whatever it has read, then the
    second, and so on.
    """
    config = GPT2Config(vocab_size=n_rows, block_size=64, n_embd=4, n_layer=1, n_head=1)
    model = GPT2(config, generator=torch.Generator().manual_seed(1)).eval()
    model.ln_f.weight.zero_()
    model.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    model.wte.weight[:, 0] = 0
    for place, id in enumerate(ids):
        model.wte.weight[id, 0] = 20 - place
    return model


def with_words(folder: Path, tmp_path_factory, *words: dict[str, Any], **config: Any) -> Path:
    """A folder of 299 merged tokens, end-of-text, these added words from id 300 on, settings."""
    vocab, merges = small(tmp_path_factory)
    added = {299 + place: fields for place, fields in enumerate([word(END), *words])}
    settings = {"added_tokens_decoder": added, **config}
    return write(folder, vocab={**vocab, END: 299}, merges=merges, tokenizer_config=settings)
