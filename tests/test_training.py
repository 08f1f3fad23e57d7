"""A training run: the step's arithmetic, and that stopping, judging and resuming change nothing."""

import functools
import json
import math
import signal

import pytest
import torch
import torch.nn as nn

from minigpt2.checkpoint import RunFolder
from minigpt2.corpus import prepare
from minigpt2.errors import InputError
from minigpt2.evaluate import summed_loss
from minigpt2.model import GPT2, PRESETS, GPT2Config
from minigpt2.optim import make_optimizer
from minigpt2.options import TrainConfig
from minigpt2.precision import Precision
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import (
    Job,
    NotFiniteError,
    Stopped,
    compiled,
    fit,
    settle,
    train_step,
)

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, torch.float32)
TEXT = "".join(f"The {n}th lamp is lit, and the sea says {n * n}.\n" for n in range(120))


def tiny_model(*, dropout=0.1, seed=5):
    config = GPT2Config(
        vocab_size=300,
        block_size=17,
        n_embd=14,
        n_layer=2,
        n_head=2,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
    )
    return GPT2(config, generator=torch.Generator().manual_seed(seed))


def ragged_batch(n_rows=7, seed=11):
    """idx, targets whose rows have very different numbers of scored tokens."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(300, (n_rows, 13), generator=generator)
    targets = torch.randint(300, (n_rows, 13), generator=generator)
    for row in range(n_rows):
        targets[row, 1 + row * 2 :] = -100
    return idx, targets


def step_of(model, *, micro_batch_size=7, precision=FLOAT32, optimizer=None, grad_clip=0.0, lr=0.0):
    optimizer = optimizer or make_optimizer(model, learning_rate=0.0, weight_decay=0.0)
    return train_step(
        model,
        ragged_batch(),
        optimizer,
        precision,
        micro_batch_size=micro_batch_size,
        learning_rate=lr,
        grad_clip=grad_clip,
    )


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 100])
def test_gradient_and_loss_do_not_depend_on_how_the_batch_is_cut(micro_batch_size):
    whole, cut = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    expected = step_of(whole)
    got = step_of(cut, micro_batch_size=micro_batch_size)
    assert got.loss == pytest.approx(expected.loss, abs=1e-6)
    assert got.n_tokens == expected.n_tokens == sum(min(13, 1 + row * 2) for row in range(7))
    torch.testing.assert_close(gradients(cut), gradients(whole), atol=1e-6, rtol=0)


def test_the_logged_loss_is_the_mean_over_all_scored_tokens():
    model = tiny_model(dropout=0.0)
    idx, targets = ragged_batch()
    expected = summed_loss(model(idx), targets) / (targets != -100).sum()
    assert step_of(model, micro_batch_size=2).loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipping_sees_true_gradients_whatever_the_loss_scale(dtype):
    # with SGD at rate 1 and a gradient above the clip, the parameters move by exactly the clip
    model = tiny_model(dropout=0.0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = step_of(
        model,
        micro_batch_size=3,
        precision=Precision(CPU, dtype),
        optimizer=optimizer,
        grad_clip=0.01,
        lr=1.0,
    )
    moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    assert stats.grad_norm > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_weights_and_optimizer_state_stay_float32_under_autocast():
    model = tiny_model()
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.0)
    step_of(model, precision=Precision(CPU, torch.bfloat16), optimizer=optimizer, lr=0.1)
    state = [t for s in optimizer.state.values() for t in s.values()]
    assert {t.dtype for t in [*model.parameters(), *state]} == {torch.float32}


def test_float16_overflow_skips_the_step_halves_the_scale_and_says_so():
    model = tiny_model(dropout=0.0)
    precision = Precision(CPU, torch.float16)
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.0)
    handle = model.ln_f.weight.register_hook(lambda grad: grad * float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    scale = precision.scaler.get_scale()
    stats = step_of(model, precision=precision, optimizer=optimizer, lr=0.1)
    assert stats.skipped
    assert precision.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    handle.remove()
    assert not step_of(model, precision=precision, optimizer=optimizer, lr=0.1).skipped


def test_a_gradient_that_is_not_a_number_stops_before_the_weights_change():
    model = tiny_model()
    model.ln_f.weight.register_hook(lambda grad: grad * float("nan"))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotFiniteError, match="gradient norm nan"):
        step_of(model, optimizer=make_optimizer(model, learning_rate=0.1, weight_decay=0.1), lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_one_batch_can_be_learned_by_heart():
    model = tiny_model(dropout=0.0)
    optimizer = make_optimizer(model, learning_rate=0.02, weight_decay=0.0)
    losses = [step_of(model, optimizer=optimizer, grad_clip=1.0, lr=0.02).loss for _ in range(150)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert losses[-1] < 0.1


def settled(preset=None, n_tokens=10_000, model="gpt2", **given):
    return settle(
        TrainConfig(**given), PRESETS[model], preset=preset, n_tokens=n_tokens, device=CPU
    )


def test_open_settings_come_from_recipe_model_and_text():
    nano = settled("nano", model="nano")
    assert (nano.max_steps, nano.batch_size, nano.learning_rate) == (800, 16, 2e-3)
    tuned = settled(n_tokens=8 * 1024 * 5 + 1)
    assert (tuned.batch_size, tuned.block_size, tuned.learning_rate) == (8, 1024, 5e-5)
    assert tuned.max_steps == math.ceil(3 * 41 / 8)  # 41 windows an epoch, 3 epochs, 8 a step
    assert settled("gpt2").learning_rate == 6e-4
    assert (tuned.eval_every, tuned.save_every, tuned.warmup_steps) == (1, 1, 0)


def test_given_settings_win():
    plan = settled("nano", model="nano", epochs=0.5, batch_size=3, n_tokens=1280, seed=9)
    assert (plan.max_steps, plan.batch_size, plan.seed) == (2, 3, 9)
    assert settled(max_steps=7, warmup_steps=0, eval_every=5, save_every=3).max_steps == 7


@pytest.mark.parametrize(("device", "most"), [("cpu", 2**26), ("mps", 2**26), ("cuda", 2**29)])
def test_the_micro_batch_keeps_the_logits_small_and_the_batch_as_asked(device, most):
    plan = settle(
        TrainConfig(batch_size=32),
        PRESETS["gpt2"],
        preset=None,
        n_tokens=10_000,
        device=torch.device(device),
    )
    a_row = 1024 * 50257
    assert plan.batch_size == 32
    assert plan.micro_batch_size * a_row <= most < (plan.micro_batch_size + 1) * a_row


def test_a_micro_batch_is_never_larger_than_the_batch():
    assert settled(batch_size=2, micro_batch_size=5).micro_batch_size == 2


def test_a_block_beyond_the_model_names_its_positions():
    with pytest.raises(InputError, match="--block-size is 2048, the model has 1024 positions"):
        settled(block_size=2048)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    path = folder / "lamps.txt"
    path.write_text(TEXT)
    return prepare([path], Tokenizer.gpt2(300), val_fraction=0.2, cache_dir=folder / "cache")


def make_job(folder, corpus, *, precision=FLOAT32, model=None, **given):
    settings = {
        "max_steps": 6,
        "batch_size": 5,
        "micro_batch_size": 2,
        "learning_rate": 0.01,
        "eval_every": 2,
        "save_every": 2,
        "seed": 7,
    } | given
    folder.mkdir(exist_ok=True)
    model = model or tiny_model()
    plan = settle(TrainConfig(**settings), model.config, preset="nano", n_tokens=1000, device=CPU)
    tokenizer = Tokenizer.gpt2(300)
    return Job(model, tokenizer, corpus, plan, RunFolder(folder), precision, {"seed": 7})


def parameters(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def untimed(run):
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in run.read_metrics()
    ]


def resumed(job):
    """The same job, continued from its folder by a fresh model."""
    checkpoint = job.run.newest(job.facts)
    model = GPT2.from_pretrained(checkpoint.path)
    again = Job(model, job.tokenizer, job.corpus, job.plan, job.run, job.precision, job.facts)
    fit(again, start=checkpoint)
    return model


def test_a_run_leaves_metrics_samples_best_weights_and_its_last_checkpoint(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)
    state = fit(job)
    assert state.step == 6
    lines = untimed(job.run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 2, 4, 6]
    assert all({"loss", "lr", "grad_norm"} <= line.keys() for line in lines[1:])
    assert [path.name for path in job.run.checkpoints()] == ["step-000006"]
    assert job.run.samples_path.read_text().count("=== step") == 4
    assert GPT2.from_pretrained(job.run.path).config == job.model.config
    assert Tokenizer.from_pretrained(job.run.path).identity == job.tokenizer.identity


def test_the_run_folder_opens_in_transformers(tmp_path, corpus):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = make_job(tmp_path / "run", corpus)
    fit(job)
    theirs, report = AutoModelForCausalLM.from_pretrained(job.run.path, output_loading_info=True)
    assert not any(report.values()), report
    text = "The 7th lamp is lit, naïve and 日本."
    ids = job.tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(job.run.path).encode(text) == ids
    ours = GPT2.from_pretrained(job.run.path)
    idx = torch.tensor([ids[:17]])
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=0)
    assert theirs.config.eos_token_id == job.tokenizer.eot


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_a_run_stopped_by_a_signal_and_resumed_is_the_run_never_stopped(tmp_path, corpus, stop_at):
    whole = make_job(tmp_path / "whole", corpus)
    fit(whole)
    stopped = make_job(tmp_path / "stopped", corpus)

    def interrupt(metrics):
        if metrics["step"] == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as stop:
        fit(stopped, on_step=interrupt)
    assert stop.value.signal_number == signal.SIGTERM
    assert [path.name for path in stopped.run.checkpoints()] == [f"step-{stop_at:06d}"]
    model = resumed(stopped)
    assert torch.equal(parameters(model), parameters(whole.model))
    assert untimed(stopped.run) == untimed(whole.run)


def test_metrics_logged_after_the_last_checkpoint_are_not_logged_twice(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=4)
    fit(job)
    for step in (5, 6):
        job.run.log({"step": step, "loss": 1.0})
    with job.run.metrics_path.open("a") as file:
        file.write('{"step": 7, "lo')
    longer = make_job(tmp_path / "run", corpus, max_steps=6)
    resumed(longer)
    assert [line["step"] for line in job.run.read_metrics()] == [0, 1, 2, 3, 4, 5, 6]


def test_the_second_signal_acts_at_once(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)

    def interrupt_twice(metrics):
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(job, on_step=interrupt_twice)
    assert [path.name for path in job.run.checkpoints()] == ["step-000002"]


def test_signal_handlers_and_random_state_are_the_callers_again(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=1)
    before = signal.getsignal(signal.SIGINT), torch.get_rng_state()
    fit(job)
    assert signal.getsignal(signal.SIGINT) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_how_often_it_is_judged_and_saved_does_not_change_the_weights(tmp_path, corpus):
    often = make_job(tmp_path / "often", corpus, eval_every=1, save_every=1)
    rarely = make_job(tmp_path / "rarely", corpus, eval_every=6, save_every=6)
    fit(often)
    fit(rarely)
    assert torch.equal(parameters(often.model), parameters(rarely.model))


def ruin(job, *, after):
    """A listener that spoils the model after a step, as over-fitting would, only faster."""

    def listen(metrics):
        if metrics["step"] == after:
            with torch.no_grad():
                job.model.ln_f.weight.mul_(-9)

    return listen


def test_the_folder_stands_for_the_best_weights_not_the_last(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=5, eval_every=1)
    state = fit(job, on_step=ruin(job, after=3))
    losses = {line["step"]: line["val_loss"] for line in job.run.read_metrics()}
    assert state.best_step == min(losses, key=losses.__getitem__) == 3
    assert state.best_val_loss == losses[3]
    best = parameters(GPT2.from_pretrained(job.run.path))
    assert not torch.equal(best, parameters(job.model))
    last = GPT2.from_pretrained(job.run.checkpoints()[0])
    assert torch.equal(parameters(last), parameters(job.model))


def test_patience_ends_a_run_that_no_longer_gains(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=9, eval_every=1, patience=3)
    state = fit(job, on_step=ruin(job, after=2))
    assert (state.best_step, state.step) == (2, 5)
    assert [path.name for path in job.run.checkpoints()] == ["step-000005"]


def test_without_held_out_text_the_newest_weights_are_the_folders(tmp_path):
    path = tmp_path / "lamps.txt"
    path.write_text(TEXT)
    corpus = prepare([path], Tokenizer.gpt2(300), val_fraction=0, cache_dir=tmp_path / "cache")
    job = make_job(tmp_path / "run", corpus)
    state = fit(job)
    assert state.best_val_loss is None
    assert not any("val_loss" in line for line in job.run.read_metrics())
    kept = parameters(GPT2.from_pretrained(job.run.path))
    assert torch.equal(kept, parameters(job.model))


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)

    def poison(metrics):
        if metrics["step"] == 3:
            with torch.no_grad():
                job.model.h[1].mlp.c_fc.weight[0, 0] = float("nan")

    with pytest.raises(InputError, match=r"step 4: loss nan.*step-000002 is intact"):
        fit(job, on_step=poison)
    kept = parameters(GPT2.from_pretrained(job.run.checkpoints()[0]))
    assert kept.isfinite().all()


def test_checkpoints_hold_nothing_that_a_safe_load_refuses(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=1)
    fit(job)
    path = job.run.checkpoints()[0] / "training.pt"
    state = torch.load(path, weights_only=True)
    assert state["optimizer"]["state"].keys() == set(range(len(list(job.model.parameters()))))
    json.loads((path.parent / "state.json").read_text())


def test_a_compiled_model_is_trained_as_the_plain_one(tmp_path, corpus, monkeypatch):
    plain = make_job(tmp_path / "plain", corpus)
    fit(plain)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    job = make_job(tmp_path / "compiled", corpus)
    forward = compiled(job.model, job.precision, job.plan)
    assert forward is not job.model
    fit(job, forward=forward)
    assert torch.equal(parameters(job.model), parameters(plain.model))
    assert GPT2.from_pretrained(job.run.path).config == job.model.config


def test_a_model_that_does_not_compile_trains_without(tmp_path, corpus, monkeypatch, caplog):
    def refuse(model):
        raise RuntimeError("no compiler on this machine\nand a long tail")

    monkeypatch.setattr(torch, "compile", refuse)
    job = make_job(tmp_path / "run", corpus)
    assert compiled(job.model, job.precision, job.plan) is job.model
    assert "no compiler on this machine): going on without" in caplog.text
