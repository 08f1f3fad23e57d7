"""The compiled int8 product equals the plain one, and its absence changes nothing."""

import logging
import shutil

import pytest
import torch

from hf_models import randomise, token_ids
from minigpt2 import kernel
from minigpt2.generate import generate
from minigpt2.kernel import FEW, FewRows, int8_product
from minigpt2.model import GPT2, GPT2Config
from minigpt2.packed import pack
from minigpt2.quantize import Int8Linear, quantize, round_rows

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(5)
    int8_product.cache_clear()
    yield
    int8_product.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (83, 129), (64, 768)], ids=str)
def test_the_compiled_product_is_the_plain_one(shape, bias):
    product = int8_product()
    n, k = shape
    linear = Int8Linear(*round_rows(torch.randn(n, k)), torch.randn(n) if bias else None)
    for rows in ((1,), (2,), (1, 1), (2, 1), (3, 2)):
        x = torch.randn(*rows, k)
        y = product(x, linear)
        assert y.shape == (*rows, n)
        assert torch.allclose(y, linear(x), atol=1e-4, rtol=1e-4)
    strided = torch.randn(k, 2).T
    assert torch.allclose(product(strided, linear), linear(strided), atol=1e-4, rtol=1e-4)


def test_what_is_not_a_number_stays_so():
    linear = Int8Linear(*round_rows(torch.randn(3, 8)), None)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(1, 8)
        x[0, 2] = bad
        assert not int8_product()(x, linear).isfinite().any()


def test_few_rows_go_through_the_function_and_more_through_the_other_module():
    class Many(torch.nn.Module):
        def forward(self, x):
            return torch.full((*x.shape[:-1], 3), -1.0)

    linear = Int8Linear(*round_rows(torch.randn(3, 8)), None)
    module = FewRows(linear, int8_product(), Many())
    for rows, few in ((1, True), (FEW, True), (FEW + 1, False)):
        y = module(torch.randn(1, rows, 8))
        assert y.shape == (1, rows, 3) and bool((y != -1).any()) is few


def test_a_model_says_with_it_what_it_says_without():
    models = []
    for compiled in (False, True):
        model = GPT2(GPT2Config(vocab_size=257, block_size=31, n_embd=34, n_layer=3, n_head=2))
        randomise(model, std=0.3)
        quantize(model.requires_grad_(False))
        if compiled:
            pack(model, compiled=True)
        models.append(model)
    fast = models[1]
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(FewRows) == 4 * 3 + 1
    text = token_ids(257, 1, 9)
    caches = [model.make_cache(1) for model in models]
    expected, logits = (model(text, cache) for model, cache in zip(models, caches))
    for token in (3, 250, 17):
        expected, logits = (model(torch.tensor([[token]]), c) for model, c in zip(models, caches))
        assert torch.allclose(logits, expected, atol=2e-3 * float(expected.abs().max()))
    assert len(generate(fast, [[5]], max_new_tokens=60)[0]) == 60


def test_it_is_built_once_and_kept(tmp_path, monkeypatch):
    assert int8_product() is not None
    (library,) = (tmp_path / "cache" / "kernels").iterdir()
    monkeypatch.setattr(kernel, "_compile", lambda *_: pytest.fail("built again"))
    int8_product.cache_clear()
    assert int8_product() is not None
    assert list((tmp_path / "cache" / "kernels").iterdir()) == [library]


def test_another_processor_gets_a_library_of_its_own(tmp_path, monkeypatch):
    int8_product()
    monkeypatch.setattr(kernel, "_processor", lambda: "flags: of another machine")
    int8_product.cache_clear()
    int8_product()
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 2


@pytest.mark.parametrize("trouble", ["no compiler", "a compiler that fails", "a wrong result"])
def test_without_it_a_notice_is_given_and_the_plain_path_stays(
    trouble, tmp_path, monkeypatch, caplog
):
    if trouble == "no compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
        expected = "there is no C compiler"
    elif trouble == "a compiler that fails":
        monkeypatch.setenv("CC", "false")
        expected = "failed"
    else:
        wrong = tmp_path / "wrong.c"
        wrong.write_text(kernel.SOURCE.read_text().replace("sum * scale[n]", "sum"))
        monkeypatch.setattr(kernel, "SOURCE", wrong)
        expected = "computes something else"
    with caplog.at_level(logging.WARNING):
        assert int8_product() is None
    (record,) = caplog.records
    assert expected in record.getMessage() and "going on without it" in record.getMessage()
    if trouble != "a wrong result":
        assert not list((tmp_path / "cache" / "kernels").glob("*"))
    model = GPT2(GPT2Config(vocab_size=57, block_size=31, n_embd=34, n_layer=1, n_head=2))
    quantize(model.requires_grad_(False))
    pack(model, compiled=True)
    assert FewRows not in [type(module) for module in model.modules()]
    assert len(generate(model, [[5]], max_new_tokens=3)[0]) == 3
