"""Devices and dtypes: what is not there is refused by name, and weights stay float32."""

import pytest
import torch

from minigpt2.errors import InputError
from minigpt2.precision import Precision, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_auto_finds_a_device():
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:9"])
def test_cuda_without_cuda_says_what_to_use(name):
    with pytest.raises(InputError, match="no CUDA device: use --device cpu"):
        pick_device(name)


def test_a_cuda_index_beyond_the_last_lists_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    with pytest.raises(InputError, match=r"only cuda:0 \(Card 0\), cuda:1 \(Card 1\)"):
        pick_device("cuda:9")


@pytest.mark.parametrize("name", ["gpu", "tpu:x", "", "vulkan"])
def test_an_unknown_device_lists_the_allowed_ones(name):
    with pytest.raises(InputError, match="allowed are auto, cpu, cuda"):
        pick_device(name)


def test_float16_trains_only_on_cuda_but_samples_on_the_cpu():
    with pytest.raises(InputError, match="training on cpu supports float32, bfloat16"):
        pick_dtype("float16", CPU, training=True)
    assert pick_dtype("float16", CPU, training=False) == torch.float16


def test_auto_is_float32_on_the_cpu():
    assert pick_dtype("auto", CPU, training=True) == torch.float32


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_auto_on_cuda_is_bfloat16_where_the_card_has_it(monkeypatch, has_bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    picked = pick_dtype("auto", torch.device("cuda"), training=True)
    assert picked == getattr(torch, expected)
    if not has_bfloat16:
        with pytest.raises(InputError, match="float32, float16"):
            pick_dtype("bfloat16", torch.device("cuda"), training=True)


@pytest.mark.parametrize(
    ("dtype", "scaled"), [("float32", False), ("bfloat16", False), ("float16", True)]
)
def test_only_float16_scales_the_loss(dtype, scaled):
    assert Precision(CPU, getattr(torch, dtype)).scaler.is_enabled() == scaled


def test_autocast_computes_products_in_its_dtype_and_keeps_weights_float32():
    linear = torch.nn.Linear(3, 5)
    with Precision(CPU, torch.bfloat16).autocast():
        out = linear(torch.ones(2, 3))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert linear.weight.dtype == linear.weight.grad.dtype == torch.float32
