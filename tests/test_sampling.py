"""Filters and probabilities are those of transformers, and draws follow the probabilities."""

import contextlib
import math
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chi_square import chi_square
from hf_models import reference, token_ids
from minigpt2.errors import InputError
from minigpt2.sampling import (
    NOTHING,
    Guess,
    SamplingConfig,
    accept,
    draw,
    min_p,
    no_repeat_ngram,
    probabilities,
    repetition_penalty,
    row_generator,
    temperature,
    top_k,
    top_p,
)

INF = float("inf")
LARGEST_BELOW_1 = 1 - 2**-53

# few different numbers, so that ties are the rule
tied = st.integers(-3, 3).map(float)
ordinary = st.integers(-320, 320).map(lambda eighths: eighths / 8)
# far beyond any model's, and still finite when divided by a temperature of 0.05
extreme = st.sampled_from([-INF, -1e37, -1e30, -1e-38, 1e30, 1e37])
temperatures = st.floats(0.05, 20)
shares = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.8]), st.floats(0, 1, exclude_max=True))
penalties = st.floats(0.1, 10)
quick = settings(deadline=None, max_examples=200)


@st.composite
def logit_rows(draw_from, values=(tied, ordinary, extreme)):
    """Float32 logits (B, V) with something finite in every row."""
    n_rows, n_vocab = draw_from(st.integers(1, 3)), draw_from(st.integers(2, 13))
    row = st.lists(st.one_of(*values), min_size=n_vocab, max_size=n_vocab)
    rows = st.lists(row.filter(lambda r: max(r) > -INF), min_size=n_rows, max_size=n_rows)
    return torch.tensor(draw_from(rows))


def ids_for(logits, data):
    """Ids (B, 5), perhaps with repeats, as a tensor and as lists."""
    n_rows, n_vocab = logits.shape
    row = st.lists(st.integers(0, n_vocab - 1), min_size=5, max_size=5)
    ids = torch.tensor(data.draw(st.lists(row, min_size=n_rows, max_size=n_rows)))
    return ids, ids.tolist()


def kept(logits):
    return (logits > -INF).tolist()


def one_hot(token, n_vocab):
    return [float(v == token) for v in range(n_vocab)]


