import pytest
import torch
import torch.nn.functional as F

from hf_models import randomise
from minigpt2 import GPT2, GPT2Config, InputError
from minigpt2.explain import differences, surprise, trace
from minigpt2.lora import add_lora, merged

PRIMES = GPT2Config(vocab_size=31, block_size=13, n_embd=15, n_layer=2, n_head=3, n_inner=17)
IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


def model_of(seed=0, **values):
    model = GPT2(GPT2Config(**{**vars(PRIMES), **values})).double().eval()
    randomise(model, std=0.4, seed=seed)
    return model


def test_a_model_does_not_differ_from_itself():
    found = differences(model_of(), model_of(), IDX)
    assert found.nats_a == found.nats_b == tuple(surprise(model_of(), IDX)[0])
    assert not found.divergence.any() and not found.streams.any()
    assert found.streams.shape == (3, 7) and set(found.weights.values()) == {0}
    assert set(found.weights) == set(dict(model_of().named_parameters()))


@torch.no_grad()
def test_two_models_differ_by_token_layer_and_tensor():
    a, b = model_of(), model_of(seed=1)
    found = differences(a, b, IDX)
    log_a, log_b = (model(IDX)[0].log_softmax(-1) for model in (a, b))
    expected = F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found.divergence, expected)
    assert (found.nats_a, found.nats_b) == tuple(tuple(surprise(m, IDX)[0]) for m in (a, b))
    for depth, (x, y) in enumerate(zip(trace(a, IDX).streams, trace(b, IDX).streams)):
        expected = (y - x)[0].norm(dim=-1) / x[0].norm(dim=-1)
        torch.testing.assert_close(found.streams[depth].double(), expected, rtol=1e-5, atol=0)
    for name, value in a.named_parameters():
        expected = (b.get_parameter(name) - value).norm() / value.norm()
        assert found.weights[name] == pytest.approx(expected.item(), rel=1e-5)


def test_adapters_count_as_what_they_add_to_their_base():
    base, tuned = model_of(), model_of()
    add_lora(tuned, rank=2, alpha=3)
    randomise(tuned, std=0.4, seed=4)
    beside = differences(base, tuned, IDX)
    with merged(tuned):
        folded = differences(base, tuned, IDX)
    assert beside.weights == pytest.approx(folded.weights)
    torch.testing.assert_close(beside.divergence, folded.divergence)


@pytest.mark.parametrize(
    "values", [{"n_layer": 3}, {"vocab_size": 37}, {"n_embd": 21}, {"n_inner": 19}], ids=str
)
def test_models_of_different_shape_are_refused(values):
    ((name, value),) = values.items()
    message = rf"{name} is {getattr(PRIMES, name)} in the first and {value} in the second"
    with pytest.raises(InputError, match=message):
        differences(model_of(), model_of(**values), IDX)


def test_one_row_is_compared():
    with pytest.raises(InputError, match=r"the shape \(2, 7\), allowed is one row"):
        differences(model_of(), model_of(), IDX.repeat(2, 1))
