"""However a text is decoded, its tokens are those of reading everything again for each of them."""

import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from hf_models import randomise, reference, token_ids
from minigpt2.errors import InputError
from minigpt2.generate import check_fits, complete, decode, generate, stream_text
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig, draw, probabilities, row_generator
from minigpt2.tokenizer import Tokenizer

WINDOW = 31
GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=1.3, top_k=97, top_p=0.95, repetition_penalty=1.2)
BYTES = Tokenizer.gpt2(257)  # one token a byte, and end-of-text
EOT = BYTES.eot


def random_model(dtype=torch.float32, **values):
    shape = {"vocab_size": 257, "block_size": WINDOW, "n_embd": 34, "n_layer": 3, "n_head": 2}
    model = GPT2(GPT2Config(**{**shape, **values})).to(dtype).eval()
    randomise(model, std=0.4)
    return model.requires_grad_(False)


MODEL = random_model()


@torch.no_grad()
def scripted(*tokens, vocab_size=257):
    """A model that says tokens[p] after position p, whatever it reads."""
    n = len(tokens)
    model = GPT2(
        GPT2Config(
            vocab_size=vocab_size, block_size=n, n_embd=n + 1, n_layer=1, n_head=1,
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.zero_()
    model.wpe.weight.fill_diagonal_(1)
    model.ln_f.weight.fill_(1)
    model.lm_head.weight[list(tokens), range(n)] = 1e4
    return model


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(257, (length,), generator=generator).tolist()


def likeliest(logits, text):
    return int(logits.argmax())


def drawn(sampling, seed, row):
    """A choice that draws as row `row` does under `seed`."""
    generator = row_generator(seed, row)

    def choose(logits, text):
        return int(draw(probabilities(logits[None], sampling, [text]), [generator]))

    return choose


def uncached(model, prompt, n_new, choose=likeliest):
    """The stated rule, in the plainest way: no cache, no batch, all of `read` again every time."""
    window = model.config.block_size
    text, read = list(prompt), prompt[-window:]
    for _ in range(n_new):
        text.append(choose(model(torch.tensor([read]))[0, -1], text))
        if len(read) == window:
            read = read[window - window // 2 :]
        read = [*read, text[-1]]
    return text[len(prompt) :]


def go_on(row, token):
    return False


def alone(model, prompt, row, *, seed, take=go_on, **options):
    """What row `row` says when it is the only one."""
    generators = [row_generator(seed, row)]
    rounds = decode(model, [prompt], generators=generators, take=take, **options)
    return [token.id for ((token,),) in rounds]


def up_to(ids, stops):
    return list(itertools.takewhile(lambda token: token not in stops, ids))


def reads_of(model, monkeypatch):
    """The shapes (B, T) of everything the model reads from now on."""
    shapes, hidden = [], model.hidden

    def spy(idx, cache=None):
        shapes.append(tuple(idx.shape))
        return hidden(idx, cache)

    monkeypatch.setattr(model, "hidden", spy)
    return shapes


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


SMALL = random_model(torch.float64, block_size=7, n_embd=10, n_layer=2)


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


def rounds_of(rows, take, max_new_tokens=9):
    return decode(
        MODEL,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=GREEDY,
        generators=[row_generator(0, row) for row in range(len(rows))],
        take=take,
    )


def test_rounds_hold_nothing_for_rows_that_ended_and_stop_with_the_last_row():
    rows, n_asked = [prompt_of(4), prompt_of(2), prompt_of(7)], [0, 0, 0]

    def take(row, token):
        n_asked[row] += 1
        return n_asked[row] == (2, 5, 3)[row]

    rounds = list(rounds_of(rows, take))
    assert [[len(tokens) for tokens in new] for new in rounds] == [
        [1, 1, 1],
        [1, 1, 1],
        [0, 1, 1],
        [0, 1, 0],
        [0, 1, 0],
    ]
    assert n_asked == [2, 5, 3]
    free = [uncached(MODEL, row, 5) for row in rows]
    assert [[token.id for new in rounds for token in new[r]] for r in range(3)] == [
        ids[:n] for ids, n in zip(free, (2, 5, 3))
    ]


def test_every_token_is_told_once_before_its_round():
    events = []
    for new in rounds_of([[5], [6]], lambda row, token: events.append((row, token)), 3):
        assert events == [(0, new[0][0]), (1, new[1][0])]
        events.clear()


def test_the_logprob_of_a_token_is_the_models_own_before_temperature_and_filters():
    prompt = prompt_of(6)
    rounds = decode(
        MODEL, [prompt], max_new_tokens=12, sampling=SAMPLED, generators=[row_generator(3, 0)],
        take=go_on,
    )  # fmt: skip
    tokens = [token for ((token,),) in rounds]
    text = prompt + [token.id for token in tokens]
    expected = MODEL(torch.tensor([text[:-1]]))[0].double().log_softmax(-1)
    for p, token in enumerate(tokens, start=len(prompt) - 1):
        assert token.logprob == pytest.approx(float(expected[p, token.id]), abs=2e-5)
    assert len({round(token.logprob, 2) for token in tokens}) > 5


def test_a_token_is_computed_when_it_is_asked_for(monkeypatch):
    shapes = reads_of(MODEL, monkeypatch)
    rounds = rounds_of([prompt_of(4)], go_on)
    assert shapes == []
    next(rounds)
    assert shapes == [(1, 4)]
    next(rounds)
    assert shapes == [(1, 4), (1, 1)]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig()], ids=str)
@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_are_refused_at_the_first_token(sampling, name, bad):
    model = random_model()
    model.get_parameter(name)[3] = bad
    with pytest.raises(InputError, match=r"not finite at new token 1: .* --dtype float32"):
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
        for ((token,),) in decode(
            model, [[5, 6]], max_new_tokens=9, sampling=GREEDY,
            generators=[row_generator(0, 0)], take=go_on,
        ):  # fmt: skip
            ids.append(token.id)
    assert len(ids) == 3


@pytest.mark.parametrize("was_training", [True, False])
def test_the_models_mode_is_restored(was_training):
    model = random_model().train(was_training)
    generate(model, [[5]], max_new_tokens=3)
    assert model.training == model.h[0].mlp.dropout.training == was_training
    pieces = stream_text(model, BYTES, "abc", max_new_tokens=9)
    next(pieces)
    pieces.close()  # abandoned
    assert model.training == model.h[0].mlp.dropout.training == was_training
    pieces = stream_text(model, BYTES, "abc", max_new_tokens=9)
    next(pieces)
    del pieces
    assert model.training == was_training
    rounds = decode(model, [[5]], max_new_tokens=9, sampling=GREEDY,
                    generators=[row_generator(0, 0)], take=lambda row, token: 1 // 0)  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        list(rounds)
    assert model.training == model.h[0].mlp.dropout.training == was_training


def test_dropout_is_off_whatever_the_models_mode():
    model = random_model(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    expected = generate(MODEL, [[5, 6]], max_new_tokens=9, sampling=GREEDY)
    assert generate(model, [[5, 6]], max_new_tokens=9, sampling=GREEDY) == expected


def test_no_gradient_is_prepared_inside_and_the_caller_between_tokens_keeps_gradients(monkeypatch):
    model, outputs = random_model().requires_grad_(True), []
    hidden = model.hidden

    def spy(idx, cache=None):
        outputs.append(hidden(idx, cache))
        return outputs[-1]

    monkeypatch.setattr(model, "hidden", spy)
    pieces = stream_text(model, BYTES, "abc", max_new_tokens=9)
    for n_pieces in (1, 2):
        next(pieces)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert [output.requires_grad for output in outputs] == [False] * n_pieces


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_the_global_random_state_is_left_alone(sampling):
    model = random_model(attn_pdrop=0.5).train()
    before = torch.get_rng_state()
    generate(model, [[5], [6, 7]], max_new_tokens=40, sampling=sampling)
    "".join(stream_text(model, BYTES, "abc", max_new_tokens=5, sampling=sampling))
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
    (written,) = complete(MODEL, BYTES, ["abc"], max_new_tokens=0)
    assert (written.text, written.ids, written.finish_reason) == ("", [], "length")
    assert "".join(stream_text(MODEL, BYTES, "abc", max_new_tokens=0)) == ""


def test_a_negative_number_of_new_tokens_is_refused():
    with pytest.raises(InputError, match="max_new_tokens is -1, allowed is 0 or more"):
        generate(MODEL, [[5]], max_new_tokens=-1)
    with pytest.raises(InputError, match="max_new_tokens is -3"):
        complete(MODEL, BYTES, ["abc"], max_new_tokens=-3)
    with pytest.raises(InputError, match="max_new_tokens is -3"):
        list(stream_text(MODEL, BYTES, "abc", max_new_tokens=-3))


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), SAMPLED], ids=str)
def test_ids_of_a_padded_vocabulary_are_never_drawn(sampling):
    model = scripted(*range(257, 277), vocab_size=311)
    assert generate(model, [[5]], max_new_tokens=20, sampling=sampling) == [[*range(257, 277)]]
    (ids,) = generate(model, [[5]], max_new_tokens=20, sampling=sampling, vocab_size=257)
    assert len(ids) == 20 and max(ids) < 257
    (written,) = complete(model, BYTES, [""], max_new_tokens=20, sampling=sampling)
    assert written.ids and max(written.ids) < 257


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


