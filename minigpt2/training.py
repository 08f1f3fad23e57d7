"""The story of a training run: batches in, weights out, nothing lost on the way.

Everything random in step n depends on (seed, n) alone, the order of the text and dropout alike, so
a run that is stopped and resumed is the run that was never stopped. Knows nothing of the command
line and of pictures.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import cast

import torch
import torch.nn as nn

from .batches import IGNORE, Batch, Batches, validation_batches
from .checkpoint import Checkpoint, RunFolder, TrainState
from .corpus import Corpus
from .errors import InputError
from .evaluate import mean_loss, summed_loss
from .generate import complete
from .model import GPT2, GPT2Config
from .optim import lr_at, make_optimizer
from .options import RECIPES, SamplingConfig, TrainConfig
from .precision import Precision
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)
Metrics = dict[str, float | None]
# Logits of one micro-batch, which with the activations behind them decide its memory: on the CPU
# one sequence of GPT-2's full window, a peak of 6.4 GB when it trains the 124M model, on CUDA ten.
MOST_LOGITS = {"cpu": 2**26, "mps": 2**26, "cuda": 2**29}
SAMPLE = SamplingConfig(temperature=0.8, top_p=0.95)
SAMPLE_TOKENS = 120
PROMPT_TOKENS = 12


@dataclass(frozen=True)
class Plan:
    """A TrainConfig in which everything is decided; see there for what the fields mean."""

    max_steps: int
    batch_size: int
    micro_batch_size: int
    block_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    eval_every: int
    save_every: int
    patience: int
    seed: int


def settle(
    config: TrainConfig,
    model: GPT2Config,
    *,
    preset: str | None,
    n_tokens: int,
    device: torch.device,
) -> Plan:
    """Decide what was left open, from the recipe, the model, the number of training tokens and
    the device.

    Raises InputError when block_size is beyond the model's context.
    """
    recipe = RECIPES.get(preset or "fine-tune", RECIPES["from-scratch"])
    block_size = config.block_size or model.block_size
    if block_size > model.block_size:
        raise InputError(
            f"--block-size is {block_size}, the model has {model.block_size} positions"
        )
    batch_size = config.batch_size or recipe.batch_size
    max_steps = config.max_steps or (recipe.max_steps if config.epochs is None else None)
    if max_steps is None:
        windows = math.ceil(n_tokens / block_size)
        max_steps = math.ceil((config.epochs or recipe.epochs) * windows / batch_size)
    fits = max(1, MOST_LOGITS[device.type] // (block_size * model.vocab_size))
    eval_every = config.eval_every or max(1, max_steps // 10)
    return Plan(
        max_steps=max_steps,
        batch_size=batch_size,
        micro_batch_size=min(config.micro_batch_size or fits, batch_size),
        block_size=block_size,
        learning_rate=config.learning_rate or recipe.learning_rate,
        warmup_steps=max_steps // 20 if config.warmup_steps is None else config.warmup_steps,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
        patience=config.patience,
        seed=config.seed,
    )


@dataclass(frozen=True)
class Job:
    """All that a training run consists of."""

    model: GPT2
    tokenizer: Tokenizer
    corpus: Corpus
    plan: Plan
    run: RunFolder
    precision: Precision
    facts: Mapping[str, object]  # what a resumed run must have in common with this one


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step measured."""

    loss: float  # mean over the step's scored tokens, in nats
    grad_norm: float  # before clipping
    n_tokens: int
    skipped: bool  # float16 overflowed: the scaler halved its scale and left the weights alone


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    micro_batch_size: int,
    learning_rate: float,
    grad_clip: float,
) -> StepStats:
    """One optimizer step over idx, targets (B, T), computed micro-batch by micro-batch.

    Each micro-batch's summed loss is divided by the tokens of the whole batch, so the gradient does
    not depend on how the batch is cut. The order is unscale, clip, step: clipping scaled gradients
    would clip them to nothing.
    """
    n_tokens = int((batch[1] != IGNORE).sum())
    loss = torch.zeros((), device=precision.device)
    optimizer.zero_grad(set_to_none=True)
    for idx, targets in zip(*(part.split(micro_batch_size) for part in batch)):
        with precision.autocast():
            logits = model(precision.to_device(idx))
        part = summed_loss(logits, precision.to_device(targets)) / n_tokens
        precision.scaler.scale(part).backward()
        loss += part.detach()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    precision.scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    finite = math.isfinite(loss.item()) and math.isfinite(grad_norm.item())
    if not finite and not precision.scaler.is_enabled():
        raise NotFiniteError(f"loss {loss.item():.4g}, gradient norm {grad_norm.item():.4g}")
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return StepStats(loss.item(), grad_norm.item(), n_tokens, skipped=not finite)


class NotFiniteError(ArithmeticError):
    """The loss or a gradient is not a number; the weights were left as they were before the
    step.
    """


