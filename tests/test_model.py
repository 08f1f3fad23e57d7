"""The network equals transformers' and a naive one in loops; its start, dropout and folders."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_models import (
    GPT2_124M,
    TOLERANCE,
    copy_of,
    gradient_difference,
    logit_difference,
    next_token_loss,
    randomise,
    reference,
    step_difference,
    tensors_of,
    token_ids,
)
from minigpt2.errors import InputError
from minigpt2.model import (
    GPT2,
    MOST_PARAMETERS,
    PRESETS,
    CausalSelfAttention,
    GPT2Config,
    evaluation_mode,
)

PRIMES = GPT2Config(vocab_size=31, block_size=13, n_embd=15, n_layer=2, n_head=3, n_inner=17)
VARIATIONS = [
    *({"activation_function": name} for name in ("gelu", "relu", "swish", "quick_gelu")),
    *({"layer_norm_epsilon": value} for value in (1e-3, 1e-12)),
    *({"n_head": value} for value in (1, 64)),
    {"n_embd": 60, "n_head": 5},
    {"n_inner": 96},
    {"n_inner": 64},  # square, so that a forgotten transposition raises nothing
    *({"n_layer": value} for value in (1, 2)),
    *({"vocab_size": value, "n_layer": 2} for value in (50257, 50304)),
    {"n_positions": 1024},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
    {"embd_pdrop": 0.5, "attn_pdrop": 0.5, "resid_pdrop": 0.5},
    {"summary_type": "mean", "task_specific_params": {"text-generation": {"do_sample": True}}},
]


def named(values):
    return "-".join(f"{name}={value}" for name, value in values.items())[:60]


def model_of(config=PRIMES, seed=0):
    model = GPT2(config).double().eval()
    randomise(model, std=0.4, seed=seed)
    return model


def test_logits_are_those_of_transformers_in_float64(hf_folder):
    assert logit_difference(hf_folder()) <= TOLERANCE


def test_logits_are_those_of_transformers_in_float32(hf_folder):
    assert logit_difference(hf_folder(), torch.float32) <= 1e-4


@pytest.mark.parametrize("values", VARIATIONS[:-1], ids=named)
def test_every_supported_config_value_does_what_it_does_in_transformers(hf_folder, values):
    assert logit_difference(hf_folder(**values)) <= TOLERANCE
    assert logit_difference(hf_folder(**values), torch.float32) <= 1e-4


def test_config_values_of_other_tasks_change_nothing(hf_folder, tmp_path):
    folder = copy_of(
        hf_folder(), tmp_path / "m", tensors_of(hf_folder()), n_ctx=7, **VARIATIONS[-1]
    )
    assert logit_difference(folder) <= TOLERANCE


def test_upcast_attention_is_that_of_transformers(hf_folder):
    # only its eager attention knows the flag, and that fails in float64
    folder = hf_folder(reorder_and_upcast_attn=True)
    assert logit_difference(folder, torch.float32, attn_implementation="eager") <= 1e-4


@pytest.mark.parametrize("length", [1, 2, 63])
def test_short_texts_have_the_logits_of_transformers(hf_folder, length):
    assert logit_difference(hf_folder(), length=length) <= TOLERANCE


@pytest.mark.parametrize(
    "values",
    [{}, {"tie_word_embeddings": False}, {"scale_attn_by_inverse_layer_idx": True}],
    ids=named,
)
def test_loss_and_every_gradient_are_those_of_transformers(hf_folder, values):
    assert gradient_difference(hf_folder(**values)) <= TOLERANCE


@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": False}], ids=named)
def test_a_step_of_adamw_leads_where_it_leads_in_transformers(hf_folder, values):
    assert step_difference(hf_folder(**values)) <= TOLERANCE


def test_the_loss_is_the_one_that_transformers_computes_itself(hf_folder):
    theirs, ours = reference(hf_folder(), torch.float32), GPT2.from_pretrained(hf_folder())
    idx = token_ids(257, 2, 64)
    with torch.no_grad():
        loss = theirs(idx, labels=idx).loss
        torch.testing.assert_close(next_token_loss(ours(idx), idx), loss, atol=1e-5, rtol=0)


def test_bfloat16_is_as_close_to_float32_as_in_transformers(hf_folder):
    idx = token_ids(257, 2, 64)
    with torch.no_grad():
        exact = reference(hf_folder(), torch.float32)(idx).logits
        theirs = reference(hf_folder(), torch.bfloat16)(idx).logits.float()
        ours = GPT2.from_pretrained(hf_folder(), dtype=torch.bfloat16)(idx).float()
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


@pytest.mark.slow
def test_the_124m_model_is_that_of_transformers(hf_folder):
    assert logit_difference(hf_folder(**GPT2_124M), torch.float32) <= 2e-5


def naive_logits(weights, tokens, n_head):
    """GPT-2 from the file's tensors, position by position and head by head: (T,) ids -> (T, V)."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(q, k, v):
        y, size = np.zeros_like(q), q.shape[1] // n_head
        for t in range(len(tokens)):
            for part in (slice(h * size, (h + 1) * size) for h in range(n_head)):
                score = [math.exp(q[t, part] @ k[s, part] / size**0.5) for s in range(t + 1)]
                for s in range(t + 1):
                    y[t, part] += score[s] / sum(score) * v[s, part]
        return y

    x = weights["wte.weight"][tokens] + weights["wpe.weight"][: len(tokens)]
    for i in range(sum(name.endswith("ln_1.weight") for name in weights)):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        x = x + linear(attention(*np.split(qkv, 3, axis=1)), f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = u / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


def test_logits_are_those_of_a_naive_gpt2_in_loops(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    weights = {name: value.numpy() for name, value in tensors_of(tmp_path).items()}
    idx = token_ids(31, 2, 11)
    with torch.no_grad():
        logits = model(idx)
    for row, tokens in zip(logits, idx.tolist()):
        expected = torch.from_numpy(naive_logits(weights, tokens, n_head=3))
        torch.testing.assert_close(row, expected, atol=1e-12, rtol=0)


def test_forward_is_head_of_hidden():
    model, idx = model_of(), token_ids(31, 2, 11)
    hidden = model.hidden(idx)
    assert hidden.shape == (2, 11, 15)
    assert torch.equal(model(idx), model.head(hidden))
    last = model.head(hidden[:, -1])
    torch.testing.assert_close(model(idx)[:, -1], last, atol=1e-12, rtol=0)


def test_later_tokens_change_nothing_before_them():
    model, idx = model_of(), token_ids(31, 2, 11)
    other = torch.cat([idx[:, :7], (idx[:, 7:] + 1) % 31], dim=1)
    assert torch.equal(model(idx)[:, :7], model(other)[:, :7])
    assert not torch.equal(model(idx)[:, 7], model(other)[:, 7])


def test_rows_of_a_batch_do_not_see_each_other():
    model, idx = model_of(), token_ids(31, 3, 11)
    for b in range(3):
        torch.testing.assert_close(model(idx)[b], model(idx[b : b + 1])[0], atol=1e-12, rtol=0)


def test_the_window_is_full_at_block_size_and_no_longer():
    model = model_of()
    assert model(token_ids(31, 1, 13)).shape == (1, 13, 31)
    with pytest.raises(InputError, match=r"^14 tokens were given, the model has 13 positions$"):
        model(token_ids(31, 1, 14))


def every_kind_of_forward_pass(model):
    """Hidden states without a cache, of documents kept apart, and with a cache: prefilled with
    padding, and then one and several tokens after rows of different length and of equal length.
    """
    idx, documents = token_ids(31, 3, 13), torch.tensor([[0] * 5 + [1] * 8] * 3)
    yield model.hidden(idx)
    yield model.hidden(idx[:, :1])
    yield model.hidden(idx, documents=documents)
    for lengths in ([2, 7, 5], [7, 7, 7]):
        cache = model.make_cache(3)
        prefilled = model.hidden(idx[:, :7], cache)  # beyond its length, a row's ids are padding
        yield from (row[:length] for row, length in zip(prefilled, lengths))
        cache.truncate(lengths)
        yield model.hidden(idx[:, 7:8], cache)
        yield model.hidden(idx[:, 8:12], cache)


CONFIGS_OF_ATTENTION = [
    {},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
]


@pytest.mark.parametrize("values", CONFIGS_OF_ATTENTION, ids=named)
def test_fused_attention_is_the_plain_one_with_and_without_a_cache(monkeypatch, values):
    model = model_of(dataclasses.replace(PRIMES, **values))
    with torch.no_grad():
        fused = [*every_kind_of_forward_pass(model)]
        called = []

        def plain(self, *parts):
            called.append(self)
            return self.plain_attention(*parts)

        monkeypatch.setattr(CausalSelfAttention, "softmax_attention", plain)
        found = [*every_kind_of_forward_pass(model)]
    assert len(called) == 9 * 2
    for a, b in zip(found, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_and_dropout_of_fused_attention_are_those_of_the_plain_one():
    config = dataclasses.replace(PRIMES, attn_pdrop=0.3)
    attention = CausalSelfAttention(config, layer_index=0).double().train()
    generator, found = torch.Generator().manual_seed(0), []
    parts = torch.randn(3, 2, 3, 7, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, 3, 7, 5, dtype=torch.float64, generator=generator)
    parts.requires_grad_(True)
    for attend in (attention.softmax_attention, attention.plain_attention):
        torch.manual_seed(3)  # the same weights are dropped
        y = attend(*parts, None)
        found.append((y, *torch.autograd.grad((y * weight).sum(), [parts])))
    for fused, plain in zip(*found):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-12)
    assert not torch.equal(found[0][0], attention.eval().plain_attention(*parts, None))


@pytest.mark.parametrize("name", ["softmax_attention", "plain_attention"])
def test_large_float16_queries_and_keys_do_not_overflow(name):
    # 64 * 40 * 40 is beyond float16: they must be scaled before they are multiplied
    attention = CausalSelfAttention(GPT2Config(n_embd=64, n_head=1), layer_index=0).eval()
    q = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)
    v = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float16)[:, None].expand(1, 1, 3, 64)
    y = getattr(attention, name)(q, q, v, None)
    assert y[0, 0, :, 0].tolist() == [1.0, 1.5, 3.0]