@quick
@given(logit_rows(), st.integers(1, 15))
def test_top_k_is_that_of_transformers(logits, k):
    assert torch.equal(top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@quick
@given(logit_rows(), shares)
def test_top_p_is_that_of_transformers(logits, p):
    assert torch.equal(top_p(logits, p), TopPLogitsWarper(p)(None, logits))


def test_of_equally_likely_tokens_at_the_border_of_top_p_the_larger_ids_stay():
    row = torch.randint(0, 3, (1, 5000), generator=torch.Generator().manual_seed(0)).float()
    found = top_p(row, 0.95)
    lost = [i for i, (x, y) in enumerate(zip(row[0], found[0])) if x != y]
    smallest = [i for i, x in enumerate(row[0]) if x == 0]
    assert 0 < len(lost) < len(smallest) and lost == smallest[: len(lost)]


@quick
@given(logit_rows(), st.one_of(shares, st.just(1.0)))
def test_min_p_is_that_of_transformers(logits, p):
    assert torch.equal(min_p(logits, p), MinPLogitsWarper(p)(None, logits))


@quick
@given(logit_rows(), penalties, st.data())
def test_repetition_penalty_is_that_of_transformers(logits, penalty, data):
    ids, texts = ids_for(logits, data)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(repetition_penalty(logits, texts, penalty), expected)


@quick
@given(logit_rows(), temperatures)
def test_temperature_gives_the_probabilities_of_transformers(logits, t):
    logits = logits.double()
    expected = TemperatureLogitsWarper(t)(None, logits)
    assert kept(temperature(logits, t)) == kept(expected)
    close(temperature(logits, t).softmax(-1), expected.softmax(-1))


@settings(deadline=None, max_examples=400)
@given(
    logit_rows(), temperatures, st.integers(0, 15), st.one_of(shares, st.just(1.0)), shares,
    penalties, st.integers(0, 3), st.data(),
)  # fmt: skip
def test_the_chain_gives_the_probabilities_of_transformers(
    logits, t, k, p, share, penalty, n, data
):
    ids, texts = ids_for(logits, data)
    config = SamplingConfig(
        temperature=t, top_k=k, top_p=p, min_p=share, repetition_penalty=penalty, no_repeat_ngram=n
    )
    if n:  # where nothing is left theirs has no answer
        left = NoRepeatNGramLogitsProcessor(n)(ids, logits)
        assume(left.isfinite().any(-1).all())
    assume(config.top_k != 1 and config.top_p != 0)  # ties: greedy here, a draw in transformers
    expected, nearest = chain_of_transformers(logits.double(), ids, config)
    assume(nearest > 1e-9)  # on the border, the last bit of a division decides
    close(probabilities(logits.double(), config, texts), expected)


def chain_of_transformers(logits, ids, config):
    """Their probabilities, and how near a token is to the border of top-p or min-p."""
    nearest = 1.0
    logits = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(ids, logits)
    if config.no_repeat_ngram > 0:
        logits = NoRepeatNGramLogitsProcessor(config.no_repeat_ngram)(ids, logits)
    logits = TemperatureLogitsWarper(config.temperature)(ids, logits)
    if config.top_k > 0:
        logits = TopKLogitsWarper(config.top_k)(ids, logits)
    if config.top_p < 1:
        tails = logits.softmax(-1).sort(-1).values.cumsum(-1)
        nearest = min(nearest, float((tails - (1 - config.top_p)).abs().min()))
        logits = TopPLogitsWarper(config.top_p)(ids, logits)
    if config.min_p > 0:
        ratios = logits.softmax(-1) / logits.softmax(-1).max(-1, keepdim=True).values
        nearest = min(nearest, float((ratios - config.min_p).abs().min()))
        logits = MinPLogitsWarper(config.min_p)(ids, logits)
    return logits.softmax(-1), nearest


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.3, "top_k": 40},
        {"top_k": 300, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
        {"temperature": 0.7, "min_p": 0.05, "no_repeat_ngram": 1},
    ],
    ids=str,
)
def test_at_full_vocabulary_the_kept_tokens_are_those_of_transformers(values):
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(3, 50257, generator=generator, dtype=torch.float64)
    ids, config = token_ids(50257, 3, 11), SamplingConfig(**values)
    expected, _ = chain_of_transformers(logits, ids, config)
    found = probabilities(logits, config, ids.tolist())
    assert torch.equal(found > 0, expected > 0)
    assert 1 < int((found > 0).sum(-1).min()) <= int((found > 0).sum(-1).max()) < 50257
    close(found, expected)


def test_the_order_of_the_filters_is_that_of_transformers_generate(hf_folder):
    theirs = reference(hf_folder(), torch.float32)
    values = {"temperature": 1.7, "top_k": 23, "top_p": 0.8, "repetition_penalty": 1.4}
    prompt = token_ids(257, 2, 7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                **values, no_repeat_ngram_size=1, min_p=0.05, do_sample=True, max_new_tokens=9,
                pad_token_id=256, output_scores=True, output_logits=True,
                return_dict_in_generate=True,
            ),
        )  # fmt: skip
    config = SamplingConfig(**values, no_repeat_ngram=1, min_p=0.05)
    assert len(output.logits) == 9
    for n_new, (logits, scores) in enumerate(zip(output.logits, output.scores)):
        texts = output.sequences[:, : 7 + n_new].tolist()
        found = probabilities(logits, config, texts)
        assert torch.equal(found > 0, scores > -INF)
        torch.testing.assert_close(found, scores.softmax(-1), atol=1e-5, rtol=0)


def test_top_p_keeps_the_token_that_crosses_p():
    probs = torch.tensor([[0.3, 0.1, 0.1, 0.5], [0.15, 0.3, 0.3, 0.25]])
    expected = torch.tensor([[0.3, 0, 0, 0.5], [0, 0.3, 0.3, 0.25]])
    torch.testing.assert_close(top_p(probs.log(), 0.8).exp(), expected)


def test_top_p_stops_where_p_is_reached_exactly():
    assert sum(kept(top_p(torch.zeros(1, 2), 0.5))[0]) == 1
    assert sum(kept(top_p(torch.zeros(1, 4), 0.5))[0]) == 2


def test_temperature_comes_before_top_p():
    logits = torch.tensor([[2, 1, 0.5, -1, -3]])
    probs = probabilities(logits, SamplingConfig(temperature=2, top_p=0.8))
    assert (probs > 0).tolist() == [[True, True, True, False, False]]
    assert kept(top_p(logits, 0.8)) == [[True, True, False, False, False]]
    expected = (logits[:, :3] / 2).softmax(-1)
    torch.testing.assert_close(probs[:, :3], expected)


