"""A model made ready to decode says what the plain one says, whatever it was made of."""

import copy

import pytest
import torch

from hf_models import randomise, token_ids
from minigpt2.decoding import routines
from minigpt2.decoding.c_products import CLinear
from minigpt2.decoding.cpu_layout import PackedInt8Linear, PackedLinear
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.ready import load
from minigpt2.equivalences import ways_of
from minigpt2.errors import InputError
from minigpt2.formats.hugging_face import StoredLinear, TensorFiles
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig

GREEDY = SamplingConfig(temperature=0)
MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    model = GPT2(GPT2Config(vocab_size=257, block_size=31, n_embd=34, n_layer=2, n_head=2,
                            tie_word_embeddings=request.param))  # fmt: skip
    randomise(model, std=0.3)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_loaded_model_is_packed_and_says_the_same(folder):
    plain = GPT2.from_pretrained(folder)
    model = load(folder, device="cpu", cpu_routine="packed")
    rows = [[5], [7, 9, 200]]
    expected = generate(plain, rows, max_new_tokens=70, sampling=GREEDY)
    assert generate(model, rows, max_new_tokens=70, sampling=GREEDY) == expected
    assert PackedLinear in [type(module) for module in model.modules()]
    assert not model.training


def test_a_small_model_is_loaded_without_a_measurement(folder, monkeypatch, caplog):
    monkeypatch.setattr(routines, "measured", lambda *_, **__: pytest.fail("measured"))
    with caplog.at_level("DEBUG", "minigpt2.decoding"):
        model = load(folder, device="cpu")
    assert "products on the CPU: plain (the matrices are small)" in caplog.messages
    found = {path: ways[-1] for path, ways in ways_of(model).items()}
    assert found.pop("read") == "decode step in torch"
    assert set(found.values()) == {"plain float32"}
    assert not any(isinstance(module, StoredLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("dtype", "kind"), [("int8", "int8"), ("bfloat16", "bfloat16"), (torch.float16, "float16")]
)
def test_a_routine_is_named_for_float32_only(folder, dtype, kind):
    message = f"^cpu_routine is 'plain', allowed is auto for {kind} on cpu: others are for float32"
    with pytest.raises(InputError, match=message):
        load(folder, device="cpu", dtype=dtype, cpu_routine="plain")
    with pytest.raises(InputError, match="cpu_routine is 'best', allowed is auto, plain, packed"):
        load(folder, device="cpu", cpu_routine="best")
    with pytest.raises(InputError, match="cpu_routine is 'slices', allowed is auto beside compile"):
        load(folder, device="cpu", cpu_routine="slices", compiled=True)


def test_the_head_of_a_tied_model_is_its_table(folder):
    tied = GPT2.from_pretrained(folder).config.tie_word_embeddings
    for routine in ("plain", "slices"):
        model = load(folder, device="cpu", cpu_routine=routine)
        assert (model.lm_head.weight.data_ptr() == model.wte.weight.data_ptr()) == tied


@pytest.mark.parametrize("compiled", [False, True])
def test_int8_is_int8_however_it_was_loaded(folder, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    plain = GPT2.from_pretrained(folder).requires_grad_(False)
    exact = copy.deepcopy(plain)
    quantize(plain)
    model = load(folder, device="cpu", dtype="int8", compiled=compiled)
    for shape in ((1, 1), (1, 2), (1, 3), (1, 9), (3, 1), (3, 9)):
        idx = token_ids(257, *shape)
        expected = plain(idx)
        assert torch.allclose(model(idx), expected, atol=2e-3 * float(expected.abs().max()))
        assert (expected - exact(idx)).abs().max() > 1e-3
    kinds = [type(module) for module in model.modules()]
    assert (CLinear if compiled else PackedInt8Linear) in kinds


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_load_as_they_did(folder, dtype):
    model = load(folder, device="cpu", dtype=dtype)
    assert model.ln_f.weight.dtype == getattr(torch, dtype)
    assert len(generate(model, [[5]], max_new_tokens=5)[0]) == 5


def test_unknown_precisions_are_refused(folder):
    with pytest.raises(InputError, match="dtype is int4, sampling on cpu supports float32"):
        load(folder, device="cpu", dtype="int4")


def test_deferred_weights_are_the_files_and_are_not_kept(folder):
    deferred, plain = GPT2.from_pretrained(folder, deferred=True), GPT2.from_pretrained(folder)
    idx = token_ids(257, 2, 31)
    assert torch.allclose(deferred(idx), plain(idx), atol=1e-5)
    assert not deferred.config.tie_word_embeddings  # a head of its own, with the same values
    names = [name for name, _ in deferred.named_parameters()]
    assert names == [
        n for n, _ in plain.named_parameters() if not n.endswith(MATRICES) and n != "lm_head.weight"
    ]
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        deferred(idx)


def test_a_deferred_model_of_another_precision_is_a_plain_one(folder):
    tied = GPT2Config.from_hf(__import__("json").loads((folder / "config.json").read_text()))
    model = GPT2.from_pretrained(folder, dtype=torch.float64, deferred=True)
    assert model.config.tie_word_embeddings == tied.tie_word_embeddings
    assert model.wte.weight.dtype == torch.float64
    assert not any(isinstance(module, StoredLinear) for module in model.modules())


def test_nothing_is_left_in_the_files_where_nothing_can_be_laid_out(folder, monkeypatch):
    monkeypatch.setattr("minigpt2.decoding.cpu_layout.works", lambda *_: False)
    model, plain = load(folder, device="cpu"), GPT2.from_pretrained(folder)
    assert not any(isinstance(module, StoredLinear) for module in model.modules())
    (folder / "model.safetensors").unlink()
    idx = token_ids(257, 2, 31)
    assert torch.allclose(model(idx), plain(idx), atol=1e-5)


def test_files_are_left_as_they_were_found(folder):
    names = set(TensorFiles.open(folder).tensors)
    GPT2.from_pretrained(folder, deferred=True)
    assert set(TensorFiles.open(folder).tensors) == names


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_a_loaded_model_is_frozen(folder, dtype):
    model = load(folder, device="cpu", dtype=dtype)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(token_ids(257, 1, 9)).float().sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_model_laid_out_for_decoding_is_not_cast(folder, dtype):
    model = load(folder, device="cpu", dtype=dtype)
    idx = token_ids(257, 2, 5)
    expected = model(idx)
    for cast in (model.half, model.double, model.bfloat16, lambda: model.to("float16"),
                 lambda: model.to("meta")):  # fmt: skip
        with pytest.raises(InputError, match="laid out for decoding on cpu"):
            cast()
    assert torch.equal(model.to("cpu").float()(idx), expected)


def test_a_model_with_weights_in_its_file_is_not_cast(folder):
    model = GPT2.from_pretrained(folder, deferred=True)
    with pytest.raises(InputError, match="deferred weights"):
        model.half()


def test_dtype_and_device_may_be_torchs(folder):
    model = load(folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert model.wte.weight.dtype == torch.bfloat16