def test_upcast_attention_computes_in_float32_and_returns_the_models_dtype():
    config = GPT2Config(n_embd=64, n_head=1, reorder_and_upcast_attn=True)
    q, k, v = torch.randn(3, 1, 1, 7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = CausalSelfAttention(config, layer_index=0).eval().attend(q, k, v, None)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert torch.equal(y, exact.bfloat16())
    assert not torch.equal(y, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_attention_stays_in_float32_under_autocast(dtype):
    config = GPT2Config(n_embd=64, n_head=1, reorder_and_upcast_attn=True)
    q, k, v = torch.randn(3, 1, 1, 7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = CausalSelfAttention(config, layer_index=0).eval().attend(q, k, v, None)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert torch.equal(y, exact.to(dtype))


def test_under_autocast_a_model_that_upcasts_computes_otherwise_than_one_that_does_not():
    logits = []
    for upcast in (False, True):
        config = dataclasses.replace(PRIMES, reorder_and_upcast_attn=upcast)
        model = GPT2(config, generator=torch.Generator().manual_seed(5)).eval()
        randomise(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits.append(model(token_ids(31, 2, 13)))
    assert not torch.equal(*logits)


def test_the_same_model_is_built_from_the_same_generator_state():
    models = [GPT2(PRIMES, generator=torch.Generator().manual_seed(n)) for n in (5, 5, 6)]
    first, same, other = (list(model.parameters()) for model in models)
    assert all(map(torch.equal, first, same))
    assert not any(torch.equal(a, b) for a, b in zip(first, other) if a.dim() == 2)


def test_the_start_is_that_of_gpt2():
    config = GPT2Config(vocab_size=257, block_size=64, n_embd=128, n_layer=3, n_head=4)
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    model = GPT2(untied, generator=torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            expected = torch.zeros if name.endswith("bias") else torch.ones
            assert torch.equal(parameter, expected(parameter.shape)), name
            continue
        std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert parameter.mean().abs() < 4 * std / math.sqrt(parameter.numel()), name


def test_the_start_has_the_width_that_the_config_names():
    config = dataclasses.replace(PRIMES, initializer_range=0.5, n_embd=120)
    model = GPT2(config, generator=torch.Generator().manual_seed(1))
    assert model.wte.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_dropout_sleeps_in_evaluation_and_wakes_in_training():
    model, idx = GPT2(dataclasses.replace(PRIMES, initializer_range=0.4)), token_ids(31, 2, 11)
    model.eval()
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.allclose(model(idx), model(idx), atol=1e-3)


@pytest.mark.parametrize("name", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_of_the_config_acts_in_training(name):
    off = dataclasses.replace(PRIMES, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    model, idx = model_of(off), token_ids(31, 2, 11)
    quiet = model(idx)
    assert torch.equal(model.train()(idx), quiet)
    loud = model_of(dataclasses.replace(off, **{name: 0.5})).train()
    assert (loud(idx) - quiet).abs().max() > 1e-3


def test_set_dropout_reaches_every_dropout():
    model, idx = model_of().train(), token_ids(31, 2, 11)
    model.set_dropout(0.0)
    assert torch.equal(model(idx), model(idx))
    model.set_dropout(0.25)
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    rates += [m.attn_pdrop for m in model.modules() if isinstance(m, CausalSelfAttention)]
    config = model.config
    assert {*rates, config.embd_pdrop, config.attn_pdrop, config.resid_pdrop} == {0.25}
    assert len(rates) == 1 + 3 * config.n_layer


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_mode_restores_the_mode_also_after_an_error(training):
    model = model_of().train(training)
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training is training
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert all(module.training is training for module in model.modules())


def test_evaluation_mode_gives_every_module_its_own_mode_back():
    model = model_of(PRIMES).train()
    model.h[1].eval()
    modes = [module.training for module in model.modules()]
    mode = evaluation_mode(model)
    for _ in range(2):  # entered again and again
        with mode:
            assert not any(module.training for module in model.modules())
        assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("preset", "n_parameters", "n_tensors"),
    [
        ("gpt2", 124_439_808, 148),
        ("gpt2-medium", 354_823_168, 292),
        ("gpt2-large", 774_030_080, 436),
        ("gpt2-xl", 1_557_611_200, 580),
    ],
)
def test_the_published_models_have_their_published_sizes(preset, n_parameters, n_tensors):
    with torch.device("meta"):
        model = GPT2(PRESETS[preset])
    shapes = Counter(tuple(parameter.shape) for parameter in model.parameters())
    assert sum(math.prod(shape) * count for shape, count in shapes.items()) == n_parameters
    assert sum(shapes.values()) == n_tensors == len(model.state_dict())


def test_the_head_is_the_token_embedding_wherever_the_model_goes(hf_folder, tmp_path):
    model = GPT2.from_pretrained(hf_folder()).to(torch.float64)
    model.save_pretrained(tmp_path)
    for tied in (model, GPT2.from_pretrained(tmp_path, dtype=torch.float64)):
        assert sum(parameter.numel() for parameter in tied.parameters()) == 620_480
        assert not any("lm_head" in name for name in tied.state_dict())
        hidden = torch.ones(1, 64, dtype=torch.float64)
        with torch.no_grad():
            tied.wte.weight[7] = 2
        assert tied.head(hidden)[0, 7] == 128


def test_a_config_comes_back_from_transformers_names():
    config = GPT2Config(
        vocab_size=31, block_size=13, n_embd=15, n_layer=2, n_head=3, n_inner=17,
        activation_function="relu", embd_pdrop=0.2, attn_pdrop=0.3, resid_pdrop=0.4,
        layer_norm_epsilon=1e-3, initializer_range=0.3, scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True,
        tie_word_embeddings=False,
    )  # fmt: skip
    defaults = GPT2Config()
    for field in dataclasses.fields(GPT2Config):
        assert getattr(config, field.name) != getattr(defaults, field.name)
    values = config.to_hf()
    assert values["n_positions"] == 13 and "block_size" not in values
    assert GPT2Config.from_hf(json.loads(json.dumps(values))) == config


def test_the_presets_are_what_their_names_say():
    assert PRESETS["gpt2"] == GPT2Config()
    assert PRESETS["distilgpt2"] == dataclasses.replace(GPT2Config(), n_layer=6)
    assert {name: config.head_size for name, config in PRESETS.items()} == {
        **dict.fromkeys(PRESETS, 64),
        "nano": 32,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_head": 5}, "n_head is 5, which does not divide n_embd 64"),
        ({"activation_function": "prelu"}, "activation_function is 'prelu', known are gelu_new, "),
        ({"n_layer": 0}, "n_layer is 0, allowed is 1 or more"),
        ({"n_positions": 0}, "n_positions is 0, allowed is 1 or more"),
        ({"n_inner": 0}, "n_inner is 0, allowed is 1 or more"),
        ({"vocab_size": -1}, "vocab_size is -1, allowed is 1 or more"),
        ({"attn_pdrop": 1.0}, "attn_pdrop is 1.0, allowed is from 0 to below 1"),
        ({"embd_pdrop": -0.1}, "embd_pdrop is -0.1, allowed is from 0 to below 1"),
        ({"n_layer": 2.0}, "n_layer is 2.0, expected int"),
        ({"n_layer": True}, "n_layer is True, expected int"),
        ({"n_embd": None}, "n_embd is None, expected int"),
        ({"n_inner": "64"}, "n_inner is '64', expected int | null"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5', expected float"),
        ({"scale_attn_weights": 1}, "scale_attn_weights is 1, expected bool"),
        ({"activation_function": ["gelu"]}, "activation_function is ['gelu'], expected str"),
        ({"add_cross_attention": True}, "add_cross_attention is set, which is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set, which is not"),
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo', supported is 'gpt2'"),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_a_config_that_makes_no_gpt2_is_refused_by_file_and_field(
    hf_folder, tmp_path, values, message
):
    folder = copy_of(hf_folder(), tmp_path / "model", {}, **values)
    with pytest.raises(InputError) as caught:
        GPT2.from_pretrained(folder)
    assert message in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_a_config_without_a_size_is_refused(hf_folder, name):
    values = json.loads((hf_folder() / "config.json").read_text())
    del values[name]
    with pytest.raises(InputError, match=f"^here: {name} is missing"):
        GPT2Config.from_hf(values, where="here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layer": 10**6}, "n_layer is 1000000, allowed is 1 to 1024"),
        ({"n_layer": 1025}, "n_layer is 1025, allowed is 1 to 1024"),
        ({"n_embd": 2**31 - 1, "n_head": 1}, "n_embd is 2147483647, which makes "),
        ({"n_inner": 2**31 - 1}, "n_inner is 2147483647, which makes "),
        ({"block_size": 2**31 - 1}, "block_size is 2147483647, which makes "),
        ({"vocab_size": 2**31 - 1}, "vocab_size is 2147483647, which makes "),
        ({"vocab_size": 10**400}, "vocab_size is 1"),
    ],
)
def test_sizes_that_no_gpt2_has_are_refused_before_anything_is_built(values, message):
    with pytest.raises(InputError, match=f"^{message}"):
        GPT2Config(**values)


def test_the_largest_sizes_that_are_allowed_overflow_nothing():
    width = 2**18  # in one block, 3/4 of all parameters that may be
    with torch.device("meta"):
        for values in ({"n_embd": width, "n_head": width}, {"block_size": 2**30}):
            config = GPT2Config(n_layer=1, vocab_size=width, **values)
            assert 2**39 < config.n_parameters <= MOST_PARAMETERS
            model = GPT2(config)
            assert sum(p.numel() for p in model.parameters()) == config.n_parameters


def test_what_a_config_leaves_out_is_as_in_gpt2():
    sizes = {"vocab_size": 31, "n_positions": 13, "n_embd": 15, "n_layer": 2, "n_head": 3}
    assert GPT2Config.from_hf(sizes) == dataclasses.replace(PRIMES, n_inner=None)


def test_the_weights_are_float32_whatever_the_file_holds(hf_folder, tmp_path):
    exact = GPT2.from_pretrained(hf_folder())
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        tensors = {name: value.to(dtype) for name, value in tensors_of(hf_folder()).items()}
        folder = copy_of(hf_folder(), tmp_path / str(dtype), tensors, dtype=str(dtype)[6:])
        for loaded, wanted in zip(GPT2.from_pretrained(folder).parameters(), exact.parameters()):
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, wanted.to(dtype).float())


def test_a_loaded_model_evaluates_can_be_trained_and_leaves_the_global_generator_alone(hf_folder):
    before = torch.get_rng_state()
    model = GPT2.from_pretrained(str(hf_folder()))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": False}], ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_what_is_loaded_and_what_transformers_opens(
    hf_folder, tmp_path, values, dtype
):
    model = GPT2.from_pretrained(hf_folder(**values), dtype=dtype)
    model.save_pretrained(tmp_path / "run")
    again = GPT2.from_pretrained(tmp_path / "run", dtype=dtype)
    assert again.config == model.config
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs, idx = reference(tmp_path / "run", "auto"), token_ids(257, 2, 64)
    assert theirs.dtype == dtype
    with torch.no_grad():
        tolerance = 1e-4 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(model(idx), theirs(idx).logits, atol=tolerance, rtol=0)
    assert logit_difference(tmp_path / "run") <= TOLERANCE


def test_transformers_opens_a_saved_folder_with_all_its_config(tmp_path):
    config = dataclasses.replace(
        PRIMES, scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=1e-3
    )
    model = model_of(config)
    model.save_pretrained(tmp_path)
    theirs, idx = reference(tmp_path), token_ids(31, 2, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits, atol=TOLERANCE, rtol=0)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (30, 30)
    assert theirs.generation_config.eos_token_id == 30
    for name, value in config.to_hf().items():
        assert getattr(theirs.config, name) == value, name


def test_a_folder_saved_with_a_tokenizer_ends_texts_with_its_token(tmp_path):
    from minigpt2.tokenizer import Tokenizer

    tokenizer = Tokenizer.gpt2(300)
    model = GPT2(dataclasses.replace(PRIMES, vocab_size=304))
    model.save_pretrained(tmp_path, tokenizer)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        assert values["bos_token_id"] == values["eos_token_id"] == tokenizer.eot == 299
    assert Tokenizer.from_folder(tmp_path).encode("sea") == tokenizer.encode("sea")


documents_of_rows = [
    [[0] * 13, [0, 0, 0, 1, 1, 2, 2, 2, 2, 5, 6, 6, 6]],
    [[*range(13)], [7] * 6 + [9] * 7],
]


@pytest.mark.parametrize("documents", documents_of_rows)
@pytest.mark.parametrize("upcast", [False, True])
def test_documents_kept_apart_are_read_as_if_each_stood_alone(documents, upcast):
    model = model_of(dataclasses.replace(PRIMES, reorder_and_upcast_attn=upcast))
    idx = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(2))
    together = model.head(model.hidden(idx, documents=torch.tensor(documents)))
    for row, numbers in enumerate(documents):
        for number in set(numbers):
            places = [at for at, other in enumerate(numbers) if other == number]
            alone = model(idx[row : row + 1, places])
            torch.testing.assert_close(together[row, places], alone[0], rtol=0, atol=1e-12)


def test_one_document_a_row_changes_nothing_and_a_cache_has_no_documents():
    model = model_of()
    idx = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(2))
    apart = model.hidden(idx, documents=torch.zeros_like(idx))
    torch.testing.assert_close(apart, model.hidden(idx), rtol=0, atol=1e-12)
    with pytest.raises(AssertionError):
        model.hidden(idx, model.make_cache(2), torch.zeros_like(idx))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("autocast", [False, True])
