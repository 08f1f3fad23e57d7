"""The loss of a model as one module: cross-entropy, with documents kept apart."""

import pytest
import torch

from minigpt2.evaluation.scorer import Scorer
from minigpt2.lora import add_lora, merged
from scored import plain_sum, ragged_batches, tiny


@pytest.mark.parametrize("tied", [True, False])
def test_the_scorer_is_cross_entropy_of_the_models_logits(tied):
    model = tiny(tied=tied).double().eval()
    ((idx, targets),) = ragged_batches(torch.Generator().manual_seed(1), [3])
    ours, expected = Scorer(model)(idx, targets, 0.37), 0.37 * plain_sum(model, idx, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    parameters = [*model.parameters()]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, expected))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


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
