"""What a run will do, decided from flags, recipe, model and text."""

import math

import pytest

from minigpt2.errors import InputError
from minigpt2.model import PRESETS
from minigpt2.training.options import TrainConfig
from minigpt2.training.plan import make_plan, recipe_for, remarks


def plan_of(preset=None, model="gpt2", n_tokens=10_000, **given):
    sizes = {"n_processes": given.pop("n_processes", 1)}
    recipe = recipe_for(preset, lora=False)
    return make_plan(TrainConfig(**given), PRESETS[model], recipe, n_tokens=n_tokens, **sizes)


def test_open_settings_come_from_recipe_model_and_text():
    nano = plan_of("nano", model="nano")
    assert (nano.max_steps, nano.batch_size, nano.learning_rate) == (800, 16, 2e-3)
    tuned = plan_of(n_tokens=8 * 1024 * 5 + 1)
    assert (tuned.batch_size, tuned.block_size, tuned.learning_rate) == (8, 1024, 5e-5)
    assert tuned.max_steps == math.ceil(3 * 41 / 8)  # 41 windows an epoch, 3 epochs, 8 a step
    assert plan_of("gpt2").learning_rate == 6e-4
    assert recipe_for(None, lora=True).learning_rate == 2e-4
    assert (tuned.eval_every, tuned.save_every, tuned.warmup_steps) == (1, 1, 0)


def test_given_settings_win():
    plan = plan_of("nano", model="nano", epochs=0.5, batch_size=3, n_tokens=1280, seed=9)
    assert (plan.max_steps, plan.batch_size, plan.seed) == (2, 3, 9)
    assert plan_of(max_steps=7, warmup_steps=0, eval_every=5, save_every=3).max_steps == 7
    assert plan_of(micro_batch_size=2).micro_batch_size == 2


def test_a_micro_batch_is_never_larger_than_a_processs_rows():
    assert plan_of(batch_size=2, micro_batch_size=5).micro_batch_size == 2
    assert plan_of(batch_size=32, n_processes=3).micro_batch_size == 11
    assert plan_of(batch_size=5, micro_batch_size=5, n_processes=2).micro_batch_size == 3


def test_a_block_beyond_the_model_names_its_positions():
    with pytest.raises(InputError, match="block_size is 2048, the model has 1024 positions"):
        plan_of(block_size=2048)


def test_every_process_needs_a_sequence():
    with pytest.raises(InputError, match="batch_size is 3, and 4 processes need a sequence each"):
        plan_of(batch_size=3, n_processes=4)


@pytest.mark.parametrize(("n_tokens", "block_size"), [(1025, 1024), (1024, 1023), (7, 6), (2, 1)])
def test_a_text_shorter_than_a_window_shortens_it(n_tokens, block_size):
    assert plan_of(n_tokens=n_tokens).block_size == block_size
    assert plan_of(n_tokens=n_tokens, block_size=5).block_size == min(5, block_size)


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("--micro-batch-size is 9, a process has 3 at a step", {"micro_batch_size": 9}),
        ("--warmup-steps is 80, the run has 20 steps: the learning rate gets to 25% of 5e-05",
         {"warmup_steps": 80}),
        ("--eval-every is 21, the run has 20 steps: the model is judged at the start and the end",
         {"eval_every": 21, "save_every": 1}),
        ("--save-every is 21, the run has 20 steps: it is saved at the end alone",
         {"save_every": 21}),
        ("--patience is 4, the run has 4 evaluations: it cannot stop",
         {"patience": 4, "eval_every": 5}),
        ("a step is 5 sequences, the training text 2: every step goes over it 2.5 times",
         {"n_tokens": 128}),
        ("the run goes over the training text 400 times, and will know it by heart",
         {"n_tokens": 320, "max_steps": 400}),
    ],
)  # fmt: skip
def test_settings_that_a_plan_makes_idle_or_odd_are_told_one_line_each(said, given):
    usual = {"n_tokens": 10_000, "block_size": 64, "max_steps": 20, "batch_size": 5, **given}
    assert [said == line[: len(said)] for line in told(**usual)] == [True]


def told(n_tokens, **given):
    plan = plan_of(n_tokens=n_tokens, n_processes=2, **given)
    return list(remarks(TrainConfig(**given), plan, n_tokens=n_tokens, n_processes=2))


@pytest.mark.parametrize(
    "given",
    [{}, {"warmup_steps": 20}, {"eval_every": 20}, {"save_every": 20}, {"micro_batch_size": 3},
     {"patience": 3, "eval_every": 5}, {"epochs": 1.0, "max_steps": None}],
)  # fmt: skip
def test_of_a_plan_in_which_everything_counts_nothing_is_told(given):
    assert told(10_000, **{"block_size": 64, "max_steps": 20, "batch_size": 5, **given}) == []