def test_documents_are_kept_apart_in_16_bits_too(dtype, atol, autocast):
    model = model_of(dataclasses.replace(PRIMES, tie_word_embeddings=False)).float()
    model = model if autocast else model.to(dtype)
    idx = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 5 + [1] * 8, [0] * 12 + [1]])
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        x = model.hidden(idx, documents=documents)
        alone = torch.cat([model.hidden(idx[:1, :5]), model.hidden(idx[:1, 5:])], 1)
    torch.testing.assert_close(x[:1].float(), alone.float(), rtol=0, atol=atol)
    x[0, 5:].float().sum().backward()
    assert model.wte.weight.grad is not None and model.wte.weight.grad.isfinite().all()
    left_out = [number for number in range(31) if number not in idx[0, 5:]]
    assert model.wte.weight.grad[left_out].eq(0).all()


def test_no_gradient_goes_to_another_document():
    model = model_of()
    idx = torch.arange(13)[None]
    documents = torch.tensor([[0] * 5 + [1] * 8])
    model.head(model.hidden(idx, documents=documents))[0, 5:].sum().backward()
    # the head is tied, so only positions are seen through the embedding of positions
    assert model.wpe.weight.grad is not None
    assert model.wpe.weight.grad[8:].eq(0).all() and model.wpe.weight.grad[7].ne(0).any()
    untied = model_of(dataclasses.replace(PRIMES, tie_word_embeddings=False))
    untied.head(untied.hidden(idx, documents=documents))[0, 5:].sum().backward()
    assert untied.wte.weight.grad is not None
    assert untied.wte.weight.grad[:5].eq(0).all() and untied.wte.weight.grad[5:13].ne(0).any()


