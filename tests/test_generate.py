"""However a text is decoded, its tokens are those of reading everything again for each of them."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from decoded import (
    EOT,
    GREEDY,
    MODEL,
    SAMPLED,
    WINDOW,
    drawn,
    likeliest,
    prompt_of,
    random_model,
    reads_of,
    scripted,
    uncached,
    up_to,
)
from hf_models import reference, token_ids
from minigpt2.errors import InputError
from minigpt2.generate import DecodeSettings, decode, generate, generate_plain
from minigpt2.model import GPT2
from minigpt2.sampling import SamplingConfig

SMALL = random_model(torch.float64, block_size=7, n_embd=10, n_layer=2)


def go_on(row, token):
    return False


def alone(model, prompt, row, **options):
    """What row `row` says when it is the only one."""
    steps = decode(model, [prompt], DecodeSettings(**options), go_on, numbers=[row])
    return [token.id for ((token,),) in steps]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), SAMPLED], ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 30, WINDOW])
def test_the_plain_loop_has_the_ids_of_the_full_one_up_to_the_end_of_the_window(length, sampling):
    prompt, most = prompt_of(length), WINDOW + 1 - length  # the last new one is never read
    for n_new in {0, 1, min(2, most), most}:
        options = {"max_new_tokens": n_new, "sampling": sampling, "seed": 5}
        ids = generate_plain(MODEL, prompt, **options)
        assert [ids] == generate(MODEL, [prompt], **options) and len(ids) == n_new
    assert prompt == prompt_of(length)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 256), min_size=1, max_size=7),
    st.integers(0, 7),
    st.sampled_from([GREEDY, SamplingConfig(), SAMPLED]),
    st.integers(0, 2**63 - 1),
)
def test_the_plain_loop_draws_as_the_full_one_for_any_row_and_seed(prompt, n_new, sampling, seed):
    options = {"max_new_tokens": n_new, "sampling": sampling, "seed": seed}
    if len(prompt) + n_new > SMALL.config.block_size + 1:
        with pytest.raises(InputError, match="the cache holds 7 tokens a row"):
            generate_plain(SMALL, prompt, **options)
    else:
        assert [generate_plain(SMALL, prompt, **options)] == generate(SMALL, [prompt], **options)


def test_the_plain_loop_leaves_the_models_mode_and_the_global_random_state_alone():
    model = random_model(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    before, options = torch.get_rng_state(), {"max_new_tokens": 9, "sampling": SAMPLED}
    assert [generate_plain(model, [5, 6], **options)] == generate(MODEL, [[5, 6]], **options)
    assert model.training and model.h[0].mlp.dropout.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("length", [1, 2, 7, 11])
def test_cached_greedy_ids_are_the_uncached_ones(length):
    prompt = prompt_of(length)
    expected = uncached(MODEL, prompt, 20)
    assert generate(MODEL, [prompt], max_new_tokens=20, sampling=GREEDY) == [expected]
    assert len(set(expected)) > 5


@pytest.mark.parametrize("cuts", [{8}, {1}, {3, 4, 10}, set(range(1, 11))], ids=str)
def test_a_prompt_read_in_pieces_leads_to_the_same_ids(cuts):
    prompt, cache = prompt_of(11), MODEL.make_cache(1)
    for piece in torch.tensor_split(torch.tensor([prompt]), sorted(cuts), dim=1):
        logits = MODEL(piece, cache)
    ids = []
    for _ in range(20):
        ids.append(int(logits[0, -1].argmax()))
        logits = MODEL(torch.tensor([ids[-1:]]), cache)
    assert generate(MODEL, [prompt], max_new_tokens=20, sampling=GREEDY) == [ids]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("length", [1, 7, 25])
def test_greedy_ids_are_those_of_transformers_up_to_the_end_of_the_window(
    hf_folder, length, penalty
):
    prompt, n_new = prompt_of(length), 65 - length
    theirs = greedy_of_transformers(
        hf_folder(), [prompt], max_new_tokens=n_new, repetition_penalty=penalty
    )
    ours = generate(
        GPT2.from_pretrained(hf_folder()),
        [prompt],
        max_new_tokens=n_new,
        sampling=SamplingConfig(temperature=0, repetition_penalty=penalty),
    )
    assert ours == theirs and len(ours[0]) == n_new


def test_a_ragged_batch_with_an_end_id_is_that_of_transformers(hf_folder):
    model, rows = GPT2.from_pretrained(hf_folder()), [prompt_of(n) for n in (3, 17, 1, 8)]
    free = generate(model, rows, max_new_tokens=40, sampling=GREEDY)
    assert free == greedy_of_transformers(hf_folder(), rows, max_new_tokens=40)
    end = next(t for t in free[1][9:] if t not in free[1][:9])
    ours = generate(model, rows, max_new_tokens=40, sampling=GREEDY, stop_ids=[end])
    theirs = greedy_of_transformers(hf_folder(), rows, max_new_tokens=40, eos_token_id=end)
    assert ours == [up_to(row, [end]) for row in theirs]
    assert len({len(row) for row in ours}) > 1


def greedy_of_transformers(folder, rows, eos_token_id=None, **options):
    """The new ids of every row, which their `generate` wants padded on the left."""
    longest = max(len(row) for row in rows)
    padded = torch.tensor([[256] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    theirs = reference(folder, torch.float32)
    # what is None here is taken from the model's own settings
    theirs.generation_config.eos_token_id = eos_token_id
    config = GenerationConfig(
        **options, do_sample=False, pad_token_id=256, eos_token_id=eos_token_id
    )
    ids = theirs.generate(padded, attention_mask=mask, generation_config=config)
    return ids[:, longest:].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), SAMPLED], ids=str)
def test_a_row_of_a_ragged_batch_is_what_it_is_alone(sampling):
    rows = [prompt_of(n) for n in (5, 1, 11, 5, 2, 31, 30)]
    rows[3] = rows[0]
    options = {"max_new_tokens": 70, "sampling": sampling}
    together = generate(MODEL, rows, seed=3, **options)
    assert together == [alone(MODEL, row, r, seed=3, **options) for r, row in enumerate(rows)]
    assert len({tuple(ids) for ids in together}) == (6 if sampling == GREEDY else 7)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), SAMPLED], ids=str)
def test_rows_that_end_at_different_steps_leave_the_others_as_they_are(sampling):
    rows = [prompt_of(n) for n in (5, 9, 1, 11, 5)]
    options = {"max_new_tokens": 50, "sampling": sampling}
    free = [alone(MODEL, row, r, seed=5, **options) for r, row in enumerate(rows)]
    stops = [free[0][0], free[1][12], free[3][37]]
    together = generate(MODEL, rows, seed=5, stop_ids=stops, **options)
    assert together == [up_to(ids, stops) for ids in free]
    assert together[0] == [] and len({len(ids) for ids in together}) > 2


def drawn_rows(**options):
    return generate(MODEL, max_new_tokens=35, sampling=SAMPLED, **options)


def test_sample_k_is_the_same_for_any_number_of_samples():
    prompt = prompt_of(4)
    five = drawn_rows(rows=[prompt] * 5, seed=7)
    for n in (1, 2, 4):
        assert drawn_rows(rows=[prompt] * n, seed=7) == five[:n]
    assert len({ids[0] for ids in five}) > 1 and len(set(map(tuple, five))) == 5
    for k, ids in enumerate(five):
        assert uncached(MODEL, prompt, 35, drawn(SAMPLED, 7, k)) == ids


def test_the_same_seed_gives_the_same_ids_and_another_seed_others():
    rows = [prompt_of(4), prompt_of(9)]
    assert drawn_rows(rows=rows, seed=7) == drawn_rows(rows=rows, seed=7)
    assert drawn_rows(rows=rows, seed=7) != drawn_rows(rows=rows, seed=8)


def test_rows_of_uniform_scores_begin_differently():
    model = random_model()
    model.wte.weight.zero_()
    ids = generate(model, [[EOT]] * 16, max_new_tokens=1)
    assert len(set(map(tuple, ids))) > 10


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 256), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 17),
    st.sampled_from([GREEDY, SamplingConfig(), SAMPLED]),
    st.integers(0, 2**63 - 1),
)
def test_any_batch_is_row_by_row_the_uncached_reference(rows, n_new, sampling, seed):
    found = generate(SMALL, rows, max_new_tokens=n_new, sampling=sampling, seed=seed)
    for r, (row, ids) in enumerate(zip(rows, found)):
        assert ids == uncached(SMALL, row, n_new, drawn(sampling, seed, r))


@pytest.mark.parametrize("window", [1, 2, 3, 16, 31])
def test_past_the_window_greedy_ids_follow_the_stated_rule(window):
    model = random_model(block_size=window)
    rows = [prompt_of(n) for n in {1, max(1, window - 1), window, window + 5}]
    n_new = 3 * window + 2
    together = generate(model, rows, max_new_tokens=n_new, sampling=GREEDY)
    for row, ids in zip(rows, together):
        assert ids == uncached(model, row, n_new)
        assert generate(model, [row], max_new_tokens=n_new, sampling=GREEDY) == [ids]


def test_the_rule_matters_past_the_window():
    def cropped_by_one(prompt, n_new):
        text = list(prompt)
        for _ in range(n_new):
            text.append(likeliest(MODEL(torch.tensor([text[-WINDOW:]]))[0, -1], text))
        return text[len(prompt) :]

    prompt = prompt_of(9)
    ids = generate(MODEL, [prompt], max_new_tokens=3 * WINDOW, sampling=GREEDY)[0]
    other = cropped_by_one(prompt, 3 * WINDOW)
    assert ids[: WINDOW + 1 - 9] == other[: WINDOW + 1 - 9] and ids != other


@pytest.mark.parametrize("length", [1, 2, 15, 30, 31])
def test_the_window_slides_for_one_token_more_than_fits_and_not_before(monkeypatch, length):
    prompt, n_new = prompt_of(length), WINDOW + 1 - length
    shapes = reads_of(MODEL, monkeypatch)
    generate(MODEL, [prompt], max_new_tokens=n_new, sampling=GREEDY)
    assert shapes == [(1, length)] + [(1, 1)] * (n_new - 1)
    shapes.clear()
    generate(MODEL, [prompt], max_new_tokens=n_new + 1, sampling=GREEDY)
    assert shapes == [(1, length)] + [(1, 1)] * (n_new - 1) + [(1, WINDOW // 2), (1, 1)]


def test_a_full_row_slides_alone(monkeypatch):
    shapes = reads_of(MODEL, monkeypatch)
    generate(MODEL, [prompt_of(31), prompt_of(29), prompt_of(5)], max_new_tokens=4)
    again = (1, WINDOW // 2)
    assert shapes == [(3, 31), again, (3, 1), (3, 1), again, (3, 1)]


def test_equal_rows_are_read_once(monkeypatch):
    shapes = reads_of(MODEL, monkeypatch)
    a, b = prompt_of(5), prompt_of(8)
    generate(MODEL, [a, b, a, a], max_new_tokens=2)
    assert shapes == [(2, 8), (4, 1)]


def test_a_prompt_longer_than_the_window_keeps_its_end_and_warns_once(caplog):
    long, longer = prompt_of(40), prompt_of(50)
    options = {"max_new_tokens": 40, "sampling": GREEDY}
    expected = generate(MODEL, [long[-WINDOW:], longer[-WINDOW:], [5]], **options)
    assert not any("prompt" in record.getMessage() for record in caplog.records)
    caplog.clear()
    assert generate(MODEL, [long, longer, [5]], **options) == expected
    record, _ = caplog.records
    assert record.levelno == logging.WARNING and record.name == "minigpt2.generate"
    assert record.getMessage() == (
        "the prompt has 50 tokens, the model reads 31: its first 19 are dropped"
    )


def test_a_full_window_is_told_once_with_what_is_forgotten(caplog):
    generate(MODEL, [prompt_of(5), prompt_of(9)], max_new_tokens=22)
    assert not caplog.records  # the last token is not read
    generate(MODEL, [prompt_of(5), prompt_of(9)], max_new_tokens=95)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the model's window of 31 tokens is full: it forgets all but the last 15"
    )


def test_tokens_that_the_window_dropped_still_count_as_repeated():
    prompt = prompt_of(40)
    sampling = SamplingConfig(temperature=0, repetition_penalty=1.5)
    dropped = uncached(MODEL, prompt, 90, drawn(sampling, 0, 0))
    assert generate(MODEL, [prompt], max_new_tokens=90, sampling=sampling) == [dropped]
    assert dropped != generate(MODEL, [prompt[-WINDOW:]], max_new_tokens=90, sampling=sampling)[0]


def steps_of(rows, on_token, max_new_tokens=9):
    return decode(MODEL, rows, DecodeSettings(max_new_tokens, GREEDY), on_token)


def test_steps_hold_nothing_for_rows_that_ended_and_stop_with_the_last_row():
    rows, n_asked = [prompt_of(4), prompt_of(2), prompt_of(7)], [0, 0, 0]

    def on_token(row, token):
        n_asked[row] += 1
        return n_asked[row] == (2, 5, 3)[row]

    steps = list(steps_of(rows, on_token))
    assert [[len(tokens) for tokens in new] for new in steps] == [
        [1, 1, 1],
        [1, 1, 1],
        [0, 1, 1],
        [0, 1, 0],
        [0, 1, 0],
    ]
    assert n_asked == [2, 5, 3]
    free = [uncached(MODEL, row, 5) for row in rows]
    assert [[token.id for new in steps for token in new[r]] for r in range(3)] == [
        ids[:n] for ids, n in zip(free, (2, 5, 3))
    ]


def test_every_token_is_told_once_before_its_step_is_yielded():
    events = []
    for new in steps_of([[5], [6]], lambda row, token: events.append((row, token)), 3):
        assert events == [(0, new[0][0]), (1, new[1][0])]
        events.clear()


def test_the_logprob_of_a_token_is_the_models_own_before_temperature_and_filters():
    prompt = prompt_of(6)
    steps = decode(MODEL, [prompt], DecodeSettings(12, SAMPLED, seed=3), go_on)
    tokens = [token for ((token,),) in steps]
    text = prompt + [token.id for token in tokens]
    expected = MODEL(torch.tensor([text[:-1]]))[0].double().log_softmax(-1)
    for p, token in enumerate(tokens, start=len(prompt) - 1):
        assert token.logprob == pytest.approx(float(expected[p, token.id]), abs=2e-5)
    assert len({round(token.logprob, 2) for token in tokens}) > 5


def test_a_token_is_computed_when_it_is_asked_for(monkeypatch):
    shapes = reads_of(MODEL, monkeypatch)
    steps = steps_of([prompt_of(4)], go_on)
    assert shapes == []
    next(steps)
    assert shapes == [(1, 4)]
    next(steps)
    assert shapes == [(1, 4), (1, 1)]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig()], ids=str)
@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_are_refused_at_the_first_token(sampling, name, bad):
    model = random_model()
    model.get_parameter(name)[3] = bad
    with pytest.raises(InputError, match=r"not finite at new token 1: .* dtype float32"):
        generate(model, [[5, 3]], max_new_tokens=4, sampling=sampling)
    assert not model.training


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig()], ids=str)
def test_one_damaged_score_of_one_row_is_enough(sampling):
    model = random_model(tie_word_embeddings=False)
    model.wte.weight[7] = float("nan")
    assert generate(model, [[5]], max_new_tokens=1, sampling=sampling)
    with pytest.raises(InputError, match="not finite at new token 1"):
        generate(model, [[5], [7]], max_new_tokens=1, sampling=sampling)
    model = random_model(tie_word_embeddings=False)
    model.lm_head.weight[256] = float("nan")
    with pytest.raises(InputError, match="not finite at new token 1"):
        generate(model, [[5]], max_new_tokens=1, sampling=sampling)


def test_damage_met_later_is_refused_there_after_the_tokens_before_it():
    model = random_model()
    model.wpe.weight[4] = float("nan")
    ids = []
    with pytest.raises(InputError, match="not finite at new token 4"):
        for ((token,),) in decode(model, [[5, 6]], DecodeSettings(9, GREEDY), go_on):
            ids.append(token.id)
    assert len(ids) == 3


@pytest.mark.parametrize("was_training", [True, False])
def test_the_models_mode_is_restored(was_training):
    model = random_model().train(was_training)
    generate(model, [[5]], max_new_tokens=3)
    assert model.training == model.h[0].mlp.dropout.training == was_training
    with pytest.raises(ZeroDivisionError):
        list(decode(model, [[5]], DecodeSettings(9, GREEDY), lambda row, token: 1 // 0))
    assert model.training == model.h[0].mlp.dropout.training == was_training


def test_dropout_is_off_whatever_the_models_mode():
    model = random_model(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    expected = generate(MODEL, [[5, 6]], max_new_tokens=9, sampling=GREEDY)
    assert generate(model, [[5, 6]], max_new_tokens=9, sampling=GREEDY) == expected


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_the_global_random_state_is_left_alone(sampling):
    model = random_model(attn_pdrop=0.5).train()
    before = torch.get_rng_state()
    generate(model, [[5], [6, 7]], max_new_tokens=40, sampling=sampling)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows to continue"),
        ([[5], []], "row 1 is empty: start it with the end-of-text id"),
        ([[5, 257]], "row 0 holds ids from 5 to 257, the model knows 0 to 256"),
        ([[5], [7, -1]], "row 1 holds ids from -1 to 7, the model knows 0 to 256"),
    ],
)
def test_rows_that_the_model_cannot_read_are_refused(rows, message):
    with pytest.raises(InputError, match=message):
        generate(MODEL, rows, max_new_tokens=3)


def test_rows_are_left_as_they_were():
    rows = [[5, 6], [7]]
    generate(MODEL, rows, max_new_tokens=3)
    assert rows == [[5, 6], [7]]


def test_no_new_tokens_is_the_empty_continuation():
    assert generate(MODEL, [[5], [6, 7]], max_new_tokens=0) == [[], []]


def test_a_negative_number_of_new_tokens_is_refused():
    with pytest.raises(InputError, match="max_new_tokens is -1, allowed is 0 or more"):
        generate(MODEL, [[5]], max_new_tokens=-1)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), SAMPLED], ids=str)
def test_ids_of_a_padded_vocabulary_are_never_drawn(sampling):
    model = scripted(*range(257, 277), vocab_size=311)
    assert generate(model, [[5]], max_new_tokens=20, sampling=sampling) == [[*range(257, 277)]]
    (ids,) = generate(model, [[5]], max_new_tokens=20, sampling=sampling, vocab_size=257)
    assert len(ids) == 20 and max(ids) < 257


def test_a_padded_vocabulary_changes_no_other_score():
    rows = [prompt_of(4), prompt_of(9)]
    wide = random_model(vocab_size=311)
    wide.load_state_dict({**MODEL.state_dict(), "wte.weight": wide.wte.weight})
    wide.wte.weight[:257] = MODEL.wte.weight
    options = {"max_new_tokens": 30, "sampling": SAMPLED}
    assert generate(wide, rows, vocab_size=257, **options) == generate(MODEL, rows, **options)


def test_stop_ids_end_a_row_and_are_left_out():
    model = scripted(10, 11, 12, 13)
    assert generate(model, [[5]], max_new_tokens=4) == [[10, 11, 12, 13]]
    assert generate(model, [[5]], max_new_tokens=4, stop_ids=[12]) == [[10, 11]]
    assert generate(model, [[5]], max_new_tokens=4, stop_ids=[13, 11]) == [[10]]
    assert generate(model, [[5], [5, 5]], max_new_tokens=4, stop_ids=[10]) == [[], [11, 12, 13, 12]]


def test_random_ids_differ_so_that_equality_means_something():
    rows = token_ids(257, 4, 6).tolist()
    ids = generate(MODEL, rows, max_new_tokens=60, sampling=GREEDY)
    assert all(len(set(row)) > 10 for row in ids) and len(set(map(tuple, ids))) == 4


def test_rows_may_be_tensors_and_arrays():
    rows = [prompt_of(5), prompt_of(5, seed=1)]
    expected = generate(MODEL, rows, max_new_tokens=4, sampling=GREEDY)
    array = torch.tensor(rows)
    for same in (array, array.int(), array.numpy(), list(array), list(array.numpy())):
        assert generate(MODEL, same, max_new_tokens=4, sampling=GREEDY) == expected


def test_one_stop_id_may_stand_alone():
    row = prompt_of(5)
    [ids] = generate(MODEL, [row], max_new_tokens=9, sampling=GREEDY)
    for stop in (ids[3], [ids[3]], torch.tensor(ids[3])):
        found = generate(MODEL, [row], max_new_tokens=9, sampling=GREEDY, stop_ids=stop)
        assert found == [up_to(ids, {ids[3]})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, 2, 3], "rows is [1, 2, 3], allowed is a list of rows"),
        ([[1.0]], "row 0 of rows holds 1.0"),
        ([[1], [-1]], "row 1 holds ids from -1 to -1, the model knows 0 to 256"),
        ([[257]], "row 0 holds ids from 257 to 257, the model knows 0 to 256"),
        ([[10**30]], "row 0 holds ids"),
        ("text", "rows is 'text'"),
        (["text"], "row 0 of rows is 'text'"),
    ],
)
def test_rows_that_are_none_are_refused(rows, message):
    with pytest.raises(InputError) as caught:
        generate(MODEL, rows, max_new_tokens=1)
    assert message in str(caught.value)


def test_a_seed_may_be_negative():
    options = {"max_new_tokens": 5, "sampling": SAMPLED}
    assert generate(MODEL, [[1]], seed=-1, **options) != generate(MODEL, [[1]], seed=1, **options)
