import pytest
import torch
from torch import Tensor

from hf_models import TOLERANCE, randomise, reference, token_ids
from minigpt2 import GPT2, GPT2Config, InputError
from minigpt2.decoding.int8 import quantize
from minigpt2.explain import trace
from minigpt2.lora import add_lora, merged

PRIMES = GPT2Config(vocab_size=31, block_size=13, n_embd=15, n_layer=2, n_head=3, n_inner=17)
IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
CONFIGS = [
    {},
    {"n_head": 1},
    {"n_embd": 60, "n_head": 5},
    {"activation_function": "gelu", "n_inner": 96},
    {"layer_norm_epsilon": 1e-3},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
    {"embd_pdrop": 0.5, "attn_pdrop": 0.5, "resid_pdrop": 0.5},
]


def model_of(seed: int = 0, **values) -> GPT2:
    model = GPT2(GPT2Config(**{**vars(PRIMES), **values})).double().eval()
    randomise(model, std=0.4, seed=seed)
    return model


def hooks_of(model: GPT2) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def apart(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize("values", CONFIGS, ids=str)
@torch.no_grad()
def test_streams_probabilities_and_scores_are_those_of_transformers(hf_folder, values):
    folder = hf_folder(**values)
    theirs = reference(folder, attn_implementation="eager").eval()
    idx = token_ids(257, 2, 64)
    expected = theirs(idx, output_attentions=True, output_hidden_states=True)
    found = trace(GPT2.from_pretrained(folder, dtype=torch.float64).train(), idx)
    *streams, hidden = expected.hidden_states
    assert len(found.layers) == len(streams) == len(expected.attentions)
    for layer, stream, probs in zip(found.layers, streams, expected.attentions):
        assert apart(layer.before, stream) <= TOLERANCE
        assert apart(layer.probs, probs) <= TOLERANCE
    assert apart(found.hidden, hidden) <= TOLERANCE
    assert apart(found.logits, expected.logits) <= TOLERANCE


@torch.no_grad()
def test_upcast_attention_is_that_of_transformers(hf_folder):
    folder = hf_folder(reorder_and_upcast_attn=True)  # there it fails in float64
    theirs = reference(folder, torch.float32, attn_implementation="eager").eval()
    idx = token_ids(257, 2, 64)
    expected = theirs(idx, output_attentions=True)
    found = trace(GPT2.from_pretrained(folder), idx)
    for layer, probs in zip(found.layers, expected.attentions):
        assert apart(layer.probs, probs) <= 1e-4
    half = trace(GPT2.from_pretrained(folder, dtype="bfloat16"), idx)
    assert half.layers[0].probs.dtype == torch.float32


@torch.no_grad()
def test_a_trace_is_the_forward_pass_in_parts():
    model = model_of()
    found = trace(model, IDX)
    assert torch.equal(found.logits, model(IDX))
    assert torch.equal(found.token_embedding + found.position_embedding, found.layers[0].before)
    for n, (layer, after) in enumerate(zip(found.layers, found.streams[1:])):
        assert torch.equal(layer.after, after)
        mixed = layer.probs @ layer.v  # (B, H, T, D)
        attn = model.h[n].attn.c_proj(mixed.transpose(1, 2).flatten(2))
        assert apart(layer.attn, attn) <= TOLERANCE
        assert apart(layer.mlp, model.h[n].mlp(model.h[n].ln_2(layer.middle))) <= TOLERANCE
        assert apart(layer.probs_at(1, 3), layer.probs[1, :, 3, :4]) <= TOLERANCE
        torch.testing.assert_close(layer.probs.sum(-1), torch.ones_like(layer.probs[..., 0]))
    assert apart(model.ln_f(found.streams[-1]), found.hidden) == 0


def test_a_model_is_as_before_also_after_an_error():
    model = model_of(attn_pdrop=0.5).train()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    found = trace(model, IDX)
    assert not found.logits.requires_grad and model.training and hooks_of(model) == 0
    with pytest.raises(InputError, match="8 to 99, the model knows 0 to 30"):
        trace(model, torch.tensor([[8, 99]]))
    with pytest.raises(InputError, match="14 tokens were given, the model has 13"):
        trace(model, torch.zeros(1, 14, dtype=torch.int64))
    assert hooks_of(model) == 0 and model.training and model.h[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_adapters_are_traced_beside_their_base_and_folded_into_it():
    model = model_of()
    add_lora(model, rank=3, alpha=5)
    randomise(model, std=0.4, seed=3)
    beside = trace(model, IDX)
    with merged(model):
        folded = trace(model, IDX)
    for a, b in zip(beside.streams, folded.streams):
        assert apart(a, b) <= TOLERANCE
    assert apart(beside.logits, model(IDX)) == 0


def test_models_laid_out_for_speed_are_refused_in_one_line():
    model = GPT2(PRIMES).eval()
    with pytest.raises(InputError, match=r"laid out for speed \(int8\), .* GPT2\.from_pretrained$"):
        quantize(model)
        trace(model, IDX)
    with pytest.raises(InputError, match="model is 'gpt2', allowed is a GPT2"):
        trace("gpt2", IDX)


def test_a_trace_takes_the_memory_that_it_says():
    config = PRIMES
    found = trace(GPT2(config).eval(), IDX)
    numbers = sum(part.numel() for part in (found.token_embedding, found.hidden, found.logits))
    for layer in found.layers:
        parts = layer.before, layer.attn, layer.mlp, layer.q, layer.k, layer.v
        numbers += sum(part.numel() for part in parts)
    a_token = 6 * config.n_embd * config.n_layer + 2 * config.n_embd + config.vocab_size
    assert numbers == IDX.numel() * a_token
