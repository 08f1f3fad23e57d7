"""The walk of the ways to compute, which `minigpt2 verify` goes too, and what only tests make of
it.
"""

import warnings
from pathlib import Path

import torch

from hf_models import reference
from minigpt2.cli.proofs.walk import *  # noqa: F403 - the walk itself, whole
from minigpt2.tokenizer import Tokenizer


def write_pefts_adapter(folder: Path, base: Path) -> Path:
    """An adapter as peft writes it, for the model in `base`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc"])
    config.fan_in_fan_out = True  # transformers' GPT-2 keeps its matrices (in, out)
    config.task_type = "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # it asks transformers by a name that is to go
        model = get_peft_model(reference(base, torch.float32), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    Tokenizer.from_pretrained(base).save(folder)
    return folder
