"""Tiny models with trained adapters, and how they are compared."""

import torch

from hf_models import randomise, token_ids
from minigpt2.lora import adapters, add_lora
from minigpt2.model import GPT2, GPT2Config

SHAPE = {"vocab_size": 300, "n_embd": 14, "n_layer": 2, "n_head": 2, "n_inner": 23}
CONFIG = GPT2Config(**SHAPE, block_size=17)
IDX = token_ids(300, 3, 11)


def base(seed=0, dtype=torch.float64):
    """A tiny GPT-2 with random values everywhere, in evaluation mode."""
    model = GPT2(CONFIG).eval()
    randomise(model, seed=seed)
    return model.to(dtype)


def adapted(seed=0, dtype=torch.float64, rank=3, alpha=7.0, dropout=0.0):
    """The same with adapters, B random too: its zeros would hide every mistake in A and scale."""
    model = base(seed, dtype)
    add_lora(model, rank=rank, alpha=alpha, dropout=dropout)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for part in adapters(model).values():
            part.lora_A.normal_(0, 0.3, generator=generator)
            part.lora_B.normal_(0, 0.3, generator=generator)
    return model


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def logits(model):
    output = model(IDX)
    return output if isinstance(output, torch.Tensor) else output.logits


def distance(left, right):
    return float((left - right).detach().abs().max())
