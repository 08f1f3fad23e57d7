"""The real GPT-2 124M gives the figures that others have published for it."""

import os

import pytest
import torch

from minigpt2 import GPT2, SamplingConfig, Tokenizer, complete, generate
from minigpt2.evaluate import summed_loss

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(
        os.environ.get("MINIGPT2_NETWORK_TESTS") != "1",
        reason="downloads GPT-2 from the Hugging Face Hub: set MINIGPT2_NETWORK_TESTS=1 to run it",
    ),
]
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def model():
    return GPT2.from_pretrained("gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained("gpt2")


def test_it_has_the_published_number_of_parameters(model):
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_greedy_ids_are_those_of_transformers_own_test(model):
    # transformers, tests/models/gpt2/test_modeling_gpt2.py: "The dog", 20 tokens in all
    published = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688]
    published += [27262, 13, 198, 198, 464, 3290]
    (new,) = generate(model, [[464, 3290]], max_new_tokens=18, sampling=GREEDY)
    assert [464, 3290, *new] == published


def test_a_ragged_batch_writes_the_sentences_of_transformers_own_test(model, tokenizer):
    prompts = ["Hello, my dog is a little", "Today, I"]
    published = [
        "Hello, my dog is a little bit of a mess. I'm not sure if he's going",
        "Today, I'm going to be doing a lot of research on this. I",
    ]
    done = complete(model, tokenizer, prompts, max_new_tokens=25, sampling=GREEDY)
    for prompt, completion, text in zip(prompts, done, published):
        assert (prompt + completion.text).startswith(text)


def test_the_loss_of_hello_world_is_transformerlens(model, tokenizer):
    # TransformerLens, tests/acceptance: loss with end-of-text in front, tolerance 4e-5
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode("Hello world!")]])
    loss = summed_loss(model(ids[:, :-1]), ids[:, 1:]) / (ids.shape[1] - 1)
    assert loss.item() == pytest.approx(5.331855773925781, abs=4e-5)


def test_forty_greedy_tokens_are_those_of_picogpts_readme(model, tokenizer):
    prompt = "Alan Turing theorized that computers would one day become"
    published = (
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform "
        "complex calculations, and it can perform these calculations in a way that is very similar "
        "to the human brain."
    )
    (done,) = complete(model, tokenizer, [prompt], max_new_tokens=40, sampling=GREEDY)
    assert done.text.startswith(published)
