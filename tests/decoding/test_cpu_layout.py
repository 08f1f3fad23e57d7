"""What is laid out for speed computes what it did before."""

import copy
from typing import get_args

import pytest
import torch
import torch.nn as nn

from hf_models import randomise
from minigpt2.arguments import CpuRoutine
from minigpt2.decoding import cpu_layout as packed
from minigpt2.decoding.cpu_layout import (
    FEW,
    ROUTINES,
    LinearByRows,
    PackedInt8Linear,
    PackedLinear,
    PlainLinear,
    SlicedLinear,
    pack,
    works,
)
from minigpt2.decoding.int8 import Int8Linear, probe, quantize, round_rows
from minigpt2.decoding.routines import Routine
from minigpt2.equivalences import ways_of
from minigpt2.errors import InputError
from minigpt2.generate import generate
from minigpt2.lora import add_lora
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(11)


SHAPE = {"vocab_size": 257, "block_size": 31, "n_embd": 34, "n_layer": 3, "n_head": 2}
GREEDY = SamplingConfig(temperature=0)


def random_model(**values):
    model = GPT2(GPT2Config(**{**SHAPE, **values})).eval()
    randomise(model, std=0.3)
    return model.requires_grad_(False)


def needs(kind, plain, way):
    return pytest.mark.skipif(
        not works(kind, plain, way), reason=f"this torch or processor has no {kind.__name__}"
    )


PLAIN, ROUNDED = nn.Linear(2, 3), Int8Linear(*round_rows(torch.ones(3, 2)), None)


def for_probe(linear):
    """The same kind of module with the numbers of the self-check."""
    weight, bias, _ = probe()
    if isinstance(linear, Int8Linear):
        return Int8Linear(*round_rows(weight), bias)
    plain = nn.Linear(131, 67).requires_grad_(False)
    plain.weight, plain.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return plain


has_float32 = needs(PackedLinear, for_probe(PLAIN), "packed float32")
has_int8 = needs(PackedInt8Linear, for_probe(ROUNDED), "packed int8")


every_routine = pytest.mark.parametrize(
    "routine",
    [pytest.param(r, marks=has_float32 if r.name == "packed" else ()) for r in ROUTINES],
    ids=[r.name for r in ROUTINES],
)


@every_routine
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (2,), (13,), (2, 7), (3, 1), (FEW + 1,)], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (64, 48), (257, 34), (3, 5)], ids=str)
def test_a_product_of_every_routine_is_the_plain_one(routine, shape, rows, bias):
    n, k = shape
    linear = nn.Linear(k, n, bias=bias).requires_grad_(False)
    transposed = copy.deepcopy(linear)
    transposed.weight.data = linear.weight.data.T.contiguous().T  # as it lies in a file
    x = torch.randn(*rows, k)
    for kind in (linear, transposed):
        y = routine.make(kind)(x)
        assert y.shape == (*rows, n) and y.is_contiguous()
        assert torch.allclose(y, linear(x), atol=1e-5, rtol=1e-5)


def test_the_routines_that_a_user_can_name_are_those_there_are():
    assert get_args(CpuRoutine) == ("auto", *(routine.name for routine in ROUTINES), "by-rows")


@pytest.mark.parametrize(
    "routine", [r for r in ROUTINES if r.name != "packed"], ids=lambda r: r.name
)
def test_a_routine_that_reads_rows_as_they_lie_copies_nothing(routine):
    model = random_model()
    table = model.wte.weight
    pack(model, cpu_routine=routine.name)
    assert model.lm_head.weight.data_ptr() == table.data_ptr()
    linear = random_model().h[0].mlp.c_fc
    assert routine.make(linear).weight.data_ptr() == linear.weight.data_ptr()


@has_float32
def test_rows_of_a_packed_product_do_not_depend_on_the_others():
    linear, x = nn.Linear(768, 96).requires_grad_(False), torch.randn(64, 768)
    product = PackedLinear(linear)
    whole = product(x)
    for n in (2, 3, 5, 8, 17):
        assert torch.equal(product(x[:n]), whole[:n])


