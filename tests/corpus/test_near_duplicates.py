"""Documents that nearly repeat others. Oracle: the share of common runs, counted in sets."""

import sys

import numpy as np
import pytest

from minigpt2.corpus.near_duplicates import N_GRAM, near_duplicates
from minigpt2.errors import InputError


def jaccard(one, other):
    runs = [
        {tuple(ids[at : at + N_GRAM]) for at in range(max(1, len(ids) - N_GRAM + 1))}
        for ids in (one.tolist(), other.tolist())
    ]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def texts(number, length, seed=0, vocabulary=400):
    """Unlike each other, of common words."""
    draw = np.random.default_rng(seed)
    return [draw.zipf(1.3, length).clip(0, vocabulary).astype(np.uint16) for _ in range(number)]


def test_a_changed_word_and_an_added_sentence_are_found_and_other_texts_are_kept():
    documents = texts(50, 300)
    changed, longer = documents[7].copy(), np.concatenate([documents[9], documents[11][:20]])
    changed[100] = 399
    found = near_duplicates([*documents, changed, longer, documents[3]])
    assert found[:50].tolist() == [-1] * 50
    assert found[50:].tolist() == [7, 9, 3]


def test_the_estimate_agrees_with_counting_away_from_the_threshold():
    original = texts(1, 400)[0]
    draw = np.random.default_rng(5)
    likely = 0
    for n_changed in (1, 2, 4, 60, 100, 200):
        other = original.copy()
        other[draw.choice(400, n_changed, replace=False)] = draw.integers(0, 400, n_changed)
        alike = jaccard(original, other)
        if abs(alike - 0.8) < 0.1:
            continue
        likely += alike > 0.8
        assert near_duplicates([original, other])[1] == (0 if alike > 0.8 else -1)
    assert 2 <= likely <= 4


def test_a_document_is_compared_with_kept_ones_only():
    original = texts(1, 500)[0]
    steps = [original]
    for start in (0, 150, 300):  # each is like the one before, the last unlike the first
        other = steps[-1].copy()
        other[start : start + 35] = np.arange(35) + 1000
        steps.append(other)
    assert jaccard(steps[0], steps[1]) > 0.85 > 0.75 > jaccard(steps[0], steps[3])
    found = near_duplicates(steps).tolist()
    assert found[:2] == [-1, 0] and found[3] != 1


@pytest.mark.parametrize("length", range(N_GRAM))
def test_short_documents_are_compared_whole(length):
    ids = np.arange(length, dtype=np.uint16)
    assert near_duplicates([ids, ids]).tolist() == [-1, 0]
    if length:
        assert near_duplicates([ids, ids + 1]).tolist() == [-1, -1]


def test_ids_alone_decide(monkeypatch):
    documents = texts(20, 200)
    documents += [document.copy() for document in documents[:5]]
    before = near_duplicates(documents).tolist()
    monkeypatch.setattr("minigpt2.corpus.near_duplicates.BLOCK", 7)
    assert near_duplicates([ids.astype(np.int64) for ids in documents]).tolist() == before


def test_no_documents_are_no_duplicates():
    assert near_duplicates([]).tolist() == []


def test_without_the_library_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(InputError, match="pip install datasketch"):
        near_duplicates([])