def test_temperature_keeps_nearly_tied_tokens_apart():
    # 5 - 1e-9 is 5 in float32: measured from the largest, the other two would be tied
    logits = torch.tensor([[5.0, 1e-9, 0.0]])
    probs = probabilities(logits, SamplingConfig(temperature=0.7, top_k=2))
    assert (probs > 0).tolist() == [[True, True, False]]


def test_what_top_k_leaves_is_made_a_distribution_before_top_p():
    # of all, the two likeliest have 0.6 of the probability; of the three kept, 0.75
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]]).log()
    logits[0, 2] -= 1e-3
    probs = probabilities(logits, SamplingConfig(top_k=3, top_p=0.7))
    assert (probs > 0).tolist() == [[True, True, False, False, False]]
    assert kept(top_p(logits, 0.7)) == [[True, True, True, False, False]]


def test_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not():
    logits = torch.tensor([[0.1, -0.1, 0.3, 0, 0.2, 0.4], [0.4, 0.1, 0.2, 0, 0.3, -0.1]])
    texts = [[0, 1], [5, 0]]
    expected = torch.tensor([[0.05, -0.2, 0.3, 0, 0.2, 0.4], [0.2, 0.1, 0.2, 0, 0.3, -0.2]])
    torch.testing.assert_close(repetition_penalty(logits, texts, 2.0), expected)


def test_without_marks_there_is_no_repetition_penalty():
    logits = torch.tensor([[1.0, 2.0, -3.0]])
    config = SamplingConfig(repetition_penalty=5.0)
    assert torch.equal(probabilities(logits, config), logits.softmax(-1))


def test_top_k_keeps_all_that_are_tied_with_the_last_one():
    logits = torch.tensor([[1.0, 2, 2, 2, 0]])
    assert kept(top_k(logits, 2)) == [[False, True, True, True, False]]


def test_min_p_measures_by_the_likeliest_token():
    probs = torch.tensor([[0.5, 0.26, 0.24, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert kept(min_p(probs.log(), 0.5)) == [[True, True, False, False], [True] * 4]


FILTERS = {
    "temperature": (temperature, temperatures, 1),
    "top_k": (top_k, st.integers(1, 15), 0),
    "top_p": (top_p, shares, 1),
    "min_p": (min_p, st.one_of(shares, st.just(1.0)), 0),
}


@pytest.mark.parametrize("name", FILTERS)
@quick
@given(data=st.data())
def test_a_filter_leaves_its_input_alone_and_a_token_in_every_row(name, data):
    apply, values, _ = FILTERS[name]
    logits = data.draw(logit_rows())
    before = logits.clone()
    after = apply(logits, data.draw(values))
    assert torch.equal(logits, before)
    assert after.shape == logits.shape and after.dtype == logits.dtype
    assert not after.isnan().any() and (after > -INF).any(-1).all()
    assert not ((after > -INF) & (before == -INF)).any()
    likeliest = before == before.max(-1, keepdim=True).values
    assert ((after > -INF) & likeliest).any(-1).all()


@quick
@given(logit_rows((tied, ordinary)), penalties, st.data())
def test_repetition_penalty_leaves_its_input_alone(logits, penalty, data):
    ids, texts = ids_for(logits, data)
    before = logits.clone()
    after = repetition_penalty(logits, texts, penalty)
    assert torch.equal(logits, before) and texts == ids.tolist()
    unseen = torch.ones_like(logits, dtype=torch.bool).scatter(1, ids, False)
    assert torch.equal(after[unseen], logits[unseen])
    assert ((after <= logits) if penalty >= 1 else (after >= logits)).all()


@pytest.mark.parametrize("name", FILTERS)
@quick
@given(logits=logit_rows())
def test_a_filter_at_its_neutral_value_is_the_identity(name, logits):
    apply, _, neutral = FILTERS[name]
    assert torch.equal(apply(logits, neutral), logits)


@quick
@given(logit_rows(), st.sampled_from([13, 50257, 10**6]))
def test_a_top_k_of_the_vocabulary_and_more_keeps_all(logits, k):
    assert torch.equal(top_k(logits, k), logits)


@quick
@given(logit_rows(), st.data())
def test_a_repetition_penalty_of_one_is_the_identity(logits, data):
    assert torch.equal(repetition_penalty(logits, ids_for(logits, data)[1], 1), logits)


def test_neutral_settings_are_softmax():
    logits = token_ids(97, 3, 31).float() / 7
    texts = [list(range(31))] * 3
    assert torch.equal(probabilities(logits, SamplingConfig(), texts), logits.softmax(-1))


@quick
@given(logit_rows((tied, ordinary, st.just(-INF))), temperatures, shares, shares, st.data())
def test_probabilities_are_distributions_and_leave_their_input_alone(logits, t, p, share, data):
    ids, texts = ids_for(logits, data)
    before = logits.clone()
    config = SamplingConfig(temperature=t, top_k=3, top_p=p, min_p=share, repetition_penalty=1.5)
    probs = probabilities(logits, config, texts)
    assert torch.equal(logits, before) and texts == ids.tolist()
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(logits)))
    assert (probs >= 0).all() and not probs[logits == -INF].any()


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0),
        SamplingConfig(top_k=1),
        SamplingConfig(top_p=0),
        SamplingConfig(temperature=0, top_k=5, top_p=0.3, min_p=0.2),
        SamplingConfig(temperature=9, top_k=1),
    ],
    ids=str,
)
def test_greedy_settings_are_one_hot_at_the_first_of_the_likeliest(config):
    logits = torch.tensor([[0.0, 2, 1, 2, 2], [-5, -INF, -4, -6, -4], [0, 0, 0, 0, 0]])
    expected = [one_hot(token, 5) for token in (1, 2, 0)]
    assert probabilities(logits, config).tolist() == expected


