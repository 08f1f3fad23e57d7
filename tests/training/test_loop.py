"""A training run: stopping, evaluating and resuming change nothing of what is learned."""

import contextlib
import json
import math
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from minigpt2.corpus.prepared import prepare
from minigpt2.errors import InputError
from minigpt2.evaluation.scorer import Scorer
from minigpt2.finetuning.progress import evaluation_line
from minigpt2.model import GPT2
from minigpt2.runs.card import write_card
from minigpt2.runs.curves import draw_loss_curve
from minigpt2.runs.folder import RunFolder
from minigpt2.runs.page import write_report
from minigpt2.runs.record import Metrics
from minigpt2.runs.state import Facts
from minigpt2.system.precision import Precision
from minigpt2.system.signals import MOMENT, Stopped
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import loop, step
from minigpt2.training.loop import MOST_SKIPS, Job, fit
from minigpt2.training.options import TrainConfig
from minigpt2.training.plan import make_plan, recipe_for
from text_files import lamp_lines
from tiny_training import CPU, FLOAT32, parameters, tiny_model

TEXT = "".join(lamp_lines(120))


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
        plan=make_plan(TrainConfig(**settings), model.config, recipe, n_tokens=1000),
        run=RunFolder(folder),
        precision=precision,
        facts=Facts(seed=7),
        write_weights=lambda model, folder: model.save_pretrained(folder, tokenizer),
    )


TIMED = dict.fromkeys(("tokens_per_second", "seconds", "memory"))


def untimed(run):
    """The metrics of a run, but what differs between two equal runs."""
    return [replace(metrics, **TIMED) for metrics in run.read_metrics()]


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
    assert [line.step for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line.step for line in lines if line.val_loss is not None] == [0, 2, 4, 6]
    assert all(None not in (line.loss, line.lr, line.grad_norm) for line in lines[1:])
    assert [path.name for path in job.run.checkpoints()] == ["step-000006", "step-000004"]
    assert [sample.step for sample in job.run.read_samples()] == [0, 2, 4, 6]
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
        if metrics.step == stop_at:
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
    real = loop.mean_loss

    def interrupted(scorer, batches, *more):
        def watched():
            for number, batch in enumerate(batches):
                if number == 1 and next(evaluation) == during:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        return real(scorer, watched(), *more)

    evaluation = iter([0, 2, 4, 6])
    monkeypatch.setattr(loop, "mean_loss", interrupted)
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
    for after in (5, 6):
        job.run.log(Metrics(after, loss=1.0))
    with job.run.metrics_path.open("a") as file:
        file.write('{"step": 7, "lo')
    longer = make_job(tmp_path / "run", corpus, max_steps=6)
    resumed(longer)
    assert [line.step for line in job.run.read_metrics()] == [0, 1, 2, 3, 4, 5, 6]


def test_the_second_signal_acts_at_once(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)

    def interrupt_twice(metrics):
        if metrics.step == 3:
            signal.raise_signal(signal.SIGINT)
            time.sleep(MOMENT)
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
        if metrics.step == after:
            with torch.no_grad():
                job.model.ln_f.weight.mul_(-300)

    return listen


def test_the_folder_stands_for_the_best_weights_not_the_last(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=5, eval_every=1)
    state = fit(job, on_step=ruin(job, after=3))
    losses = {line.step: line.val_loss for line in job.run.read_metrics()}
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
    assert all(line.val_loss is None for line in job.run.read_metrics())
    kept = parameters(GPT2.from_pretrained(job.run.path))
    assert torch.equal(kept, parameters(job.model))


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_where_it_arose(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)

    def poison(metrics):
        if metrics.step == 3:
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

    real = loop.save

    def save(job, state, optimizer):
        real(job, state, optimizer)
        if state.step == at:
            poison()

    monkeypatch.setattr(loop, "save", save)
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
    real = step.accumulate

    def scarce(scorer, batch, precision, micro_batch_size, *more):
        if micro_batch_size > 3:
            raise MemoryError
        return real(scorer, batch, precision, micro_batch_size, *more)

    monkeypatch.setattr(step, "accumulate", scarce)
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
    assert [line.skipped for line in lines[1:]] == [*range(1, MOST_SKIPS)]
    assert all(math.isnan(line.grad_norm) for line in lines[1:])
    assert torch.equal(parameters(job.model), before)


def test_float16_goes_on_after_a_few_overflows(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, precision=Precision(CPU, torch.float16))
    broken = [True, True, True]
    hook = lambda grad: grad * float("inf") if broken and broken.pop() else grad  # noqa: E731
    job.model.ln_f.weight.register_hook(hook)
    state = fit(job)
    assert (state.step, state.skipped_in_a_row) == (6, 0)
    assert 1 <= state.n_skipped <= 3


