"""Products in C are the plain ones, row by row, whatever the weights are kept as."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from minigpt2.decoding.c_products import CHUNK, FEW, CLinear, c_works
from minigpt2.decoding.int8 import Int8Linear, round_rows
from minigpt2.equivalences import WAYS, difference
from minigpt2.errors import InputError

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
DTYPES = (torch.float32, torch.float16, torch.int8)
# of the last, the inputs of 4 and 8 rows do not fit the nearest cache, and come for several outputs
SHAPES = [(1, 1), (7, 5), (83, 129), (67, 31), (64, 768), (11, 3601)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(5)


def linears(n, k, dtype, *, bias=True):
    """A Linear in C, and its plain twin."""
    weight, bias = torch.randn(n, k), torch.randn(n) if bias else None
    if dtype == torch.int8:
        plain = Int8Linear(*round_rows(weight), bias)
        return CLinear(plain.weight, plain.scale, bias), plain
    weight = weight.to(dtype)
    return CLinear(weight, None, bias), lambda x: F.linear(x, weight.float(), bias)


def needs(dtype):
    if not c_works(dtype):
        pytest.skip(f"{dtype} is not to be had on this machine")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_in_c_is_the_plain_one(shape, dtype, bias):
    needs(dtype)
    fast, plain = linears(*shape, dtype, bias=bias)
    # inputs of int8 are rounded to 16 bits; where one output is all there is, to them alone
    tolerance = WAYS["int8 in C" if dtype == torch.int8 else "float32 in C"].tolerance
    for rows in ((1,), (2,), (1, 1), (3, 1), (3, 2), (7,), (8,), (13,), (FEW + 1,), (CHUNK + 3,)):
        x = torch.randn(*rows, shape[1])
        y = fast(x)
        assert y.shape == (*rows, shape[0])
        assert difference(y, plain(x)) <= tolerance
    strided = torch.randn(shape[1], 2).T
    assert difference(fast(strided), plain(strided)) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(83, 129), (11, 3601)])
def test_a_row_is_the_same_in_any_batch_and_by_any_number_of_threads(shape, dtype, n_threads):
    needs(dtype)
    fast, _ = linears(*shape, dtype)
    x = torch.randn(FEW, shape[1])
    alone = torch.cat([fast(row[None]) for row in x])
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for n_rows in range(1, FEW + 1):
            assert torch.equal(fast(x[:n_rows]), alone[:n_rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_a_matrix_lay_before_makes_no_difference(dtype):
    needs(dtype)
    weight, x = torch.randn(83, 129), torch.randn(2, 129)
    weight, scale = round_rows(weight) if dtype == torch.int8 else (weight.to(dtype), None)
    transposed = weight.T.contiguous().T
    assert torch.equal(CLinear(weight, scale, None)(x), CLinear(transposed, scale, None)(x))


@pytest.mark.parametrize("k", [8192, 20000])
def test_sums_of_many_int8_products_do_not_overflow(k):
    needs(torch.int8)
    weight = torch.full((3, k), 127, dtype=torch.int8)
    y = CLinear(weight, torch.ones(3), None)(torch.ones(2, k))
    assert difference(y, torch.full((2, 3), 127.0 * k)) <= 1e-6


def test_an_input_of_zeros_gives_the_bias():
    needs(torch.int8)
    linear = CLinear(torch.ones(7, 5, dtype=torch.int8), torch.ones(7), torch.arange(7.0))
    assert torch.equal(linear(torch.zeros(2, 5)), torch.arange(7.0).expand(2, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_stays_so(dtype, bad):
    needs(dtype)
    fast, _ = linears(3, 40, dtype)
    for place in (0, 17, 39):
        x = torch.randn(2, 40)
        x[0, place] = bad
        y = fast(x)
        assert not y[0].isfinite().any() and y[1].isfinite().all()


@pytest.mark.parametrize("trouble", ["transposed", "double", "wide input"])
def test_memory_that_the_functions_would_read_wrongly_is_refused(trouble):
    needs(torch.int8)
    (linear, _), x = linears(7, 5, torch.int8), torch.randn(1, 5)
    if trouble == "transposed":
        linear.weight = linear.weight.T.contiguous().T
    elif trouble == "double":
        linear.double()
    else:
        x = x.double()
    with pytest.raises(InputError, match=r"they take contiguous torch.*: load the model anew"):
        linear(x)
