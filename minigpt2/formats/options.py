"""What can be set for a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..arguments import DType


@dataclass(frozen=True)
class ConvertOptions:
    """Rewrite a GPT-2 checkpoint as a clean Hugging Face folder, and read it back to prove it."""

    source: str
    """A Hub id, a Hugging Face folder (safetensors, sharded or pytorch_model.bin), a run folder, or
    a LoRA adapter, which is folded into its base.
    """
    dest: str
    """Folder to write."""
    to: Literal["hf"] = "hf"
    """Format to write: hf is config.json, model.safetensors and the tokenizer's files."""
    dtype: DType = "auto"
    """Cast the weights. auto: keep each tensor's own."""
    force: bool = False
    """Replace the model files in an existing DEST; its other files stay."""
    debug: bool = False
    """Show the full traceback of an error."""
