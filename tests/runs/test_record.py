"""A run's files are read as records and written again as they were, whatever version wrote them."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.errors import InputError
from minigpt2.runs.folder import RunFolder
from minigpt2.runs.record import (
    DataInfo,
    Metrics,
    ModelInfo,
    RunInfo,
    Sample,
    Session,
    Settings,
    evaluations,
    number,
    seconds_trained,
    series,
    spread,
    thinned,
)

NAN = math.nan


@given(st.lists(st.floats(-1e9, 1e9), max_size=300), st.integers(4, 40))
def test_thinned_curves_keep_ends_extremes_and_order(values, at_most):
    points = [*enumerate(values)]
    kept = thinned(points, at_most)
    assert set(kept) <= set(points)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert len(kept) <= at_most + 4  # a stretch too short, and both ends
    if len(points) <= at_most:
        assert kept == points
    else:
        assert {points[0], points[-1]} <= set(kept)
        assert min(values) == min(value for _, value in kept)
        assert max(values) == max(value for _, value in kept)


@given(st.lists(st.integers(), max_size=50, unique=True), st.integers(2, 20))
def test_a_spread_keeps_both_ends_and_no_item_twice(items, at_most):
    kept = spread(items, at_most)
    assert len(kept) == min(len(items), at_most)
    assert len(set(kept)) == len(kept)
    if items:
        assert (kept[0], kept[-1]) == (items[0], items[-1])


def test_a_series_leaves_out_lines_that_lack_either_number():
    losses = [2.5, None, NAN, math.inf, True, 3]
    metrics = [Metrics(step, loss) for step, loss in enumerate(losses)]
    assert series([*metrics, Metrics(10**400, 1.0)], "loss") == [(0, 2.5), (5, 3)]


@pytest.mark.parametrize("value", [1e31, -1e31, 10**400, NAN, None, True, "1"])
def test_what_cannot_be_drawn_is_no_number(value):
    assert number(value) is None


def test_training_time_is_counted_over_all_sessions():
    times = [1.0, 2.5, 4.0, 0.5, 2.0, 0.25]
    assert seconds_trained([Metrics(i, seconds=t) for i, t in enumerate(times)]) == 4 + 2 + 0.25
    assert seconds_trained([]) == 0


def test_damaged_files_are_named_and_the_others_still_read(tmp_path):
    run = RunFolder(tmp_path)
    run.log(Metrics(0, val_loss=3.0))
    (tmp_path / "run.json").write_text('{"model": ', encoding="utf-8")
    record = run.read_record()
    assert [e.val_loss for e in evaluations(record.metrics)] == [3.0]
    assert record.info == RunInfo()
    assert [problem.split()[0] for problem in record.problems] == ["run.json"]


def test_an_empty_folder_is_an_empty_record_without_problems(tmp_path):
    record = RunFolder(tmp_path).read_record()
    assert (record.metrics, record.samples, record.problems) == ([], [], [])
    assert record.info == RunInfo()
    assert record.name == tmp_path.name


def test_evaluations_that_did_not_count_bytes_are_told_by_one_that_did():
    lines = [Metrics(0, val_loss=4.0), Metrics(1, loss=3.0), Metrics(5, val_loss=NAN)]
    assert [e.bits_per_byte for e in evaluations(lines)] == [None, None]
    lines += [Metrics(8, val_loss=3.0, bits_per_byte=1.5), Metrics(9, val_loss=2, bits_per_byte=1)]
    assert [e.bits_per_byte for e in evaluations(lines)] == [2.0, None, 1.5, 1]


@pytest.mark.parametrize("odd", [NAN, math.inf, -math.inf, True, 0, -3, 1e29, 1e-320])
def test_odd_bits_per_byte_are_no_harm(odd):
    lines = [Metrics(0, val_loss=4.0), Metrics(1, val_loss=1e-310, bits_per_byte=odd)]
    for evaluation in evaluations([*lines, Metrics(2, val_loss=odd)]):
        bits = evaluation.bits_per_byte
        assert bits is None or abs(bits) < 1e30


EARLIER = sorted(Path(__file__).parents[1].glob("earlier_runs/*/*/run.json"))
INFO = {
    "sessions": [
        {
            "command": "python train.py --data a.txt",
            "started": "2025-03-10T14:03:21+01:00",
            "from_step": 0,
            "device": "cpu",
            "dtype": "float32",
            "world_size": 3,
            "versions": {"minigpt2": "0.1.0"},
        }
    ],
    "model": {
        "source": "nano",
        "source_kind": "preset",
        "pretrained": False,
        "n_parameters": 1_234_567,
        "n_trained": 1_234_567,
        "lora_rank": None,
        "config": {"n_layer": 2},
    },
    "data": {
        "paths": ["a.txt", "b.txt"],
        "val_paths": [],
        "n_documents": 2,
        "n_characters": 231_402,
        "n_tokens": 71_230,
        "duplicates": 3,
        "--mask-prompt": True,
        "n_train_tokens": 64_107,
        "n_val_tokens": 7_123,
        "identity": "100b02b7e8d0f364",
    },
    "options": {"--data": ["a.txt", "b.txt"], "--preset": "nano"},
    "settings": {
        "max_steps": 40,
        "batch_size": 8,
        "micro_batch_size": 2,
        "block_size": 23,
        "learning_rate": 0.0005,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "eval_every": 5,
        "save_every": 7,
        "patience": 0,
        "seed": 1337,
        "dropout": 0.1,
        "way": "16-bit dropout",
        "dtype": "float32",
    },
    "memory": {"weights": 38472, "total": 340465957},
}
NEWER = {"unheard_of": [1, {"a": None}]}


def test_run_json_is_written_as_it_was_read_to_the_order_of_its_fields():
    assert json.dumps(RunInfo.from_json(INFO).to_json()) == json.dumps(INFO)


def test_what_a_newer_version_wrote_is_kept():
    stored = INFO | NEWER | {name: INFO[name] | NEWER for name in ("model", "data", "settings")}
    stored["sessions"] = [INFO["sessions"][0] | NEWER]
    info = RunInfo.from_json(stored)
    assert info.settings.more == info.sessions[0].more == NEWER
    assert info.to_json() == stored
    metrics = {"step": 7, "loss": 2.5, "z_loss": 0.25, "later": None}
    assert Metrics.from_json(metrics).to_json() == metrics
    sample = {"step": 7, "prompt": "a", "text": "b", **NEWER}
    assert Sample.from_json(sample).to_json() == sample


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_what_an_earlier_version_did_not_write_is_none(path):
    stored = json.loads(path.read_text())
    info = RunInfo.from_json(stored)
    assert info.model.source_kind is None and info.options is None
    assert info.settings.to_json() == stored["settings"] | {"way": None}
    assert RunInfo.from_json(info.to_json()) == info
    lines = path.with_name("metrics.jsonl").read_text().splitlines()
    assert [json.dumps(Metrics.from_json(json.loads(line)).to_json()) for line in lines] == lines


@pytest.mark.parametrize("record", [Session, ModelInfo, DataInfo, Settings])
@pytest.mark.parametrize("value", [True, "x", 1.5, 3, [], [3], {}, {"a": 1}, None])
def test_a_value_of_another_kind_is_no_field_and_is_kept(record, value):
    stored = dict.fromkeys(record.json_keys().values(), value)
    found = record.from_json(stored)
    assert found.to_json() == stored
    for name in found.more:
        assert getattr(found, name) is None


@pytest.mark.parametrize("name", ["sessions", "model", "data", "settings", "options", "memory"])
@pytest.mark.parametrize("value", [None, 3, "x", [3]])
def test_a_part_of_run_json_that_is_something_else_is_named(name, value):
    with pytest.raises(InputError, match=r"is .*, expected (an object|a list)"):
        RunInfo.from_json(INFO | {name: value})


@pytest.mark.parametrize("number", [NAN, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_in_metrics_and_nan_again(number):
    metrics = Metrics(5, loss=number, lr=0.1)
    assert metrics.to_json() == {"step": 5, "loss": None, "lr": 0.1}
    again = Metrics.from_json(metrics.to_json())
    assert again.loss is not None and math.isnan(again.loss)
    assert again.val_loss is None, "not measured is something else"
    assert Metrics.from_json(metrics.to_json()) == again


@pytest.mark.parametrize(
    "line", [{}, {"loss": 1.0}, {"step": -1}, {"step": True}, {"step": 1, "loss": "2"},
             {"step": 1, "loss": 10**400}, {"step": 1, "newer": [1]}]
)  # fmt: skip
def test_a_line_without_a_step_or_with_anything_but_numbers_is_no_metrics(line):
    with pytest.raises(ValueError, match="no metrics"):
        Metrics.from_json(line)


def test_a_setting_has_changed_where_both_know_it_and_differ():
    before, now = Settings(max_steps=5, seed=3), Settings(max_steps=7, seed=3, dropout=0.1)
    assert now.changes(before) == {"max_steps": (5, 7)}
