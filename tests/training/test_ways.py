"""How a step is computed is chosen once, and kept by a run that goes on."""

import pytest
import torch

from minigpt2.system.precision import Precision
from minigpt2.training import c_parts, ways
from minigpt2.training.blocks import prepare_blocks
from minigpt2.training.ways import (
    COMPILED,
    IN_C,
    LONG,
    PLAIN,
    QUICK_DROPOUT,
    SWAPS,
    choose_way,
    go,
    way_of_step,
)
from tiny_training import FLOAT32, needs_c, tiny_model

BFLOAT16 = Precision(torch.device("cpu"), torch.bfloat16)
ON_CUDA = Precision(torch.device("cuda"), torch.bfloat16)
LONGER = 2 * LONG


@pytest.fixture(params=[True, False], ids=["with C", "without C"])
def has_c(request, monkeypatch):
    monkeypatch.setattr(c_parts, "c_trains", lambda: request.param)
    monkeypatch.setattr(ways, "find_compiler", lambda: "/usr/bin/cc" if request.param else None)
    return request.param


@pytest.mark.parametrize("compiled", [None, False, True])
@pytest.mark.parametrize("operations", [LONG, LONGER])
def test_a_run_that_begins_takes_the_fastest_way_that_there_is_and_was_not_refused(
    has_c, compiled, operations
):
    asked = {"compiled": compiled, "operations": operations}
    in_c = has_c and (compiled or (compiled is None and operations > LONG))
    assert choose_way(FLOAT32, **asked) == (IN_C if in_c else QUICK_DROPOUT)
    assert choose_way(FLOAT32, sharded=True, **asked) == (COMPILED if compiled else QUICK_DROPOUT)
    assert choose_way(BFLOAT16, **asked) == (COMPILED if compiled else QUICK_DROPOUT)
    assert choose_way(ON_CUDA, **asked) == (COMPILED if compiled else PLAIN)


def test_a_compiler_is_not_missed_where_nobody_asked_for_it(monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert choose_way(FLOAT32, compiled=None, operations=LONGER) == QUICK_DROPOUT
    assert not caplog.text


@pytest.mark.parametrize("compiled", [None, False, True])
def test_a_run_of_a_version_that_had_no_other_way_goes_on_in_torchs(has_c, compiled):
    expected = COMPILED if compiled else PLAIN
    again = {"compiled": compiled, "operations": LONGER, "recorded": PLAIN}
    assert choose_way(FLOAT32, **again) == expected


@pytest.mark.parametrize("operations", [0, LONGER])
def test_a_run_goes_on_in_its_way_however_long_it_has_become(has_c, operations):
    def again(recorded, compiled):
        return choose_way(FLOAT32, compiled=compiled, operations=operations, recorded=recorded)

    for compiled in (None, False):
        assert again(QUICK_DROPOUT, compiled) == QUICK_DROPOUT
    for compiled in (None, True):
        assert again(IN_C, compiled) == (IN_C if has_c else QUICK_DROPOUT)
        assert again(COMPILED, compiled) == COMPILED


def test_what_is_asked_for_anew_takes_the_place_of_the_way(has_c):
    quick = {"compiled": True, "recorded": QUICK_DROPOUT}
    assert choose_way(FLOAT32, **quick) == (IN_C if has_c else QUICK_DROPOUT)
    assert choose_way(FLOAT32, compiled=False, recorded=IN_C) == QUICK_DROPOUT
    assert choose_way(ON_CUDA, compiled=False, recorded=COMPILED) == PLAIN


@pytest.mark.parametrize("recorded", [IN_C, QUICK_DROPOUT])
def test_a_way_of_the_cpu_is_not_taken_elsewhere(has_c, recorded):
    assert choose_way(ON_CUDA, compiled=None, recorded=recorded) == PLAIN
    if recorded == IN_C:
        assert choose_way(ON_CUDA, compiled=True, recorded=IN_C) == COMPILED
        assert choose_way(BFLOAT16, compiled=None, recorded=IN_C) == QUICK_DROPOUT


@pytest.mark.parametrize("way", [PLAIN, QUICK_DROPOUT, pytest.param(IN_C, marks=needs_c)])
def test_what_a_model_goes_is_recorded(way):
    model = tiny_model()
    go(model, way)
    assert way_of_step(model) == way


def test_a_model_whose_blocks_are_compiled_goes_this_way(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    model = tiny_model().train()
    go(model, COMPILED)
    prepare_blocks(model, FLOAT32, (3, 17), compiled=True, recomputed=False)
    assert way_of_step(model) == COMPILED and COMPILED not in SWAPS
