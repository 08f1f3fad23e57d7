"""Rewrite a checkpoint as a clean Hugging Face folder: python convert_weights.py SOURCE DEST"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import DType
from ..errors import InputError
from ..formats.bases import CONFIG as ADAPTER
from ..formats.bases import base_name, is_adapter
from ..formats.llama_cpp import refusals
from ..formats.options import ConvertOptions
from ..formats.vocabulary import has_vocabulary, is_gpt2s, with_vocabulary
from ..hub.folders import model_folder, require_source
from ..system.signals import raise_on_signals
from .console import run_script

if TYPE_CHECKING:
    from torch import Tensor

    from ..formats.hugging_face import ModelFolder
    from ..tokenizer import Tokenizer

logger = logging.getLogger("convert_weights")


def main(options: ConvertOptions) -> int:
    """Read SOURCE strictly, write DEST, read it back and compare every tensor."""
    dest = Path(options.dest)
    if dest.exists() and not dest.is_dir():
        raise InputError(f"DEST {dest} is a file: name a folder")
    if dest.is_dir() and any(dest.iterdir()) and not options.force:
        raise InputError(
            f"DEST {dest} exists and is not empty: add --force to replace its model files"
        )
    require_source(options.source)

    import minigpt2.model  # with all that is heavy, before signals are raised
    import minigpt2.tokenizer  # noqa: F401

    from ..formats import hugging_face

    raise_on_signals()
    source = model_folder(options.source)
    if (dest / ADAPTER).exists():
        raise InputError(
            f"DEST {dest} holds {ADAPTER}: transformers would put that adapter on the model; name "
            "another folder"
        )
    (tensors, config, generation), tokenizer = hugging_face.read_model(
        source,
        None,
        lambda found: (read(found, options.dtype), tokenizer_of(options.source, source)),
    )
    hugging_face.save_tensors(tensors, config, dest, generation=generation)
    if is_adapter(source):
        logger.info("%s holds a LoRA adapter, folded into its base %s", source, base_name(source))
    if tokenizer is None:
        logger.info("%s has no tokenizer files, so %s has none either", source, dest)
    else:
        tokenizer.save(dest)
    verify(dest, tensors)
    reasons = refusals(
        config,
        n_rows=len(tensors["wte.weight"]),
        n_ids=tokenizer and tokenizer.vocab_size,
        gpt2s_vocabulary=tokenizer is not None and tokenizer.is_gpt2s,
    )
    if reasons:
        logger.info("llama.cpp's converter has no such model as %s: %s", dest, "; ".join(reasons))
    logger.info("%s: %s tensors written and read back equal", dest, len(tensors))
    return 0


def tokenizer_of(source: str, folder: Path) -> Tokenizer | None:
    """The tokenizer of a source that lies in a folder, or of the base of the adapters there; None
    where there is none.
    """
    from ..tokenizer import Tokenizer

    source_of_it, found = with_vocabulary(source, folder)
    if has_vocabulary(found):
        return Tokenizer.from_folder(found)
    return Tokenizer.gpt2() if is_gpt2s(source_of_it) else None


def read(found: ModelFolder, dtype: DType) -> tuple[dict[str, Tensor], dict, dict | None]:
    """The tensors in a dtype, config.json and generation_config.json of a model; None for what it
    may lack and does.

    With "auto", each tensor keeps the dtype that it has in the file, whatever is folded into it.
    """
    from ..formats import hugging_face
    from ..formats.tensors import check_range
    from ..model import skeleton
    from ..system.files import read_json
    from ..system.precision import DTYPES

    own = hugging_face.stored_dtypes(found.path)
    model, stored = skeleton(found, dtype=max(own.values(), key=lambda kind: kind.itemsize))
    hugging_face.check(model, stored)
    tensors = {}
    for name, value in stored.read_in_order([name for name, _ in model.named_parameters()]):
        tensors[name] = value.to(own[name] if dtype == "auto" else DTYPES[dtype]).contiguous()
        check_range(f"{stored.path}: {name}", value, tensors[name])
    config, generation = hugging_face.read_config(found.path), None
    if dtype != "auto":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if not model.config.tie_word_embeddings:
        config["tie_word_embeddings"] = False
    if (found.path / "generation_config.json").is_file():
        generation = read_json(found.path / "generation_config.json")
    return tensors, config, generation


def verify(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read the folder again and compare it with what was to be written, bit by bit."""
    import torch

    from ..formats import hugging_face
    from ..model import skeleton

    model, files = skeleton(folder)
    hugging_face.check(model, files)
    for name, tensor in tensors.items():
        stored = files.tensors[name].read()
        if stored.dtype != tensor.dtype or not torch.equal(
            stored.view(torch.uint8), tensor.view(torch.uint8)
        ):
            raise OSError(
                f"{folder}: {name} does not read back as it was written: is the disk sound?"
            )


def run(argv: Sequence[str] | None = None) -> int:
    """The command, from its flags to its exit code."""
    return run_script(main, ConvertOptions, argv, positional=True)
