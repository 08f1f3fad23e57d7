"""Guessing ahead changes how soon a text comes, never which texts come how often."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chi_square import chi_square
from hf_models import randomise
from minigpt2.decoding.drafters import CountingDrafter, DrafterFactory, ModelDrafter, NGramDrafter
from minigpt2.decoding.options import SampleOptions
from minigpt2.errors import InputError
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import Guess, SamplingConfig, probabilities, row_generator
from minigpt2.tokenizer import Tokenizer

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

    def propose(self, rows, texts, limits):
        guesses = []
        for row, text, limit in zip(rows, texts, limits):
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
    counting = CountingDrafter(Oracle([rows[0] + expected[0]], good))
    ids = generate(MODEL, rows, max_new_tokens=21, sampling=GREEDY, drafter=counting)
    assert ids == expected
    assert counting.tokens == counting.forward_passes * (good + 1) > 0
    before = counting.tokens
    generate(MODEL, rows, max_new_tokens=21, sampling=GREEDY, drafter=counting)  # and once more
    assert counting.tokens == counting.forward_passes * (good + 1) == 2 * before


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
    counting = CountingDrafter(drafter)
    rows = generate(
        TINY, [prompt] * n, max_new_tokens=4, sampling=sampling, seed=13, drafter=counting
    )
    counts = dict.fromkeys(probs, 0)
    for row in rows:
        counts[tuple(row)] += 1
    assert (
        counting.forward_passes < counting.tokens < counting.forward_passes * 2
    )  # some guesses fall, some stay
    expected = torch.tensor(list(probs.values()), dtype=torch.float64)
    assert chi_square(torch.tensor(list(counts.values())).double(), expected) > 1e-3


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
    (guess,) = NGramDrafter(n_guesses=4, longest=3, shortest=2).propose([0], [text], [9])
    assert guess == Guess(expected)


def test_a_drafter_keeps_to_the_limit():
    text = [1, 2, 3, 1, 2]
    for limit in range(4):
        (guess,) = NGramDrafter(n_guesses=8).propose([0], [text], [limit])
        assert guess.ids == [3, 1, 2, 3][:limit]
        (guess,) = model_drafter(MODEL, GREEDY).propose([0], [text], [limit])
        assert len(guess.ids) == limit


def test_a_model_drafter_guesses_what_its_model_says_wherever_the_text_goes():
    drafter = model_drafter(SMALL, GREEDY, n_guesses=3)
    text = prompts(9)[0]
    for new in ([], [5], [6, 7, 8], [1] * 20):
        text = text + new
        (guess,) = drafter.propose([0], [text], [9])
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
    (guess,) = drafter.propose([0], [[5, 6, 7, 8]], [9])
    assert shapes == [(1, 4), (1, 1), (1, 1)]
    shapes.clear()
    drafter.propose([0], [[5, 6, 7, 8, *guess.ids[:1], 99]], [9])  # the second guess fell
    assert shapes == [(1, 1), (1, 1), (1, 1)]
    assert caches == [1]


@pytest.mark.parametrize("name", ["ngram", "another model"])
@pytest.mark.parametrize("seed", range(6))
def test_a_row_that_is_guessed_ahead_is_what_it_is_alone(name, seed):
    sampling = SamplingConfig(temperature=0.7, top_k=9)
    makers = {
        "ngram": lambda: NGramDrafter(n_guesses=5, longest=2, shortest=1),
        "another model": lambda: model_drafter(SMALL, sampling, n_guesses=3),
    }
    rows = [prompts(n)[0] for n in (WINDOW - 3, 5, WINDOW + 9)]  # one is soon at its window's end
    options = {"max_new_tokens": 40, "sampling": sampling, "seed": seed}
    together = generate(MODEL, rows, drafter=makers[name](), **options)
    for row in range(3):
        others = [[0]] * row  # row r draws from stream r
        alone = generate(MODEL, [*others, rows[row]], drafter=makers[name](), **options)
        assert alone[row] == together[row]


@pytest.mark.parametrize("sizes", [(257, 263), (263, 257), (269, 263)], ids=str)
def test_a_draft_model_may_be_padded_otherwise(sizes):
    wide = [random_model(seed, vocab_size=n, n_layer=1) for seed, n in enumerate(sizes)]
    options = {"max_new_tokens": 40, "sampling": SamplingConfig(temperature=1.3), "vocab_size": 251}
    drafter = model_drafter(wide[1], options["sampling"], vocab_size=251)
    for ids in generate(wide[0], prompts(3, 8), drafter=drafter, **options):
        assert len(ids) == 40 and max(ids) < 251


def test_a_draft_model_of_another_vocabulary_is_refused():
    other = random_model(vocab_size=263)
    with pytest.raises(InputError, match="chooses among 263 tokens, the model among 257: give"):
        generate(
            MODEL, [[5]], max_new_tokens=9, drafter=model_drafter(other, SamplingConfig()),
        )  # fmt: skip


def test_padding_of_a_vocabulary_is_not_guessed():
    padded = random_model(tie_word_embeddings=False)
    padded.lm_head.weight[200:] = padded.lm_head.weight[200:] * 0
    padded.lm_head.weight[201] = 100 * padded.ln_f.bias
    drafter = model_drafter(padded, SamplingConfig(), vocab_size=200, n_guesses=9)
    (guess,) = drafter.propose([0], [[3, 4]], [9])
    assert max(guess.ids) < 200 and guess.probs.shape == (9, 200)


@pytest.mark.parametrize("values", [{"n_guesses": 0}, {"shortest": 0}, {"longest": 1}], ids=str)
def test_ngram_sizes_that_make_no_sense_are_refused(values):
    with pytest.raises(InputError, match="guesses are 1 or more"):
        NGramDrafter(**values)


def test_a_factory_makes_a_drafter_for_each_text_and_counts_over_all_of_them():
    tokenizer = Tokenizer.gpt2(257)
    without = DrafterFactory(SampleOptions(prompt=""), tokenizer)
    assert without.of(0) is None and without.rows_at_once > 1 and without.forward_passes == 0
    factory, new = DrafterFactory(SampleOptions(prompt="", guess=3), tokenizer), 0
    assert factory.rows_at_once == 1
    drafters = [factory.of(row) for row in range(2)]
    for drafter in drafters:
        (ids,) = generate(MODEL, [[5, 6, 5, 6, 5]], max_new_tokens=20, drafter=drafter)
        new += len(ids) - 1  # the first comes with the prefill
    assert drafters[0] is not drafters[1] and new == 38
    assert factory.forward_passes == sum(drafter.forward_passes for drafter in drafters) > 0
    assert factory.tokens == sum(drafter.tokens for drafter in drafters) <= new
