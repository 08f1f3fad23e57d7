import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minigpt2 import GPT2, GPT2Config
from minigpt2.explain.costs import cached_numbers, multiplications

CONFIG = GPT2Config(vocab_size=31, block_size=13, n_embd=15, n_layer=2, n_head=3, n_inner=17)


def counted(model: GPT2, idx: torch.Tensor, cache=None) -> float:
    """Multiplications of matrices in a forward pass with the last token's scores, by torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.hidden(idx, cache)[:, -1])
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_multiplications_are_those_that_torch_counts(n_tokens, monkeypatch):
    model = GPT2(CONFIG).eval()
    for block in model.h:  # the fused routine of the CPU is not counted
        attn = block.attn
        monkeypatch.setattr(attn, "softmax_attention", attn.plain_attention)
    idx = torch.arange(n_tokens + 1)[None]
    assert sum(multiplications(CONFIG, n_tokens + 1).values()) == counted(model, idx)
    cache = model.make_cache(1, n_tokens + 1)
    model.hidden(idx[:, :-1], cache)
    part = counted(model, idx[:, -1:], cache)
    assert sum(multiplications(CONFIG, 1, n_tokens).values()) == part


def test_the_cache_has_a_key_and_a_value_for_every_token():
    cache = GPT2(CONFIG).make_cache(1, 7)
    assert cached_numbers(CONFIG, 7) == cache.keys.numel() + cache.values.numel()
