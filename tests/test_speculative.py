"""Guessing ahead changes how soon a text comes, never which texts come how often."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from hf_models import randomise
from minigpt2.errors import InputError
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig, probabilities, row_generator
from minigpt2.speculative import NOTHING, Guess, ModelDrafter, NGramDrafter, Tally, accept

GREEDY = SamplingConfig(temperature=0)
WINDOW = 31


def random_model(seed=0, std=0.4, **values):
    shape = {"vocab_size": 257, "block_size": WINDOW, "n_embd": 34, "n_layer": 3, "n_head": 2}
    model = GPT2(GPT2Config(**{**shape, **values})).eval()
    randomise(model, std=std, seed=seed)
    return model.requires_grad_(False)


MODEL = random_model()
SMALL = random_model(seed=1, n_layer=1, n_embd=14, block_size=23)


def model_drafter(model, sampling, rows=9, **options):
    return ModelDrafter(model, sampling, [row_generator(99, row) for row in range(rows)], **options)


class Oracle:
    """Guesses what will come, spoiled after `good` tokens."""

    def __init__(self, futures, good):
        self.futures, self.good = futures, good

    def propose(self, rows, texts, limit):
        guesses = []
        for row, text in zip(rows, texts):
            ids = self.futures[row][len(text) : len(text) + self.good + 2]
            ids[self.good : self.good + 1] = [256 - token for token in ids[self.good :][:1]]
            guesses.append(Guess(ids[:limit]))
        return guesses


def prompts(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(257, (n,), generator=generator).tolist() for n in lengths]


DRAFTERS = {
    "ngram": lambda: NGramDrafter(n_guesses=5, longest=2, shortest=1),
    "itself": lambda: model_drafter(MODEL, GREEDY),
    "another model": lambda: model_drafter(SMALL, GREEDY, n_guesses=3),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("lengths", [(5,), (3, 11, 1, 29), (40,)], ids=str)
def test_greedy_text_is_that_of_plain_decoding_over_three_windows(name, lengths):
    rows = prompts(*lengths)
    expected = generate(MODEL, rows, max_new_tokens=95, sampling=GREEDY)
    drafter = DRAFTERS[name]()
    assert generate(MODEL, rows, max_new_tokens=95, sampling=GREEDY, drafter=drafter) == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.lists(st.integers(1, 34), min_size=1, max_size=4), st.integers(0, 70))
def test_however_many_guesses_are_right_the_greedy_text_is_the_same(good, lengths, n_new):
    rows = prompts(*lengths)
    expected = generate(MODEL, rows, max_new_tokens=n_new, sampling=GREEDY)
    oracle = Oracle([row + new for row, new in zip(rows, expected)], good)
    assert generate(MODEL, rows, max_new_tokens=n_new, sampling=GREEDY, drafter=oracle) == expected


@pytest.mark.parametrize("good", [0, 1, 4])
def test_a_check_brings_the_right_guesses_and_one_token_more(good):
    rows = prompts(4)
    expected = generate(MODEL, rows, max_new_tokens=21, sampling=GREEDY)
    tally = Tally(Oracle([rows[0] + expected[0]], good))
    ids = generate(MODEL, rows, max_new_tokens=21, sampling=GREEDY, drafter=tally)
    assert ids == expected
    assert tally.tokens == tally.readings * (good + 1) > 0
    before = tally.tokens
    generate(MODEL, rows, max_new_tokens=21, sampling=GREEDY, drafter=tally)  # and once more
    assert tally.tokens == tally.readings * (good + 1) == 2 * before


def test_stop_ids_and_limits_hold_inside_a_guess():
    rows = prompts(4)
    (expected,) = generate(MODEL, rows, max_new_tokens=20, sampling=GREEDY)
    oracle = Oracle([rows[0] + expected], 6)
    for n in range(21):
        assert generate(MODEL, rows, max_new_tokens=n, sampling=GREEDY, drafter=oracle) == [
            expected[:n]
        ]
    for stop in set(expected):
        (ids,) = generate(
            MODEL, rows, max_new_tokens=20, sampling=GREEDY, stop_ids=[stop], drafter=oracle
        )
        assert ids == expected[: expected.index(stop)]


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.4}, {"no_repeat_ngram": 2}], ids=str)
def test_filters_that_read_the_text_read_the_guesses_before_each_token(penalty):
    sampling = SamplingConfig(temperature=0, **penalty)
    rows = prompts(6, 9)
    expected = generate(MODEL, rows, max_new_tokens=60, sampling=sampling)
    oracle = Oracle([row + new for row, new in zip(rows, expected)], 4)
    assert generate(MODEL, rows, max_new_tokens=60, sampling=sampling, drafter=oracle) == expected
    assert expected != generate(MODEL, rows, max_new_tokens=60, sampling=GREEDY)


def chi_square(counts, probs):
    """The probability of counts at least so far from the expected ones."""
    expected = probs * counts.sum()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    kept = expected > 0
    assert not counts[~kept].any()
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    return float(chi2.sf(statistic, int(kept.sum()) - 1))


TINY = random_model(std=0.7, vocab_size=5, block_size=9, n_embd=6, n_layer=2, n_head=2)
TINY_DRAFT = random_model(seed=5, std=0.7, vocab_size=5, block_size=5, n_embd=4, n_layer=1)
SETTINGS = [
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.6, top_k=4),
    SamplingConfig(top_p=0.8, repetition_penalty=1.3),
]


def exact_distribution(sampling, prompt, n_new):
    """The probability of every continuation, by reading all of them."""
    probs = {(): 1.0}
    for _ in range(n_new):
        longer = {}
        for ids, p in probs.items():
            text = [*prompt, *ids]
            row = probabilities(TINY(torch.tensor([text]))[:, -1], sampling, [text])[0]
            longer |= {(*ids, token): p * float(row[token]) for token in range(5)}
        probs = longer
    return probs


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_texts_come_as_often_as_in_plain_decoding(kind, sampling):
    prompt, n = [1, 2, 1, 2], 6000
    probs = exact_distribution(sampling, prompt, 4)
    if kind == "ngram":
        drafter = NGramDrafter(n_guesses=3, longest=2, shortest=1)
    else:
        drafter = model_drafter(TINY_DRAFT, sampling, rows=n, n_guesses=2)
    tally = Tally(drafter)
    rows = generate(TINY, [prompt] * n, max_new_tokens=4, sampling=sampling, seed=13, drafter=tally)
    counts = dict.fromkeys(probs, 0)
    for row in rows:
        counts[tuple(row)] += 1
    assert tally.readings < tally.tokens < tally.readings * 2  # some guesses fall, some stay
    expected = torch.tensor(list(probs.values()), dtype=torch.float64)
    assert chi_square(torch.tensor(list(counts.values())).double(), expected) > 1e-3


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 9, 8, 7, 1, 2, 3], [9, 8, 7, 1]),  # three agree
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2, 6]),  # the newest place counts
        ([4, 1, 2, 5, 3, 2, 6, 4, 1, 2], [5, 3, 2, 6]),  # the longest agreement counts
        ([1, 2, 3, 4], []),
        ([7, 3, 7], []),  # one token is too little
        ([5, 5, 5], [5, 5, 5, 5]),  # it goes round
        ([5], []),
    ],
)
def test_ngram_guesses_are_what_followed_before(text, expected):
    (guess,) = NGramDrafter(n_guesses=4, longest=3, shortest=2).propose([0], [text], 9)
    assert guess == Guess(expected)


def test_a_drafter_keeps_to_the_limit():
    text = [1, 2, 3, 1, 2]
    for limit in range(4):
        (guess,) = NGramDrafter(n_guesses=8).propose([0], [text], limit)
        assert guess.ids == [3, 1, 2, 3][:limit]
        (guess,) = model_drafter(MODEL, GREEDY).propose([0], [text], limit)
        assert len(guess.ids) == limit


def test_a_model_drafter_guesses_what_its_model_says_wherever_the_text_goes():
    drafter = model_drafter(SMALL, GREEDY, n_guesses=3)
    text = prompts(9)[0]
    for new in ([], [5], [6, 7, 8], [1] * 20):
        text = text + new
        (guess,) = drafter.propose([0], [text], 9)
        if len(text) + 2 <= 23:
            (expected,) = generate(SMALL, [text], max_new_tokens=3, sampling=GREEDY)
            assert guess.ids == expected
        assert len(guess.ids) == 3 and guess.probs.shape == (3, 257)


def test_a_model_drafter_reads_only_what_is_new(monkeypatch):
    shapes, caches, hidden, make_cache = [], [], SMALL.hidden, SMALL.make_cache

    def reading(idx, cache=None):
        shapes.append(tuple(idx.shape))
        return hidden(idx, cache)

    monkeypatch.setattr(SMALL, "hidden", reading)
    monkeypatch.setattr(SMALL, "make_cache", lambda n: caches.append(n) or make_cache(n))
    drafter = model_drafter(SMALL, GREEDY, n_guesses=3)
    (guess,) = drafter.propose([0], [[5, 6, 7, 8]], 9)
    assert shapes == [(1, 4), (1, 1), (1, 1)]
    shapes.clear()
    drafter.propose([0], [[5, 6, 7, 8, *guess.ids[:1], 99]], 9)  # the second guess fell
    assert shapes == [(1, 1), (1, 1), (1, 1)]
    assert caches == [1]


def test_padding_of_a_vocabulary_is_not_guessed():
    padded = random_model(tie_word_embeddings=False)
    padded.lm_head.weight[200:] = padded.lm_head.weight[200:] * 0
    padded.lm_head.weight[201] = 100 * padded.ln_f.bias
    drafter = model_drafter(padded, SamplingConfig(), vocab_size=200, n_guesses=9)
    (guess,) = drafter.propose([0], [[3, 4]], 9)
    assert max(guess.ids) < 200 and not guess.probs[:, 200:].any()


@pytest.mark.parametrize("values", [{"n_guesses": 0}, {"shortest": 0}, {"longest": 1}], ids=str)
def test_ngram_sizes_that_make_no_sense_are_refused(values):
    with pytest.raises(InputError, match="guesses are 1 or more"):
        NGramDrafter(**values)
