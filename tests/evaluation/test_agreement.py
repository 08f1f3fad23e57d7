"""How far a text is from the one a model writes, also past its window."""

import math

import pytest
import torch

from hf_models import randomise
from minigpt2.evaluation.agreement import logprob_error, shortfall
from minigpt2.generate import DecodeSettings, decode, generate
from minigpt2.model import GPT2, GPT2Config, evaluation_mode
from minigpt2.sampling import SamplingConfig
from scored import tiny


def test_the_shortfall_of_a_models_own_greedy_text_is_none_and_of_another_what_its_scores_say():
    model = GPT2(GPT2Config(vocab_size=29, block_size=17, n_embd=10, n_layer=2, n_head=2)).train()
    randomise(model, std=0.5)
    prompt = [3, 5, 7]
    (ids,) = generate(model, [prompt], max_new_tokens=14, sampling=SamplingConfig(temperature=0))
    assert shortfall(model, prompt, ids) == 0.0
    assert shortfall(model, prompt, []) == 0.0
    with evaluation_mode(model), torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1]
    worst = int(logits.argmin())
    expected = (logits.max() - logits.min()) / logits.abs().max()
    assert shortfall(model, prompt, [worst]) == pytest.approx(float(expected), rel=1e-4)
    assert model.training


def written(model, prompt, n_new, temperature, vocab_size=None):
    """The tokens that decoding adds to a prompt."""
    tokens = []
    for (new,) in decode(
        model,
        [prompt],
        DecodeSettings(n_new, SamplingConfig(temperature), seed=1, vocab_size=vocab_size),
        lambda row, token: False,
    ):
        tokens += new
    return tokens


@pytest.mark.parametrize("window", [1, 2, 7, 17])
@pytest.mark.parametrize("n_prompt", [1, 7, 19])
@pytest.mark.parametrize("vocab_size", [None, 23])
def test_a_models_own_text_is_its_own_also_past_its_window(window, n_prompt, vocab_size):
    shape = {"vocab_size": 29, "n_embd": 10, "n_layer": 2, "n_head": 2}
    model = GPT2(GPT2Config(block_size=window, **shape)).double().train()
    randomise(model, std=0.5)
    prompt = torch.randint(29, (n_prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    for temperature in (0.0, 1.3):
        tokens = written(model, prompt, 41, temperature, vocab_size)
        ids, logprobs = [token.id for token in tokens], [token.logprob for token in tokens]
        assert logprob_error(model, prompt, ids, logprobs, vocab_size=vocab_size) < 1e-6
        off = shortfall(model, prompt, ids, vocab_size=vocab_size)
        assert off < 1e-6 if temperature == 0 else off > 0.1
        for at in (0, 20, 40):
            wrong = [*logprobs]
            wrong[at] += 0.5
            assert logprob_error(model, prompt, ids, wrong, vocab_size=vocab_size) > 0.01
            wrong[at] = math.nan
            assert math.isnan(logprob_error(model, prompt, ids, wrong, vocab_size=vocab_size))
    assert logprob_error(model, prompt, [], []) == 0.0
    assert model.training


def test_the_error_of_a_log_probability_is_a_share_of_the_largest_score():
    model = tiny().eval()
    with torch.no_grad():
        logits = model(torch.tensor([[3, 5]]))[0]
    logprobs = logits.log_softmax(-1)[[0, 1], [5, 8]]
    reported = [float(logprobs[0]), float(logprobs[1]) - 0.25]
    expected = 0.25 / float(logits.abs().max())
    assert logprob_error(model, [3], [5, 8], reported) == pytest.approx(expected, rel=1e-4)
