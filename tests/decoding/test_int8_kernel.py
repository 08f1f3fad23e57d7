"""The compiled int8 product equals the plain one, and its absence changes nothing."""

import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from hf_models import randomise, token_ids
from minigpt2.decoding import int8_kernel as kernel
from minigpt2.decoding.cpu_layout import pack
from minigpt2.decoding.int8 import Int8Linear, quantize, round_rows
from minigpt2.decoding.int8_kernel import FEW, FewRows, int8_product
from minigpt2.errors import InputError
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(5)
    int8_product.cache_clear()
    yield
    int8_product.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (83, 129), (64, 768)], ids=str)
def test_the_compiled_product_is_the_plain_one(shape, bias):
    product = int8_product()
    n, k = shape
    linear = Int8Linear(*round_rows(torch.randn(n, k)), torch.randn(n) if bias else None)
    for rows in ((1,), (2,), (1, 1), (2, 1), (3, 2)):
        x = torch.randn(*rows, k)
        y = product(x, linear)
        assert y.shape == (*rows, n)
        assert torch.allclose(y, linear(x), atol=1e-4, rtol=1e-4)
    strided = torch.randn(k, 2).T
    assert torch.allclose(product(strided, linear), linear(strided), atol=1e-4, rtol=1e-4)


def test_the_compiled_product_does_not_depend_on_how_the_matrix_lay_before_it_was_rounded():
    weight, x = torch.randn(129, 83), torch.randn(2, 129)
    product = int8_product()
    transposed, straight = (
        Int8Linear(*round_rows(w), torch.randn(83, generator=torch.Generator().manual_seed(1)))
        for w in (weight.T, weight.T.contiguous())
    )
    assert torch.equal(product(x, transposed), product(x, straight))


@pytest.mark.parametrize("trouble", ["transposed", "half", "wide input"])
def test_memory_that_the_function_would_read_wrongly_is_refused(trouble):
    linear, x = Int8Linear(*round_rows(torch.randn(7, 5)), torch.randn(7)), torch.randn(1, 5)
    if trouble == "transposed":
        linear.weight = linear.weight.T.contiguous().T
    elif trouble == "half":
        linear.half()
    else:
        x = x.double()
    with pytest.raises(InputError, match=r"it takes contiguous torch.*: load the model anew"):
        int8_product()(x, linear)


def test_building_it_draws_no_random_numbers():
    state = torch.get_rng_state()
    assert int8_product() is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_a_number_stays_so():
    linear = Int8Linear(*round_rows(torch.randn(3, 8)), None)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(1, 8)
        x[0, 2] = bad
        assert not int8_product()(x, linear).isfinite().any()


def test_few_rows_go_through_the_function_and_more_through_the_other_module():
    class Many(torch.nn.Module):
        def forward(self, x):
            return torch.full((*x.shape[:-1], 3), -1.0)

    linear = Int8Linear(*round_rows(torch.randn(3, 8)), None)
    module = FewRows(linear, int8_product(), Many())
    for rows, few in ((1, True), (FEW, True), (FEW + 1, False)):
        y = module(torch.randn(1, rows, 8))
        assert y.shape == (1, rows, 3) and bool((y != -1).any()) is few


def test_a_model_says_with_it_what_it_says_without():
    models = []
    for compiled in (False, True):
        model = GPT2(GPT2Config(vocab_size=257, block_size=31, n_embd=34, n_layer=3, n_head=2))
        randomise(model, std=0.3)
        quantize(model.requires_grad_(False))
        if compiled:
            pack(model, compiled=True)
        models.append(model)
    fast = models[1]
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(FewRows) == 4 * 3 + 1
    text = token_ids(257, 1, 9)
    caches = [model.make_cache(1) for model in models]
    expected, logits = (model(text, cache) for model, cache in zip(models, caches))
    for token in (3, 250, 17):
        expected, logits = (model(torch.tensor([[token]]), c) for model, c in zip(models, caches))
        assert torch.allclose(logits, expected, atol=2e-3 * float(expected.abs().max()))
    assert len(generate(fast, [[5]], max_new_tokens=60)[0]) == 60


def test_it_is_built_once_and_kept(tmp_path, monkeypatch):
    assert int8_product() is not None
    (library,) = (tmp_path / "cache" / "kernels").iterdir()
    monkeypatch.setattr(kernel, "_compile", lambda *_: pytest.fail("built again"))
    int8_product.cache_clear()
    assert int8_product() is not None
    assert list((tmp_path / "cache" / "kernels").iterdir()) == [library]


def test_another_processor_gets_a_library_of_its_own(tmp_path, monkeypatch):
    int8_product()
    monkeypatch.setattr(kernel, "_processor", lambda: "flags: of another machine")
    int8_product.cache_clear()
    int8_product()
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 2


