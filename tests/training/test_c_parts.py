"""What a training step computes in C is what torch computes, with the masks that were drawn."""

import math

import pytest
import torch
import torch.nn.functional as F

from minigpt2.decoding import c_library
from minigpt2.evaluation.scorer import Scorer
from minigpt2.lora import add_lora
from minigpt2.system.precision import Precision
from minigpt2.training import c_parts
from minigpt2.training.blocks import prepare_blocks
from minigpt2.training.c_parts import CDropout, c_trains, dropped, swap_in_c
from tiny_training import FLOAT32, needs_c, tiny_model

pytestmark = needs_c
IDX, TARGETS = torch.randint(300, (2, 3, 17), generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)


# dropout


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_numbers_are_dropped_at_the_rate_and_the_rest_grows(p):
    count = 1_000_003  # more than threads take at once, and no whole vectors
    y = dropped(torch.ones(count), p, 5)
    kept = y[y != 0]
    error = 5 * math.sqrt(p * (1 - p) / count) + 1e-12
    assert abs(len(kept) / count - (1 - p)) <= error
    assert len(kept) == 0 or torch.allclose(kept, torch.tensor(1 / (1 - p)).float(), rtol=1e-5)
    if 0.01 < p < 0.99:
        # neighbours, and the same places of two stretches, know nothing of each other
        mask = (y != 0).double()
        for step in (1, 16, 4096):
            both = (mask[step:] * mask[:-step]).mean()
            assert abs(both - (1 - p) ** 2) <= error


def test_masks_come_from_the_seed_and_those_of_neighbouring_seeds_have_nothing_in_common():
    x = torch.ones(400_000)
    one, same, other = (dropped(x, 0.5, seed) != 0 for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert abs((one & other).double().mean() - 0.25) < 0.005


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


# the MLP


@pytest.mark.parametrize("n_tokens", [1, 3, 700])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_mlp_and_its_gradients_are_torchs(n_tokens, size):
    shapes = (n_tokens, 5), (23, 5), (23,), (5, 23), (5,)
    given = [(size * torch.randn(shape)).requires_grad_() for shape in shapes]
    x, w_fc, b_fc, w_proj, b_proj = given
    ours = c_parts._MLP.apply(*given)
    plain = F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)
    grad = torch.randn_like(plain)
    for a, b in zip(*([y, *torch.autograd.grad(y, given, grad)] for y in (ours, plain))):
        scale = b.detach().abs().max()
        torch.testing.assert_close(a / scale, b / scale, **CLOSE)


@pytest.mark.parametrize("size", [10.0, 21.0, 1e4, 1e14, 1e30])
def test_the_slope_of_gelu_far_from_zero_is_that_of_a_line(size):
    one = torch.ones(1, 1)
    for x, slope in ((size, 1.0), (-size, 0.0)):
        x = torch.full((1, 1), x, requires_grad=True)
        y = c_parts._MLP.apply(x, one, torch.zeros(1), one, torch.zeros(1))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.item() == pytest.approx(slope, abs=1e-6)


def test_what_is_no_number_stays_so():
    given = [torch.randn(s) for s in ((3, 5), (23, 5), (23,), (5, 23), (5,))]
    given[0][1, 2] = math.nan
    y = c_parts._MLP.apply(*given)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


# attention


def mask_of(shape, p, seed):
    """The factors of attention's probabilities, found by values that are unit vectors and scores
    that are all the same.
    """
    n_rows, n_head, n_tokens, _ = shape
    zeros = torch.zeros(n_rows, n_head, n_tokens, n_tokens)
    units = torch.eye(n_tokens).expand_as(zeros)
    return c_parts._Attention.apply(zeros, zeros, units, 1.0, p, seed) * torch.arange(
        1, n_tokens + 1
    ).view(-1, 1)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 5), (3, 2, 7, 5), (5, 2, 128, 3), (3, 2, 271, 5), (1, 3, 97, 37)], ids=str
)
@pytest.mark.parametrize("p", [0.0, 1e-12, 0.3])
def test_attention_and_its_gradients_are_torchs_with_the_masks(shape, p):
    n_tokens, scale, seed = shape[2], 0.3, 2**62 - 1
    given = [torch.randn(shape).requires_grad_() for _ in range(3)]
    q, k, v = given
    factors = mask_of(shape, p, seed)
    visible = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    share = (factors[:, :, visible] != 0).double().mean()
    assert abs(share - (1 - p)) < 5 * math.sqrt(p / factors.numel()) + 0.05
    found = c_parts._Attention.apply(q, k, v, scale, p, seed)
    scores = (q * scale @ k.transpose(2, 3)).masked_fill(~visible, -math.inf)
    expected = scores.softmax(-1) * factors @ v
    grad = torch.randn(shape)
    for a, b in zip(*([y, *torch.autograd.grad(y, given, grad)] for y in (found, expected))):
        torch.testing.assert_close(a, b, **CLOSE)


