"""Windows over rows of any length: each token is scored once, in groups of bounded size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.errors import OptionError
from minigpt2.evaluation import windows as module
from minigpt2.evaluation.windows import checked_stride, groups_of


def rows_of(lengths):
    ends = np.array(lengths, np.int64).cumsum()
    return np.concatenate([[0], ends])[:-1].astype(np.int64), ends


def listed(groups):
    """(start, first, end) of every window, in order."""
    return [
        place
        for group in groups
        for place in zip(group.start.tolist(), group.first.tolist(), group.end.tolist())
    ]


def naive(lengths, block_size, stride):
    begin = 0
    for n_tokens in lengths:
        start, first = begin, begin + 1
        while first < begin + n_tokens:
            end = min(start + block_size + 1, begin + n_tokens)
            yield start, first, end
            start, first = start + stride, end
        begin += n_tokens


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 90), max_size=6), st.integers(1, 20), st.data())
def test_every_token_but_a_rows_first_is_scored_once_after_block_size_less_stride_and_one_more(
    lengths, block_size, data
):
    stride = data.draw(st.integers(1, block_size))
    found = listed(groups_of([rows_of(lengths)], block_size, stride))
    assert found == list(naive(lengths, block_size, stride))
    begins, ends = rows_of(lengths)
    scored = []
    for start, first, end in found:
        assert 1 <= end - 1 - start <= block_size
        begin = begins[ends.searchsorted(start, side="right")]
        places = range(first, end)
        assert all(at - start >= min(at - begin, block_size - stride + 1) for at in places)
        scored += places
    assert scored == sorted({*range(sum(lengths))} - {*begins.tolist()})


@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_groups_are_bounded_and_hold_every_window_in_order(at_once, monkeypatch):
    monkeypatch.setattr(module, "GROUP_TOKENS", 50)
    lengths = [3, 200, 0, 1, 17, 18, 19, 2, 2, 2]
    everything = listed(groups_of([rows_of(lengths)], 17, 9))
    monkeypatch.setattr(module, "WINDOWS_AT_ONCE", at_once)
    groups = list(groups_of([rows_of(lengths)], 17, 9))
    assert listed(groups) == everything
    assert all(sum(group.end - 1 - group.start) < 50 + 17 for group in groups)
    assert at_once == 1 or len(groups) < len(everything) / 2


def test_windows_of_a_text_that_no_memory_holds_are_made_one_group_after_the_other():
    rows = np.zeros(1, np.int64), np.array([10**12])
    groups = groups_of([rows], 1024, 512)
    first, second = next(groups), next(groups)
    assert len(first) == len(second) == 16
    assert first.end[-1] == second.first[0] == 15 * 512 + 1025


@pytest.mark.parametrize(("given", "used"), [(None, 16), (1, 1), (31, 31), (np.int64(2), 2)])
def test_a_stride_is_half_of_the_window_unless_another_is_given(given, used):
    assert checked_stride(given, 31) == used


@pytest.mark.parametrize("given", [0, 32, 1.5, "half", True])
def test_another_stride_is_refused(given):
    with pytest.raises(OptionError, match="stride is "):
        checked_stride(given, 31)
