"""Ways to compute, made as users make them, and how far each is from its plain twin: the walk.

Whatever is compared has as many tokens and rows as SHAPES say, and is computed in every FORM in
which a user's texts come: at once, after a prompt, token by token, rows of different length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...decoding.cpu_layout import pack
from ...decoding.cuda_graphs import fix_shapes
from ...decoding.int8 import quantize
from ...decoding.ready import load
from ...equivalences import PLAIN, difference, ways_of
from ...formats.tensors import read_tensors
from ...lora import adapters, add_lora, load_adapter, save_adapter
from ...model import GPT2, GPT2Config
from ...tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 293,
    "block_size": 31,
    "n_embd": 34,
    "n_layer": 3,
    "n_head": 2,
}
PROMPT = 5  # tokens before those that are compared
SHAPES = [(n_rows, n_tokens) for n_rows in (1, 3) for n_tokens in (1, 2, 3, 9)]
FILES: dict[str, dict[str, Any]] = {  # tied or not, and the precision of the file
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "float16": {"tie_word_embeddings": False, "dtype": torch.float16},
}

Make = Callable[[Path], GPT2]


def randomise(model: nn.Module, *, std: float = 0.2, seed: int = 0) -> None:
    """Fill every parameter of a GPT-2, ours or transformers': matrices N(0, std), biases
    N(0, std / 2), layer norms 1 + N(0, std).

    A fresh model's own start (biases 0, layer norms 1, nearly flat logits) hides swapped layer
    norms and dropped biases at any tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, std, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, std / 2, generator=generator)
            else:
                parameter.normal_(1, std, generator=generator)


def token_ids(vocab_size: int, rows: int, length: int) -> Tensor:
    """Random ids (rows, length), always the same."""
    return torch.randint(
        vocab_size, (rows, length), generator=torch.Generator().manual_seed(rows * length)
    )


def write_folder(folder: Path, *, dtype: torch.dtype = torch.float32, **values) -> Path:
    """A model whose scores are far from flat, with a tokenizer that has all of its ids."""
    model = GPT2(GPT2Config(**{**SHAPE, **values})).to(dtype)
    randomise(model, std=0.3)
    model.save_pretrained(folder, Tokenizer.gpt2(SHAPE["vocab_size"]))
    return folder


