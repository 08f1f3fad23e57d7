"""However a text is cut into calls, and whatever is beside it, its logits are those of one call."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cached import N_POSITIONS, pieces_of, ragged_difference, random_model, split_difference
from hf_models import token_ids
from minigpt2.cache import KVCache
from minigpt2.model import GPT2

MODEL = random_model()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(1, N_POSITIONS - 1)), st.sampled_from([1, 2, 3]))
def test_any_split_of_a_text_into_calls_gives_the_logits_of_one_call(cuts, n_rows):
    assert split_difference(MODEL, token_ids(31, n_rows, N_POSITIONS), cuts) <= 1e-12


@pytest.mark.parametrize("cuts", [{8}, {16}, {1}, set(range(1, N_POSITIONS))], ids=str)
def test_splits_agree_in_float32_too(cuts):
    model = random_model(torch.float32)
    assert split_difference(model, token_ids(31, 2, N_POSITIONS), cuts) <= 1e-4


@pytest.mark.parametrize(
    "values",
    [
        {"reorder_and_upcast_attn": True},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"tie_word_embeddings": False},
        {"n_head": 1},
        {"n_head": 15},
    ],
    ids=str,
)
def test_splits_agree_for_every_kind_of_attention(values):
    assert split_difference(random_model(**values), token_ids(31, 2, 13), {1, 5, 6}) <= 1e-12


def test_splits_agree_for_a_twelve_layer_model_of_transformers(hf_folder):
    model = GPT2.from_pretrained(hf_folder(), dtype=torch.float64).requires_grad_(False)
    assert split_difference(model, token_ids(257, 2, 64), {8, 16, 17, 18, 63}) <= 1e-12


def test_greedy_text_with_a_cache_is_greedy_text_without(hf_folder):
    model = GPT2.from_pretrained(hf_folder()).requires_grad_(False)
    plain = cached = token_ids(257, 2, 7)
    cache = model.make_cache(2)
    for _ in range(40):
        plain = torch.cat([plain, model(plain)[:, -1:].argmax(-1)], dim=1)
        new = cached[:, int(cache.lengths[0]) :]
        cached = torch.cat([cached, model(new, cache)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(plain, cached)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_rows_of_a_ragged_batch_have_the_logits_they_have_alone(lengths):
    assert ragged_difference(MODEL, token_ids(31, len(lengths), N_POSITIONS), lengths) <= 1e-12


def test_a_ragged_batch_agrees_with_its_rows_in_float32_too():
    model = random_model(torch.float32)
    assert ragged_difference(model, token_ids(31, 3, N_POSITIONS), [1, 5, 9]) <= 1e-4


def test_what_the_padding_is_changes_nothing_at_all():
    lengths, idx = [2, 7, 5], token_ids(31, 3, 7)
    padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
    results = []
    for other in (idx, torch.where(padding, (idx + 11) % 31, idx)):
        cache = MODEL.make_cache(3)
        prefill = MODEL(other, cache)
        cache.truncate(lengths)
        results.append((prefill[~padding], MODEL(idx[:, :1], cache)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_rows_of_padding_alone_leave_all_logits_finite():
    cache, idx = MODEL.make_cache(3), token_ids(31, 3, 7)
    MODEL(idx, cache)
    cache.truncate([0, 7, 3])
    assert MODEL(idx, cache).isfinite().all()


def test_truncating_then_appending_is_as_if_the_rest_had_never_been():
    idx, other = token_ids(31, 2, 11), (token_ids(31, 2, 11) + 7) % 31
    guessed, straight = MODEL.make_cache(2), MODEL.make_cache(2)
    MODEL(idx[:, :4], guessed)
    MODEL(other[:, 4:9], guessed)  # a wrong guess, longer than what replaces it
    guessed.truncate([4, 4])
    MODEL(idx[:, :4], straight)
    for piece in pieces_of(idx[:, 4:], {2, 3}):
        assert torch.equal(MODEL(piece, guessed), MODEL(piece, straight))


def test_rows_may_be_truncated_to_different_lengths():
    idx = token_ids(31, 3, 11)
    cache = MODEL.make_cache(3)
    MODEL(idx, cache)
    cache.truncate([0, 11, 6])
    logits = MODEL(idx[:, 6:], cache)
    assert cache.lengths.tolist() == [5, 16, 11]
    close(logits[0], MODEL(idx[:1, 6:])[0])
    close(logits[1], MODEL(torch.cat([idx[1], idx[1, 6:]])[None])[0, 11:])
    close(logits[2], MODEL(idx[2:])[0, 6:])


def test_a_cache_is_shortened_never_grown():
    cache = MODEL.make_cache(2)
    MODEL(token_ids(31, 2, 3), cache)
    with pytest.raises(AssertionError):
        cache.truncate([3, 4])
    assert cache.lengths.tolist() == [3, 3]


def test_a_row_is_a_view_what_is_written_to_it_is_written_here():
    idx = token_ids(31, 3, 9)
    cache = MODEL.make_cache(3)
    for b, length in enumerate([4, 1, 6]):
        close(MODEL(idx[b : b + 1, :length], cache.row(b)), MODEL(idx[b : b + 1, :length]))
    assert cache.lengths.tolist() == [4, 1, 6]
    logits = MODEL(idx[:, 6:], cache)
    for b, length in enumerate([4, 1, 6]):
        close(logits[b], MODEL(torch.cat([idx[b, :length], idx[b, 6:]])[None])[0, length:])


def test_selected_rows_are_copies_in_the_order_asked_for():
    idx = token_ids(31, 3, 9)
    cache = MODEL.make_cache(3)
    MODEL(idx[:, :5], cache)
    cache.truncate([5, 2, 4])
    before = cache.keys.clone(), cache.values.clone()
    rows, lengths = [2, 0, 2], [4, 5, 4]
    chosen = cache.select(rows)
    assert chosen.lengths.tolist() == lengths
    logits = MODEL(idx[:, 5:], chosen)
    for number, (b, length) in enumerate(zip(rows, lengths)):
        text = torch.cat([idx[b, :length], idx[number, 5:]])
        close(logits[number], MODEL(text[None])[0, length:])
    assert torch.equal(cache.keys, before[0]) and torch.equal(cache.values, before[1])
    assert cache.lengths.tolist() == [5, 2, 4]


def test_a_full_cache_refuses_more_and_stays_as_it_was():
    cache, idx = MODEL.make_cache(2, capacity=7), token_ids(31, 2, 7)
    MODEL(idx, cache)
    cache.truncate([2, 6])  # the longest row decides
    keys = cache.keys.clone()
    with pytest.raises(ValueError, match="holds 7 tokens a row and 6 are there: 2 more do not fit"):
        MODEL(idx[:, :2], cache)
    assert cache.lengths.tolist() == [2, 6] and torch.equal(cache.keys, keys)
    assert MODEL(idx[:, :1], cache).shape == (2, 1, 31)


def test_capacity_is_block_size_at_most_and_by_default():
    capacities = [MODEL.make_cache(1, capacity).capacity for capacity in (None, 7, 23, 24, 10**6)]
    assert capacities == [23, 7, 23, 23, 23]


def test_a_cache_has_the_models_dtype():
    cache = random_model(torch.bfloat16).make_cache(2)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert cache.keys.shape == (2, 2, 3, 23, 5) and cache.lengths.tolist() == [0, 0]


def test_texts_in_two_caches_of_one_model_do_not_meet():
    idx, caches = token_ids(31, 2, 11), [MODEL.make_cache(1) for _ in range(2)]
    logits = [[], []]
    for t in range(11):
        for b in range(2):
            logits[b].append(MODEL(idx[b : b + 1, t : t + 1], caches[b]))
    for b in range(2):
        close(torch.cat(logits[b], dim=1), MODEL(idx[b : b + 1]))


def test_a_call_that_fails_midway_leaves_the_cache_as_it_was(monkeypatch):
    model, idx = random_model(), token_ids(31, 2, 11)
    cache = model.make_cache(2)
    model(idx[:, :5], cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.h[1].mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model((idx[:, 5:] + 1) % 31, cache)
    assert cache.lengths.tolist() == [5, 5]
    close(model(idx[:, 5:], cache), model(idx)[:, 5:])


def test_no_gradient_flows_through_a_cache():
    model, idx = random_model().requires_grad_(True), token_ids(31, 2, 5)
    cache = model.make_cache(2)
    with_cache = model(idx, cache)
    assert not cache.keys.requires_grad and not cache.values.requires_grad
    close(with_cache, model(idx))


def test_the_mask_shows_each_token_itself_and_what_is_before_it():
    cache = KVCache.empty(
        n_layer=1, batch_size=2, n_head=1, capacity=7, head_size=1,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    cache.lengths[:] = torch.tensor([2, 0])
    positions = cache.positions(3)
    assert positions.tolist() == [[2, 3, 4], [0, 1, 2]]
    visible = cache.mask(positions)
    assert visible.shape == (2, 1, 3, 5)
    assert visible[:, 0].sum(-1).tolist() == [[3, 4, 5], [1, 2, 3]]
    assert visible[0, 0, 0].tolist() == [True, True, True, False, False]


def test_new_keys_and_values_land_in_their_own_slots():
    cache = KVCache.empty(
        n_layer=2, batch_size=2, n_head=3, capacity=7, head_size=5,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    cache.lengths[:] = torch.tensor([1, 4])
    positions = cache.positions(2)
    k = torch.arange(1.0, 1 + math.prod((2, 3, 2, 5))).view(2, 3, 2, 5)
    keys, values = cache.layers(positions)[1].append(k, -k)
    assert keys.shape == values.shape == (2, 3, 6, 5)
    expected = torch.zeros(2, 3, 7, 5)
    expected[0, :, 1:3], expected[1, :, 4:6] = k[0], k[1]
    assert torch.equal(cache.keys[1], expected) and torch.equal(cache.values[1], -expected)
    assert torch.equal(keys, expected[:, :, :6])
    assert not cache.keys[0].any() and not cache.values[0].any()


@pytest.mark.parametrize(
    ("lengths", "n_tokens", "needed"),
    [
        ([0, 0], 5, False),  # a first reading is causal
        ([0, 0], 1, False),
        ([3, 3], 1, False),  # one new token sees everything
        ([3, 3], 2, True),
        ([3, 2], 1, True),
        ([0, 2], 1, True),
    ],
)
def test_a_mask_is_made_where_attention_does_not_know_it_by_itself(lengths, n_tokens, needed):
    cache = KVCache.empty(
        n_layer=1, batch_size=2, n_head=1, capacity=9, head_size=2, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    cache.advance(3)
    cache.truncate(lengths)
    positions = cache.positions(n_tokens)
    mask = cache.mask(positions)
    assert (mask is not None) is needed
    everything, layers = cache.all_slots(positions)
    assert everything.shape == (2, 1, n_tokens, 9) and layers[0].n_slots == 9
    if mask is not None:
        assert torch.equal(everything[..., : mask.shape[-1]], mask)
        assert not everything[..., mask.shape[-1] :].any()
