"""A training run: the step's arithmetic, and that stopping, judging and resuming change nothing."""

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

import minigpt2.training as training
from minigpt2.checkpoint import RunFolder
from minigpt2.corpus import prepare
from minigpt2.distributed import World
from minigpt2.errors import InputError
from minigpt2.evaluate import Scorer
from minigpt2.interrupt import Stopped
from minigpt2.model import GPT2, GPT2Config
from minigpt2.optim import make_optimizer
from minigpt2.options import TrainConfig
from minigpt2.plan import recipe_for, settle
from minigpt2.precision import Precision
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import MOST_SKIPS, Job, NotFiniteError, accumulate, fit, train_step

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
        Scorer(model),
        ragged_batch(),
        optimizer,
        precision,
        micro_batch_size=micro_batch_size,
        learning_rate=lr,
        grad_clip=grad_clip,
        seed=3,
    )


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 100])
def test_gradient_and_loss_do_not_depend_on_how_the_batch_is_cut(micro_batch_size):
    whole, cut = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    expected = accumulate(Scorer(whole), ragged_batch(), FLOAT32, 7, seed=3)
    got = accumulate(Scorer(cut), ragged_batch(), FLOAT32, micro_batch_size, seed=3)
    assert got == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradients(cut), gradients(whole), atol=1e-6, rtol=0)


@pytest.mark.parametrize("micro_batch_size", [2, 7])
def test_a_batch_of_prompts_alone_has_no_loss_and_no_gradient(micro_batch_size):
    model, (idx, targets) = tiny_model(), ragged_batch()
    nothing = idx, torch.full_like(targets, -100)
    assert accumulate(Scorer(model), nothing, FLOAT32, micro_batch_size, seed=3) == 0
    assert not gradients(model).any()


def test_the_logged_loss_is_the_mean_over_all_scored_tokens():
    model = tiny_model(dropout=0.0)
    idx, targets = ragged_batch()
    expected = nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    stats = step_of(model, micro_batch_size=2)
    assert stats.loss == pytest.approx(expected.item(), rel=1e-6)
    assert stats.n_tokens == sum(min(13, 1 + row * 2) for row in range(7))


class Pretended(World):
    """One of several processes whose turn comes one after the other."""

    def gather(self, value):
        return [value]


# dropout is the same where every process's rows make whole micro-batches; 7 rows leave a remainder
@pytest.mark.parametrize(
    ("n_rows", "size", "micro_batch_size", "dropout"),
    [
        (6, 2, 3, 0.1),
        (6, 2, 1, 0.1),
        (6, 3, 2, 0.1),
        (7, 7, 1, 0.1),
        (7, 2, 2, 0.0),
        (7, 5, 2, 0.0),
    ],
)
def test_processes_together_compute_what_one_does(n_rows, size, micro_batch_size, dropout):
    alone, shared, batch = (
        tiny_model(dropout=dropout),
        tiny_model(dropout=dropout),
        ragged_batch(n_rows),
    )
    expected = accumulate(Scorer(alone), batch, FLOAT32, micro_batch_size, seed=3)
    # gradients of the processes add up in the one model; DDP would take their mean
    losses = [
        accumulate(Scorer(shared), batch, FLOAT32, micro_batch_size, 3, Pretended(rank, size))
        for rank in range(size)
    ]
    assert sum(losses) == pytest.approx(expected, abs=2e-6)
    torch.testing.assert_close(gradients(shared) / size, gradients(alone), atol=1e-6, rtol=0)


