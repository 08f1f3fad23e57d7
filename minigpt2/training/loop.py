"""The loop of a training run: batches in, weights out, nothing lost on the way.

Everything random in step n depends on (seed, n, row) alone, the order of the text and dropout
alike, so a run that is stopped and resumed is the run that was never stopped, and two processes
draw what one would. Knows nothing of the command line and of pictures.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from ..corpus.prepared import Corpus
from ..decoding.text import complete
from ..errors import OptionError
from ..evaluation.held_out_loss import bytes_per_target, mean_loss
from ..loss import bits_per_byte
from ..model import GPT2
from ..runs.folder import Checkpoint, RunFolder
from ..runs.record import Metrics, Sample, Settings
from ..runs.state import Facts, TrainState
from ..sampling import SamplingConfig
from ..system.files import write_json
from ..system.memory import memory_kept, peak_memory
from ..system.precision import Precision, own_randomness
from ..system.processes import ALONE, World, is_sharded, reshard, unwrapped, whole
from ..system.signals import Stopped, StopRequest, stop_on_signals
from ..tokenizer import Tokenizer
from .batches import Batch, Batches, validation_batches
from .not_finite import find_nonfinite, finding_as_json, finding_in_words
from .optimizer import load_optimizer_tensors, lr_at, make_optimizer, optimizer_tensors
from .plan import Plan
from .step import NotFiniteError, mixed, n_scored, train_step
from .ways import way_of_step

logger = logging.getLogger(__name__)
MOST_SKIPS = 20  # float16 overflows in a row: its scale has then fallen from 65,536 to 1/16
SAMPLE = SamplingConfig(temperature=0.8, top_p=0.95)
SAMPLE_TOKENS = 120
PROMPT_TOKENS = 12
ROWS = 64  # of held-out text whose bytes are counted together
NAMED = ("resume", "learning_rate", "dtype", "fsdp")  # options, in what is said of a failed step


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
    facts: Facts  # what a resumed run must have in common with this one
    write_weights: Callable[[GPT2, Path], None]  # a model folder, or an adapter
    world: World = ALONE
    mask_prompt: bool = False  # prompts are read, and not learned
    special_tokens: bool = False  # their names in a text are these tokens

    def held_out(self, n_rows: int) -> Iterator[Batch]:
        """The held-out text, n_rows at a time."""
        val = self.corpus.val
        assert val is not None, "nothing is held out"
        return validation_batches(
            val,
            block_size=self.plan.block_size,
            batch_size=n_rows,
            mask_prompt=self.mask_prompt,
        )

    @cached_property
    def bytes_per_target(self) -> float:
        """Of the held-out text, how many bytes a scored token stands for; it is the same in all
        evaluations.
        """
        n_bytes, _ = self.tokenizer.written_sizes()
        return bytes_per_target(self.held_out(ROWS), torch.from_numpy(n_bytes))


def fit(
    job: Job,
    *,
    start: Checkpoint | None = None,
    on_step: Callable[[Metrics], None] = lambda metrics: None,
    request: StopRequest | None = None,
) -> TrainState:
    """Train job.model to plan.max_steps, keep the best weights in job.run, and say where it ended.

    `start` is the checkpoint whose weights the model already has; `on_step` gets what metrics.jsonl
    gets. What asks for an end is `request`, or a signal where there is none. Raises Stopped when it
    did, with everything saved, and InputError when the loss is not a number, with the last
    checkpoint as it was.
    """
    plan, world, run = job.plan, job.world, job.run
    batches = Batches(
        job.corpus.train,
        block_size=plan.block_size,
        batch_size=plan.batch_size,
        seed=plan.seed,
        mask_prompt=job.mask_prompt,
    )
    optimizer, state = _begin(job, start)

    def publish(metrics: Metrics) -> None:
        if world.is_main:
            run.log(metrics)
            on_step(metrics)

    stopping = stop_on_signals() if request is None else contextlib.nullcontext(request)
    with stopping as request, own_randomness(job.precision.device), memory_kept():

        def asked_to_stop() -> int:
            return max(world.gather(request.signal_number))

        began = time.perf_counter()
        job.model.train()
        saved = state
        if start is None:
            save(job, state, optimizer)  # a disk that is full says so before the work begins
        while True:
            # 1) the held-out loss, where the last step is one after which it is due
            if state.unjudged is not None:
                try:
                    state, metrics = evaluate(job, state, asked_to_stop)
                except _Interrupted:
                    break
                publish(metrics)
            # 2) the end: all steps are done, the loss no longer falls, or a signal came
            if state.step >= plan.max_steps or _is_over(state, plan) or asked_to_stop():
                break
            # 3) one optimizer step; its metrics wait for the held-out loss where that is due
            state, metrics = _next_step(job, batches, optimizer, state)
            peak = peak_memory(job.precision.device)
            metrics = replace(metrics, memory=peak, seconds=time.perf_counter() - began)
            if state.step % plan.eval_every == 0 or state.step == plan.max_steps:
                state = replace(state, unjudged=metrics)
            else:
                publish(metrics)
            # 4) a checkpoint
            if state.step % plan.save_every == 0:
                save(job, state, optimizer)
                saved = state
        if saved != state:
            save(job, state, optimizer)
        stop = asked_to_stop()
    if stop and not state.ended(plan.max_steps):
        raise Stopped(stop)
    return state


def _begin(job: Job, start: Checkpoint | None) -> tuple[torch.optim.AdamW, TrainState]:
    """The optimizer and the state from which the first step is taken, and the run folder as it was
    then.
    """
    plan, world, run = job.plan, job.world, job.run
    optimizer = make_optimizer(
        job.model, learning_rate=plan.learning_rate, weight_decay=plan.weight_decay
    )
    state = TrainState(unjudged=Metrics(step=0)) if start is None else start.state
    state = replace(state, micro_batch_size=plan.micro_batch_size)
    if start is not None:
        load_optimizer_tensors(job.model, optimizer, start.optimizer_tensors())
        job.precision.scaler.load_state_dict(dict(start.scaler))
        if state.best_step == state.step and state.unjudged is None:
            _publish_best(job)  # the folder's may be those of a later step, or damaged
    world.gather(0)  # all have read the checkpoint, which may get another name
    if world.is_main:
        with run.writing("metrics.jsonl"):
            run.take_up()
            run.forget_after(state.step if state.unjudged is None else state.step - 1)
    return optimizer, state


def _is_over(state: TrainState, plan: Plan) -> bool:
    """Whether patience is at its end."""
    return 0 < plan.patience <= state.evaluations_without_gain


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
        raise OptionError(_diagnosis(job, batches, state, str(problem)), *NAMED) from problem
    metrics = Metrics(
        step=state.step + 1,
        loss=stats.loss,
        lr=learning_rate,
        grad_norm=stats.grad_norm,
        tokens_per_second=stats.n_tokens / (time.perf_counter() - began),
    )
    state = replace(
        state,
        step=state.step + 1,
        micro_batch_size=stats.micro_batch_size,
        n_skipped=state.n_skipped + stats.skipped,
        skipped_in_a_row=state.skipped_in_a_row + 1 if stats.skipped else 0,
    )
    if stats.skipped:
        metrics = replace(metrics, skipped=state.n_skipped)
        logger.warning(
            "step %s skipped: float16 overflowed, scale %s", state.step, scaler.get_scale()
        )
    if state.skipped_in_a_row >= MOST_SKIPS:
        problem = f"float16 overflowed {MOST_SKIPS} times in a row"
        before = replace(state, step=state.step - 1)
        raise OptionError(_diagnosis(job, batches, before, problem), *NAMED)
    return state, metrics


class _Interrupted(Exception):
    """A signal came during an evaluation, which will be done when the run is resumed."""


def evaluate(
    job: Job, state: TrainState, asked_to_stop: Callable[[], int]
) -> tuple[TrainState, Metrics]:
    """Compute the held-out loss, in nats a token and in bits a byte, keep the weights if they are
    the best yet, and let them write a sample.

    Returns the metrics of the step and its evaluation. Without held-out text the newest weights
    count as the best. Changes nothing that training depends on. Raises InputError when the loss is
    not finite.
    """
    metrics = state.unjudged
    assert metrics is not None, "the step before was evaluated already"
    state = replace(state, unjudged=None)
    world = job.world
    best = job.corpus.val is None
    if not best:
        scored = _until(asked_to_stop, job.held_out(state.micro_batch_size * world.size))
        scorer = unwrapped(job.scorer)
        loss = mean_loss(scorer, scored, job.precision, world)
        metrics = replace(metrics, val_loss=loss)
        if not math.isfinite(loss):
            raise OptionError(_ruined(job, state, loss), *NAMED)
        if job.bytes_per_target:
            bits = bits_per_byte(loss, job.bytes_per_target)
            metrics = replace(metrics, bits_per_byte=bits)
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
    if world.is_main or is_sharded(job.model):
        sample = _sample(job, state.step)
        if world.is_main:
            job.run.log_sample(sample)
    return state, metrics


def _publish_best(job: Job) -> None:
    """Make the weights of this moment those that the run folder stands for."""
    weights = _as_one_process(job)
    if job.world.is_main:
        with job.run.writing("the best weights"):
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


def settings_of(job: Job) -> Settings:
    """What may be another value in a resumed run, which is then another run from there on."""
    return Settings(
        **asdict(job.plan),
        dropout=job.model.config.resid_pdrop,
        way=way_of_step(job.model) or None,
        dtype=str(job.precision.dtype).removeprefix("torch."),
    )


def _as_one_process(job: Job) -> GPT2:
    """The model as one process would have it; with sharded weights a copy on the CPU, and every
    process must ask for it.
    """
    if not is_sharded(job.model):
        return job.model
    reshard(job.model)
    with torch.device("meta"):
        copy = GPT2(job.model.config)
    for name, parameter in job.model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(whole(parameter.detach()).to("cpu"))
        setattr(copy.get_submodule(owner), leaf, value)
    return copy


def _sample(job: Job, step: int) -> Sample:
    """A prompt from the held-out text, and how the model goes on from it."""
    tokens = job.corpus.train if job.corpus.val is None else job.corpus.val
    start = [int(id) for id in tokens.tokens[:PROMPT_TOKENS] if id != job.tokenizer.eot]
    prompt = job.tokenizer.decode(start)
    room = job.model.config.block_size + 1 - max(1, len(start))  # the last token is not read
    # texts of growing length would be compiled again and again
    with torch.compiler.set_stance("force_eager"):
        (completion,) = complete(
            job.model,
            job.tokenizer,
            [prompt],
            special=job.special_tokens,
            max_new_tokens=min(SAMPLE_TOKENS, max(1, room)),
            sampling=SAMPLE,
            seed=job.plan.seed,
        )
    return Sample(step, prompt, completion.text)


def _diagnosis(job: Job, batches: Batches, state: TrainState, problem: str) -> str:
    """Repeat the step after `state`, say what was not finite first and in which documents, and
    leave the whole report in the run folder.
    """
    step, train = state.step + 1, job.corpus.train
    batch, spans = batches.at(state.step), batches.spans(state.step)
    job.model.zero_grad(set_to_none=True)  # room for the repetition
    if is_sharded(job.model):
        found = "with fsdp the module is not looked for"
    else:
        finding = find_nonfinite(
            job.model,
            batch,
            loss_of=_loss_of(job, batch),
            micro_batch_size=state.micro_batch_size,
            seed_row=lambda row: torch.manual_seed(mixed(mixed(job.plan.seed, state.step), row)),
        )
        found = finding_in_words(finding, spans, train)
        decode = job.tokenizer.decode
        report = finding_as_json(
            finding, batch, spans, train, decode=decode, step=step, problem=problem
        )
        if job.world.is_main:
            write_json(job.run.path / f"not-finite-step-{step:06d}.json", report)
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
    return f"{kept}; go on from it with resume and a lower learning_rate, or dtype float32"


def _loss_of(job: Job, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    """The part of a micro-batch in the loss of a batch, as `step.accumulate` computes it."""
    scale = job.precision.loss_scale() / max(1, n_scored(batch))

    def loss_of(idx: Tensor, targets: Tensor) -> Tensor:
        idx, targets = job.precision.to_device(idx), job.precision.to_device(targets)
        with job.precision.autocast():
            return unwrapped(job.scorer)(idx, targets, scale)

    return loss_of
