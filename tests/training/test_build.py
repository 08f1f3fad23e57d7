"""What a run consists of, built from options alone, and how the micro-batch is chosen for it."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from minigpt2.errors import InputError, OptionError
from minigpt2.model import GPT2, GPT2Config
from minigpt2.runs.folder import Checkpoint, RunFolder
from minigpt2.system.processes import World
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import build as build_module
from minigpt2.training.build import Origin, build, enough_rows, specify, way_of
from minigpt2.training.loop import fit, settings_of
from minigpt2.training.options import TrainConfig, TrainOptions
from minigpt2.training.ways import IN_C, PLAIN, QUICK_DROPOUT
from scripts import tiny_folder
from text_files import lamp_lines
from tiny_training import CPU, FLOAT32, needs_c

ALONE = World()
SHORT = TrainConfig(max_steps=3, batch_size=7, eval_every=2, save_every=2)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "lamps.txt"
    text.write_text("".join(lamp_lines(90)))
    model = tiny_folder(tmp_path / "model")
    return TrainOptions(data=(str(text),), model=str(model), workers=1, training=SHORT)


def claimed(tmp_path, resume=False):
    return RunFolder.claim(tmp_path / "run", resume=resume)


def test_a_run_is_built_from_options_and_nothing_is_said(tmp_path, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    with claimed(tmp_path) as run:
        built = build(options, run, CPU, ALONE)
        assert capsys.readouterr() == ("", "")
        assert fit(built.job).step == 3
    assert built.start is None and built.need.total > 0
    assert GPT2.from_pretrained(run.path).config == built.job.model.config
    assert Tokenizer.from_pretrained(run.path).identity == built.job.tokenizer.identity


def test_a_resumed_run_has_the_weights_of_its_checkpoint_and_is_held_to_its_facts(
    tmp_path, options
):
    with claimed(tmp_path) as run:
        job = build(options, run, CPU, ALONE).job
        fit(job)
    again = replace(options, resume=True)
    with claimed(tmp_path, resume=True) as run:
        built = build(again, run, CPU, ALONE)
        assert built.start is not None and built.start.state.step == 3
        ours, theirs = built.job.model.parameters(), job.model.parameters()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        with pytest.raises(ValueError, match="--batch-size was 7 in"):
            build(replace(again, training=replace(SHORT, batch_size=5)), run, CPU, ALONE)


def test_what_is_decided_needs_no_weights(tmp_path, options, monkeypatch):
    monkeypatch.setattr(GPT2, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with claimed(tmp_path) as run:
        spec = specify(replace(options, lora_rank=15, document_mask=True), run, CPU, ALONE)
    assert spec.plan.max_steps == 3
    assert [remark.split()[0] for remark in spec.remarks] == ["--lora-rank", "--document-mask"]


@pytest.fixture
def asked(monkeypatch):
    """What is asked of memory, which has room for two sequences at once."""
    asked = []

    def fitting(need, *, rows, block_size, budget):
        asked.append((rows, block_size))
        return 2

    monkeypatch.setattr(build_module, "fitting_micro_batch", fitting)
    return asked


def micro_batch(tmp_path, options, world=ALONE, **training):
    with claimed(tmp_path) as run:
        spec = specify(replace(options, training=replace(SHORT, **training)), run, CPU, world)
    assert spec.plan.batch_size == training.get("batch_size", 7)
    return spec.plan.micro_batch_size


class Pretended(World):
    """One of several processes that is alone."""

    def gather(self, value):
        return [value]


class Differing(Pretended):
    """Another process has another value."""

    def gather(self, value):
        return [value, "another"] if isinstance(value, str) else [value]


def test_processes_that_came_to_different_vocabularies_are_refused(tmp_path, options):
    own = replace(options, model=None, preset="nano", train_vocabulary=True, vocab_size=300)
    with claimed(tmp_path) as run:
        assert specify(own, run, CPU, ALONE).tokenizer.vocab_size == 300
        with pytest.raises(InputError, match="vocabularies that two machines trained differ"):
            specify(own, run, CPU, Differing())


def test_the_micro_batch_is_what_fits_of_a_processs_rows(tmp_path, options, asked):
    assert micro_batch(tmp_path, options) == 2
    assert micro_batch(tmp_path, options, Pretended(0, 3), batch_size=13) == 2
    assert asked == [(7, 23), (5, 23)]


def test_the_cpu_gets_no_more_tokens_at_once_than_gain_speed(tmp_path, options, asked):
    micro_batch(tmp_path, options, batch_size=9999)
    config = GPT2.from_pretrained(options.model).config
    assert asked == [(enough_rows(config, 23), 23)]


@pytest.mark.parametrize(
    ("width", "block_size", "expected"),
    [(768, 128, 16), (128, 128, 32), (768, 1024, 2), (128, 1024, 4), (1600, 4096, 1)],
)
def test_narrow_models_get_more_tokens_at_once(width, block_size, expected):
    assert enough_rows(GPT2Config(n_embd=width, n_head=1), block_size) == expected


def test_a_micro_batch_that_is_given_is_taken(tmp_path, options, asked):
    assert micro_batch(tmp_path, options, micro_batch_size=3) == 3
    assert micro_batch(tmp_path, options, micro_batch_size=30) == 7
    assert not asked


def checkpointed(tmp_path, options):
    """The newest checkpoint's settings of a run that was trained to its end."""
    with claimed(tmp_path) as run:
        fit(build(options, run, CPU, ALONE).job)
        return run.newest().settings