class Overflowing:
    """A final layer norm that overflows in the forward passes of one training step."""

    def __init__(self, job, at):
        self.passes = -(-job.plan.batch_size // job.plan.micro_batch_size)
        self.at, self.seen = at, 0
        job.model.ln_f.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        if not torch.is_grad_enabled():
            return output
        step, self.seen = self.seen // self.passes + 1, self.seen + 1
        return output * 1e39 if step == self.at else output


class Ended(BaseException):
    """The process was killed."""


@pytest.mark.parametrize("stop", ["killed", "signal", "never"])
@pytest.mark.parametrize("at", [2, 6])
def test_a_run_whose_judged_and_saved_step_overflows_forward_resumes_and_ends(
    tmp_path, corpus, stop, at, monkeypatch
):
    job = make_job(tmp_path / "run", corpus, precision=Precision(CPU, torch.float16))
    Overflowing(job, at)
    real = loop.evaluate

    def interrupted(job, state, asked_to_stop):
        if state.step == at and stop == "killed":
            raise Ended
        if state.step == at and stop == "signal":
            signal.raise_signal(signal.SIGTERM)
        return real(job, state, asked_to_stop)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with contextlib.suppress(Ended, Stopped):
        fit(job)
    monkeypatch.undo()
    start = job.run.newest()
    if stop != "never":
        assert start.state.step == at
        unjudged = start.state.unjudged
        assert math.isnan(unjudged.loss) and math.isnan(unjudged.grad_norm)
        assert unjudged.skipped == 1
    model = GPT2.from_pretrained(start.path)
    state = fit(replace(job, model=model, scorer=Scorer(model)), start=start)
    assert (state.step, state.n_skipped, state.unjudged) == (6, 1, None)
    lines = job.run.read_metrics()
    assert [line.step for line in lines] == [*range(7)]
    assert [line.step for line in lines[1:] if math.isnan(line.loss)] == [at]
    assert math.isfinite(lines[at].val_loss)
    refuse = lambda name: pytest.fail(name)  # noqa: E731
    for text in job.run.metrics_path.read_text().splitlines():
        json.loads(text, parse_constant=refuse)
    assert "not finite" in evaluation_line(lines[at])
    for write in (draw_loss_curve, write_report, write_card):
        write(job.run)


def held_out_from(rows, folder, tokenizer, *, learned):
    """These rows held out, and another one to train on."""
    paths = [folder / name for name in ("train.jsonl", "val.jsonl")]
    for path, part in zip(paths, ([learned], rows)):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return prepare(paths[:1], tokenizer, val_paths=paths[1:], cache_dir=folder / "cache")


def judged_bits(folder, corpus, tokenizer, **changes):
    """(nats of all scored tokens, bits per byte) of the weights before training."""
    model = GPT2(replace(tiny_model().config, vocab_size=tokenizer.vocab_size))
    job = make_job(folder, corpus, model=model, max_steps=1)
    fit(replace(job, tokenizer=tokenizer, **changes))
    judged = job.run.read_metrics()[0]
    n_scored = len(corpus.val.tokens) - 1
    if changes:
        n_scored -= sum(end - start for start, end in corpus.val.prompts.tolist())
        n_scored += corpus.val.prompts["start"][0] == 0  # the first token is never a target
    return judged.val_loss * n_scored, judged.bits_per_byte


OWN_WORDS = Tokenizer.gpt2(290).with_words([" lamp", "日本", "is lit, na"])


@pytest.mark.parametrize(
    "tokenizer", [Tokenizer.gpt2(300), Tokenizer.gpt2(), OWN_WORDS], ids=["300", "gpt2", "words"]
)
def test_bits_per_byte_are_all_bits_over_all_bytes_whatever_the_tokenizer(tmp_path, tokenizer):
    texts = ["The 7th lamp is lit, naïve and 日本.\n", "🤗 lamp by lamp\n" * 9, "no end é"]
    rows = [{"text": text} for text in texts]
    corpus = held_out_from(rows, tmp_path, tokenizer, learned={"text": TEXT})
    nats, found = judged_bits(tmp_path / "run", corpus, tokenizer)
    ids = [id for id in corpus.val.tokens.tolist() if id != tokenizer.eot]
    assert b"".join(map(tokenizer.token_bytes, ids)) == "".join(texts).encode()
    unscored = tokenizer.token_bytes(ids[0]) if corpus.val.tokens[0] == ids[0] else b""
    n_bytes = len("".join(texts).encode()) - len(unscored)
    assert found == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)


def test_with_prompts_masked_the_bytes_are_those_of_completions(tmp_path):
    tokenizer = Tokenizer.gpt2(300)
    rows = [
        {"prompt": f"What is lamp {n}?", "completion": f" It is naïve, {n * '日'}."}
        for n in range(9)
    ]
    learned = {"prompt": "Who?", "completion": TEXT}
    corpus = held_out_from(rows, tmp_path, tokenizer, learned=learned)
    nats, found = judged_bits(tmp_path / "run", corpus, tokenizer, mask_prompt=True)
    n_bytes = sum(len(row["completion"].encode()) for row in rows)
    assert found == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)


def test_a_held_out_part_without_any_text_has_no_bits_per_byte(tmp_path, corpus):
    ends = replace(corpus.val, tokens=np.full(5, 299, np.uint16))
    job = make_job(tmp_path / "run", replace(corpus, val=ends), max_steps=1)
    fit(job)
    judged = job.run.read_metrics()[0]
    assert judged.val_loss > 0 and judged.bits_per_byte is None
    assert "bits_per_byte" not in judged.to_json()


def test_the_weights_before_training_are_judged_and_remembered(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus)
    state = fit(job)
    assert state.first_val_loss == job.run.read_metrics()[0].val_loss


def test_checkpoints_hold_tensors_and_text_and_no_pickles(tmp_path, corpus):
    job = make_job(tmp_path / "run", corpus, max_steps=1)
    fit(job)
    start = job.run.newest()
    assert len(start.optimizer_tensors()) == 3 * len(list(job.model.parameters()))
    assert {path.suffix for path in start.path.iterdir()} <= {".json", ".safetensors", ".txt"}
    assert json.loads((start.path / "state.json").read_text())["state"]["step"] == 1
