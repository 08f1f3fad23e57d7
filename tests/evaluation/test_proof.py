"""An item of a proof raises nothing, changes nothing, and says what it found."""

import logging
import os
import random

import pytest
import torch

from minigpt2.errors import InputError
from minigpt2.evaluation.proof import (
    PASS,
    Item,
    NotHereError,
    chosen,
    first_failure,
    judged,
    notices,
    run,
    unchanged,
    within,
)


def test_what_an_item_raises_is_a_fail_in_one_line():
    def broken():
        raise KeyError("a\nb")

    outcome = run(Item("x", "that", broken))
    assert (outcome.status, outcome.name, outcome.proves) == ("FAIL", "x", "that")
    assert outcome.detail.startswith("KeyError (test_proof.py:") and "\n" not in outcome.detail
    assert outcome.seconds >= 0


def test_what_is_not_there_is_not_here():
    def absent():
        raise NotHereError("there is no GPU")

    assert run(Item("x", "", absent)).detail == "there is no GPU"
    assert run(Item("x", "", absent)).status == "NOT HERE"


def test_an_interrupt_ends_more_than_an_item():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Item("x", "", interrupted))


def test_nothing_that_an_item_sets_stays(monkeypatch):
    monkeypatch.setenv("MINIGPT2_PROOF", "before")

    def sets():
        torch.manual_seed(99)
        torch.rand(3)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_grad_enabled(False)
        os.environ["MINIGPT2_PROOF"] = "after"
        os.environ["MINIGPT2_OTHER"] = "new"
        raise ValueError

    def state():
        return (
            torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), dict(os.environ), random.getstate(),
        )  # fmt: skip

    before = state()
    run(Item("x", "", sets))
    assert state() == before


def test_small_items_have_one_thread_and_others_all():
    seen, all_of_them = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for threads in (False, True):
            run(
                Item("x", "", lambda: seen.append(torch.get_num_threads()) or PASS, threads=threads)
            )
    finally:
        torch.set_num_threads(all_of_them)
    assert seen == [1, 2]


def test_notices_of_a_failing_item_are_told_and_those_of_others_are_silent(caplog):
    def warns(result):
        logging.getLogger("minigpt2.somewhere").warning("the %s is off", "lamp")
        return result

    assert run(Item("x", "", lambda: warns(judged(False, 1, 2)))).detail == (
        "found 1, expected 2; a notice: the lamp is off"
    )
    assert run(Item("x", "", lambda: warns(PASS))).detail == "" and not caplog.records
    with notices("minigpt2") as heard, unchanged():
        warns(PASS)
    assert heard == ["the lamp is off"]


@pytest.mark.parametrize(
    ("found", "status"), [(0.0, "PASS"), (0.1, "PASS"), (0.2, "FAIL"), (float("nan"), "FAIL")]
)
def test_a_difference_is_within_its_tolerance_or_not(found, status):
    result = within(found, 0.1, "somewhere")
    assert result.status == status
    assert status == "PASS" or result.detail.endswith("(somewhere), expected 0.1 at most")


def test_the_first_failure_ends_the_search():
    computed = []

    def results():
        for ok in (True, False, True):
            computed.append(ok)
            yield judged(ok, len(computed), 0)

    assert first_failure(results()).detail == "found 2, expected 0"
    assert computed == [True, False]
    assert first_failure([PASS, PASS]) == PASS


def test_items_are_chosen_by_name_in_their_own_order():
    items = [Item(name, "", lambda: PASS) for name in ("a", "b", "c")]
    assert [item.name for item in chosen(items, ["c", "a"])] == ["a", "c"]
    with pytest.raises(InputError, match=r"there is no item 'd'.*: a, b, c"):
        chosen(items, ["a", "d"])