def test_a_run_on_the_cpu_records_how_its_masks_are_drawn_and_a_resumed_one_draws_them_so(
    tmp_path, options
):
    assert checkpointed(tmp_path, options).way == "16-bit dropout"
    resumed = replace(options, resume=True)
    with claimed(tmp_path, resume=True) as run:
        job = build(resumed, run, CPU, ALONE).job
        assert settings_of(job).way == "16-bit dropout"
        path = run.newest().path / "state.json"
        state = json.loads(path.read_text())
        del state["settings"]["way"]  # as earlier versions wrote it
        start = Checkpoint.from_json(path.parent, state)
    origin = Origin(resumed, start, None)
    assert way_of(origin, job.model, job.plan, FLOAT32, ALONE) == PLAIN


@needs_c
def test_a_long_run_is_computed_in_c_and_a_resumed_one_goes_on_so_however_long_it_is(
    tmp_path, options
):
    longer = replace(options, training=replace(SHORT, max_steps=10**9))
    with claimed(tmp_path / "longer") as run:
        assert specify(longer, run, CPU, ALONE).way == IN_C
        never = specify(replace(longer, compile=False), run, CPU, ALONE)
        assert never.way == QUICK_DROPOUT
    for asked, way in ((None, QUICK_DROPOUT), (True, IN_C)):
        folder = tmp_path / way
        assert checkpointed(folder, replace(options, compile=asked)).way == way
        again = replace(longer, resume=True)
        with claimed(folder, resume=True) as run:
            assert specify(again, run, CPU, ALONE).way == way
            other = specify(replace(again, compile=not asked), run, CPU, ALONE)
            assert {other.way, way} == {IN_C, QUICK_DROPOUT}


def test_a_resumed_run_keeps_its_micro_batch(tmp_path, options, asked):
    with claimed(tmp_path) as run:
        fit(build(options, run, CPU, ALONE).job)
    asked.clear()
    with claimed(tmp_path, resume=True) as run:
        spec = specify(replace(options, resume=True), run, CPU, ALONE)
    assert spec.plan.micro_batch_size == 2 and not asked


REFUSED = {
    "patience": {"val_fraction": 0.0, "training": replace(SHORT, patience=1)},
    "data": {"data": ("-",)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_together_are_called_by_their_names(tmp_path, options, name):
    with claimed(tmp_path) as run, pytest.raises(OptionError) as error:
        build(replace(options, **REFUSED[name]), run, CPU, Pretended(0, 2))
    assert str(error.value).startswith(name) and name in error.value.names
    assert "--" not in str(error.value)
