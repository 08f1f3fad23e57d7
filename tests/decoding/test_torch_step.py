"""The decode step in few operations is the plain one bit for bit, for every shape and cache."""

import copy

import pytest
import torch

from hf_models import randomise, token_ids
from minigpt2.decoding.cpu_layout import ROUTINES, LinearByRows, pack
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.routines import Routine
from minigpt2.decoding.torch_step import FEW, TorchDecodeStep, step_in_torch
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig

SHAPE = {"vocab_size": 257, "block_size": 31, "n_embd": 34, "n_layer": 3, "n_head": 2}
GREEDY = SamplingConfig(temperature=0)
VARIANTS = [
    *({"activation_function": name} for name in ("gelu_new", "gelu", "relu", "tanh")),
    {"n_inner": 17, "n_head": 17},
    {"n_embd": 48, "n_head": 3, "n_inner": 101, "tie_word_embeddings": False},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
]


def models(*, dtype=torch.float32, rounded=False, **values):
    """A plain model, and the same with its decode step in few operations."""
    plain = GPT2(GPT2Config(**{**SHAPE, **values})).eval().requires_grad_(False)
    randomise(plain, std=0.3)
    plain.to(dtype)
    if rounded:
        quantize(plain)
    fast = copy.deepcopy(plain)
    step_in_torch(fast)
    return plain, fast


@torch.no_grad()
@pytest.mark.parametrize("values", [{}, {"dtype": torch.bfloat16}, {"rounded": True}, *VARIANTS])
def test_the_step_is_the_plain_one(values):
    plain, fast = models(**values)
    for n_rows in (1, 3):
        caches = [model.make_cache(n_rows) for model in (plain, fast)]
        for n_tokens in (5, 1, 3, 1, 5, 2):
            idx = token_ids(257, n_rows, n_tokens)
            expected, found = (m.hidden(idx, c) for m, c in zip((plain, fast), caches))
            assert torch.equal(found, expected)
            assert torch.equal(caches[0].keys, caches[1].keys)
            assert torch.equal(caches[0].values, caches[1].values)


@torch.no_grad()
def test_rows_of_different_length_and_views_of_a_cache_are_read_where_they_lie():
    found = []
    for model in models():
        cache = model.make_cache(3, capacity=20)
        model.hidden(token_ids(257, 3, 6), cache)
        cache.truncate([6, 2, 4])
        model.hidden(token_ids(257, 3, 2), cache)
        model.hidden(token_ids(257, 1, 1), cache.row(1))
        cache = cache.select([2, 1, 1])
        found.append(model.hidden(token_ids(257, 3, 1), cache))
    assert torch.equal(*found)


@torch.no_grad()
def test_what_is_no_decode_step_goes_the_plain_way(monkeypatch):
    _, fast = models(block_size=2 * FEW)
    step = vars(fast)["read"]
    plain, asked = step._plain, []
    monkeypatch.setattr(step, "_plain", lambda *given: asked.append(1) or plain(*given))
    cache = fast.make_cache(1)
    fast(token_ids(257, 1, 1))  # without a cache
    fast(token_ids(257, 1, 1), fast.make_cache(1))  # a prompt of one token
    fast(token_ids(257, 1, 3), cache)  # a prompt
    fast(token_ids(257, 1, FEW + 1), cache)  # much of one
    assert len(asked) == 4
    fast(token_ids(257, 1, 1), cache)
    fast(token_ids(257, 1, FEW - 9), cache)
    assert len(asked) == 4
    fast.train()
    fast(token_ids(257, 1, 1), cache)
    fast.eval()
    with torch.enable_grad():
        fast(token_ids(257, 1, 1), cache)
    assert len(asked) == 6


@torch.no_grad()
@pytest.mark.parametrize("way", ["ids", "capacity"])
def test_errors_are_those_of_the_plain_model(way):
    messages = []
    for model in models():
        cache = model.make_cache(2, capacity=3)
        model.hidden(token_ids(257, 2, 2), cache)
        idx = token_ids(257, 2, 1 if way == "ids" else 2)
        with pytest.raises(Exception) as caught:
            model.hidden(idx + 257 if way == "ids" else idx, cache)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


def test_texts_past_the_window_are_those_of_the_plain_model():
    plain, fast = models()
    for prompts in ([[5]], [[5, 6], [7, 8]], [[5], [7, 8, 9], list(range(40))]):
        texts = [generate(m, prompts, max_new_tokens=70, sampling=GREEDY) for m in (plain, fast)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upcast", [False, True])
def test_every_model_on_the_cpu_has_it_but_one_that_is_computed_in_two_precisions(dtype, upcast):
    model = GPT2(GPT2Config(**SHAPE, reorder_and_upcast_attn=upcast)).to(dtype)
    pack(model.requires_grad_(False))
    assert isinstance(vars(model).get("read"), TorchDecodeStep) is not upcast


class Named(torch.nn.Module):
    """A Linear that notes by how many rows it was multiplied."""

    made: list["Named"]

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias, self.rows = linear.weight, linear.bias, []
        Named.made.append(self)

    def forward(self, x):
        self.rows.append(x.numel() // x.shape[-1])
        return torch.nn.functional.linear(x, self.weight, self.bias)


def by_rows():
    """A model whose matrices have a layout of their own for more rows, and those layouts."""
    Named.made = []
    one, some = ROUTINES[0], Routine("packed", "packed float32", Named)
    model, _ = models(tie_word_embeddings=False)
    for block in model.h:
        for part in (block.attn, block.mlp):
            part.c_proj = LinearByRows(part.c_proj, (one, some), 0)
    model.lm_head = LinearByRows(model.lm_head, (one, some), FEW)
    step_in_torch(model)
    return model


def test_a_layout_for_more_rows_is_made_for_them_and_not_for_prompts():
    model = by_rows()
    generate(model, [[5, 6, 7]], max_new_tokens=4, sampling=GREEDY)
    assert not Named.made
    generate(model, [[5, 6, 7], [8, 9, 10]], max_new_tokens=4, sampling=GREEDY)
    assert len(Named.made) == 3 * 2 + 1
    assert all(made.rows[-3:] == [2, 2, 2] for made in Named.made)


def test_what_was_read_before_does_not_choose_the_layout():
    fresh, used = by_rows(), by_rows()
    generate(used, [[5, 6], [8, 9]], max_new_tokens=4, sampling=GREEDY)
    Named.made = []
    texts = [generate(m, [[5, 6, 7]], max_new_tokens=9, sampling=GREEDY) for m in (fresh, used)]
    assert texts[0] == texts[1] and not Named.made
    assert not any(1 in made.rows for made in Named.made)
