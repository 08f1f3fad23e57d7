"""Devices and dtypes: what is not there is refused by name, and weights stay float32."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from minigpt2.errors import InputError
from minigpt2.system import files
from minigpt2.system.precision import (
    COMPILER_CACHE,
    Precision,
    guard_compiler_cache,
    own_randomness,
    pick_device,
    pick_dtype,
)

CPU = torch.device("cpu")


def test_auto_finds_a_device():
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:9"])
def test_cuda_without_cuda_says_what_to_use(name):
    with pytest.raises(InputError, match="no CUDA device: use device cpu"):
        pick_device(name)


def test_a_cuda_index_beyond_the_last_lists_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    with pytest.raises(InputError, match=r"only cuda:0 \(Card 0\), cuda:1 \(Card 1\)"):
        pick_device("cuda:9")


@pytest.mark.parametrize("name", ["gpu", "tpu:x", "", "vulkan"])
def test_an_unknown_device_lists_the_allowed_ones(name):
    with pytest.raises(InputError, match="allowed is auto, cpu, cuda"):
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


def test_randomness_is_given_back_also_after_an_error():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), own_randomness(torch.device("cpu")):
        torch.manual_seed(5)
        torch.rand(7)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_the_randomness_of_an_apple_gpu_is_given_back_too(monkeypatch):
    states = ["before"]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    with own_randomness(torch.device("mps")):
        states.append("seeded")
    assert states[-1] == "before"


@pytest.fixture
def torchs_cache(tmp_path, monkeypatch):
    """The folder that torch takes where no other is named."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv(COMPILER_CACHE, "")  # so that it is as before in the end
    monkeypatch.delenv(COMPILER_CACHE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Path(default_cache_dir())


def test_torch_compiles_where_it_always_does_if_nobody_else_can_write_there(torchs_cache, caplog):
    guard_compiler_cache()
    assert torchs_cache.is_dir() and COMPILER_CACHE not in os.environ
    assert not caplog.records


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_torch_compiles_elsewhere_if_others_can_write_there(torchs_cache, caplog):
    torchs_cache.mkdir()
    torchs_cache.chmod(0o777)
    guard_compiler_cache()
    own = Path(os.environ[COMPILER_CACHE])
    assert own != torchs_cache and files.exposed(own) is None
    assert f"others can write to {torchs_cache}" in caplog.text
    guard_compiler_cache()
    assert Path(os.environ[COMPILER_CACHE]) == own and len(caplog.records) == 1


def test_a_named_folder_is_taken(torchs_cache, tmp_path, monkeypatch):
    monkeypatch.setenv(COMPILER_CACHE, str(tmp_path / "mine"))
    guard_compiler_cache()
    assert os.environ[COMPILER_CACHE] == str(tmp_path / "mine") and not torchs_cache.exists()