def test_the_repetition_penalty_counts_when_greedy_too():
    logits, config = (
        torch.tensor([[3.0, 2.0, 1.0]]),
        SamplingConfig(temperature=0, repetition_penalty=2),
    )
    assert probabilities(logits, config, [[0]]).tolist() == [one_hot(1, 3)]


# few different tokens, so that sequences repeat
loops = st.lists(st.integers(0, 2), max_size=14)


@quick
@given(logit_rows((tied, ordinary)), st.lists(loops, min_size=3, max_size=3), st.integers(1, 4))
def test_no_repeat_ngram_is_that_of_transformers(logits, texts, n):
    assume(logits.shape[1] > 3)  # one token is always left
    texts = texts[: len(logits)]
    for row, text in zip(logits, texts):
        expected = NoRepeatNGramLogitsProcessor(n)(
            torch.tensor([text], dtype=torch.int64), row[None]
        )
        before = row.clone()
        assert torch.equal(no_repeat_ngram(row[None], [text], n), expected)
        assert torch.equal(row, before)
    together = no_repeat_ngram(logits, texts, n)
    for row, one, text in zip(together, logits, texts):
        assert torch.equal(row, no_repeat_ngram(one[None], [text], n)[0])


@pytest.mark.parametrize(("n", "dropped"), [(1, {1, 2, 3}), (2, {2, 3}), (3, {3}), (4, set())])
def test_an_ngram_that_was_there_does_not_come_again(n, dropped):
    logits = torch.zeros(1, 5)
    after = no_repeat_ngram(logits, [[1, 2, 1, 3, 2, 1]], n)
    expected = {1: {1, 2, 3}, 2: {2, 3}, 3: {3}, 4: set()}[n]
    assert {v for v in range(5) if after[0, v] == -INF} == expected == dropped


def test_where_every_ngram_was_there_the_row_stays_as_it_was():
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    after = no_repeat_ngram(logits, [[0, 1], [0]], 1)
    assert after.tolist() == [[1.0, 2.0], [-INF, 4.0]]


@pytest.mark.parametrize("t", [0, 0.7])
def test_where_bans_and_ngrams_leave_nothing_together_the_bans_stay(t):
    logits = torch.tensor([[5.0, 4.0, 3.0, -INF], [5.0, 4.0, 3.0, -INF]])
    banned = torch.tensor([[True, False, False, False], [False, False, False, False]])
    config = SamplingConfig(temperature=t, no_repeat_ngram=1)
    probs = probabilities(logits, config, [[1, 2], [0, 1]], banned)
    assert [[v for v in range(4) if row[v] > 0] for row in probs] == [[1, 2] if t else [1], [2]]
    close(probs.sum(-1), torch.ones(2))


@pytest.mark.parametrize("t", [0, 0.7])
def test_banned_tokens_and_repeated_ngrams_never_come(t):
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]] * 2)
    banned = torch.tensor([[True, False, False, False], [False, False, True, False]])
    config = SamplingConfig(temperature=t, no_repeat_ngram=2)
    probs = probabilities(logits, config, [[3, 1, 3], [2, 0, 2]], banned)
    expected = [[2, 3], [1, 3]] if t else [[2], [1]]
    assert [[v for v in range(4) if row[v] > 0] for row in probs] == expected


