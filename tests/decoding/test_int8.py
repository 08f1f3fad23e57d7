"""int8 weights: every row within half a step of what it was, and a model that knows its text."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_models import randomise
from minigpt2.decoding.cpu_layout import pack
from minigpt2.decoding.int8 import Int8Linear, quantize, round_rows
from minigpt2.errors import InputError
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(11)


SHAPE = {"vocab_size": 101, "block_size": 23, "n_embd": 26, "n_layer": 3, "n_head": 2}


def random_model(**values):
    model = GPT2(GPT2Config(**{**SHAPE, **values})).eval()
    randomise(model, std=0.2)
    return model.requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 19), st.integers(0, 99), st.floats(1e-6, 1e6))
def test_a_row_is_within_half_a_step_of_what_it_was_and_its_largest_is_kept(n, k, seed, size):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * size
    rounded, scale = round_rows(weight)
    assert rounded.dtype == torch.int8 and scale.shape == (n,)
    steps = weight.double() / scale.double()[:, None]
    assert (steps - rounded).abs().max() <= 0.5 + 1e-4
    assert (rounded.abs().amax(1) == 127).all()
    assert torch.equal(round_rows(-weight)[0], -rounded)


def test_rows_of_zeros_stay_zeros():
    rounded, scale = round_rows(torch.zeros(3, 5))
    assert not rounded.any() and torch.equal(rounded * scale[:, None], torch.zeros(3, 5))


@pytest.mark.parametrize("tied", [True, False])
def test_the_int8_model_is_the_plain_one_with_rounded_matrices(tied):
    model = random_model(tie_word_embeddings=tied)
    expected = copy.deepcopy(model).double()
    embedding = expected.wte.weight.clone()
    head = embedding if tied else expected.lm_head.weight
    for module in expected.modules():
        if isinstance(module, nn.Linear):
            rounded, scale = round_rows(module.weight.float())
            module.weight.copy_(rounded.double() * scale.double()[:, None])
    rounded, scale = round_rows(head.float())
    quantize(model)
    idx = torch.randint(101, (2, 17))
    x = expected.hidden(idx)
    if not tied:
        rounded, scale = round_rows(head.float())
        logits = expected.head(x)
    else:
        logits = x @ (rounded.double() * scale.double()[:, None]).T
    assert torch.allclose(model(idx).double(), logits, atol=2e-5)
    kinds = [type(module) for module in model.modules()]
    assert nn.Linear not in kinds and kinds.count(Int8Linear) == 4 * 3 + 1
    assert torch.equal(model.wte.weight.double(), embedding)


def test_rounding_moves_the_logits():
    model = random_model()
    idx = torch.randint(101, (1, 9))
    before = model(idx)
    quantize(model)
    assert 1e-4 < (model(idx) - before).abs().max() < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_and_cache_keep_the_models_precision(dtype):
    model = random_model().to(dtype)
    quantize(model)
    cache = model.make_cache(1)
    assert cache.keys.dtype == dtype == model(torch.tensor([[3, 5]]), cache).dtype


def test_an_int8_model_decodes_with_its_cache_what_it_decodes_without():
    model = random_model()
    quantize(model)
    text = [5, 7, 11]
    for _ in range(15):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    ids = generate(model, [[5, 7, 11]], max_new_tokens=15)
    assert len(ids[0]) == 15
    greedy = SamplingConfig(temperature=0)
    assert generate(model, [[5, 7, 11]], max_new_tokens=15, sampling=greedy) == [text[3:]]


@pytest.mark.parametrize("change", [quantize, pack])
def test_what_was_made_for_decoding_is_not_saved(change, tmp_path):
    model = random_model()
    change(model)
    with pytest.raises(InputError, match="save the one it was made of"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def learned_model():
    """A small model that has learned which token follows which, with some noise to be unsure of."""
    torch.manual_seed(3)
    model = GPT2(GPT2Config(vocab_size=61, block_size=29, n_embd=32, n_layer=2, n_head=2,
                            embd_pdrop=0, attn_pdrop=0, resid_pdrop=0))  # fmt: skip
    follows = torch.softmax(2.5 * torch.randn(61, 61), 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def text(rows):
        ids = [torch.randint(61, (rows,))]
        for _ in range(29):
            ids.append(torch.multinomial(follows[ids[-1]], 1)[:, 0])
        return torch.stack(ids, 1)

    for _ in range(150):
        ids = text(32)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), text(64)


def perplexity(model, ids):
    logits = model(ids[:, :-1]).flatten(0, 1)
    return math.exp(nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


def test_a_trained_models_perplexity_stays_within_one_percent():
    model, held_out = learned_model()
    plain = perplexity(model, held_out)
    assert plain < 35  # of 61: it has learned
    quantize(model)
    rounded = perplexity(model, held_out)
    assert rounded != plain
    pack(model)
    packed = perplexity(model, held_out)
    assert rounded == pytest.approx(plain, rel=0.01) == packed
