"""The decode step in C is the plain one, for every shape, activation and cache."""

import copy
import shutil

import pytest
import torch

from hf_models import randomise, token_ids
from minigpt2.decoding import c_step
from minigpt2.decoding.c_products import FEW, c_works
from minigpt2.decoding.c_step import NAMES, CDecodeStep
from minigpt2.decoding.cpu_layout import pack
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.torch_step import TorchDecodeStep
from minigpt2.equivalences import WAYS, difference
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
SHAPE = {"vocab_size": 257, "block_size": 31, "n_embd": 34, "n_layer": 3, "n_head": 2}
GREEDY = SamplingConfig(temperature=0)
VARIANTS = [
    *({"activation_function": name} for name in (*NAMES, "gelu_10", "tanh")),
    {"n_inner": 17},
    {"n_head": 17},
    {"n_embd": 48, "n_head": 3, "n_inner": 101},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
    {"reorder_and_upcast_attn": True, "tie_word_embeddings": False},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def models(*, rounded=False, **values):
    """A plain model, and the same with its decode step in C."""
    plain = GPT2(GPT2Config(**{**SHAPE, **values})).eval().requires_grad_(False)
    randomise(plain, std=0.3)
    if rounded:
        quantize(plain)
    fast = copy.deepcopy(plain)
    pack(fast, compiled=True)
    return plain, fast


@torch.no_grad()
@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_the_step_is_the_plain_one(values):
    plain, fast = models(**values)
    known = values.get("activation_function", "gelu_new") in NAMES
    assert isinstance(vars(fast)["read"], CDecodeStep) is known
    caches = [model.make_cache(3) for model in (plain, fast)]
    for n_tokens in (5, 1, 3, 1, 5, 2):
        idx = token_ids(257, 3, n_tokens)
        expected, found = (m.hidden(idx, c) for m, c in zip((plain, fast), caches))
        assert difference(found, expected) <= WAYS["decode step in C"].tolerance
        for a, b in zip((caches[0].keys, caches[0].values), (caches[1].keys, caches[1].values)):
            assert difference(b, a) <= WAYS["decode step in C"].tolerance


@torch.no_grad()
@pytest.mark.parametrize("rounded", [False, True])
def test_a_row_is_bit_for_bit_the_same_alone_and_in_a_batch(rounded):
    _, fast = models(rounded=rounded)
    for n_rows, n_tokens in ((2, 1), (5, 1), (FEW, 1), (3, 5), (2, 7)):
        idx = token_ids(257, n_rows, n_tokens)
        together = fast(idx, fast.make_cache(n_rows))
        alone = torch.cat([fast(row[None], fast.make_cache(1)) for row in idx])
        assert torch.equal(together, alone)


@torch.no_grad()
def test_rows_of_different_length_and_views_of_a_cache_are_read_where_they_lie():
    plain, fast = models()
    caches = []
    for model in (plain, fast):
        cache = model.make_cache(3, capacity=20)
        model.hidden(token_ids(257, 3, 6), cache)
        cache.truncate([6, 2, 4])
        model.hidden(token_ids(257, 3, 2), cache)
        model.hidden(token_ids(257, 1, 3), cache.row(1))
        cache = cache.select([2, 1, 1])
        caches.append((cache, model.hidden(token_ids(257, 3, 1), cache)))
    (_, expected), (_, found) = caches
    assert difference(found, expected) <= WAYS["decode step in C"].tolerance


@torch.no_grad()
def test_two_caches_in_turns_are_read_each_where_it_lies():
    plain, fast = models()
    texts = token_ids(257, 2, 9)
    found = []
    for model in (plain, fast):
        caches = [model.make_cache(1, capacity=capacity) for capacity in (9, 20)]
        steps = [
            model.hidden(texts[row : row + 1, place : place + 1], cache)
            for place in range(9)
            for row, cache in enumerate(caches)
        ]
        found.append(torch.cat(steps))
    assert difference(found[1], found[0]) <= WAYS["decode step in C"].tolerance


def test_what_is_no_decode_step_goes_the_plain_way(monkeypatch):
    _, fast = models()
    step = vars(fast)["read"]
    plain, asked = step._plain, []
    monkeypatch.setattr(step, "_plain", lambda *given: asked.append(1) or plain(*given))
    fast(token_ids(257, 1, 3))  # without a cache
    with torch.no_grad():
        fast(token_ids(257, 1, FEW + 1), fast.make_cache(1))  # a long prompt
        assert len(asked) == 2
        fast(token_ids(257, 1, FEW), fast.make_cache(1))
        assert len(asked) == 2
        fast.train()
        fast(token_ids(257, 1, 3), fast.make_cache(1))
    assert len(asked) == 3
    fast.eval()
    fast(token_ids(257, 1, 3), fast.make_cache(1))  # gradients are asked for
    assert len(asked) == 4


@torch.no_grad()
@pytest.mark.parametrize("way", ["ids", "positions", "layers"])
def test_errors_are_those_of_the_plain_model(way):
    plain, fast = models()
    messages = []
    for model in (plain, fast):
        cache = model.make_cache(2, capacity=3)
        idx = token_ids(257, 2, 2)
        with pytest.raises(Exception) as caught:
            if way == "ids":
                model.hidden(idx + 257, cache)
            elif way == "positions":
                model.hidden(idx, cache)
                model.hidden(idx, cache)
            else:
                model.hidden(idx[:1], cache)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


def test_texts_past_the_window_are_those_of_the_plain_model():
    plain, fast = models()
    prompts = [[5], [7, 8, 9], list(range(40))]
    texts = [generate(m, prompts, max_new_tokens=70, sampling=GREEDY) for m in (plain, fast)]
    assert texts[0] == texts[1]


def test_without_c_for_a_part_the_blocks_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(c_step, "NAMES", ())
    _, fast = models()
    assert isinstance(vars(fast)["read"], TorchDecodeStep) and c_works(torch.float32)
