"""The story of a training run: batches in, weights out, nothing lost on the way.

Everything random in step n depends on (seed, n, row) alone, the order of the text and dropout
alike, so a run that is stopped and resumed is the run that was never stopped, and two processes
draw what one would. Knows nothing of the command line and of pictures.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from . import distributed, memory
from .batches import Batch, Batches, validation_batches
from .checkpoint import Checkpoint, RunFolder, TrainState
from .corpus import Corpus
from .diagnose import describe, find_nonfinite, report
from .distributed import ALONE, World
from .errors import InputError
from .evaluate import mean_loss
from .files import write_json
from .generate import complete
from .interrupt import Stopped, stop_on_signals
from .loss import IGNORE
from .model import GPT2
from .optim import load_optimizer_tensors, lr_at, make_optimizer, optimizer_tensors
from .options import SamplingConfig
from .plan import Plan
from .precision import Precision, ran_out_of_memory
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)
Metrics = dict[str, Any]
MOST_SKIPS = 20  # float16 overflows in a row: its scale has then fallen from 65,536 to 1/16
SAMPLE = SamplingConfig(temperature=0.8, top_p=0.95)
SAMPLE_TOKENS = 120
PROMPT_TOKENS = 12


@dataclass(frozen=True)
class Job:
    """All that a training run consists of."""

    model: GPT2
    scorer: nn.Module  # Scorer(model), as this run computes it: replicated, sharded or plain
    tokenizer: Tokenizer
    corpus: Corpus
    plan: Plan
    run: RunFolder
    precision: Precision
    facts: Mapping[str, object]  # what a resumed run must have in common with this one
    write_weights: Callable[[GPT2, Path], None]  # a model folder, or an adapter
    world: World = ALONE
    mask_prompt: bool = False  # prompts are read, and not learned


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step measured."""

    loss: float  # mean over the scored tokens of all micro-batches and processes, in nats
    grad_norm: float  # before clipping
    n_tokens: int
    micro_batch_size: int  # which fitted into memory
    skipped: bool  # float16 overflowed: the scaler halved its scale and left the weights alone


class NotFiniteError(ArithmeticError):
    """The loss or a gradient is not a number; the weights were left as they were before the
    step.
    """

    def __init__(self, loss: float, grad_norm: float) -> None:
        super().__init__(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}")
        self.loss, self.grad_norm = loss, grad_norm