@has_float32
def test_each_number_of_rows_has_the_product_of_its_own_routine():
    linear = nn.Linear(768, 96).requires_grad_(False)
    plain, packed_one, _ = (routine.make(linear) for routine in ROUTINES)
    rows = torch.randn(9, 768)
    for one, some in ((plain, packed_one), (packed_one, plain)):
        choice = tuple(ROUTINES[kind is packed_one] for kind in (one, some))
        head, of_block = LinearByRows(linear, choice, 8), LinearByRows(linear, choice, 0)
        for x, expected in ((rows[:1], one), (rows[:8], some), (rows, plain)):
            assert torch.equal(head(x), expected(x)) and torch.equal(of_block(x), plain(x))
        assert torch.equal(of_block.for_rows(1)(rows[:1]), one(rows[:1]))
        assert torch.equal(of_block.for_rows(2)(rows[:2]), some(rows[:2]))


@has_int8
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3)], ids=str)
def test_the_packed_int8_product_is_off_by_its_stated_digits_at_most(rows, bias, size):
    weight = torch.randn(83, 129)
    linear = Int8Linear(*round_rows(weight), torch.randn(83) * size if bias else None)
    x = torch.randn(*rows, 129) * size
    x[..., 3] *= 100  # one large value spoils the step of its row only
    exact = x.double() @ (linear.weight.double() * linear.scale.double()[:, None]).T
    if linear.bias is not None:
        exact = exact + linear.bias
    y = PackedInt8Linear(linear)(x)
    assert y.shape == (*rows, 83)
    step = x.abs().amax(-1, keepdim=True).double() / 63
    bound = step / 252 * (linear.weight.double().abs().sum(1) * linear.scale)
    assert ((y - exact).abs() <= bound + 1e-5 * exact.abs().max()).all()
    assert (linear(x) - exact).abs().max() <= 1e-5 * exact.abs().max()


@has_int8
def test_no_sum_of_int8_products_saturates():
    # the largest digits against the largest weights: 16 bits would not hold two unsigned products
    linear = Int8Linear(torch.full((3, 4096), 127, dtype=torch.int8), torch.ones(3), None)
    x = torch.full((2, 4096), 63.0)
    assert torch.equal(PackedInt8Linear(linear)(x), torch.full((2, 3), 63.0 * 127 * 4096))


@has_int8
def test_a_row_of_zeros_gives_the_bias():
    linear = Int8Linear(*round_rows(torch.randn(7, 5)), torch.arange(7.0))
    assert torch.equal(PackedInt8Linear(linear)(torch.zeros(2, 5)), torch.arange(7.0).expand(2, 7))


@has_int8
def test_rows_of_a_packed_int8_product_do_not_depend_on_the_others():
    product = PackedInt8Linear(Int8Linear(*round_rows(torch.randn(96, 768)), torch.randn(96)))
    x = torch.randn(64, 768)
    whole = product(x)
    for n in (1, 2, 3, 5, 8, 17):
        assert torch.equal(product(x[:n]), whole[:n])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("routine", ["int8", "auto", "by-rows", *(r.name for r in ROUTINES)])
def test_a_packed_model_says_what_the_plain_one_says(tied, routine):
    model = random_model(tie_word_embeddings=tied)
    rounded = routine == "int8"
    if rounded:
        quantize(model)
    plain = copy.deepcopy(model)
    pack(model, cpu_routine="auto" if rounded else routine)
    idx = torch.randint(257, (3, 31))
    scale = plain(idx).abs().max()
    assert torch.allclose(model(idx), plain(idx), atol=(2e-3 if rounded else 1e-5) * float(scale))
    rows = [idx[0, :5].tolist(), idx[1, :11].tolist(), idx[2, :1].tolist()]
    if not rounded:
        expected = generate(plain, rows, max_new_tokens=70, sampling=GREEDY)
        assert generate(model, rows, max_new_tokens=70, sampling=GREEDY) == expected


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0.9, top_p=0.9)], ids=str)
@every_routine
def test_a_row_of_a_packed_batch_is_what_it_is_alone(routine, sampling):
    model = random_model()
    pack(model, cpu_routine=routine.name)
    rows = [torch.randint(257, (n,)).tolist() for n in (5, 1, 13, 8)]
    options = {"max_new_tokens": 40, "sampling": sampling, "seed": 5}
    together = generate(model, rows, **options)
    for row in range(4):
        others = [[0]] * row  # row r draws from stream r
        assert generate(model, [*others, rows[row]], **options)[row] == together[row]