def written_by(text, *, tokenizer=BYTES, n=None, then=(EOT,), prompt="", stop=()):
    """What a model that says `text` is heard to say: by `complete`, and by `stream_text`."""
    tokens = [*tokenizer.encode(text), *then][:n]
    model = scripted(*tokens, vocab_size=tokenizer.vocab_size)
    options = {"max_new_tokens": len(tokens), "sampling": GREEDY, "stop": stop}
    (written,) = complete(model, tokenizer, [prompt], **options)
    pieces = list(stream_text(model, tokenizer, prompt, **options))
    assert "".join(pieces) == written.text
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    return written


texts = st.text(st.sampled_from("aab\n é€😀"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(texts, st.lists(st.text(st.sampled_from("ab\né😀"), min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_text_however_tokens_cut_it(text, stop):
    found = [text.find(s) for s in stop if s in text]
    assert written_by(text, stop=stop).text == text[: min(found, default=len(text))]


@settings(deadline=None, max_examples=20)
@given(text=texts, vocab_size=st.sampled_from([257, 300, 2048]))
def test_text_is_written_whole(text, vocab_size):
    tokenizer = Tokenizer.gpt2(vocab_size)
    written = written_by(text, tokenizer=tokenizer, then=(tokenizer.eot,))
    assert (written.text, written.finish_reason) == (text, "eot")
    assert written.ids == [*tokenizer.encode(text), tokenizer.eot]


@pytest.mark.parametrize("tokens", [[40, 198, 198, 40], [40, 628, 40], [40, 198, 628, 40]])
def test_a_stop_text_is_found_across_tokens_of_the_full_vocabulary(tokens):
    tokenizer = Tokenizer.gpt2()
    assert tokenizer.decode([198]) * 2 == tokenizer.decode([628]) == "\n\n"
    model = scripted(*tokens, vocab_size=50257)
    options = {"max_new_tokens": 4, "sampling": GREEDY, "stop": ["\n\n"]}
    (written,) = complete(model, tokenizer, [""], **options)
    assert (written.text, written.finish_reason) == ("I", "stop")
    assert "".join(stream_text(model, tokenizer, "", **options)) == "I"


def test_a_stop_text_within_a_token_ends_the_text_there():
    tokenizer = Tokenizer.gpt2()
    hello = tokenizer.encode(" hello")
    assert len(hello) == 1
    written = written_by(" hello", tokenizer=tokenizer, then=hello, stop=["ll"])
    assert (written.text, written.ids, written.finish_reason) == (" he", hello, "stop")


def test_the_beginning_of_a_stop_text_is_written_when_the_rest_does_not_come():
    written = written_by("a\nb\n", stop=["\n\n"])
    assert (written.text, written.finish_reason) == ("a\nb\n", "eot")


@pytest.mark.parametrize(
    ("text", "n", "stop", "expected", "reason"),
    [
        ("abc", None, [], "abc", "eot"),
        ("abc", 3, [], "abc", "length"),
        ("abc", 2, ["c"], "ab", "length"),
        ("abc", None, ["c"], "ab", "stop"),
        ("abc", 3, ["c"], "ab", "stop"),
        ("abc", None, ["x", "bc", "c"], "a", "stop"),
        ("", None, ["a"], "", "eot"),
    ],
)
def test_the_finish_reason_is_what_ended_the_text(text, n, stop, expected, reason):
    written = written_by(text, n=n, stop=stop)
    assert (written.text, written.finish_reason) == (expected, reason)


@pytest.mark.parametrize("n", [None, 3])
def test_a_stop_text_that_only_the_end_made_certain_is_the_finish_reason(n):
    # "abcd" might have begun before "bc", and did not come
    written = written_by("abc", n=n, stop=["abcd", "bc"])
    assert (written.text, written.finish_reason) == ("a", "stop")


def test_the_spelling_of_end_of_text_does_not_end_a_text():
    written = written_by("a<|endoftext|>b")
    assert (written.text, written.finish_reason) == ("a<|endoftext|>b", "eot")


def test_rows_end_for_their_own_reasons():
    model = scripted(*BYTES.encode("ab\ncd"), EOT, *BYTES.encode("xyz"))
    prompts = ["", "12", "1234", "1234567"]  # position 0, 1, 3, 6
    done = complete(model, BYTES, prompts, max_new_tokens=3, sampling=GREEDY, stop=["\n"])
    assert [(written.text, written.finish_reason) for written in done] == [
        ("ab", "stop"),
        ("b", "stop"),
        ("cd", "eot"),
        ("xyz", "length"),
    ]


@pytest.mark.parametrize(
    ("n", "expected"), [(1, "\ufffd"), (2, "é"), (3, "é\ufffd"), (4, "é\ufffd"), (6, "é😀")]
)
def test_a_character_cut_by_max_new_tokens_is_one_replacement_character(n, expected):
    written = written_by("é😀", n=n)
    assert (written.text, written.finish_reason) == (expected, "length")


def test_pieces_come_as_soon_as_their_characters_are_whole(monkeypatch):
    model = scripted(*BYTES.encode("aé\nb\n"), EOT)
    shapes = reads_of(model, monkeypatch)
    pieces = stream_text(model, BYTES, "", max_new_tokens=9, sampling=GREEDY, stop=["\n\n"])
    seen = [(piece, len(shapes)) for piece in pieces]
    assert seen == [("a", 1), ("", 2), ("é", 3), ("", 4), ("\nb", 5), ("", 6), ("", 7), ("\n", 7)]


@pytest.mark.parametrize("seed", range(5))
def test_streamed_pieces_are_the_text_of_complete(seed):
    # random bytes: most are no characters
    options = {"max_new_tokens": 90, "sampling": SamplingConfig(), "seed": seed, "stop": ["zz"]}
    (written,) = complete(MODEL, BYTES, ["Ein Wort, "], **options)
    assert "".join(stream_text(MODEL, BYTES, "Ein Wort, ", **options)) == written.text
    text = [token for token in written.ids if token != EOT]
    assert written.text == BYTES.decode(text) and len(text) > 5


def test_complete_continues_each_prompt_as_generate_does_its_ids():
    prompts = ["Ein Wort", "", "Ein Wort", "und é"]
    done = complete(MODEL, BYTES, prompts, max_new_tokens=50, sampling=SAMPLED, seed=11)
    rows = [BYTES.encode(prompt) or [EOT] for prompt in prompts]
    ids = generate(MODEL, rows, max_new_tokens=50, sampling=SAMPLED, seed=11, stop_ids=[EOT])
    assert [up_to(written.ids, [EOT]) for written in done] == ids
    assert [written.text for written in done] == [BYTES.decode(row) for row in ids]
    fewer = complete(MODEL, BYTES, prompts[:2], max_new_tokens=50, sampling=SAMPLED, seed=11)
    assert [(w.text, w.ids) for w in fewer] == [(w.text, w.ids) for w in done[:2]]


def test_an_empty_prompt_starts_from_end_of_text():
    (written,) = complete(MODEL, BYTES, [""], max_new_tokens=30, sampling=GREEDY)
    assert up_to(written.ids, [EOT]) == up_to(uncached(MODEL, [EOT], 30), [EOT])
    pieces = stream_text(MODEL, BYTES, "", max_new_tokens=30, sampling=GREEDY)
    assert "".join(pieces) == written.text != ""


def test_a_tokenizer_may_have_fewer_ids_than_the_model_not_more():
    check_fits(BYTES, MODEL)
    check_fits(BYTES, random_model(vocab_size=311))
    with pytest.raises(InputError, match="the tokenizer has 258 ids, the model 257"):
        check_fits(Tokenizer.gpt2(258), MODEL)


def test_a_long_prompt_may_be_text():
    text = "Ein langer Anfang, länger als das Fenster ist. " * 3
    (written,) = complete(MODEL, BYTES, [text], max_new_tokens=20, sampling=GREEDY)
    assert up_to(written.ids, [EOT]) == up_to(uncached(MODEL, BYTES.encode(text), 20), [EOT])


def test_random_ids_differ_so_that_equality_means_something():
    rows = token_ids(257, 4, 6).tolist()
    ids = generate(MODEL, rows, max_new_tokens=60, sampling=GREEDY)
    assert all(len(set(row)) > 10 for row in ids) and len(set(map(tuple, ids))) == 4


STORY = 'Ab 3.5 cd? "Ef gh!" (Ij.) Kl\nMn op'


@pytest.mark.parametrize(
    ("n", "expected", "reason"),
    [
        (1, "Ab 3.5 cd?", "sentence"),  # the point of 3.5 ends nothing
        (9, "Ab 3.5 cd?", "sentence"),
        (10, "Ab 3.5 cd?", "sentence"),  # it had just ended
        (11, "Ab 3.5 cd? ", "sentence"),  # and the space behind it is there, too
        (12, 'Ab 3.5 cd? "Ef gh!"', "sentence"),
        (20, 'Ab 3.5 cd? "Ef gh!" ', "sentence"),
        (21, 'Ab 3.5 cd? "Ef gh!" (Ij.)', "sentence"),
        (27, 'Ab 3.5 cd? "Ef gh!" (Ij.) Kl', "sentence"),  # a line ends one, too
        (30, STORY, "eot"),
    ],
)
def test_a_text_goes_on_to_the_end_of_its_sentence_when_asked(n, expected, reason):
    model = scripted(*BYTES.encode(STORY), EOT)
    options = {"max_new_tokens": n, "sampling": GREEDY, "finish_sentence": True}
    (written,) = complete(model, BYTES, [""], **options)
    assert (written.text, written.finish_reason) == (expected, reason)
    assert "".join(stream_text(model, BYTES, "", **options)) == expected
    assert n <= len(written.ids) == len(written.logprobs)


def test_a_sentence_without_end_is_given_up():
    model = scripted(*[BYTES.encode("a")[0]] * 200)
    (written,) = complete(
        model, BYTES, [""], max_new_tokens=7, sampling=GREEDY, finish_sentence=True
    )
    assert (len(written.ids), written.finish_reason) == (107, "length")
    (written,) = complete(
        model, BYTES, [""], max_new_tokens=0, sampling=GREEDY, finish_sentence=True
    )
    assert written.ids == []


@pytest.mark.parametrize("seed", range(4))
def test_banned_texts_are_not_written_and_the_prompt_does_not_count(seed):
    prompts, sampling = ["ab", "a"], SamplingConfig(temperature=1.5)
    options = {"max_new_tokens": 80, "sampling": sampling, "seed": seed}
    free = complete(MODEL, BYTES, prompts, **options)
    common = [next(c for c in written.text if c.isascii()) for written in free]
    for row in range(2):
        banned = complete(MODEL, BYTES, prompts, ban=common, **options)[row]
        assert not any(text in banned.text for text in common) and len(banned.text) > 3
        (alone,) = complete(MODEL, BYTES, [prompts[row]], ban=common, rows=[row], **options)
        assert alone.ids == banned.ids
    assert complete(MODEL, BYTES, ["ab"], ban=["ab\n\n\n\n"], **options)[0].ids == free[0].ids


def test_rows_name_the_random_numbers_of_each_prompt():
    options = {"max_new_tokens": 30, "sampling": SamplingConfig(), "seed": 4}
    ordered = complete(MODEL, BYTES, ["x"] * 4, **options)
    chosen = complete(MODEL, BYTES, ["x"] * 3, rows=[3, 0, 3], **options)
    assert [w.ids for w in chosen] == [ordered[k].ids for k in (3, 0, 3)]
    assert ordered[0].ids != ordered[3].ids
    pieces = stream_text(MODEL, BYTES, "x", row=3, **options)
    assert "".join(pieces) == ordered[3].text


def test_every_new_token_is_counted_once():
    counts = []
    done = complete(MODEL, BYTES, ["x", "yz"], max_new_tokens=40, sampling=SamplingConfig(),
                    on_tokens=counts.append)  # fmt: skip
    assert sum(counts) == sum(len(written.ids) for written in done) > 40
