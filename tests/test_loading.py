"""A model made ready to decode says what the plain one says, whatever it was made of."""

import copy

import pytest
import torch

from hf_models import randomise, token_ids
from minigpt2.errors import InputError
from minigpt2.generate import generate
from minigpt2.kernel import FewRows
from minigpt2.loading import load
from minigpt2.model import GPT2, GPT2Config
from minigpt2.packed import PackedInt8Linear, PackedLinear
from minigpt2.quantize import quantize
from minigpt2.sampling import SamplingConfig
from minigpt2.weights import TensorFiles

GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    model = GPT2(GPT2Config(vocab_size=257, block_size=31, n_embd=34, n_layer=2, n_head=2,
                            tie_word_embeddings=request.param))  # fmt: skip
    randomise(model, std=0.3)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_loaded_model_is_packed_and_says_the_same(folder):
    plain, model = GPT2.from_pretrained(folder), load(folder, device="cpu")
    rows = [[5], [7, 9, 200]]
    expected = generate(plain, rows, max_new_tokens=70, sampling=GREEDY)
    assert generate(model, rows, max_new_tokens=70, sampling=GREEDY) == expected
    assert PackedLinear in [type(module) for module in model.modules()]
    assert not model.training


@pytest.mark.parametrize("compiled", [False, True])
def test_int8_is_int8_however_it_was_loaded(folder, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    plain = GPT2.from_pretrained(folder).requires_grad_(False)
    exact = copy.deepcopy(plain)
    quantize(plain)
    model = load(folder, device="cpu", dtype="int8", compiled=compiled)
    idx = token_ids(257, 1, 9)
    expected = plain(idx)
    assert torch.allclose(model(idx), expected, atol=2e-3 * float(expected.abs().max()))
    assert (expected - exact(idx)).abs().max() > 1e-3
    kinds = [type(module) for module in model.modules()]
    assert (FewRows if compiled else PackedInt8Linear) in kinds


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_load_as_they_did(folder, dtype):
    model = load(folder, device="cpu", dtype=dtype)
    assert model.ln_f.weight.dtype == getattr(torch, dtype)
    assert len(generate(model, [[5]], max_new_tokens=5)[0]) == 5


def test_unknown_precisions_are_refused(folder):
    with pytest.raises(InputError, match="--dtype is int4"):
        load(folder, device="cpu", dtype="int4")


def test_mapped_weights_are_the_files_and_changing_them_does_not_change_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    mapped, plain = GPT2.from_pretrained(folder, mapped=True), GPT2.from_pretrained(folder)
    idx = token_ids(257, 2, 31)
    assert torch.allclose(mapped(idx), plain(idx), atol=1e-5)
    with torch.no_grad():
        for parameter in mapped.parameters():
            parameter.mul_(2)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not mapped.config.tie_word_embeddings  # a head of its own, on the same values


def test_a_mapped_model_of_another_precision_is_a_plain_one(folder):
    tied = GPT2Config.from_hf(__import__("json").loads((folder / "config.json").read_text()))
    model = GPT2.from_pretrained(folder, dtype=torch.float64, mapped=True)
    assert model.config.tie_word_embeddings == tied.tie_word_embeddings
    assert model.wte.weight.dtype == torch.float64


def test_files_are_left_as_they_were_found(folder):
    names = set(TensorFiles.open(folder).tensors)
    GPT2.from_pretrained(folder, mapped=True)
    assert set(TensorFiles.open(folder).tensors) == names
