"""A model small enough to be trained in a test, and what is compared of it."""

import pytest
import torch
import torch.nn as nn

from minigpt2.model import GPT2, GPT2Config
from minigpt2.system.precision import Precision
from minigpt2.training.c_parts import c_trains

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, torch.float32)
needs_c = pytest.mark.skipif(not c_trains(), reason="needs a C compiler")


def tiny_model(*, dropout=0.1, seed=5, **options):
    sizes = {"vocab_size": 300, "block_size": 17, "n_embd": 14, "n_layer": 2, "n_head": 2}
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    config = GPT2Config(**sizes | rates | options)
    return GPT2(config, generator=torch.Generator().manual_seed(seed))


def parameters(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()