def fit(
    job: Job,
    *,
    start: Checkpoint | None = None,
    forward: nn.Module | None = None,
    on_step: Callable[[Metrics], None] = lambda metrics: None,
) -> TrainState:
    """Train job.model to plan.max_steps, keep the best weights in job.run, and say where it ended.

    `start` is the checkpoint whose weights the model already has; `forward` is the compiled model,
    if any; `on_step` gets what metrics.jsonl gets. Raises Stopped after a signal, with everything
    saved, and InputError when the loss is not a number, with the last checkpoint as it was.
    """
    plan, run, model = job.plan, job.run, job.model if forward is None else forward
    batches = Batches(
        job.corpus.train, block_size=plan.block_size, batch_size=plan.batch_size, seed=plan.seed
    )
    optimizer = make_optimizer(
        job.model, learning_rate=plan.learning_rate, weight_decay=plan.weight_decay
    )
    state = saved = TrainState()
    if start is not None:
        state = saved = start.state
        run.load_training(start.path, optimizer, job.precision)
        run.forget_after(state.step)

    def report(metrics: Metrics) -> None:
        run.log(metrics)
        on_step(metrics)

    def save() -> TrainState:
        run.save_checkpoint(state, job.model, optimizer, job.precision, job.facts)
        return state

    with _stop_on_signals() as stop, _own_randomness(job.precision.device):
        job.model.train()
        if start is None:
            state, metrics = evaluate(job, state)
            report(metrics)
        while state.step < plan.max_steps and not stop.signal_number:
            if plan.patience and state.evaluations_without_gain >= plan.patience:
                logger.info("no better evaluation in %s: stopping early", plan.patience)
                break
            metrics = _measured_step(job, model, batches.at(state.step), optimizer, state.step)
            state = replace(state, step=state.step + 1)
            if state.step % plan.eval_every == 0 or state.step == plan.max_steps:
                state, judged = evaluate(job, state)
                metrics |= judged
            report(metrics)
            if state.step % plan.save_every == 0:
                saved = save()
        if saved != state:
            save()
    if stop.signal_number:
        raise Stopped(stop.signal_number)
    return state


def _measured_step(
    job: Job,
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> Metrics:
    """Take step number `step`, counted from 0, and say what it measured."""
    began = time.perf_counter()
    torch.manual_seed(_step_seed(job.plan.seed, step))  # dropout
    learning_rate = lr_at(
        step,
        peak=job.plan.learning_rate,
        warmup_steps=job.plan.warmup_steps,
        max_steps=job.plan.max_steps,
    )
    try:
        stats = train_step(
            model,
            batch,
            optimizer,
            job.precision,
            micro_batch_size=job.plan.micro_batch_size,
            learning_rate=learning_rate,
            grad_clip=job.plan.grad_clip,
        )
    except NotFiniteError as problem:
        raise InputError(_not_finite_message(problem, step + 1, job.run)) from problem
    if stats.skipped:
        logger.warning("step %s was skipped: float16 overflowed, its scale is halved", step + 1)
    return {
        "step": step + 1,
        "loss": stats.loss,
        "lr": learning_rate,
        "grad_norm": None if stats.skipped else stats.grad_norm,  # JSON has no infinity
        "tokens_per_second": stats.n_tokens / (time.perf_counter() - began),
    }


def evaluate(job: Job, state: TrainState) -> tuple[TrainState, Metrics]:
    """Judge the weights on all of the held-out text, keep them if they are the best yet, and let
    them write.

    Without held-out text the newest weights count as the best. Changes nothing that training
    depends on.
    """
    metrics: Metrics = {"step": state.step}
    val = job.corpus.val
    if val is None:
        state = replace(state, best_step=state.step)
    else:
        scored = validation_batches(
            val, block_size=job.plan.block_size, batch_size=job.plan.micro_batch_size
        )
        metrics["val_loss"] = val_loss = mean_loss(job.model, scored, job.precision)
        if state.best_val_loss is None or val_loss < state.best_val_loss:
            state = replace(
                state, best_step=state.step, best_val_loss=val_loss, evaluations_without_gain=0
            )
        else:
            state = replace(state, evaluations_without_gain=state.evaluations_without_gain + 1)
    if state.best_step == state.step:
        job.run.save_best(job.model, job.tokenizer)
    prompt = _sample_prompt(job)
    (sample,) = complete(
        job.model,
        job.tokenizer,
        [prompt],
        max_new_tokens=SAMPLE_TOKENS,
        sampling=SAMPLE,
        seed=job.plan.seed,
    )
    job.run.log_sample(state.step, prompt, sample.text)
    return state, metrics


def compiled(model: GPT2, precision: Precision, plan: Plan) -> nn.Module:
    """The model through torch.compile, tried on one micro-batch; the plain model, with a notice,
    where that fails.
    """
    idx = torch.zeros(plan.micro_batch_size, plan.block_size, dtype=torch.int64)
    try:
        fast = cast(nn.Module, torch.compile(model))
        with precision.autocast():
            fast(precision.to_device(idx)).float().sum().backward()
    except Exception as problem:  # compilers fail in as many ways as there are machines
        logger.warning(
            "torch.compile failed (%s): going on without it",
            next(iter(str(problem).splitlines()), ""),
        )
        return model
    finally:
        model.zero_grad(set_to_none=True)
    return fast


def _sample_prompt(job: Job) -> str:
    tokens = job.corpus.train if job.corpus.val is None else job.corpus.val
    return job.tokenizer.decode(
        [int(id) for id in tokens.tokens[:PROMPT_TOKENS] if id != job.tokenizer.eot]
    )


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _not_finite_message(problem: NotFiniteError, step: int, run: RunFolder) -> str:
    saved = run.checkpoints()
    kept = f"{saved[0]} is intact" if saved else "no checkpoint was written yet"
    return f"step {step}: {problem}; {kept}; try a lower --learning-rate or --dtype float32"


class Stopped(Exception):
    """A signal asked the run to stop; it finished its step and saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


@dataclass
class _StopRequest:
    signal_number: int = 0


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[_StopRequest]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request; a second one acts as it always
    does.
    """
    request = _StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    numbers = [signal.SIGINT, signal.SIGTERM] + (
        [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    )
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, before[signal.Signals(number)])

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in numbers:
            signal.signal(number, before[number])


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Let the run seed torch as it likes, and give the caller's random state back afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        yield
