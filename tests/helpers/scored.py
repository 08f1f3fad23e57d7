"""A tiny model, batches that are scored in part, and their loss written out."""

import torch
import torch.nn.functional as F

from minigpt2.model import GPT2, GPT2Config


def tiny(*, tied=True):
    generator = torch.Generator().manual_seed(3)
    config = GPT2Config(
        vocab_size=29, block_size=7, n_embd=10, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    return GPT2(config, generator=generator)


def ragged_batches(generator, sizes):
    for n_rows in sizes:
        idx = torch.randint(29, (n_rows, 7), generator=generator)
        targets = torch.randint(29, (n_rows, 7), generator=generator)
        targets[0, n_rows:] = -100
        yield idx, targets


def plain_sum(model, idx, targets):
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), reduction="sum")