class OutOfMemory:
    """A scorer that finds no memory for more than `most` rows."""

    def __init__(self, model, most, error):
        self.scorer, self.most, self.error = Scorer(model), most, error
        self.parameters = self.scorer.parameters

    def __call__(self, idx, targets, scale):
        if len(idx) > self.most:
            raise self.error
        return self.scorer(idx, targets, scale)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_same_step(error, caplog):
    def trained(scorer_of, micro_batch_size):
        model = tiny_model()
        optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1)
        stats = train_step(
            scorer_of(model),
            ragged_batch(),
            optimizer,
            FLOAT32,
            micro_batch_size=micro_batch_size,
            learning_rate=0.1,
            grad_clip=1.0,
            seed=3,
        )
        return stats, parameters(model)

    stats, weights = trained(lambda model: OutOfMemory(model, 2, error), 7)
    expected, expected_weights = trained(Scorer, 2)
    assert stats == expected  # 7 -> 4 -> 2
    assert torch.equal(weights, expected_weights)
    assert "again, with 4 sequences at a time" in caplog.text
    with pytest.raises(type(error)):
        trained(lambda model: OutOfMemory(model, 0, error), 7)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    scorer = OutOfMemory(tiny_model(), 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        accumulate(scorer, ragged_batch(), FLOAT32, 7, seed=3)


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
    model, tokenizer = model or tiny_model(), Tokenizer.gpt2(300)
    recipe = recipe_for("nano", lora=False)
    return Job(
        model=model,
        scorer=Scorer(model),
        tokenizer=tokenizer,
        corpus=corpus,
        plan=settle(TrainConfig(**settings), model.config, recipe, n_tokens=1000),
        run=RunFolder(folder),
        precision=precision,
        facts={"seed": 7},
        write_weights=lambda model, folder: model.save_pretrained(folder, tokenizer),
    )


def parameters(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


TIMED = {"tokens_per_second", "seconds", "memory"}


def untimed(run):
    return [{k: v for k, v in line.items() if k not in TIMED} for line in run.read_metrics()]


def resumed(job):
    """The same job, continued from its folder by a fresh model."""
    start = job.run.newest()
    model = GPT2.from_pretrained(start.path)
    fit(replace(job, model=model, scorer=Scorer(model)), start=start)
    return model


def test_a_run_leaves_metrics_samples_best_weights_and_its_last_checkpoint(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)
    state = fit(job)
    assert state.step == 6
    lines = untimed(job.run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 2, 4, 6]
    assert all({"loss", "lr", "grad_norm"} <= line.keys() for line in lines[1:])
    assert [path.name for path in job.run.checkpoints()] == ["step-000006", "step-000004"]
    assert [sample["step"] for sample in job.run.read_samples()] == [0, 2, 4, 6]
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


@pytest.mark.parametrize(
    ("stop_at", "micro_batch_size"), [(1, 2), (2, 2), (3, 2), (5, 2), (3, 5), (3, 3)]
)
def test_a_run_stopped_by_a_signal_and_resumed_is_the_run_never_stopped(
    tmp_path, corpus, stop_at, micro_batch_size
):
    whole = make_job(tmp_path / "whole", corpus, micro_batch_size=micro_batch_size)
    fit(whole)
    stopped = make_job(tmp_path / "stopped", corpus, micro_batch_size=micro_batch_size)

    def interrupt(metrics):
        if metrics["step"] == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as stop:
        fit(stopped, on_step=interrupt)
    assert stop.value.signal_number == signal.SIGTERM
    assert stopped.run.checkpoints()[0].name == f"step-{stop_at:06d}"
    model = resumed(stopped)
    assert torch.equal(parameters(model), parameters(whole.model))
    assert untimed(stopped.run) == untimed(whole.run)


@pytest.mark.parametrize("during", [0, 4, 6])
def test_a_signal_during_an_evaluation_ends_it_and_it_is_done_after_resuming(
    tmp_path, corpus, monkeypatch, during
):
    whole = make_job(tmp_path / "whole", corpus)
    fit(whole)
    stopped = make_job(tmp_path / "stopped", corpus)
    real = training.mean_loss

    def interrupted(scorer, batches, *more):
        def watched():
            for number, batch in enumerate(batches):
                if number == 1 and next(evaluation) == during:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        return real(scorer, watched(), *more)

    evaluation = iter([0, 2, 4, 6])
    monkeypatch.setattr(training, "mean_loss", interrupted)
    with pytest.raises(Stopped):
        fit(stopped)
    monkeypatch.undo()
    start = stopped.run.newest()
    assert start.state.step == during and start.state.unjudged is not None
    assert not start.state.ended(6)
    model = resumed(stopped)
    assert torch.equal(parameters(model), parameters(whole.model))
    assert untimed(stopped.run) == untimed(whole.run)
    assert stopped.run.read_samples() == whole.run.read_samples()


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
    assert job.run.checkpoints()[0].name == "step-000002"


def test_an_ignored_signal_stays_ignored(tmp_path, corpus):
    # nohup starts a program so, that it may outlive its terminal
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = lambda metrics: signal.raise_signal(signal.SIGHUP)  # noqa: E731
        assert fit(make_job(tmp_path / "run", corpus), on_step=hang_up).step == 6
    finally:
        signal.signal(signal.SIGHUP, before)


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
                job.model.ln_f.weight.mul_(-300)

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


def test_resuming_at_the_best_step_mends_the_folders_weights(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)
    state = fit(job)
    assert state.best_step == state.step == 6
    weights = tmp_path / "run" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    resumed(job)
    assert weights.read_bytes() == whole


def test_patience_ends_a_run_that_no_longer_gains(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=9, eval_every=1, patience=3)
    state = fit(job, on_step=ruin(job, after=2))
    assert (state.best_step, state.step) == (2, 5)
    assert job.run.checkpoints()[0].name == "step-000005"


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


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_where_it_arose(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)

    def poison(metrics):
        if metrics["step"] == 3:
            with torch.no_grad():
                job.model.h[1].mlp.c_fc.weight[0, 0] = float("nan")

    with pytest.raises(InputError) as error:
        fit(job, on_step=poison)
    text = str(error.value)
    assert text.startswith("step 4: loss nan, gradient norm nan; first not finite: output of h.1.")
    assert "h.1.mlp.c_fc, whose weight has 1 of 784 values not finite" in text
    assert "lamps.txt" in text
    assert f"{tmp_path / 'run' / 'checkpoints' / 'step-000002'} is intact" in text
    kept = parameters(GPT2.from_pretrained(job.run.newest().path))
    assert kept.isfinite().all()
    told = json.loads((tmp_path / "run" / "not-finite-step-000004.json").read_text())
    assert (told["step"], told["where"]) == (4, "output of h.1.mlp.c_fc")
    assert len(told["rows"]) == 5


@pytest.mark.parametrize("at", [0, 2])
def test_weights_that_cannot_be_judged_are_named_and_their_checkpoint_is_dropped(
    tmp_path, corpus, monkeypatch, at
):
    job = make_job(tmp_path / "run", corpus, weight_decay=0.0)

    def poison():
        with torch.no_grad():
            job.model.h[1].mlp.c_proj.bias[0] = float("nan")

    real = training.save

    def save(job, state, optimizer):
        real(job, state, optimizer)
        if state.step == at:
            poison()

    monkeypatch.setattr(training, "save", save)
    with pytest.raises(InputError) as error:
        fit(job)
    assert "h.1.mlp.c_proj.bias holds values that are not finite" in str(error.value)
    expected = "before training is nan" if at == 0 else "at step 2 is nan"
    assert expected in str(error.value)
    assert [path.name for path in job.run.checkpoints()] == ["step-000000"]


def test_a_poisoned_document_is_named(tmp_path):
    for name, text in {"lamps": TEXT, "well": "Only here a ~ stands. " * 9, "sea": TEXT}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    tokenizer, files = Tokenizer.gpt2(300), [*tmp_path.glob("*.txt")]
    corpus = prepare(files, tokenizer, val_fraction=0, cache_dir=tmp_path / "cache")
    job = make_job(tmp_path / "run", corpus, max_steps=400, save_every=400, eval_every=400)
    (token,) = tokenizer.encode("~")

    def poison(module, inputs, output):
        return output.masked_fill((inputs[0] == token)[..., None], float("inf"))

    job.model.wte.register_forward_hook(poison)
    with pytest.raises(InputError, match=r"step \d+: .*output of wte.*, from \S*well\.txt; "):
        fit(job)


def test_the_micro_batch_that_fitted_is_remembered(tmp_path, corpus, monkeypatch):
    job = make_job(tmp_path / "run", corpus, micro_batch_size=5)
    real = training.accumulate

    def scarce(scorer, batch, precision, micro_batch_size, *more):
        if micro_batch_size > 3:
            raise MemoryError
        return real(scorer, batch, precision, micro_batch_size, *more)

    monkeypatch.setattr(training, "accumulate", scarce)
    assert fit(job).micro_batch_size == 3
    assert job.run.newest().state.micro_batch_size == 3


def test_float16_that_always_overflows_ends_the_run_and_says_how_often(tmp_path, corpus):
    job = make_job(
        tmp_path / "run",
        corpus,
        max_steps=50,
        save_every=50,
        eval_every=50,
        precision=Precision(CPU, torch.float16),
    )
    job.model.ln_f.weight.register_hook(lambda grad: grad * float("inf"))
    before = parameters(job.model).clone()
    with pytest.raises(InputError, match=f"step {MOST_SKIPS}: float16 overflowed {MOST_SKIPS} "):
        fit(job)
    lines = untimed(job.run)
    assert [line.get("skipped") for line in lines[1:]] == [*range(1, MOST_SKIPS)]
    assert all(line["grad_norm"] is None for line in lines[1:])
    assert torch.equal(parameters(job.model), before)


def test_float16_goes_on_after_a_few_overflows(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, precision=Precision(CPU, torch.float16))
    broken = [True, True, True]
    hook = lambda grad: grad * float("inf") if broken and broken.pop() else grad  # noqa: E731
    job.model.ln_f.weight.register_hook(hook)
    state = fit(job)
    assert (state.step, state.skipped_in_a_row) == (6, 0)
    assert 1 <= state.n_skipped <= 3


def test_the_weights_before_training_are_judged_and_remembered(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)
    state = fit(job)
    assert state.first_val_loss == job.run.read_metrics()[0]["val_loss"]


def test_checkpoints_hold_tensors_and_text_and_no_pickles(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=1)
    fit(job)
    start = job.run.newest()
    assert len(start.optimizer_tensors()) == 3 * len(list(job.model.parameters()))
    assert {path.suffix for path in start.path.iterdir()} <= {".json", ".safetensors", ".txt"}
    assert json.loads((start.path / "state.json").read_text())["state"]["step"] == 1
