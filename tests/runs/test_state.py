"""A run's state is read as it was written, and is none where no run can have it."""

import json
import math
from pathlib import Path

import pytest

from minigpt2.runs.record import Metrics
from minigpt2.runs.state import Facts, TrainState

EARLIER = sorted(Path(__file__).parents[1].glob("earlier_runs/*/*/checkpoints/*/state.json"))
FACTS = Facts(model="gpt2", tokenizer="4583", lora_rank=0, seed=3, data="abc", batch_size=5)


@pytest.mark.parametrize(
    "unjudged",
    [None, Metrics(7), Metrics(7, loss=2.5, lr=0.1, memory=13, seconds=0.5, more={"newer": 1.0})],
    ids=["judged", "before the first step", "measured"],
)
def test_a_state_comes_back_as_it_was(unjudged):
    state = TrainState(step=7, best_val_loss=2.25, micro_batch_size=3, unjudged=unjudged)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_what_awaits_its_evaluation_has_the_form_that_earlier_versions_read():
    assert TrainState(unjudged=Metrics(0)).to_json()["unjudged"] == {}
    measured = TrainState(step=5, unjudged=Metrics(5, loss=math.inf, lr=0.1, skipped=1))
    expected = {"step": 5, "loss": None, "lr": 0.1, "skipped": 1}
    assert measured.to_json()["unjudged"] == expected
    assert list(TrainState().to_json())[:3] == ["step", "best_step", "best_val_loss"]


def test_a_run_has_ended_when_its_last_step_is_judged():
    assert TrainState(step=7).ended(7)
    assert not TrainState(step=7, unjudged=Metrics(7)).ended(7)
    assert not TrainState(step=6).ended(7)


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: "-".join(path.parts[-5:-1]))
def test_state_and_facts_of_earlier_runs_are_written_as_they_were(path):
    stored = json.loads(path.read_text())
    assert TrainState.from_json(stored["state"]).to_json() == stored["state"]
    facts = Facts.from_json(stored["facts"])
    written = {name: value for name, value in facts.to_json().items() if value is not None}
    assert written == {name: v for name, v in stored["facts"].items() if v is not None}
    assert facts.more == {}


def test_there_are_states_of_earlier_runs():
    assert len(EARLIER) == 4


@pytest.mark.parametrize("value", [-1, 1.5, True, "x", None, []])
def test_a_count_that_is_none_is_no_state(value):
    with pytest.raises(ValueError, match="step is"):
        TrainState.from_json({"step": value})


@pytest.mark.parametrize("value", ["x", [], 10**400])
def test_a_loss_that_is_no_number_is_no_state(value):
    with pytest.raises(ValueError, match="best_val_loss is"):
        TrainState.from_json({"best_val_loss": value})


def test_a_field_of_another_version_may_decide_something_and_is_refused():
    with pytest.raises(TypeError, match="unheard_of"):
        TrainState.from_json({"step": 5, "unheard_of": 1})


def test_facts_are_named_by_their_flags():
    assert Facts.json_keys()["lora_alpha"] == "--lora-alpha"
    assert Facts.from_json(FACTS.to_json()) == FACTS
    assert FACTS.to_json()["--batch-size"] == 5
    assert FACTS.differences(FACTS) == {}
    now = Facts(tokenizer="other", lora_rank=0, seed=3, data="abc", batch_size=5)
    assert FACTS.differences(now) == {"--model": ("gpt2", None), "tokenizer": ("4583", "other")}