def test_certain_rows_use_up_one_number_like_the_others():
    # or a row would go on differently beside one that has a choice
    certain, open_ = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.3, 0.3, 0.4])
    alone, beside = row_generator(1, 0), row_generator(1, 0)
    assert draw(certain[None], [alone]).tolist() == [1]
    assert draw(torch.stack((certain, open_)), [beside, row_generator(1, 1)])[0] == 1
    assert torch.equal(alone.get_state(), beside.get_state())
    assert not torch.equal(alone.get_state(), row_generator(1, 0).get_state())


@pytest.mark.parametrize("t", [1e-3, 1e-8, 1e-38, 1e-45, 1e-46, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(t):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1e30, -3e38, -2e30]])
    assert probabilities(logits, SamplingConfig(temperature=t)).tolist() == [
        one_hot(1, 3),
        one_hot(0, 3),
    ]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "values", [{"repetition_penalty": p} for p in (1e-300, 1e-39, 1e39, 1e300)], ids=str
)
def test_extreme_penalties_are_refused_or_give_a_distribution(values, sign):
    logits = sign * torch.tensor([[1.0, 3.0, 2.0]])
    with contextlib.suppress(InputError):
        probs = probabilities(logits, SamplingConfig(**values), [[0, 1, 2]])
        assert math.isclose(float(probs.sum()), 1, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_have_float32_probabilities(dtype):
    logits = (torch.arange(300) / 100).to(dtype)[None]
    config = SamplingConfig(temperature=0.7, top_p=0.9)
    found = probabilities(logits, config)
    assert found.dtype == torch.float32
    assert torch.equal(found, probabilities(logits.float(), config))


def test_float64_logits_have_float64_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    assert probabilities(logits, SamplingConfig()).dtype == torch.float64
    assert probabilities(logits, SamplingConfig(temperature=0)).dtype == torch.float64


def test_draws_follow_the_probabilities():
    n_draws, generator = 20_000, row_generator(1, 0)
    probs = torch.tensor([0.3, 0.05, 0.0, 0.2, 0.01, 0.14, 0.0, 0.24, 0.05, 0.01, 0.0])
    tokens = draw(probs.expand(n_draws, -1), [generator] * n_draws)
    counts, expected = tokens.bincount(minlength=11), n_draws * probs
    possible = probs > 0
    assert counts[~possible].tolist() == [0, 0, 0]
    chi_square = ((counts - expected) ** 2 / expected)[possible].sum()
    assert chi_square < 24.3  # the 0.999 quantile for 7 degrees of freedom


def test_draws_of_uniform_rows_differ():
    tokens = draw(torch.full((16, 257), 1 / 257), [row_generator(0, row) for row in range(16)])
    assert tokens.dtype == torch.int64 and tokens.shape == (16,)
    assert len(set(tokens.tolist())) > 10


class Uniforms:
    """Stands for torch.rand and returns given numbers, one a call."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def __call__(self, *size, generator, dtype):
        assert size == (1,) and dtype == torch.float64 and generator.device.type == "cpu"
        return torch.tensor([self.numbers.pop(0)], dtype=dtype)


weights = st.one_of(st.just(0.0), st.sampled_from([1e-38, 1e-12, 1.0]), st.floats(0, 1, width=32))
uniforms = st.one_of(
    st.sampled_from([0.0, 2.0**-53, 0.25, 0.5, 0.75, LARGEST_BELOW_1]),
    st.floats(0, LARGEST_BELOW_1),
)


@st.composite
def distributions(draw_from):
    row = draw_from(st.lists(weights, min_size=1, max_size=11).filter(lambda w: sum(w) > 0))
    return torch.tensor([row]) / sum(row)


@settings(deadline=None, max_examples=400)
@given(distributions(), uniforms)
def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_the_number(probs, u):
    assume(probs.sum() > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", Uniforms(u))
        token = int(draw(probs, [torch.Generator()]))
    sums = list(accumulate(probs[0].tolist()))
    assert token == next(v for v, total in enumerate(sums) if total > u * sums[-1])
    assert probs[0, token] > 0


@pytest.mark.parametrize("n_vocab", [3, 257, 50257])
@pytest.mark.parametrize("u", [0.0, LARGEST_BELOW_1])
def test_the_smallest_and_largest_numbers_draw_the_first_and_last_possible_token(
    monkeypatch, n_vocab, u
):
    logits = token_ids(97, 2, n_vocab).float() / 7
    logits[:, 0] = logits[:, -1] = -INF
    monkeypatch.setattr(torch, "rand", Uniforms(u, u))
    tokens = draw(logits.softmax(-1), [torch.Generator()] * 2)
    assert tokens.tolist() == [1 if u == 0 else n_vocab - 2] * 2


def test_each_row_draws_one_number_from_its_own_generator():
    probs = token_ids(97, 5, 257).float().softmax(-1) / 2 + 1 / 514
    together, alone = ([row_generator(7, row) for row in range(5)] for _ in range(2))
    for _ in range(3):
        tokens = draw(probs, together)
        separate = [draw(probs[b : b + 1], [alone[b]]) for b in range(5)]
        assert torch.equal(tokens, torch.cat(separate))
    fresh = row_generator(7, 3)
    torch.rand(3, generator=fresh, dtype=torch.float64)
    assert torch.equal(fresh.get_state(), together[3].get_state())


def test_draws_and_generators_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    probabilities(torch.zeros(1, 5), SamplingConfig(temperature=0))
    draw(torch.full((1, 5), 0.2), [row_generator(0, 0)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rows_numbers_depend_on_seed_and_row_alone():
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 11), (11, 1), (-1, 0), (2**63 - 1, 0), (2**64, 3)]
    first = [torch.rand(4, generator=row_generator(*pair)).tolist() for pair in pairs]
    again = [torch.rand(4, generator=row_generator(*pair)).tolist() for pair in pairs]
    assert first == again
    assert len(set(map(tuple, first))) == len(pairs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "0.8"}, "temperature is '0.8', allowed is a number"),
        ({"temperature": None}, "temperature is None, allowed is a number"),
        ({"temperature": -1}, "temperature is -1, allowed is 0 or more"),
        ({"top_k": 1.5}, "top_k is 1.5, allowed is a whole number"),
        ({"top_k": True}, "top_k is True, allowed is a whole number"),
        ({"top_p": [0.5]}, "top_p is [0.5], allowed is a number"),
    ],
)
def test_options_of_other_types_are_refused_by_parameter(values, message):
    with pytest.raises(InputError) as caught:
        SamplingConfig(**values)
    assert str(caught.value) == message


# guesses, and how they are checked


def accepted(guess, probs, n=8000):
    """Counts (V,) of the first token that `accept` returns, and how often it was the guess."""
    generator, counts = torch.Generator().manual_seed(4), torch.zeros(probs.shape[1])
    lengths = []
    for _ in range(n):
        (ids,) = accept([guess], probs[None], [generator])
        counts[ids[0]] += 1
        lengths.append(len(ids))
    return counts.double(), lengths


P = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.1, 0.4, 0.0, 0.5]])


@pytest.mark.parametrize("token", range(4))
def test_a_certain_guess_stays_with_its_probability_and_changes_no_distribution(token):
    counts, lengths = accepted(Guess([token]), P)
    assert chi_square(counts, P[0].double()) > 1e-3
    assert lengths.count(2) == int(counts[token]) and set(lengths) <= {1, 2}


@pytest.mark.parametrize(
    "q", [[0.25, 0.25, 0.25, 0.25], [0.0, 0.9, 0.1, 0.0], [0.5, 0.2, 0.3, 0.0]], ids=str
)
def test_a_drawn_guess_changes_no_distribution(q):
    q, generator, counts = torch.tensor(q), torch.Generator().manual_seed(6), torch.zeros(4)
    stayed = 0
    for _ in range(8000):
        token = int(torch.multinomial(q, 1, generator=generator))
        (ids,) = accept([Guess([token], q[None])], P[None], [generator])
        counts[ids[0]] += 1
        stayed += len(ids) == 2
    assert chi_square(counts.double(), P[0].double()) > 1e-3
    overlap = float(torch.minimum(q, P[0]).sum())  # Leviathan et al., theorem 3.5
    assert stayed / 8000 == pytest.approx(overlap, abs=0.02)


def test_tokens_of_probability_zero_are_never_accepted():
    counts, _ = accepted(Guess([3]), P, n=500)
    assert counts[3] == 0


def test_without_guesses_one_token_comes():
    assert [len(ids) for ids in accept([NOTHING] * 2, P[:, None], [torch.Generator()] * 2)] == [
        1, 1
    ]  # fmt: skip
