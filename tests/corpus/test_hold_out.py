"""What is held out: by whole documents, near the share asked for, stable, and never with a copy on
the other side.
"""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minigpt2.corpus.hold_out import FEWEST, _as_they_come, hold_out


def keys_for(n, salt=0):
    return [hashlib.sha256(f"{salt} {number}".encode()).digest()[:16] for number in range(n)]


def held_tokens(split, lengths):
    cut = lengths[split.cut_document] - split.cut_at if split.cut_document >= 0 else 0
    return int(lengths[split.held].sum()) + cut


texts = st.lists(st.tuples(st.integers(2, 3000), st.integers(0, 40)), min_size=1, max_size=60)
fractions = st.floats(0.001, 0.95)


@given(texts, fractions)
def test_copies_are_never_on_both_sides(documents, fraction):
    # equal texts have equal lengths
    lengths = np.array([2 + (key * 71) % 900 for _, key in documents])
    keys = [keys_for(41)[key] for _, key in documents]
    split = hold_out(lengths, keys, fraction)
    sides = {}
    for key, held in zip(keys, split.held):
        assert sides.setdefault(key, held) == held
    if split.cut_document >= 0:
        assert keys.count(keys[split.cut_document]) == 1


@given(texts, fractions)
def test_there_is_always_something_to_train_on_and_a_cut_leaves_two_tokens_on_each_side(
    documents, fraction
):
    lengths = np.array([length for length, _ in documents])
    split = hold_out(lengths, keys_for(len(documents)), fraction)
    assert held_tokens(split, lengths) < lengths.sum()
    assert not split.held.all()
    if split.cut_document >= 0:
        assert not split.held[split.cut_document]
        assert FEWEST <= split.cut_at <= lengths[split.cut_document] - FEWEST


@given(texts, fractions)
def test_something_is_held_out_wherever_a_document_has_four_tokens(documents, fraction):
    lengths = np.array([length for length, _ in documents])
    split = hold_out(lengths, keys_for(len(documents)), fraction)
    if lengths.max() >= 2 * FEWEST:
        assert split.holds_out and held_tokens(split, lengths) > 0


@pytest.mark.parametrize("n_documents", [10, 37, 100, 1000])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_many_documents_are_held_out_whole_and_near_the_share(n_documents, fraction):
    draw = random.Random(n_documents)
    for salt in range(20):
        lengths = np.array([draw.randint(200, 800) for _ in range(n_documents)])
        split = hold_out(lengths, keys_for(n_documents, salt), fraction)
        assert split.cut_document == -1
        share = held_tokens(split, lengths) / lengths.sum()
        assert abs(share - fraction) <= max(fraction / 2, 800 / lengths.sum()) + 1e-9


lengths_of_any_kind = st.lists(st.integers(1, 30) | st.integers(20, 9999), min_size=1, max_size=60)


@given(lengths_of_any_kind, lengths_of_any_kind, st.integers(0, 99), fractions)
def test_a_document_is_decided_on_by_those_before_it_alone(lengths, more, salt, fraction):
    both, keys = np.array(lengths + more), keys_for(len(lengths) + len(more), salt)
    decided = as_they_come(both[: len(lengths)], keys, fraction)
    assert decided.tolist() == as_they_come(both, keys, fraction)[: len(lengths)].tolist()


@given(lengths_of_any_kind, lengths_of_any_kind, st.integers(0, 99), fractions)
def test_documents_added_at_the_end_move_none_where_the_decisions_suffice(
    lengths, more, salt, fraction
):
    both, keys = np.array(lengths + more), keys_for(len(lengths) + len(more), salt)
    parts = both[: len(lengths)], both
    assume(all(suffices(part, keys, fraction) for part in parts))
    before, after = (hold_out(part, keys[: len(part)], fraction) for part in parts)
    assert before.held.tolist() == after.held[: len(lengths)].tolist()
    assert before.cut_document == after.cut_document == -1


def as_they_come(lengths, keys, fraction):
    return _as_they_come(lengths, keys[: len(lengths)], fraction)


def suffices(lengths, keys, fraction):
    """Whether the decisions alone hold out half of the share or more, and not everything."""
    decided = as_they_come(lengths, keys, fraction)
    return lengths[decided].sum() >= fraction * lengths.sum() / 2 and not decided.all()


@pytest.mark.parametrize(("n_documents", "fraction"), [(30, 0.1), (200, 0.01)])
def test_the_decisions_suffice_for_some_documents_of_similar_length(n_documents, fraction):
    draw = random.Random(n_documents)
    for salt in range(50):
        lengths = np.array([draw.randint(200, 800) for _ in range(n_documents)])
        assert suffices(lengths, keys_for(n_documents, salt), fraction)


def test_few_documents_may_be_moved_by_later_ones():
    lengths, keys = np.full(12, 500), keys_for(12)
    assert hold_out(lengths[:3], keys[:3], 0.1).cut_document == 0
    assert hold_out(lengths, keys, 0.1).cut_document == -1


def test_copies_added_at_the_end_move_none_of_those_before():
    lengths = np.array([300 + n for n in range(40)])
    keys = keys_for(40)
    before = hold_out(lengths, keys, 0.1)
    after = hold_out(np.concatenate([lengths, lengths[:30]]), [*keys, *keys[:30]], 0.1)
    assert before.held.tolist() == after.held[:40].tolist()
    assert after.held[40:].tolist() == before.held[:30].tolist()


@given(st.integers(4, 10**6), fractions)
def test_one_document_is_cut_at_the_share(length, fraction):
    split = hold_out(np.array([length]), keys_for(1), fraction)
    expected = min(max(2, round(fraction * length)), length - 2)
    assert (split.held.tolist(), split.cut_document) == ([False], 0)
    assert length - split.cut_at == expected


def test_a_book_among_notes_is_cut_and_most_notes_stay_for_training():
    lengths = np.array([1_000_000] + [500] * 40)
    split = hold_out(lengths, keys_for(41), 0.1)
    assert split.cut_document == 0
    assert 3 <= split.held[1:].sum() <= 6
    assert held_tokens(split, lengths) == round(0.1 * lengths.sum())


def test_a_note_beside_a_book_is_held_out_where_it_is_about_the_share():
    split = hold_out(np.array([9000, 1000]), keys_for(2), 0.1)
    assert (split.held.tolist(), split.cut_document) == ([False, True], -1)


def test_three_books_lose_the_end_of_the_longest():
    split = hold_out(np.array([1000, 1003, 1001]), keys_for(3), 0.1)
    assert (split.held.tolist(), split.cut_document) == ([False] * 3, 1)
    assert split.cut_at == 1003 - 300


def test_where_every_document_has_a_copy_and_they_are_few_nothing_is_held_out():
    key = keys_for(1) * 3
    assert not hold_out(np.array([50, 50, 50]), key, 0.1).holds_out


def test_which_documents_are_held_out_follows_their_text():
    lengths = np.full(200, 400)
    chosen = [tuple(hold_out(lengths, keys_for(200, salt), 0.1).held) for salt in range(2)]
    assert chosen[0] != chosen[1]
    assert np.diff(np.flatnonzero(chosen[0])).std() > 0  # no rhythm