def test_attention_is_the_same_with_any_number_of_threads_and_strides():
    q, k, v = torch.randn(3, 2, 19, 3, 7).unbind()  # (B, T, H, D)
    expected = c_parts._Attention.apply(*(x.transpose(1, 2) for x in (q, k, v)), 0.3, 0.2, 5)
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            whole = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            turned = (x.permute(0, 2, 3, 1).contiguous().transpose(2, 3) for x in (q, k, v))
            for found in (whole, turned):
                assert torch.equal(c_parts._Attention.apply(*found, 0.3, 0.2, 5), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0), (1, 3, 0, 2)], ids=str)
def test_a_gradient_may_lie_in_memory_in_any_order(order):
    q, k, v, grad = torch.randn(4, 3, 2, 190, 7).unbind()
    given = [x.requires_grad_() for x in (q, k, v)]
    y = c_parts._Attention.apply(q, k, v, 0.3, 0.2, 5)
    expected = torch.autograd.grad(y, given, grad, retain_graph=True)
    back = [order.index(i) for i in range(4)]
    turned = grad.permute(order).contiguous().permute(back)
    for _ in range(3):
        for a, b in zip(torch.autograd.grad(y, given, turned, retain_graph=True), expected):
            assert torch.equal(a, b)


def test_each_query_of_each_head_has_a_mask_of_its_own():
    shape = (3, 2, 271, 5)
    factors = mask_of(shape, 0.5, 3)[:, :, :, :40]  # keys that all later queries see
    rows = factors[:, :, 40:].flatten(0, 2) != 0
    assert len(rows.unique(dim=0)) == len(rows)


# models


def gradients(model, seed=5):
    torch.manual_seed(seed)
    model.zero_grad()
    Scorer(model)(IDX, TARGETS).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def in_c(**options):
    model = tiny_model(**options).train()
    swap_in_c(model)
    return model


def test_a_model_without_dropout_has_the_gradients_of_the_plain_one():
    torch.testing.assert_close(
        gradients(in_c(dropout=0.0)), gradients(tiny_model(dropout=0.0).train()), **CLOSE
    )


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


def test_whoever_watches_the_linears_of_an_mlp_sees_what_they_give():
    model, seen = in_c(dropout=0.0), {}
    expected = gradients(model)
    for name in ("c_fc", "c_proj"):
        module = model.h[1].mlp.get_submodule(name)
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
    torch.testing.assert_close(gradients(model), expected, **CLOSE)
    mlp = tiny_model(dropout=0.0).h[1].mlp
    torch.testing.assert_close(seen["c_proj"], mlp.c_proj(mlp.act(seen["c_fc"])), **CLOSE)


def test_adapters_and_other_numbers_go_as_before():
    model = tiny_model().train()
    add_lora(model, rank=2, alpha=1.0, generator=torch.Generator().manual_seed(1))
    swap_in_c(model)
    assert "forward" not in vars(model.h[0].mlp)
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
        ("return most + logf(sum)", "return most"),
        ("own = first + i + 1", "own = first + i + 2"),
        ("of_float(grad + k) - sum", "of_float(grad + k)"),
        ("multiply(first + n, narrow, n, dropped", "multiply(first, narrow, n, dropped"),
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
    expected = gradients(in_c(dropout=0.0)), dropped(torch.ones(5000), 0.3, 7)
    monkeypatch.setattr(c_library, "FLAGS", [*c_library.FLAGS, *flags])
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    c_library.training_library.cache_clear()
    try:
        torch.testing.assert_close(gradients(in_c(dropout=0.0)), expected[0], **CLOSE)
        assert torch.equal(dropped(torch.ones(5000), 0.3, 7), expected[1])
    finally:
        c_library.training_library.cache_clear()
