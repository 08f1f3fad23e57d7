"""Blocks that are compiled or computed twice give the numbers of plain ones."""

import functools

import pytest
import torch

from minigpt2.evaluation.scorer import Scorer
from minigpt2.model import GPT2, GPT2Config
from minigpt2.system.precision import Precision
from minigpt2.training.blocks import prepare_blocks

FLOAT32 = Precision(torch.device("cpu"), torch.float32)


def tiny():
    config = GPT2Config(vocab_size=29, block_size=7, n_embd=10, n_layer=3, n_head=2)
    return GPT2(config, generator=torch.Generator().manual_seed(3)).train()


def gradients(model, *, saved=None, eot=None):
    """The gradients of one batch with dropout, and in `saved` the sizes of what autograd kept."""
    generator = torch.Generator().manual_seed(1)
    idx, targets = torch.randint(29, (2, 3, 7), generator=generator)
    torch.manual_seed(5)
    pack = lambda tensor: (saved.append(tensor.numel()), tensor)[1]  # noqa: E731
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    if saved is None:
        Scorer(model, eot)(idx, targets).backward()
    else:
        with hooks:
            Scorer(model, eot)(idx, targets).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("eot", [None, 10], ids=["", "masked"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradients_are_the_plain_ones_bit_for_bit(compiled, recomputed, eot, monkeypatch):
    # Inductor may round differently; the eager backend goes through everything but its kernels
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    expected, unmasked = gradients(tiny(), eot=eot), gradients(tiny())
    assert eot is None or not torch.equal(expected["wte.weight"], unmasked["wte.weight"])
    model, masked = tiny(), eot is not None
    shape = (3, 7)
    prepare_blocks(model, FLOAT32, shape, compiled=compiled, recomputed=recomputed, masked=masked)
    assert all(p.grad is None for p in model.parameters())
    got = gradients(model, eot=eot)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_recomputed_blocks_keep_only_what_goes_into_them():
    plain, lean, model = [], [], tiny()
    gradients(tiny(), saved=plain)
    prepare_blocks(model, FLOAT32, (3, 7), compiled=False, recomputed=True)
    gradients(model, saved=lean)
    assert sum(lean) < sum(plain) / 2


def refuse(*anything):
    raise RuntimeError("no compiler on this machine\nand a long tail")


@pytest.mark.parametrize("broken", [refuse, lambda forward: refuse], ids=["at once", "when used"])
def test_a_model_that_does_not_compile_trains_without(broken, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", broken)
    model = tiny()
    prepare_blocks(model, FLOAT32, (3, 7), compiled=True, recomputed=False)
    assert "no compiler on this machine): going on without" in caplog.text
    expected = gradients(tiny())
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model).items())
