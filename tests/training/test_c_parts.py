"""Blocks that train in C learn what torch's do, and what C does not know stays torch's."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_forward_hook

from minigpt2.decoding import c_library
from minigpt2.equivalences import difference
from minigpt2.evaluation.scorer import Scorer
from minigpt2.lora import add_lora
from minigpt2.model import MLP, CausalSelfAttention
from minigpt2.system.precision import Precision
from minigpt2.training import c_parts
from minigpt2.training.blocks import prepare_blocks
from minigpt2.training.c_functions import Attention, Dropout, dropped
from minigpt2.training.c_parts import CDropout, c_trains, swap_in_c
from tiny_training import FLOAT32, needs_c, tiny_model

pytestmark = needs_c
IDX, TARGETS = torch.randint(300, (2, 3, 17), generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)


# dropout


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 17), (0, 4)])
def test_the_gradient_is_dropped_as_the_numbers_were(shape):
    x = torch.randn(shape).requires_grad_()
    y = CDropout(0.4)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal((grad != 0), (y != 0))
    torch.testing.assert_close(y.detach(), x.detach() * grad)


@pytest.mark.parametrize("module", [CDropout(0.0), CDropout(0.3).eval()])
def test_without_a_rate_or_training_nothing_changes_and_nothing_is_drawn(module):
    x, before = torch.randn(3, 5), torch.get_rng_state()
    assert module(x) is x and torch.equal(torch.get_rng_state(), before)


# attention


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0), (1, 3, 0, 2)], ids=str)
def test_what_attention_is_given_may_lie_in_memory_in_any_order(order):
    q, k, v, grad = torch.randn(4, 3, 2, 190, 7).unbind()
    given, how = [x.requires_grad_() for x in (q, k, v)], Attention(0.3, Dropout(0.2, 5))
    y = c_parts._Attend.apply(q, k, v, how)
    expected = torch.autograd.grad(y, given, grad)
    back = [order.index(i) for i in range(4)]
    turned = [x.detach().permute(order).contiguous().permute(back) for x in (q, k, v, grad)]
    given = [x.requires_grad_() for x in turned[:3]]
    again = c_parts._Attend.apply(*given, how)
    assert torch.equal(again, y)
    for _ in range(3):
        found = torch.autograd.grad(again, given, turned[3], retain_graph=True)
        for a, b in zip(found, expected):
            assert torch.equal(a, b)


# models


def gradients(model, seed=5):
    torch.manual_seed(seed)
    model.zero_grad()
    Scorer(model)(IDX, TARGETS).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def in_c(**options):
    model = tiny_model(**options).train()
    swap_in_c(model)
    return model


def test_a_model_without_dropout_has_the_gradients_of_the_plain_one():
    model, expected = in_c(dropout=0.0), gradients(tiny_model(dropout=0.0).train())
    for block in model.h:
        block.attn.forward = block.mlp.forward = None  # both halves are C's
    torch.testing.assert_close(gradients(model), expected, **CLOSE)


def test_a_model_with_dropout_learns_with_other_masks_at_every_seed():
    model = in_c()
    first = gradients(model)
    assert torch.equal(first, gradients(model)) and not torch.equal(first, gradients(model, 6))


def test_blocks_that_are_computed_twice_drop_the_same():
    again = in_c()
    prepare_blocks(again, FLOAT32, (3, 17), compiled=False, recomputed=True)
    assert torch.equal(gradients(in_c()), gradients(again))


def test_tokens_that_a_cache_holds_are_seen_in_training_too():
    model, plain = in_c(dropout=0.0), tiny_model(dropout=0.0).train()
    cache = model.make_cache(3)
    parts = [model(IDX[:, :8], cache), model(IDX[:, 8:9], cache), model(IDX[:, 9:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), plain(IDX), **CLOSE)
    assert in_c().double()(IDX).dtype == torch.float64


def test_an_evaluation_is_the_plain_models():
    with torch.no_grad():
        assert torch.equal(in_c().eval()(IDX), tiny_model().eval()(IDX))


def test_documents_that_are_kept_apart_are_dropped_out_in_parts():
    documents = torch.arange(17).expand(3, -1) // 6
    model = in_c()
    y = model.hidden(IDX, documents=documents)
    assert y.isfinite().all()
    changed = IDX.clone()
    changed[:, 0] = 3
    torch.manual_seed(11)
    first = model.hidden(IDX, documents=documents)
    torch.manual_seed(11)
    assert torch.equal(model.hidden(changed, documents=documents)[:, 6:], first[:, 6:])


@pytest.mark.parametrize(
    "name", ["ln_1", "attn", "attn.c_attn", "attn.resid_dropout", "ln_2", "mlp", "mlp.c_proj"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])  # with the same masks
def test_whoever_watches_a_part_of_a_block_sees_what_it_gives(name, dropout):
    model, seen = in_c(dropout=dropout), []
    expected = gradients(model)
    part = model.h[1].get_submodule(name)
    part.register_forward_hook(lambda *call: seen.append(call[2]))
    part.register_full_backward_hook(lambda *call: seen.append(call[2][0]))
    torch.testing.assert_close(gradients(model), expected, **CLOSE)
    assert [x.shape[:2] for x in seen] == [(3, 17)] * 2


def test_whoever_watches_all_modules_sees_what_they_give():
    model, seen = in_c(), []
    expected = gradients(model)
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        torch.testing.assert_close(gradients(model), expected, **CLOSE)
    finally:
        hook.remove()
    assert seen.count(MLP) == seen.count(CausalSelfAttention) == 2


def test_what_a_block_gives_may_be_changed_in_place():
    models = [in_c(dropout=0.0), tiny_model(dropout=0.0).train()]
    for model in models:
        model.h[0].register_forward_hook(lambda module, given, y: y.add_(0.3))
    assert difference(*map(gradients, models)) < 1e-5


def test_a_copy_of_a_model_learns_by_itself():
    model = in_c(dropout=0.0)
    expected = gradients(model)
    model.zero_grad()
    torch.testing.assert_close(gradients(copy.deepcopy(model)), expected, **CLOSE)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_is_swapped_in_evaluation_mode_stays_in_it():
    model = tiny_model().eval()
    swap_in_c(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("every", [2, 3, 5])
@pytest.mark.parametrize("first", [0, 1])
def test_weights_that_are_frozen_get_no_gradient_and_the_others_theirs(every, first):
    model, plain = in_c(dropout=0.0), tiny_model(dropout=0.0).train()
    gradients(plain)
    names = [name for name, _ in model.named_parameters()]
    trained = {*names[first::every]} - ({"wpe.weight", "wte.weight"} if first else set())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    Scorer(model)(IDX, TARGETS).backward()
    for (name, parameter), one in zip(model.named_parameters(), plain.parameters()):
        if name in trained:
            torch.testing.assert_close(parameter.grad, one.grad, **CLOSE)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize(
    ("n_rows", "n_tokens", "n_head", "n_embd", "n_inner"),
    [
        (1, 1, 1, 3, 7),
        (3, 1, 2, 14, 97),
        (1, 17, 1, 37, 16),
        (2, 33, 5, 85, 128),
        (5, 16, 2, 32, 64),
    ],
)
def test_a_block_of_any_shape_learns_what_torchs_does(n_rows, n_tokens, n_head, n_embd, n_inner):
    shape = {"n_head": n_head, "n_embd": n_embd, "n_inner": n_inner, "block_size": 40}
    blocks = [
        model.train().h[0]
        for model in (in_c(dropout=0.0, **shape), tiny_model(dropout=0.0, **shape))
    ]
    x, grad = (
        torch.randn(n_embd, n_tokens, n_rows).permute(2, 1, 0),
        torch.randn(n_embd).expand(n_rows, n_tokens, -1),
    )
    found, expected = ([], [])
    for block, results in zip(blocks, (found, expected)):
        given = x.clone().requires_grad_(), *block.parameters()
        y = block(given[0], None, None)
        for _ in range(2):
            results += torch.autograd.grad(y, given, grad, retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        scale = 1 + b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-5, atol=1e-5)


def test_it_is_found_out_where_nothing_is_learned_and_nothing_is_drawn():
    c_trains.cache_clear()
    before = torch.get_rng_state()
    with torch.no_grad():
        assert c_trains()
    assert torch.equal(torch.get_rng_state(), before)


def test_another_activation_stays_torchs():
    model = in_c(dropout=0.0, activation_function="relu")
    expected = gradients(tiny_model(dropout=0.0, activation_function="relu").train())
    torch.testing.assert_close(gradients(model), expected, **CLOSE)


def test_adapters_and_other_numbers_go_as_before():
    model = tiny_model(dropout=0.0).train()
    add_lora(model, rank=2, alpha=1.0, generator=torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    expected = gradients(model)
    swap_in_c(model)
    torch.testing.assert_close(gradients(model), expected, **CLOSE)
    model, precision = in_c(), Precision(torch.device("cpu"), torch.bfloat16)
    with precision.autocast():
        Scorer(model)(IDX, TARGETS).backward()


def test_without_a_compiler_there_is_no_such_way(monkeypatch, caplog):
    monkeypatch.setattr(c_parts, "training_library", lambda: None)
    c_trains.cache_clear()
    try:
        assert not c_trains()
    finally:
        c_trains.cache_clear()


@pytest.mark.parametrize(
    ("right", "slip"),
    [
        ("CUBIC 0.044715f", "CUBIC 0.05f"),
        ("most[i] + logf(sum[i])", "most[i]"),
        ("(int32_t)(key - lanes.first)", "(int32_t)(key - lanes.first - 1)"),
        ("of_float(grad + at) - sum", "of_float(grad + at)"),
        ("multiply(seen, narrow, QUERIES, dropped", "multiply(first, narrow, QUERIES, dropped"),
        ("total(squares) / size", "total(squares) / (size - 1)"),
        ("mean_g - normal * mean_gx", "mean_g"),
        ("some_of(residual + row * size, k, size)", "0"),
        ("sum += of_float(x", "sum = of_float(x"),
        (
            "tile(UP, WIDE, a, b + j, n_cols, depth, c + j, add)",
            "tile(UP, WIDE, a, b + j, n_cols, depth, c + j, 0)",
        ),
    ],
)
def test_functions_that_compute_something_else_are_not_taken(
    monkeypatch, caplog, tmp_path, right, slip
):
    text, wrong = c_library.TRAINING.read_text(), tmp_path / "train.c"
    assert text.count(right) == 1
    wrong.write_text(text.replace(right, slip))
    monkeypatch.setattr(c_library, "TRAINING", wrong)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    c_library.training_library.cache_clear()
    c_trains.cache_clear()
    try:
        assert not c_trains()
        assert "training in C computes something else on this machine" in caplog.text
    finally:
        c_library.training_library.cache_clear()
        c_trains.cache_clear()


@pytest.mark.parametrize("flags", [["-mno-avx512f", "-mavx2"], ["-march=x86-64"]], ids=str)
def test_smaller_vectors_compute_the_same(flags, monkeypatch, tmp_path):
    if c_library.platform.machine() != "x86_64":
        pytest.skip("these are flags for x86-64")
    given = torch.ones(3, 5000), Dropout(0.3, 7)
    expected = gradients(in_c()), dropped(*given)
    monkeypatch.setattr(c_library, "FLAGS", [*c_library.FLAGS, *flags])
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    c_library.training_library.cache_clear()
    try:
        torch.testing.assert_close(gradients(in_c()), expected[0], **CLOSE)  # masks and all
        assert torch.equal(dropped(*given), expected[1])
    finally:
        c_library.training_library.cache_clear()
