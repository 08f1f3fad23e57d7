"""Rewrite a checkpoint as a clean Hugging Face folder: python convert_weights.py SOURCE DEST"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..formats.options import ConvertOptions
from ..formats.vocabulary import has_vocabulary
from ..hub.folders import MODEL_FILES, model_folder, require_source
from ..system.signals import raise_on_signals
from .console import run_script

if TYPE_CHECKING:
    from torch import Tensor

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
    from ..system.files import at_one_moment
    from ..system.precision import DTYPES

    raise_on_signals()
    source = model_folder(options.source)
    tensors, config, generation, tokenizer = at_one_moment(
        source, MODEL_FILES, lambda: read(source)
    )
    if options.dtype != "auto":
        tensors = {name: tensor.to(DTYPES[options.dtype]) for name, tensor in tensors.items()}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = options.dtype

    hugging_face.save_tensors(tensors, config, dest, generation=generation)
    if tokenizer is None:
        logger.info("%s has no tokenizer files, so %s has none either", source, dest)
    else:
        tokenizer.save(dest)
    verify(dest, tensors)
    logger.info("%s: %s tensors written and read back equal", dest, len(tensors))
    return 0


def read(folder: Path) -> tuple[dict[str, Tensor], dict, dict | None, Tokenizer | None]:
    """The tensors, config.json, generation_config.json and tokenizer of a folder; None for what it
    may lack and does.
    """
    from ..formats import hugging_face
    from ..model import skeleton
    from ..system.files import read_json
    from ..tokenizer import Tokenizer

    model, files = skeleton(folder)
    hugging_face.check(model, files)
    tensors = {name: files.tensors[name].read() for name, _ in model.named_parameters()}
    config, generation, tokenizer = hugging_face.read_config(folder), None, None
    if not model.config.tie_word_embeddings:
        config["tie_word_embeddings"] = False
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
    if has_vocabulary(folder):
        tokenizer = Tokenizer.from_folder(folder)
    return tensors, config, generation, tokenizer


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