def write_adapter(folder: Path, base: Path) -> Path:
    """An adapter of ours for the model in `base`."""
    model = GPT2.from_pretrained(base)
    add_lora(model, rank=3, alpha=7.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in adapters(model).values():
            part.lora_B.normal_(0, 0.3, generator=generator)
    save_adapter(model, folder, base_model=str(base))
    Tokenizer.from_pretrained(base).save(folder)
    return folder


def base_of(adapter: Path) -> Path:
    """The folder that an adapter names."""
    values = json.loads((adapter / "adapter_config.json").read_text())
    return Path(values["base_model_name_or_path"])


def plain(folder: Path) -> GPT2:
    """The plain model."""
    return GPT2.from_pretrained(folder)


def added_by_hand(adapter: Path) -> GPT2:
    """The plain model of an adapter's base, to whose matrices the adapter's products were added."""
    model = plain(base_of(adapter))
    tensors, _ = read_tensors(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for key, a in tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            name = key.removesuffix(".lora_A.weight")
            b = tensors[f"{name}.lora_B.weight"]
            linear = model.get_submodule(name.removeprefix("base_model.model.transformer."))
            linear.get_parameter("weight").add_((7 / 3 * b.double() @ a.double()).float())
    return model


def quantized(folder: Path) -> GPT2:
    """int8 matrices, multiplied as they are read in decoding/int8.py."""
    model = plain(folder)
    quantize(model)
    return model


def beside(adapter: Path) -> GPT2:
    """Adapters beside the matrices, as training has them."""
    model = plain(base_of(adapter))
    load_adapter(model, adapter)
    return model.eval()


def fixed(folder: Path) -> GPT2:
    """The plain model, whose new tokens come in the fixed shapes that a GPU records."""
    model = plain(folder)
    fix_shapes(model)
    return model


def packed(make: Make, **options) -> Make:
    """A model that `make` gives, laid out afterwards: its matrices were contiguous."""

    def made(folder: Path) -> GPT2:
        model = make(folder)
        pack(model, **options)
        return model

    return made


def loaded(**options) -> Make:
    """What sample.py loads: the matrices of a float32 file are transposed views of it."""
    return lambda folder: load(folder, **{"device": "cpu", **options})


# how each way is reached; most by a command and from the library
MODELS: dict[str, list[Make]] = {
    "deferred weights": [lambda folder: GPT2.from_pretrained(folder, deferred=True)],
    "plain float32": [loaded(cpu_routine="plain"), packed(plain, cpu_routine="plain")],
    "packed float32": [loaded(cpu_routine="packed"), packed(plain, cpu_routine="packed")],
    "sliced float32": [loaded(cpu_routine="slices"), packed(plain, cpu_routine="slices")],
    "float32 by rows": [loaded(cpu_routine="by-rows"), packed(plain, cpu_routine="by-rows")],
    "decode step in torch": [loaded(cpu_routine="plain"), packed(plain)],
    "int8": [quantized],
    "packed int8": [loaded(dtype="int8"), packed(quantized)],
    "float32 in C": [loaded(dtype="float32", compiled=True), packed(plain, compiled=True)],
    "float16 in C": [loaded(compiled=True), loaded(dtype="float32", compiled=True)],
    "int8 in C": [loaded(dtype="int8", compiled=True), packed(quantized, compiled=True)],
    "decode step in C": [loaded(compiled=True), packed(plain, compiled=True)],
    "bfloat16": [loaded(dtype="bfloat16")],
    "float16": [loaded(dtype="float16")],
    "fixed shapes": [fixed],
}
# of files of one precision, where a way is for them only
FILES_OF = {"float32 in C": ["tied", "untied"], "float16 in C": ["float16"]}
IN_C = [way for way in MODELS if way.endswith("in C")]
ADAPTERS: dict[str, list[Make]] = {
    "LoRA beside": [beside],
    "LoRA folded": [plain, loaded(dtype="float32")],
    "peft's adapter": [plain, loaded(dtype="float32")],
}
ON_CUDA: dict[str, list[Make]] = {
    "CUDA graph": [loaded(device="cuda", dtype="float32")],
    "compiled decode step": [loaded(device="cuda", dtype="float32", compiled=True)],
    "int8 on CUDA": [
        loaded(device="cuda", dtype="int8"),
        loaded(device="cuda", dtype="int8", compiled=True),
    ],
    "bfloat16": [
        loaded(device="cuda", dtype="bfloat16"),
        loaded(device="cuda", dtype="bfloat16", compiled=True),
    ],
    "float16": [loaded(device="cuda", dtype="float16")],
}
TWINS: dict[str, Make] = {PLAIN: plain, "int8": quantized}
# no part is swapped for them
UNMARKED = {"bfloat16", "float16", "LoRA folded", "peft's adapter", "int8 on CUDA"}


@torch.no_grad()
def at_once(model: GPT2, idx: Tensor) -> Tensor:
    """The whole text in one call, without a cache."""
    return model(idx)[:, PROMPT:]


@torch.no_grad()
def after_a_prompt(model: GPT2, idx: Tensor) -> Tensor:
    """The prompt into a cache, then all the others in one call."""
    cache = model.make_cache(len(idx))
    model(idx[:, :PROMPT], cache)
    return model(idx[:, PROMPT:], cache)


@torch.no_grad()
def token_by_token(model: GPT2, idx: Tensor) -> Tensor:
    """The prompt into a cache, then each of the others in a call of its own."""
    cache = model.make_cache(len(idx))
    model(idx[:, :PROMPT], cache)
    return torch.cat([model(token, cache) for token in idx[:, PROMPT:].split(1, dim=1)], dim=1)


@torch.no_grad()
def after_prompts_of_different_length(model: GPT2, idx: Tensor) -> Tensor:
    """Of row b's prompt b tokens are forgotten, as padding is."""
    cache = model.make_cache(len(idx))
    lengths = [PROMPT - b for b in range(len(idx))]
    model(idx[:, :PROMPT], cache)
    cache.truncate(lengths)
    rows = [row[length : length + idx.shape[1] - PROMPT] for row, length in zip(idx, lengths)]
    return model(torch.stack(rows), cache)


@torch.no_grad()
def every_row_alone(model: GPT2, idx: Tensor) -> Tensor:
    """What `after_prompts_of_different_length` must give."""
    n_tokens = idx.shape[1] - PROMPT
    texts = (row[None, : PROMPT - b + n_tokens] for b, row in enumerate(idx))
    return torch.cat([model(text)[:, -n_tokens:] for text in texts])


FORMS = {  # and what each must give
    "at once": (at_once, at_once),
    "cache": (after_a_prompt, at_once),
    "prompt in parts": (token_by_token, at_once),
    "rows of different length": (after_prompts_of_different_length, every_row_alone),
}


def pairs(
    model: GPT2, twin: GPT2, device: str = "cpu", shapes: Sequence[tuple[int, int]] = SHAPES
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every shape and form by name, with the logits of the model and of its twin."""
    for n_rows, n_tokens in shapes:
        idx = token_ids(SHAPE["vocab_size"] - 1, n_rows, PROMPT + n_tokens)
        for name, (form, plain_form) in FORMS.items():
            found, expected = form(model, idx.to(device)), plain_form(twin, idx)
            yield f"{n_rows} rows of {n_tokens} tokens, {name}", found, expected


def worst(
    model: GPT2, twin: GPT2, device: str = "cpu", shapes: Sequence[tuple[int, int]] = SHAPES
) -> tuple[float, str]:
    """The largest difference of all shapes and forms, and where it is; NaN counts as infinite."""
    found = [(difference(a, b), where) for where, a, b in pairs(model, twin, device, shapes)]
    return max((value if value == value else float("inf"), where) for value, where in found)


def goes(model: GPT2, way: str) -> bool:
    """Whether a part of the model was swapped for this way."""
    return any(way in ways for ways in ways_of(model).values())
