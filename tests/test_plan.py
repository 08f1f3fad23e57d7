"""What a run will do, decided from flags, recipe, model and text."""

import math

import pytest

from minigpt2.errors import InputError
from minigpt2.model import PRESETS
from minigpt2.options import TrainConfig
from minigpt2.plan import recipe_for, settle


def settled(preset=None, model="gpt2", n_tokens=10_000, **given):
    sizes = {name: given.pop(name) for name in ("n_processes", "fitting") if name in given}
    recipe = recipe_for(preset, lora=False)
    return settle(TrainConfig(**given), PRESETS[model], recipe, n_tokens=n_tokens, **sizes)


def test_open_settings_come_from_recipe_model_and_text():
    nano = settled("nano", model="nano")
    assert (nano.max_steps, nano.batch_size, nano.learning_rate) == (800, 16, 2e-3)
    tuned = settled(n_tokens=8 * 1024 * 5 + 1)
    assert (tuned.batch_size, tuned.block_size, tuned.learning_rate) == (8, 1024, 5e-5)
    assert tuned.max_steps == math.ceil(3 * 41 / 8)  # 41 windows an epoch, 3 epochs, 8 a step
    assert settled("gpt2").learning_rate == 6e-4
    assert recipe_for(None, lora=True).learning_rate == 2e-4
    assert (tuned.eval_every, tuned.save_every, tuned.warmup_steps) == (1, 1, 0)


def test_given_settings_win():
    plan = settled("nano", model="nano", epochs=0.5, batch_size=3, n_tokens=1280, seed=9)
    assert (plan.max_steps, plan.batch_size, plan.seed) == (2, 3, 9)
    assert settled(max_steps=7, warmup_steps=0, eval_every=5, save_every=3).max_steps == 7
    assert settled(micro_batch_size=2, fitting=lambda rows, block_size: 5).micro_batch_size == 2


def test_the_micro_batch_is_what_fits_and_the_batch_stays_as_asked():
    asked = []

    def fitting(rows, block_size):
        asked.append((rows, block_size))
        return 3

    plan = settled(batch_size=32, block_size=64, n_processes=3, fitting=fitting)
    assert asked == [(11, 64)]
    assert (plan.batch_size, plan.micro_batch_size) == (32, 3)


def test_a_micro_batch_is_never_larger_than_a_processs_rows():
    assert settled(batch_size=2, micro_batch_size=5).micro_batch_size == 2
    assert settled(batch_size=5, micro_batch_size=5, n_processes=2).micro_batch_size == 3


def test_a_block_beyond_the_model_names_its_positions():
    with pytest.raises(InputError, match="--block-size is 2048, the model has 1024 positions"):
        settled(block_size=2048)


def test_every_process_needs_a_sequence():
    with pytest.raises(InputError, match="--batch-size is 3, and 4 processes need a sequence each"):
        settled(batch_size=3, n_processes=4)


@pytest.mark.parametrize(("n_tokens", "block_size"), [(1025, 1024), (1024, 1023), (7, 6), (2, 1)])
def test_a_text_shorter_than_a_window_shortens_it(n_tokens, block_size):
    assert settled(n_tokens=n_tokens).block_size == block_size
    assert settled(n_tokens=n_tokens, block_size=5).block_size == min(5, block_size)