@has_float32
@has_int8
def test_everything_is_packed():
    kinds_of = {
        "plain": PlainLinear,
        "packed": PackedLinear,
        "slices": SlicedLinear,
        "by-rows": LinearByRows,
        "int8": PackedInt8Linear,
    }
    for name, expected in kinds_of.items():
        model = random_model()
        if name == "int8":
            quantize(model)
        pack(model, cpu_routine="auto" if name == "int8" else name)
        kinds = [type(module) for module in model.modules()]
        assert nn.Linear not in kinds and Int8Linear not in kinds
        assert kinds.count(expected) == 4 * 3 + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_plain(dtype):
    model = random_model().to(dtype)
    pack(model)
    assert nn.Linear in [type(module) for module in model.modules()]


def test_where_the_routines_are_missing_the_plain_path_stays(monkeypatch):
    monkeypatch.setattr(packed, "works", lambda *_: False)
    model = random_model()
    idx = torch.randint(257, (1, 9))
    expected = model(idx)
    pack(model)
    assert torch.equal(model(idx), expected)
    assert set(ways_of(model).values()) == {("plain float32",), ("decode step in torch",)}
    for name in ("packed", "by-rows"):
        with pytest.raises(InputError, match=f"cpu_routine is '{name}', which this torch does not"):
            pack(random_model(), cpu_routine=name)


def test_a_missing_routine_is_noticed():
    class Missing(nn.Module):
        def __init__(self, linear):
            super().__init__()
            torch.ops.mkldnn.no_such_routine(linear.weight)

    assert not works(Missing, for_probe(PLAIN), "packed float32")


def as_if_contiguous(weight):
    """What a routine reads that ignores strides."""
    return torch.as_strided(weight, weight.shape, (weight.shape[1], 1))


class ReadsStridesWrongly(PackedLinear):
    def __init__(self, linear):
        wrong = nn.Linear(2, 3).requires_grad_(False)
        wrong.weight, wrong.bias = nn.Parameter(as_if_contiguous(linear.weight), False), linear.bias
        super().__init__(wrong)


class WrongFromThreeRowsOn(PackedLinear):
    def forward(self, x):
        return super().forward(x) * (1 if x.shape[0] < 3 else 1.001)


@has_float32
@pytest.mark.parametrize("kind", [ReadsStridesWrongly, WrongFromThreeRowsOn])
def test_a_routine_that_computes_something_else_is_not_used_and_told_of(kind, caplog, monkeypatch):
    wrong = Routine("packed", "packed float32", kind)
    monkeypatch.setattr(packed, "ROUTINES", (ROUTINES[0], wrong))
    model = random_model()
    plain = copy.deepcopy(model)
    pack(model)
    idx = torch.randint(257, (3, 9))
    assert torch.equal(model(idx), plain(idx))
    (record,) = caplog.records
    assert record.getMessage().startswith("packed float32 computes something else on this machine")


@has_int8
def test_an_int8_routine_that_computes_something_else_is_not_used(caplog, monkeypatch):
    monkeypatch.setattr(packed, "ZERO_POINT", 10)
    model = random_model()
    quantize(model)
    plain = copy.deepcopy(model)
    pack(model)
    idx = torch.randint(257, (3, 9))
    assert torch.equal(model(idx), plain(idx))
    assert "packed int8 computes something else" in caplog.text


@pytest.mark.parametrize("change", [quantize, pack])
def test_a_model_with_adapters_is_refused_and_stays_as_it_was(change):
    model = random_model()
    add_lora(model, rank=2, alpha=4.0)
    idx = torch.randint(257, (1, 9))
    expected, kinds = model(idx), [type(module) for module in model.modules()]
    with pytest.raises(InputError, match="has LoRA adapters: fold them"):
        change(model)
    assert torch.equal(model(idx), expected)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", ["fastest", "", None, "Plain"])
def test_a_routine_that_there_is_not_is_refused(name):
    allowed = "allowed is auto, plain, packed, slices"
    with pytest.raises(InputError, match=f"cpu_routine is {name!r}, {allowed}"):
        pack(random_model(), cpu_routine=name)


def test_packing_leaves_torchs_settings_alone():
    engine = torch.backends.quantized.engine
    model = random_model()
    quantize(model)
    pack(model)
    assert torch.backends.quantized.engine == engine