def train_step(
    scorer: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    micro_batch_size: int,
    learning_rate: float,
    grad_clip: float,
    seed: int,
    world: World = ALONE,
) -> StepStats:
    """One optimizer step over idx, targets (B, T) of all processes; `seed` decides its dropout.

    The order is unscale, clip, step: clipping scaled gradients would clip them to nothing. Raises
    NotFiniteError before the weights change, unless float16 has overflowed, which is no error.
    """
    while True:
        try:
            loss = accumulate(scorer, batch, precision, micro_batch_size, seed, world)
            break
        except Exception as problem:
            if not ran_out_of_memory(problem) or micro_batch_size == 1 or world.size > 1:
                raise
        # after the except block, which keeps the failed frames and all their tensors alive
        optimizer.zero_grad(set_to_none=True)
        precision.release_memory()
        micro_batch_size = math.ceil(micro_batch_size / 2)
        logger.warning("out of memory: again, with %s sequences at a time", micro_batch_size)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    precision.scaler.unscale_(optimizer)
    trained = [p for p in scorer.parameters() if p.requires_grad]
    norm = distributed.whole(nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if not finite and not precision.scaler.is_enabled():
        raise NotFiniteError(loss, norm)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepStats(loss, norm, _count(batch), micro_batch_size, skipped=not finite)


def accumulate(
    scorer: nn.Module,
    batch: Batch,
    precision: Precision,
    micro_batch_size: int,
    seed: int,
    world: World = ALONE,
) -> float:
    """Leave the gradient of the batch's mean loss in the parameters, and return that loss.

    Each micro-batch's summed loss is divided by the tokens of the whole batch, so the gradient does
    not depend on how the batch is cut, nor over how many processes. Micro-batches draw their
    dropout from the seed and the number of their first row.
    """
    parts = [*zip(*(part.split(micro_batch_size) for part in world.share(batch)))]
    loss_scale = precision.loss_scale()
    # DDP and FSDP take the mean over processes; a batch may have nothing but prompts
    scale = loss_scale * world.size / max(1, _count(batch))
    loss = torch.zeros((), device=precision.device)
    for number, (idx, targets) in enumerate(parts):
        row = world.rows(len(batch[0])).start + number * micro_batch_size
        torch.manual_seed(mixed(seed, row))
        with distributed.gradient_sync(scorer, number == len(parts) - 1):
            with precision.autocast():
                part = scorer(precision.to_device(idx), precision.to_device(targets), scale)
            part.backward()
        loss += part.detach()
    return sum(world.gather((loss / loss_scale).item())) / world.size


def fit(
    job: Job,
    *,
    start: Checkpoint | None = None,
    on_step: Callable[[Metrics], None] = lambda metrics: None,
) -> TrainState:
    """Train job.model to plan.max_steps, keep the best weights in job.run, and say where it ended.

    `start` is the checkpoint whose weights the model already has; `on_step` gets what metrics.jsonl
    gets. Raises Stopped after a signal, with everything saved, and InputError when the loss is not
    a number, with the last checkpoint as it was.
    """
    plan, world, run = job.plan, job.world, job.run
    batches = Batches(
        job.corpus.train,
        block_size=plan.block_size,
        batch_size=plan.batch_size,
        seed=plan.seed,
        mask_prompt=job.mask_prompt,
    )
    optimizer = make_optimizer(
        job.model, learning_rate=plan.learning_rate, weight_decay=plan.weight_decay
    )
    state = TrainState(unjudged={}) if start is None else start.state
    state = replace(state, micro_batch_size=plan.micro_batch_size)
    if start is not None:
        load_optimizer_tensors(job.model, optimizer, start.optimizer_tensors())
        job.precision.scaler.load_state_dict(start.scaler)
        if state.best_step == state.step and state.unjudged is None:
            _publish_best(job)  # the folder's may be those of a later step, or damaged
    if world.is_main:
        run.forget_after(state.step if state.unjudged is None else state.step - 1)

    def publish(metrics: Metrics) -> None:
        if world.is_main:
            run.log(metrics)
            on_step(metrics)

    with stop_on_signals() as request, _own_randomness(job.precision.device):

        def asked_to_stop() -> int:
            return max(world.gather(request.signal_number))

        began = time.perf_counter()
        job.model.train()
        saved = state
        if start is None:
            save(job, state, optimizer)  # a disk that is full says so before the work begins
        while True:
            if state.unjudged is not None:
                try:
                    state, metrics = judge(job, state, asked_to_stop)
                except _Interrupted:
                    break
                publish(metrics)
            impatient = 0 < plan.patience <= state.evaluations_without_gain
            if state.step >= plan.max_steps or impatient or asked_to_stop():
                break
            state, metrics = _next_step(job, batches, optimizer, state)
            peak = memory.peak(job.precision.device)
            metrics |= {"memory": peak, "seconds": time.perf_counter() - began}
            if state.step % plan.eval_every == 0 or state.step == plan.max_steps:
                state = replace(state, unjudged=metrics)
            else:
                publish(metrics)
            if state.step % plan.save_every == 0:
                save(job, state, optimizer)
                saved = state
        if saved != state:
            save(job, state, optimizer)
        stop = asked_to_stop()
    if stop and not state.ended(plan.max_steps):
        raise Stopped(stop)
    if state.step < plan.max_steps:
        logger.info("no better evaluation in %s: stopped early", plan.patience)
    return state


def _next_step(
    job: Job, batches: Batches, optimizer: torch.optim.Optimizer, state: TrainState
) -> tuple[TrainState, Metrics]:
    """Take the step after `state`, and say what it measured."""
    began = time.perf_counter()
    plan, scaler = job.plan, job.precision.scaler
    learning_rate = lr_at(
        state.step,
        peak=plan.learning_rate,
        warmup_steps=plan.warmup_steps,
        max_steps=plan.max_steps,
    )
    batch, seed = batches.at(state.step), mixed(plan.seed, state.step)
    try:
        stats = train_step(
            job.scorer,
            batch,
            optimizer,
            job.precision,
            micro_batch_size=state.micro_batch_size,
            learning_rate=learning_rate,
            grad_clip=plan.grad_clip,
            seed=seed,
            world=job.world,
        )
    except NotFiniteError as problem:
        raise InputError(_diagnosis(job, batches, state, str(problem))) from problem
    metrics: Metrics = {
        "step": state.step + 1,
        "loss": stats.loss,
        "lr": learning_rate,
        "grad_norm": None if stats.skipped else stats.grad_norm,  # JSON has no infinity
        "tokens_per_second": stats.n_tokens / (time.perf_counter() - began),
    }
    state = replace(
        state,
        step=state.step + 1,
        micro_batch_size=stats.micro_batch_size,
        n_skipped=state.n_skipped + stats.skipped,
        skipped_in_a_row=state.skipped_in_a_row + 1 if stats.skipped else 0,
    )
    if stats.skipped:
        metrics |= {"skipped": state.n_skipped}
        logger.warning(
            "step %s skipped: float16 overflowed, scale %s", state.step, scaler.get_scale()
        )
    if state.skipped_in_a_row >= MOST_SKIPS:
        problem = f"float16 overflowed {MOST_SKIPS} times in a row"
        before = replace(state, step=state.step - 1)
        raise InputError(_diagnosis(job, batches, before, problem))
    return state, metrics


class _Interrupted(Exception):
    """A signal came during an evaluation, which will be done when the run is resumed."""


def judge(
    job: Job, state: TrainState, asked_to_stop: Callable[[], int]
) -> tuple[TrainState, Metrics]:
    """Judge the weights on all of the held-out text, keep them if they are the best yet, and let
    them write.

    Returns the metrics of the step and its evaluation. Without held-out text the newest weights
    count as the best. Changes nothing that training depends on.
    """
    metrics: Metrics = {"step": state.step, **(state.unjudged or {})}
    state = replace(state, unjudged=None)
    plan, val, world = job.plan, job.corpus.val, job.world
    best = val is None
    if val is not None:
        rows = state.micro_batch_size * world.size
        scored = validation_batches(
            val, block_size=plan.block_size, batch_size=rows, mask_prompt=job.mask_prompt
        )
        scored = _until(asked_to_stop, scored)
        scorer = distributed.unwrapped(job.scorer)
        metrics["val_loss"] = loss = mean_loss(scorer, scored, job.precision, world)
        if not math.isfinite(loss):
            raise InputError(_ruined(job, state, loss))
        best = state.best_val_loss is None or loss < state.best_val_loss
        waited = 0 if best else state.evaluations_without_gain + 1
        state = replace(state, evaluations_without_gain=waited)
        if state.first_val_loss is None:
            state = replace(state, first_val_loss=loss)
        if best:
            state = replace(state, best_val_loss=loss)
    if best:
        state = replace(state, best_step=state.step)
        _publish_best(job)
    if world.is_main or distributed.is_sharded(job.model):
        prompt, text = _sample(job)
        if world.is_main:
            job.run.log_sample(state.step, prompt, text)
    return state, metrics


def _publish_best(job: Job) -> None:
    """Make the weights of this moment those that the run folder stands for."""
    weights = _as_one_process(job)
    if job.world.is_main:
        job.write_weights(weights, job.run.path)


def save(job: Job, state: TrainState, optimizer: torch.optim.AdamW) -> None:
    """Write a checkpoint from which the run goes on as if it had never stopped."""
    weights = _as_one_process(job)
    tensors = optimizer_tensors(job.model, optimizer)
    if job.world.is_main:
        job.run.save_checkpoint(
            state,
            write_weights=lambda folder: job.write_weights(weights, folder),
            optimizer=tensors,
            scaler=job.precision.scaler.state_dict(),
            facts=job.facts,
            settings=settings_of(job),
        )


def _until(asked_to_stop: Callable[[], int], batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if asked_to_stop():
            raise _Interrupted
        yield batch


def settings_of(job: Job) -> dict[str, object]:
    """What may be another value in a resumed run, which is then another run from there on."""
    dtype = str(job.precision.dtype).removeprefix("torch.")
    return {**asdict(job.plan), "dropout": job.model.config.resid_pdrop, "dtype": dtype}


def mixed(seed: int, number: int) -> int:
    """A seed for the number-th of many things, far from those of its neighbours."""
    return (seed * 6_364_136_223_846_793_005 + number * 1_442_695_040_888_963_407 + 1) % 2**63


def _as_one_process(job: Job) -> GPT2:
    """The model as one process would have it; with sharded weights a copy on the CPU, and every
    process must ask for it.
    """
    if not distributed.is_sharded(job.model):
        return job.model
    distributed.reshard(job.model)
    with torch.device("meta"):
        copy = GPT2(job.model.config)
    for name, parameter in job.model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(distributed.whole(parameter.detach()).to("cpu"))
        setattr(copy.get_submodule(owner), leaf, value)
    return copy


def _sample(job: Job) -> tuple[str, str]:
    """A prompt from the held-out text, and how the model goes on from it."""
    tokens = job.corpus.train if job.corpus.val is None else job.corpus.val
    start = [int(id) for id in tokens.tokens[:PROMPT_TOKENS] if id != job.tokenizer.eot]
    prompt = job.tokenizer.decode(start)
    room = job.model.config.block_size + 1 - max(1, len(start))  # the last token is not read
    # texts of growing length would be compiled again and again
    with torch.compiler.set_stance("force_eager"):
        (sample,) = complete(
            job.model,
            job.tokenizer,
            [prompt],
            max_new_tokens=min(SAMPLE_TOKENS, max(1, room)),
            sampling=SAMPLE,
            seed=job.plan.seed,
        )
    return prompt, sample.text


def _count(batch: Batch) -> int:
    return int((batch[1] != IGNORE).sum())


def _diagnosis(job: Job, batches: Batches, state: TrainState, problem: str) -> str:
    """Repeat the step after `state`, say what was not finite first and in which documents, and
    leave the whole report in the run folder.
    """
    step, train = state.step + 1, job.corpus.train
    batch, spans = batches.at(state.step), batches.spans(state.step)
    job.model.zero_grad(set_to_none=True)  # room for the repetition
    if distributed.is_sharded(job.model):
        found = "with --fsdp the module is not looked for"
    else:
        finding = find_nonfinite(
            job.model,
            batch,
            loss_of=_loss_of(job, batch),
            micro_batch_size=state.micro_batch_size,
            seed_row=lambda row: torch.manual_seed(mixed(mixed(job.plan.seed, state.step), row)),
        )
        found = describe(finding, spans, train)
        decode = job.tokenizer.decode
        made = report(finding, batch, spans, train, decode=decode, step=step, problem=problem)
        if job.world.is_main:
            write_json(job.run.path / f"not-finite-step-{step:06d}.json", made)
        job.world.gather(None)  # one process that ends ends the others, and the report with them
    return f"step {step}: {problem}; {found}; {_advice(job.run)}"


def _ruined(job: Job, state: TrainState, loss: float) -> str:
    """What to say of weights whose held-out loss is not a number; their checkpoint is dropped."""
    bad = [name for name, p in job.model.named_parameters() if not p.detach().isfinite().all()]
    where = f"; {bad[0]} holds values that are not finite" if bad else ""
    if state.step == 0:
        return f"the held-out loss before training is {loss}{where}: the model is damaged"
    if job.world.is_main:
        job.run.discard(state.step)
    job.world.gather(None)
    return f"the held-out loss at step {state.step} is {loss}{where}; {_advice(job.run)}"


def _advice(run: RunFolder) -> str:
    saved = run.checkpoints()
    kept = f"{saved[0]} is intact" if saved else "no checkpoint was written yet"
    return f"{kept}; go on from it with --resume and a lower --learning-rate, or --dtype float32"


def _loss_of(job: Job, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    """The part of a micro-batch in the loss of a batch, as `accumulate` computes it."""
    scale = job.precision.loss_scale() / max(1, _count(batch))

    def loss_of(idx: Tensor, targets: Tensor) -> Tensor:
        idx, targets = job.precision.to_device(idx), job.precision.to_device(targets)
        with job.precision.autocast():
            return distributed.unwrapped(job.scorer)(idx, targets, scale)

    return loss_of


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Let the run seed torch as it likes, and give the caller's random state back afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        yield
