"""The validation loss: token-weighted, independent of how batches are cut, and without side
effects.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from minigpt2.evaluate import Scorer, mean_loss
from minigpt2.lora import add_lora, merged
from minigpt2.model import GPT2, GPT2Config, evaluation_mode
from minigpt2.precision import Precision

CPU = Precision(torch.device("cpu"), torch.float32)


def tiny(*, tied=True):
    generator = torch.Generator().manual_seed(3)
    config = GPT2Config(
        vocab_size=29, block_size=7, n_embd=10, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    return GPT2(config, generator=generator)


def ragged_batches(generator, sizes):
    for n_rows in sizes:
        idx = torch.randint(29, (n_rows, 7), generator=generator)
        targets = torch.randint(29, (n_rows, 7), generator=generator)
        targets[0, n_rows:] = -100
        yield idx, targets


def plain_sum(model, idx, targets):
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("tied", [True, False])
def test_the_scorer_is_cross_entropy_of_the_models_logits(tied):
    model = tiny(tied=tied).double().eval()
    ((idx, targets),) = ragged_batches(torch.Generator().manual_seed(1), [3])
    ours, expected = Scorer(model)(idx, targets, 0.37), 0.37 * plain_sum(model, idx, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    parameters = [*model.parameters()]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, expected))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_mean_weighs_tokens_and_not_batches():
    model = tiny().eval()
    batches = list(ragged_batches(torch.Generator().manual_seed(1), [3, 1, 2]))
    total = sum(plain_sum(model, idx, targets).item() for idx, targets in batches)
    count = sum(int((targets != -100).sum()) for _, targets in batches)
    assert mean_loss(Scorer(model), batches, CPU) == pytest.approx(total / count, rel=1e-6)
    rows = [(idx[i : i + 1], t[i : i + 1]) for idx, t in batches for i in range(len(idx))]
    assert mean_loss(Scorer(model), rows, CPU) == pytest.approx(total / count, rel=1e-6)


def test_evaluating_twice_gives_the_same_float_and_leaves_everything_as_it_was():
    model = tiny().train()
    scorer = Scorer(model).train()
    batches = list(ragged_batches(torch.Generator().manual_seed(1), [3, 1]))
    before = torch.get_rng_state()
    first, second = mean_loss(scorer, batches, CPU), mean_loss(scorer, batches, CPU)
    assert first == second and math.isfinite(first)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_mode_comes_back_after_an_error():
    model = tiny().train()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not model.training
        raise KeyError
    assert model.training


def test_documents_are_kept_apart_with_adapters_and_with_merged_ones():
    model, eot = tiny().double().eval(), 28
    add_lora(model, rank=2, alpha=3.0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
    idx = torch.tensor([[3, 4, eot, 5, 6, 7, 8]])
    together = Scorer(model, eot)(idx, idx)
    alone = plain_sum(model, idx[:, :2], idx[:, :2]) + plain_sum(model, idx[:, 2:], idx[:, 2:])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    with merged(model), torch.no_grad():
        torch.testing.assert_close(Scorer(model, eot)(idx, idx), together, rtol=1e-12, atol=0)


def test_with_end_of_text_each_document_is_scored_as_if_it_stood_alone():
    model, eot = tiny().double().eval(), 28
    # a window that begins inside a document, one that is empty, and an end at the end
    idx = torch.tensor([[3, 4, eot, 5, 6, 7, eot], [eot, eot, 1, 2, eot, 9, 8]])
    targets = torch.randint(29, idx.shape, generator=torch.Generator().manual_seed(1))
    alone = [(0, range(2)), (0, range(2, 6)), (0, range(6, 7))]
    alone += [(1, range(1)), (1, range(1, 4)), (1, range(4, 7))]
    expected = sum(
        plain_sum(model, idx[row : row + 1, places], targets[row : row + 1, places])
        for row, places in ((row, list(places)) for row, places in alone)
    )
    assert isinstance(expected, torch.Tensor)
    ours = Scorer(model, eot)(idx, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    parameters = [*model.parameters()]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert abs(float(Scorer(model)(idx, targets).detach() - expected.detach())) > 1e-3