@pytest.mark.parametrize("trouble", ["no compiler", "a compiler that fails", "a wrong result"])
def test_without_it_a_notice_is_given_and_the_plain_path_stays(
    trouble, tmp_path, monkeypatch, caplog
):
    if trouble == "no compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
        expected = "there is no C compiler"
    elif trouble == "a compiler that fails":
        monkeypatch.setenv("CC", "false")
        expected = "failed"
    else:
        wrong = tmp_path / "wrong.c"
        wrong.write_text(kernel.SOURCE.read_text().replace("sum * scale[n]", "sum"))
        monkeypatch.setattr(kernel, "SOURCE", wrong)
        expected = "computes something else"
    with caplog.at_level(logging.WARNING):
        assert int8_product() is None
    (record,) = caplog.records
    assert expected in record.getMessage() and "going on without it" in record.getMessage()
    if trouble != "a wrong result":
        assert not list((tmp_path / "cache" / "kernels").glob("*"))
    model = GPT2(GPT2Config(vocab_size=57, block_size=31, n_embd=34, n_layer=1, n_head=2))
    quantize(model.requires_grad_(False))
    pack(model, compiled=True)
    assert FewRows not in [type(module) for module in model.modules()]
    assert len(generate(model, [[5]], max_new_tokens=3)[0]) == 3


def open_to_others(path):
    path.chmod(path.stat().st_mode | 0o022)


def of_somebody_else(path):
    os.chown(path, 1234, 1234)


def reached_by_their_link(path):
    """Only the link is theirs; what it leads to is ours."""
    path.rename(path.with_name("aside"))
    path.symlink_to(path.with_name("aside"))
    os.chown(path, 1234, 1234, follow_symlinks=False)


as_root = pytest.mark.skipif(
    os.name == "nt" or os.geteuid() != 0, reason="only root can give files to somebody else"
)


@pytest.fixture
def poisoned(tmp_path, monkeypatch):
    """A library of the right name that somebody left in the cache: it leaves a file when loaded."""
    with monkeypatch.context() as elsewhere:  # a name that was loaded is not loaded again
        elsewhere.setenv("MINIGPT2_CACHE", str(tmp_path / "elsewhere"))
        assert int8_product() is not None
    (right,) = (tmp_path / "elsewhere" / "kernels").iterdir()
    library = tmp_path / "cache" / "kernels" / right.name
    library.parent.mkdir(mode=0o700, parents=True)
    source = tmp_path / "poison.c"
    source.write_text(
        '#include <stdio.h>\n__attribute__((constructor)) void load(void) { fputs("inside", '
        f'fopen("{tmp_path}/ran", "w")); }}\nvoid int8_rows(void) {{}}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "poison.so"], check=True)
    library.write_bytes((tmp_path / "poison.so").read_bytes())
    library.chmod(0o600)
    int8_product.cache_clear()
    return library


@pytest.mark.parametrize("of", ["library", "folder", "folder above"])
@pytest.mark.parametrize(
    "trouble",
    [
        open_to_others,
        pytest.param(of_somebody_else, marks=as_root),
        pytest.param(reached_by_their_link, marks=as_root),
    ],
)
def test_what_others_could_have_put_there_is_not_loaded(trouble, of, poisoned, tmp_path, caplog):
    path = {"library": poisoned, "folder": poisoned.parent, "folder above": tmp_path / "cache"}[of]
    trouble(path)
    assert int8_product() is not None
    assert not (tmp_path / "ran").exists()
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert ("others can write" if trouble is open_to_others else "belongs to") in caplog.text
    if of == "library":  # in a folder that is safe, it is replaced
        int8_product.cache_clear()
        caplog.clear()
        assert int8_product() is not None and not caplog.records
        assert stat.S_IMODE(poisoned.stat().st_mode) == 0o600
    else:
        assert "set MINIGPT2_CACHE to a folder that only you can write to" in caplog.text
        assert not list(Path(tempfile.gettempdir()).glob("minigpt2-*/int8*"))


def test_the_poison_would_have_run(poisoned, tmp_path):
    assert int8_product() is None and (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077], ids=oct)
def test_whatever_the_umask_what_is_kept_is_for_this_user_alone(mask, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "new" / "cache"))
    before = os.umask(mask)
    try:
        assert int8_product() is not None
    finally:
        os.umask(before)
    made = sorted((tmp_path / "new").rglob("*"))
    assert [path.name for path in made][:2] == ["cache", "kernels"] and len(made) == 3
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700, 0o700, 0o600]


def test_a_cache_that_cannot_be_written_is_no_reason_to_go_without(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert int8_product() is not None
    assert "is built for this process alone" in caplog.text and str(tmp_path) in caplog.text


def test_where_no_folder_is_safe_it_is_not_built(tmp_path, monkeypatch, caplog):
    place = tmp_path / "open"
    place.mkdir()
    open_to_others(place)
    monkeypatch.setenv("MINIGPT2_CACHE", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(kernel, "_compile", lambda *_: pytest.fail("built all the same"))
    assert int8_product() is None
    assert f"others can write to {place}: set TMPDIR to another folder" in caplog.text
