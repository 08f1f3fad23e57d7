"""How far cached forward passes are from plain ones."""

import torch

from hf_models import randomise
from minigpt2.model import GPT2, GPT2Config

N_POSITIONS = 23


CONFIG = GPT2Config(vocab_size=31, block_size=N_POSITIONS, n_embd=15, n_layer=2, n_head=3)


def random_model(dtype=torch.float64, **values):
    model = GPT2(GPT2Config(**{**vars(CONFIG), **values})).to(dtype).eval()
    randomise(model, std=0.4)
    return model.requires_grad_(False)


def pieces_of(idx, cuts):
    return torch.tensor_split(idx, sorted(cuts), dim=1)


def split_difference(model, idx, cuts):
    """Largest difference between one call without a cache and calls with one, cut at `cuts`."""
    cache = model.make_cache(idx.shape[0])
    cached = torch.cat([model(piece, cache) for piece in pieces_of(idx, cuts)], dim=1)
    return float((cached - model(idx)).abs().max())


def ragged_difference(model, idx, lengths, *, n_more=3):
    """Largest difference between rows of `lengths` in one batch, right-padded, then continued
    together, and each row alone without a cache.
    """
    cache = model.make_cache(len(lengths))
    prefill = model(idx[:, : max(lengths)], cache)  # beyond its length, a row's ids are padding
    cache.truncate(lengths)
    continued = [idx[:, -n_more:][:, i : i + 1] for i in range(n_more)]
    logits = torch.cat([model(column, cache) for column in continued], dim=1)
    differences = []
    for b, length in enumerate(lengths):
        alone = model(torch.cat([idx[b, :length], idx[b, -n_more:]])[None])[0]
        differences += [prefill[b, :length] - alone[:length], logits[b] - alone[length:]]
    return max(float(part.abs().max()) for part in differences)
