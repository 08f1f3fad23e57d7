"""The C functions are built once, for this user alone, and their absence changes nothing."""

import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from minigpt2.decoding import c_library
from minigpt2.decoding.c_library import library, training_library
from minigpt2.decoding.c_products import CLinear
from minigpt2.decoding.cpu_layout import pack
from minigpt2.decoding.int8 import quantize
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    # built often here: sooner, and slower code
    monkeypatch.setattr(c_library, "FLAGS", ["-O0", *c_library.FLAGS[1:]])
    for functions in (library, training_library):
        functions.cache_clear()
    yield
    for functions in (library, training_library):
        functions.cache_clear()


def test_no_compiler_of_the_last_years_is_too_old_for_it():
    # GCC 9 of 2019 knows these; Ubuntu 22.04 has 11, to which __builtin_shufflevector is unknown
    files = (c_library.SOURCE, c_library.TRAINING, c_library.SHARED)
    named = set(re.findall(r"__builtin_\w+", "".join(path.read_text() for path in files)))
    assert named == {"__builtin_prefetch", "__builtin_convertvector"}


@pytest.mark.parametrize("compiler", ["gcc-9", "gcc-10", "gcc-11", "gcc-12", "gcc-13", "gcc-14"])
def test_it_is_built_by_every_compiler_that_is_there(compiler, monkeypatch):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv("CC", compiler)
    assert library() is not None and training_library() is not None


def test_building_it_draws_no_random_numbers():
    state = torch.get_rng_state()
    assert library() is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_built_once_and_kept(tmp_path, monkeypatch):
    assert library() is not None
    (path,) = (tmp_path / "cache" / "kernels").iterdir()
    monkeypatch.setattr(c_library, "_compile", lambda *_: pytest.fail("built again"))
    library.cache_clear()
    assert library() is not None
    assert list((tmp_path / "cache" / "kernels").iterdir()) == [path]


def test_what_both_files_include_makes_another_library(tmp_path, monkeypatch):
    library()
    training_library()
    other = tmp_path / "vectors.h"
    other.write_text(c_library.SHARED.read_text() + "/* another */\n")
    monkeypatch.setattr(c_library, "SHARED", other)
    for functions in (library, training_library):
        functions.cache_clear()
        assert functions() is not None
    names = sorted(path.name[:6] for path in (tmp_path / "cache" / "kernels").iterdir())
    assert names == ["decode", "decode", "train-", "train-"]


def test_another_processor_gets_a_library_of_its_own(tmp_path, monkeypatch):
    library()
    monkeypatch.setattr(c_library, "_processor", lambda: "flags: of another machine")
    library.cache_clear()
    library()
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
        wrong.write_text(c_library.SOURCE.read_text().replace("sum *= w->scale[n]", "sum *= 2"))
        monkeypatch.setattr(c_library, "SOURCE", wrong)
        expected = "compute something else"
    model = GPT2(GPT2Config(vocab_size=57, block_size=31, n_embd=34, n_layer=1, n_head=2))
    quantize(model.requires_grad_(False))
    with caplog.at_level(logging.WARNING):
        pack(model, compiled=True)
    (record,) = caplog.records
    assert expected in record.getMessage() and "going on without them" in record.getMessage()
    if trouble != "a wrong result":
        assert not list((tmp_path / "cache" / "kernels").glob("*"))
    assert CLinear not in [type(module) for module in model.modules()]
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
        assert library() is not None
    (right,) = (tmp_path / "elsewhere" / "kernels").iterdir()
    path = tmp_path / "cache" / "kernels" / right.name
    path.parent.mkdir(mode=0o700, parents=True)
    source = tmp_path / "poison.c"
    source.write_text(
        '#include <stdio.h>\n__attribute__((constructor)) void load(void) { fputs("inside", '
        f'fopen("{tmp_path}/ran", "w")); }}\nvoid linear(void) {{}}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "poison.so"], check=True)
    path.write_bytes((tmp_path / "poison.so").read_bytes())
    path.chmod(0o600)
    library.cache_clear()
    return path


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
    assert library() is not None
    assert not (tmp_path / "ran").exists()
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert ("others can write" if trouble is open_to_others else "belongs to") in caplog.text
    if of == "library":  # in a folder that is safe, it is replaced
        library.cache_clear()
        caplog.clear()
        assert library() is not None and not caplog.records
        assert stat.S_IMODE(poisoned.stat().st_mode) == 0o600
    else:
        assert "set MINIGPT2_CACHE to a folder that only you can write to" in caplog.text
        assert not list(Path(tempfile.gettempdir()).glob("minigpt2-*/decode*"))


def test_the_poison_would_have_run(poisoned, tmp_path):
    assert library() is None and (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077], ids=oct)
def test_whatever_the_umask_what_is_kept_is_for_this_user_alone(mask, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "new" / "cache"))
    before = os.umask(mask)
    try:
        assert library() is not None
    finally:
        os.umask(before)
    made = sorted((tmp_path / "new").rglob("*"))
    assert [path.name for path in made][:2] == ["cache", "kernels"] and len(made) == 3
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700, 0o700, 0o600]


def test_a_cache_that_cannot_be_written_is_no_reason_to_go_without(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert library() is not None
    assert "are built for this process alone" in caplog.text and str(tmp_path) in caplog.text


def test_where_no_folder_is_safe_it_is_not_built(tmp_path, monkeypatch, caplog):
    place = tmp_path / "open"
    place.mkdir()
    open_to_others(place)
    monkeypatch.setenv("MINIGPT2_CACHE", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(c_library, "_compile", lambda *_: pytest.fail("built all the same"))
    assert library() is None
    assert f"others can write to {place}: set TMPDIR to another folder" in caplog.text
