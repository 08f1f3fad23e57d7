"""Rewrite a checkpoint as a clean Hugging Face folder: python convert_weights.py SOURCE DEST"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt2.console import run_script
from minigpt2.errors import InputError
from minigpt2.options import ConvertOptions

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("convert_weights")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")


def main(options: ConvertOptions) -> int:
    """Read SOURCE strictly, write DEST, read it back and compare every tensor."""
    dest = Path(options.dest)
    if dest.exists() and not dest.is_dir():
        raise InputError(f"DEST {dest} is a file: name a folder")
    if dest.is_dir() and any(dest.iterdir()) and not options.force:
        raise InputError(
            f"DEST {dest} exists and is not empty: add --force to replace its model files"
        )

    from minigpt2 import hub, weights
    from minigpt2.model import skeleton
    from minigpt2.precision import DTYPES
    from minigpt2.tokenizer import Tokenizer

    source = hub.model_folder(options.source)
    model, files = skeleton(source)
    weights.check(model, files)
    tensors = {name: files.tensors[name].read() for name, _ in model.named_parameters()}
    config = weights.read_config(source)
    if not model.config.tie_word_embeddings:
        config["tie_word_embeddings"] = False
    if options.dtype != "auto":
        tensors = {name: tensor.to(DTYPES[options.dtype]) for name, tensor in tensors.items()}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = options.dtype
    tokenizer = None
    if any((source / name).exists() for name in TOKENIZER_FILES):
        tokenizer = Tokenizer.from_folder(source)

    weights.save_tensors(tensors, config, dest, generation=source / "generation_config.json")
    if tokenizer is None:
        logger.info("%s has no tokenizer files, so %s has none either", source, dest)
    else:
        tokenizer.save(dest)
    verify(dest, tensors)
    logger.info("%s: %s tensors written and read back equal", dest, len(tensors))
    return 0


def verify(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read the folder again and compare it with what was to be written, bit by bit."""
    import torch

    from minigpt2 import weights
    from minigpt2.model import skeleton

    model, files = skeleton(folder)
    weights.check(model, files)
    for name, tensor in tensors.items():
        stored = files.tensors[name].read()
        if stored.dtype != tensor.dtype or not torch.equal(
            stored.view(torch.uint8), tensor.view(torch.uint8)
        ):
            raise OSError(
                f"{folder}: {name} does not read back as it was written: is the disk sound?"
            )


if __name__ == "__main__":
    sys.exit(run_script(main, ConvertOptions, positional=True))
