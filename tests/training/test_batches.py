"""Batches of consecutive numbers, whose targets say where in the text they came from."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minigpt2.corpus.prepared import prepare
from minigpt2.corpus.token_file import DOCUMENT, SPAN, TokenFile, TokenFileInfo
from minigpt2.errors import InputError
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.batches import IGNORE, Batches, validation_batches

quick = settings(max_examples=80, deadline=None)
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**63 - 1)


def numbers(n_tokens, dtype=np.uint16):
    return np.arange(n_tokens, dtype=dtype)


def rows_of_epoch(batches, batch_size, epoch):
    """(idx, targets) of all windows of an epoch, (W, T) each, in the order they are drawn."""
    first = epoch * batches.windows_per_epoch
    last = first + batches.windows_per_epoch - 1
    steps = range(first // batch_size, last // batch_size + 1)
    idx, targets = (torch.cat(parts) for parts in zip(*map(batches.at, steps)))
    skip = first - steps.start * batch_size
    return tuple(part[skip : skip + batches.windows_per_epoch] for part in (idx, targets))


@quick
@given(st.integers(2, 200), sizes, st.integers(1, 7), seeds, st.integers(0, 3))
def test_every_token_is_a_target_exactly_once_per_epoch(n_tokens, T, batch_size, seed, epoch):
    assume(n_tokens > T)
    batches = Batches(numbers(n_tokens), block_size=T, batch_size=batch_size, seed=seed)
    assert batches.windows_per_epoch == math.ceil(n_tokens / T)
    _, targets = rows_of_epoch(batches, batch_size, epoch)
    assert sorted(targets[targets != IGNORE].tolist()) == list(range(n_tokens))


@quick
@given(st.integers(2, 200), sizes, st.integers(1, 7), seeds, st.integers(0, 50))
def test_targets_are_the_tokens_that_follow_on_the_circle(n_tokens, T, batch_size, seed, step):
    assume(n_tokens > T)
    batches = Batches(numbers(n_tokens), block_size=T, batch_size=batch_size, seed=seed)
    idx, targets = batches.at(step)
    assert idx.shape == targets.shape == (batch_size, T)
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.is_contiguous() and targets.is_contiguous()
    assert torch.equal(idx, (idx[:, :1] + torch.arange(T)) % n_tokens)
    scored = targets != IGNORE
    assert torch.equal(targets[scored], ((idx + 1) % n_tokens)[scored])
    # what is not scored is the end of a row, never all of it
    assert torch.equal(scored, torch.arange(T) < scored.sum(1, keepdim=True))
    assert scored[:, 0].all()


@quick
@given(st.integers(2, 200), sizes, st.integers(1, 7), seeds, st.integers(0, 50))
def test_spans_are_where_the_rows_lie(n_tokens, T, batch_size, seed, step):
    assume(n_tokens > T)
    text = numbers(n_tokens) * 3
    batches = Batches(text, block_size=T, batch_size=batch_size, seed=seed)
    spans = batches.spans(step)
    assert [length for _, length in spans] == [T] * batch_size
    assert all(0 <= start < n_tokens for start, _ in spans)
    twice = np.concatenate([text, text])  # a row may go on beyond the last token
    rows = [twice[start : start + length].tolist() for start, length in spans]
    assert rows == batches.at(step)[0].tolist()


@quick
@given(st.integers(2, 200), sizes, seeds, st.randoms())
def test_a_batch_depends_on_seed_and_step_alone(n_tokens, T, seed, shuffler):
    assume(n_tokens > T)

    def make():
        return Batches(numbers(n_tokens), block_size=T, batch_size=3, seed=seed)

    once = make()
    in_order = [once.at(step) for step in range(30)]
    steps = list(range(30))
    shuffler.shuffle(steps)
    mixed = make()
    for step in steps:
        for batch in (mixed.at(step), make().at(step)):
            assert all(torch.equal(part, known) for part, known in zip(batch, in_order[step]))


@quick
@given(st.integers(2, 200), sizes, seeds)
def test_a_sample_is_the_same_in_batches_of_any_size(n_tokens, T, seed):
    assume(n_tokens > T)
    text = numbers(n_tokens)
    single, six = (Batches(text, block_size=T, batch_size=n, seed=seed) for n in (1, 6))
    for step in (0, 1, 7):
        rows = [single.at(6 * step + row) for row in range(6)]
        for part, known in zip(six.at(step), map(torch.cat, zip(*rows))):
            assert torch.equal(part, known)


def test_epochs_and_seeds_differ_in_order_and_in_window_borders():
    drawn = {}
    for seed in (1, 2):
        batches = Batches(numbers(5003), block_size=50, batch_size=4, seed=seed)
        for epoch in range(3):
            idx, _ = rows_of_epoch(batches, 4, epoch)
            drawn[seed, epoch] = idx[:, 0].tolist()
    orders, borders = list(drawn.values()), [frozenset(starts) for starts in drawn.values()]
    for i, starts in enumerate(orders):
        in_text_order = [(start + 50) % 5003 for start in starts[:-1]]
        assert sum(a == b for a, b in zip(in_text_order, starts[1:])) < 10
        assert all(
            starts != other and borders[i] != borders[j] for j, other in enumerate(orders[:i])
        )


def test_every_place_is_equally_likely_to_begin_an_epoch():
    begins = []
    for seed in range(400):
        _, targets = Batches(numbers(10), block_size=9, batch_size=2, seed=seed).at(0)
        short = targets[(targets != IGNORE).sum(1) == 1]
        begins.append(int(short[0, 0]))  # its one target is where the circle was opened
    assert set(begins) == set(range(10))
    assert max(begins.count(n) for n in range(10)) < 70  # 40 are expected, 6 is one sigma


def test_step_1000_reads_only_its_own_windows():
    class Counting(np.ndarray):
        read = 0

        def __getitem__(self, key):
            part = super().__getitem__(key)
            Counting.read += part.size
            return part

    text = numbers(100_000, np.uint32).view(Counting)
    batches = Batches(text, block_size=100, batch_size=4, seed=5)
    batches.at(1000)
    assert Counting.read == 4 * 101


@pytest.mark.parametrize("n_tokens", [65_536, 100_003])
def test_ids_beyond_uint16_arrive_whole(n_tokens):
    text = numbers(n_tokens, np.uint32)
    batches = Batches(text, block_size=1000, batch_size=13, seed=5)
    _, targets = rows_of_epoch(batches, 13, 0)
    assert targets.max() == n_tokens - 1


def test_the_order_of_a_run_is_the_same_on_every_machine():
    batches = Batches(numbers(100), block_size=9, batch_size=12, seed=1337)
    starts = [start for step in range(2) for start, _ in batches.spans(step)]
    assert starts[:12] == [34, 89, 53, 98, 43, 7, 16, 52, 80, 25, 62, 71]
    assert starts[12:] == [68, 40, 49, 4, 77, 13, 95, 86, 22, 58, 31, 59]


def test_random_states_of_the_caller_stay_as_they_were():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    Batches(numbers(100), block_size=7, batch_size=3, seed=5).at(20)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_too_little_text_names_both_numbers_and_the_largest_block_that_works():
    with pytest.raises(
        InputError,
        match="training part has 12 tokens, needs 13: use block_size up to 11 or more text",
    ):
        Batches(numbers(12), block_size=12, batch_size=2, seed=5)
    batches = Batches(numbers(12), block_size=11, batch_size=2, seed=5)
    assert batches.windows_per_epoch == 2
    with pytest.raises(InputError, match="has 1 tokens, needs 13: use more text"):
        Batches(numbers(1), block_size=12, batch_size=2, seed=5)


@pytest.mark.parametrize("given_sizes", [(0, 2), (3, 0), (-1, 2)])
def test_sizes_below_one_are_refused(given_sizes):
    block_size, batch_size = given_sizes
    with pytest.raises(InputError, match="is not 1 or more"):
        Batches(numbers(12), block_size=block_size, batch_size=batch_size, seed=5)


@quick
@given(st.integers(2, 200), sizes, st.integers(1, 7))
def test_validation_scores_every_token_but_the_first_once_and_in_order(n_tokens, T, batch_size):
    text = numbers(n_tokens) + 5
    seen = []
    for idx, targets in validation_batches(text, block_size=T, batch_size=batch_size):
        assert idx.shape == targets.shape and idx.shape[1] == T
        assert 1 <= len(idx) <= batch_size
        assert idx.dtype == targets.dtype == torch.int64
        scored = targets != IGNORE
        assert torch.equal(targets[scored], idx[scored] + 1)
        assert scored[:, 0].all()
        assert torch.equal(scored, torch.arange(T) < scored.sum(1, keepdim=True))
        seen += targets[scored].tolist()
    assert seen == text[1:].tolist()


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_a_held_out_part_without_a_target_is_refused_at_once(n_tokens):
    with pytest.raises(InputError, match=rf"held-out part has {n_tokens} tokens, needs 2: raise"):
        validation_batches(numbers(n_tokens), block_size=4, batch_size=2)


def test_batches_of_a_prepared_corpus_are_its_tokens(tmp_path):
    path = tmp_path / "lamps.txt"
    path.write_text("The lamp is lit, and the sea says nothing.\n" * 20)
    corpus = prepare([path], Tokenizer.gpt2(300), val_fraction=0.2, cache_dir=tmp_path)
    assert corpus.val is not None
    stream = corpus.train.tokens.tolist()
    doubled = "".join(map(chr, stream + stream))
    for idx, _ in map(Batches(corpus.train, block_size=11, batch_size=3, seed=5).at, range(40)):
        assert all("".join(map(chr, row)) in doubled for row in idx.tolist())
    scored = [t for _, t in validation_batches(corpus.val, block_size=11, batch_size=3)]
    assert torch.cat(scored)[torch.cat(scored) != IGNORE].tolist() == corpus.val.tokens[1:].tolist()


marks = st.lists(st.booleans(), min_size=1, max_size=9)
documents_with_prompts = st.lists(marks, min_size=1, max_size=12)


def with_prompts(documents):
    """A token file of consecutive numbers, and the positions of prompts' tokens: of each document
    it is said which of its tokens are a prompt's; the last never is.
    """
    records = np.zeros(len(documents), DOCUMENT)
    records["end"] = np.cumsum([len(document) for document in documents])
    flat = [mark and n < len(doc) for doc in documents for n, mark in enumerate(doc, 1)]
    prompts, spans = {at for at, mark in enumerate(flat) if mark}, []
    for at in sorted(prompts):  # runs that go over the end of a document are cut there
        if spans and spans[-1][1] == at and at not in records["end"]:
            spans[-1] = (spans[-1][0], at + 1)
        else:
            spans.append((at, at + 1))
    ids = numbers(len(flat))
    info = TokenFileInfo("uint16", len(ids), 65536, "", "", "", "")
    return TokenFile(Path("train.bin"), ids, info, records, np.array(spans, SPAN)), prompts


def beginning(lengths, prompts):
    """A token file of documents that begin with prompts of these lengths."""
    ends, (file, _) = np.cumsum(lengths), with_prompts([[False] * n for n in lengths])
    spans = [(e - n, e - n + p) for e, n, p in zip(ends, lengths, prompts) if p]
    return replace(file, prompts=np.array(spans, SPAN))


@quick
@given(documents_with_prompts, sizes, sizes, seeds, st.integers(0, 2))
def test_with_masked_prompts_all_other_tokens_are_targets_once_and_prompts_never(
    documents, T, batch_size, seed, epoch
):
    file, prompts = with_prompts(documents)
    assume(len(file.tokens) > T and prompts)
    sizes = {"block_size": T, "batch_size": batch_size, "seed": seed}
    batches = Batches(file, **sizes, mask_prompt=True)
    idx, targets = rows_of_epoch(batches, batch_size, epoch)
    scored = targets[targets != IGNORE].tolist()
    assert sorted(scored) == [at for at in range(len(file.tokens)) if at not in prompts]
    plain_idx, plain = rows_of_epoch(Batches(file, **sizes), batch_size, epoch)
    assert torch.equal(idx, plain_idx)
    hidden = torch.isin(plain, torch.tensor(sorted(prompts)))
    assert torch.equal(targets, plain.masked_fill(hidden, IGNORE))


@quick
@given(documents_with_prompts, sizes, sizes)
def test_held_out_prompts_are_not_scored_either(documents, T, batch_size):
    file, prompts = with_prompts(documents)
    assume(len(file.tokens) > 1)
    sizes = {"block_size": T, "batch_size": batch_size}
    masked = [*validation_batches(file, **sizes, mask_prompt=True)]
    scored = [int(t) for _, targets in masked for t in targets.flatten() if t != IGNORE]
    assert scored == [at for at in range(1, len(file.tokens)) if at not in prompts]
    for (idx, _), (plain, _) in zip(masked, validation_batches(file, **sizes), strict=True):
        assert torch.equal(idx, plain)


def test_masking_prompts_of_a_text_without_any_is_refused():
    file = beginning([5, 7], [0, 0])
    with pytest.raises(InputError, match="no row is a chat, or has the fields prompt and compl"):
        Batches(file, block_size=3, batch_size=2, seed=1, mask_prompt=True)
    assert len([*validation_batches(file, block_size=3, batch_size=2, mask_prompt=True)]) == 2


def test_a_text_of_prompts_alone_is_refused():
    lengths, sizes = [1, 7, 5], {"block_size": 3, "batch_size": 2, "mask_prompt": True}
    Batches(beginning(lengths, [0, 6, 4]), **sizes, seed=1)
    file = beginning(lengths, [1, 7, 5])
    with pytest.raises(InputError, match="the training part is a prompt and nothing else"):
        Batches(file, **sizes, seed=1)
    with pytest.raises(InputError, match="the held-out part is a prompt and nothing else"):
        validation_batches(file, **sizes)
    file = beginning(lengths, [0, 7, 5])  # the first token is never a target
    with pytest.raises(InputError, match="the held-out part is a prompt and nothing else"):
        validation_batches(file, **sizes)
    Batches(file, **sizes, seed=1)
    file = beginning(lengths, [1, 7, 4])
    assert len([*validation_batches(file, **sizes)]) == 2