# arguments


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (torch.tensor([1, 2]), "idx has the shape (2,), allowed is (B, T), rows of ids: idx[None]"),
        (torch.tensor(1), "idx has the shape (), allowed is (B, T)"),
        (torch.ones(1, 1, 2, dtype=torch.int64), "idx has the shape (1, 1, 2), allowed is (B, T)"),
        (torch.ones(1, 2), "idx is tensor([[1., 1.]]), allowed is an int64 tensor of ids (B, T)"),
        (torch.ones(1, 2, dtype=torch.bool), "allowed is an int64 tensor"),
        (torch.ones(1, 2, dtype=torch.uint8), "allowed is an int64 tensor"),
        ([[1, 2]], "idx is [[1, 2]], allowed is an int64 tensor of ids (B, T)"),
        ("text", "idx is 'text', allowed is an int64 tensor"),
        (torch.tensor([[1, 31]]), "idx holds ids from 1 to 31, the model knows 0 to 30"),
        (torch.tensor([[-1, 3]]), "idx holds ids from -1 to 3, the model knows 0 to 30"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_what_are_no_ids_is_refused(idx, message, cached):
    model = GPT2(PRIMES).eval()
    cache = model.make_cache(1) if cached else None
    for read in (model, model.hidden):
        with pytest.raises(InputError) as caught:
            read(idx, cache)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert cache is None or int(cache.lengths.max()) == 0


def test_ids_of_32_bits_are_ids():
    model, idx = GPT2(PRIMES).eval(), token_ids(31, 2, 5)
    assert torch.equal(model(idx.int()), model(idx))


def test_a_cache_of_another_number_of_rows_is_refused():
    model = GPT2(PRIMES).eval()
    for rows, cached in ((1, 2), (2, 1), (3, 2)):
        with pytest.raises(InputError, match=f"^idx has {rows} rows, the cache has {cached}$"):
            model(token_ids(31, rows, 2), model.make_cache(cached))


@pytest.mark.parametrize("size", [{"batch_size": 0}, {"batch_size": 1.5}, {"capacity": -1},
                                  {"capacity": "3"}], ids=str)  # fmt: skip
def test_a_cache_has_a_whole_number_of_rows_and_tokens(size):
    [(name, value)] = size.items()
    with pytest.raises(InputError, match=f"^{name} is {value!r}, allowed is "):
        GPT2(PRIMES).make_cache(**{"batch_size": 1, **size})


@pytest.mark.parametrize("name", ["float16", "torch.float16", "float64", "bfloat16"])
def test_a_dtype_may_be_given_by_its_name(hf_folder, name):
    dtype = getattr(torch, name.removeprefix("torch."))
    for model in (
        GPT2.from_pretrained(hf_folder(), dtype=name),
        GPT2(PRIMES).to(name),
        GPT2(PRIMES).to(dtype=name),
        GPT2(PRIMES).to("cpu", name),
    ):
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_model_moves_as_any_module_does():
    model = GPT2(PRIMES)
    assert model.to(torch.ones(1, dtype=torch.float64)).wte.weight.dtype == torch.float64
    assert model.half() is model and model.to("meta").wte.weight.is_meta
    with pytest.raises(RuntimeError):
        model.to("nowhere")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float17"}, "dtype is 'float17', allowed is float32, bfloat16, float16 or"),
        ({"dtype": "auto"}, "dtype is 'auto', allowed is"),
        ({"dtype": torch.int8}, "dtype is torch.int8, allowed is float32"),
        ({"dtype": "nn"}, "dtype is 'nn', allowed is float32"),
        ({"dtype": 16}, "dtype is 16, allowed is float32"),
        ({"device": "gpu"}, "device is 'gpu', allowed is auto, cpu, cuda, cuda:N or mps"),
        ({"device": [0]}, "device is [0], allowed is auto, cpu"),
    ],
)
def test_a_dtype_or_device_that_there_is_not_is_refused_before_anything_is_looked_for(
    values, message
):
    with pytest.raises(InputError) as caught:
        GPT2.from_pretrained("/no/such/folder", **values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layer": "3"}, "n_layer is '3', allowed is a whole number"),
        ({"n_layer": 3.0}, "n_layer is 3.0, allowed is a whole number"),
        ({"n_embd": None}, "n_embd is None, allowed is a whole number"),
        ({"embd_pdrop": "0.1"}, "embd_pdrop is '0.1', allowed is a number"),
        ({"activation_function": ["relu"]}, "activation_function is ['relu'], allowed is a text"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, allowed is True or False"),
    ],
)
def test_a_config_of_other_types_is_refused(values, message):
    with pytest.raises(InputError) as caught:
        GPT2Config(**values)
    assert str(caught.value) == message


def test_a_share_of_dropout_is_a_share():
    with pytest.raises(InputError, match=r"^p is 1\.5, allowed is from 0 to below 1$"):
        GPT2(PRIMES).set_dropout(1.5)


def test_a_model_is_exported_with_a_length_that_is_any():
    model = model_of()
    length = torch.export.Dim("length", min=1, max=PRIMES.block_size)
    exported = torch.export.export(model, (token_ids(31, 1, 7),), dynamic_shapes=({1: length},))
    for n_tokens in (1, 5, PRIMES.block_size):
        idx = token_ids(31, 1, n_tokens)
        assert (exported.module()(idx) - model(idx)).abs().max() <= TOLERANCE
