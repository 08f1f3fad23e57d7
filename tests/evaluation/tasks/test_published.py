"""Published figures stand beside the models that they are of."""

import pytest

from minigpt2.evaluation.tasks.published import SIZES, published, size_of
from minigpt2.evaluation.tasks.records import Metric
from minigpt2.model import PRESETS, GPT2Config


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_known_by_its_shape(name):
    assert size_of(PRESETS[name]) == name


def test_no_other_shape_is_taken_for_one():
    assert size_of(GPT2Config(n_layer=6)) is None
    assert size_of(GPT2Config(vocab_size=300)) is None
    assert size_of(PRESETS["nano"]) is None
    assert published("ptb", "word_perplexity", None) == ()


def test_what_was_measured_as_here_comes_first():
    first, second = published("lambada_openai", "perplexity", "gpt2")
    assert (first.value, first.protocol, second.value, second.who) == (
        40.06,
        "as here",
        35.13,
        "the paper",
    )
    assert published("lambada_openai", "accuracy", "gpt2-large") == ()
    assert published("lambada_standard", "accuracy", "gpt2") == ()
    (paper,) = published("cbt_ne", "accuracy", "gpt2-xl")
    assert Metric("accuracy", 0.9, 0.01, (paper,)).gaps == (pytest.approx(0.0095),)
