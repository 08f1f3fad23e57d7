"""Fine-tune GPT-2, or train a small one, on your own text: python train.py --data my.txt"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt2.console import run_script
from minigpt2.errors import InputError
from minigpt2.options import TextConfig, TrainOptions, flag

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from minigpt2.checkpoint import Checkpoint, RunFolder
    from minigpt2.corpus import Corpus
    from minigpt2.distributed import World
    from minigpt2.memory import MemoryForecast
    from minigpt2.model import GPT2
    from minigpt2.plan import Plan
    from minigpt2.precision import Precision
    from minigpt2.tokenizer import Tokenizer
    from minigpt2.training import Job, Metrics

logger = logging.getLogger("train")
MASKS = ("document_mask", "mask_prompt")
ENOUGH_TOKENS = 2048  # at once on the CPU: more take memory and gain no speed


def main(options: TrainOptions) -> int:
    """Find this process's place among those that train together, and let it do its part."""
    from minigpt2.checkpoint import RunFolder
    from minigpt2.distributed import device_of, join, world_from
    from minigpt2.interrupt import Stopped
    from minigpt2.precision import pick_device

    world = world_from(os.environ)
    if options.fsdp and world.size == 1:
        raise InputError("--fsdp shares a model between processes: start them with torchrun")
    device = pick_device(device_of(options.device, world))
    out = Path(options.out or default_out(options))
    try:
        if world.is_main:
            with RunFolder.claim(out, resume=options.resume) as run, join(world, device):
                train(options, run, device, world)
        else:
            logging.getLogger().setLevel(logging.ERROR)  # the main process speaks for all
            with join(world, device):
                train(options, RunFolder(out), device, world)
    except Stopped as stop:
        logger.info("%s; everything is saved, go on with: %s", stop, resume_command(world))
        return 128 + stop.signal_number
    return 0


def train(options: TrainOptions, run: RunFolder, device: torch.device, world: World) -> None:
    """Build what the run consists of, train, and say how it went."""
    from minigpt2.training import fit

    job, start = build(options, run, device, world)
    if start and start.state.ended(job.plan.max_steps):
        done, wanted = start.state.step, job.plan.max_steps
        logger.info("nothing to do: %s is at step %s of %s", run.path, done, wanted)
    else:
        with Display(options, job, start) as show:
            fit(job, start=start, on_step=show)
    if world.is_main:
        finish(options, job)


def build(
    options: TrainOptions, run: RunFolder, device: torch.device, world: World
) -> tuple[Job, Checkpoint | None]:
    """All that the run consists of, and the checkpoint it goes on from, if any."""
    from minigpt2.generate import check_fits
    from minigpt2.precision import Precision, pick_dtype
    from minigpt2.tokenizer import Tokenizer
    from minigpt2.training import Job, settings_of

    precision = Precision(device, pick_dtype(options.dtype, device, training=True))
    start = run.newest() if options.resume and run.checkpoints() else None
    model = first_model(options, start)
    if options.preset:
        tokenizer = Tokenizer.gpt2(model.config.vocab_size)
    else:
        tokenizer = Tokenizer.from_pretrained(options.model)
    check_fits(tokenizer, model)
    corpus = read_data(options, tokenizer, world)
    if options.training.patience and corpus.val is None:
        raise InputError("--patience needs held-out text: give --val-data or --val-fraction")
    plan = decide(options, model, corpus, precision, world, start)
    facts = {
        "--val-fraction": 0.0 if options.val_data else options.val_fraction,
        "--data": corpus.identity,
        "tokenizer": tokenizer.identity,
        "--preset" if options.preset else "--model": options.preset or options.model,
        "--document-mask": options.document_mask,
        "--mask-prompt": options.mask_prompt,
        "--lora-rank": options.lora_rank,
        "--lora-alpha": options.lora_rank and (options.lora_alpha or 2 * options.lora_rank),
        "--batch-size": plan.batch_size,
        "--block-size": plan.block_size,
        "--seed": plan.seed,
    }
    if start:
        start.require(facts)
    need = forecast(options, model, precision, world)(
        micro_batch_size=plan.micro_batch_size,
        block_size=plan.block_size,
        accumulated=plan.micro_batch_size * world.size < plan.batch_size or world.size > 1,
    )
    scorer = place(options, model, tokenizer, plan, precision, world)
    write = writer(options, model, tokenizer)
    job = Job(
        model,
        scorer,
        tokenizer,
        corpus,
        plan,
        run,
        precision,
        facts,
        write,
        world,
        mask_prompt=options.mask_prompt,
    )
    if start:
        tell_changes(start, settings_of(job))
    announce(options, job, start, need)
    return job, start


def read_data(options: TrainOptions, tokenizer: Tokenizer, world: World) -> Corpus:
    """The text as tokens, and, from the main process, a report on it."""
    from minigpt2.corpus import prepare
    from minigpt2.encoding import default_workers
    from minigpt2.survey import describe, survey

    if world.size > 1 and "-" in (*options.data, *options.val_data):
        raise InputError("--data - with several processes: save the text to a file first")
    with world.main_first():
        corpus = prepare(
            options.data,
            tokenizer,
            val_paths=options.val_data,
            val_fraction=options.val_fraction,
            text=options.text,
            workers=options.workers or default_workers(),
        )
    if world.is_main:
        logger.info(describe(survey(corpus, tokenizer)))
    return corpus


def first_model(options: TrainOptions, start: Checkpoint | None) -> GPT2:
    """The model the run starts from: a checkpoint, random weights, or pretrained ones, with
    adapters if they are what is trained.
    """
    import torch

    from minigpt2.lora import add_lora, load_adapter
    from minigpt2.model import GPT2, PRESETS

    random = torch.Generator().manual_seed(options.training.seed)
    if start and not options.lora_rank:
        model = GPT2.from_pretrained(start.path)
    elif options.preset:
        model = GPT2(PRESETS[options.preset], generator=random)
    else:
        model = GPT2.from_pretrained(options.model)
    dropout = options.dropout
    if dropout is None and start:
        dropout = start.settings["dropout"]  # a base model has its own
    if dropout is not None:
        model.set_dropout(dropout)
    if options.lora_rank and start:
        load_adapter(model, start.path)
    elif options.lora_rank:
        alpha = options.lora_alpha or 2 * options.lora_rank
        add_lora(model, rank=options.lora_rank, alpha=alpha, generator=random)
    return model


def decide(
    options: TrainOptions,
    model: GPT2,
    corpus: Corpus,
    precision: Precision,
    world: World,
    start: Checkpoint | None,
) -> Plan:
    """The plan of the run, with a micro-batch that fits into memory.

    A resumed run keeps the micro-batch it had: another one would round and drop out differently.
    """
    from minigpt2 import memory
    from minigpt2.plan import recipe_for, settle

    def fitting(rows: int, block_size: int) -> int:
        if start:
            return start.state.micro_batch_size
        if precision.device.type == "cpu":
            rows = min(rows, max(1, ENOUGH_TOKENS // block_size))
        need = forecast(options, model, precision, world)
        sharing = world.size if precision.device.type == "cpu" else 1
        budget = memory.budget(precision.device, n_processes=sharing)
        return memory.fitting_micro_batch(need, rows=rows, block_size=block_size, budget=budget)

    plan = settle(
        options.training,
        model.config,
        recipe_for(options.preset, lora=bool(options.lora_rank)),
        n_tokens=len(corpus.train.tokens),
        n_processes=world.size,
        fitting=fitting,
    )
    wanted = options.training.block_size or model.config.block_size
    if plan.block_size < wanted:
        logger.warning(
            "the training text has %s tokens, fewer than a window of %s: windows are of %s tokens",
            f"{len(corpus.train.tokens):,}",
            wanted,
            plan.block_size,
        )
    return replace(plan, micro_batch_size=min(world.gather(plan.micro_batch_size)))


def forecast(
    options: TrainOptions, model: GPT2, precision: Precision, world: World
) -> Callable[..., MemoryForecast]:
    """From micro_batch_size and block_size to the memory that one process of this run needs."""
    from minigpt2 import memory

    return partial(
        memory.forecast,
        model.config,
        dtype=precision.dtype,
        device=precision.device,
        activation_checkpointing=options.activation_checkpointing,
        n_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        n_shards=world.size if options.fsdp else 1,
        masked=options.document_mask,
    )


def announce(
    options: TrainOptions, job: Job, start: Checkpoint | None, need: MemoryForecast
) -> None:
    """Say what is about to happen, on the screen and in the run folder."""
    from minigpt2 import memory
    from minigpt2.precision import describe_device
    from minigpt2.survey import duration, estimate_seconds, measured_speed
    from minigpt2.training import settings_of

    plan, model, world, precision = job.plan, job.model, job.world, job.precision
    n_parameters = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(job.precision.dtype).removeprefix("torch.")
    trained = f", {n_trained:,} of them trained" if n_trained < n_parameters else ""
    logger.info(
        "%s parameters on %s in %s%s", f"{n_parameters:,}", job.precision.device, dtype, trained
    )
    steps_left = plan.max_steps - (start.state.step if start else 0)
    tokens_left = steps_left * plan.batch_size * plan.block_size
    speed = measured_speed(precision.device, precision.dtype) * world.size
    logger.info(
        "%s steps of %s x %s tokens, %s sequences at a time%s; about %s, evaluations not counted",
        f"{plan.max_steps:,}",
        plan.batch_size,
        plan.block_size,
        plan.micro_batch_size,
        f" in each of {world.size} processes" if world.size > 1 else "",
        duration(estimate_seconds(n_parameters, tokens_left, speed, n_trained=n_trained)),
    )
    sharing = world.size if job.precision.device.type == "cpu" else 1
    logger.info(memory.table(need, job.precision.device, sharing))
    if not world.is_main:
        return
    sessions = job.run.read_info().get("sessions", []) if start else []
    session = {
        "command": command(world),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "from_step": start.state.step if start else 0,
        "device": describe_device(job.precision.device),
        "dtype": dtype,
        "world_size": world.size,
        "versions": versions(),
    }
    corpus = job.corpus
    job.run.write_info(
        {
            "sessions": [*sessions, session],
            "model": {
                "source": options.preset or options.model,
                "pretrained": not options.preset,
                "n_parameters": n_parameters,
                "n_trained": n_trained,
                "lora_rank": options.lora_rank or None,
                "config": asdict(model.config),
            },
            "data": {
                "paths": list(options.data),
                "val_paths": list(options.val_data),
                "n_documents": corpus.n_documents,
                "n_characters": corpus.n_characters,
                "n_tokens": corpus.n_tokens,
                **{name: count for name, count in corpus.counts.items() if count},
                **changed_settings(options.text),
                **{flag(name): True for name in MASKS if getattr(options, name)},
                "n_train_tokens": len(corpus.train.tokens),
                "n_val_tokens": len(corpus.val.tokens) if corpus.val else 0,
                "identity": corpus.identity,
            },
            "settings": settings_of(job),
            "memory": {**asdict(need), "total": need.total},
        }
    )


def changed_settings(text: TextConfig) -> dict[str, object]:
    """What was set otherwise than by default."""
    default = asdict(type(text)())
    return {flag(name): value for name, value in asdict(text).items() if value != default[name]}


def tell_changes(start: Checkpoint, settings: dict[str, object]) -> None:
    """Say which settings are no longer those of the run, which is then another run from here on."""
    for name, value in settings.items():
        before = start.settings.get(name, value)
        if before != value and name != "micro_batch_size":
            logger.warning("%s was %s, from here on it is %s", flag(name), before, value)


def place(
    options: TrainOptions,
    model: GPT2,
    tokenizer: Tokenizer,
    plan: Plan,
    precision: Precision,
    world: World,
) -> nn.Module:
    """Put the model where it is trained, and say how: the module that goes from ids to a loss."""
    from minigpt2 import distributed
    from minigpt2.blocks import prepare_blocks
    from minigpt2.evaluate import Scorer

    if options.fsdp and precision.scaler.is_enabled():
        raise InputError("--dtype float16 with --fsdp is not supported: use bfloat16 or float32")
    if options.fsdp:
        distributed.shard(model, model.h, precision.device, methods=("hidden", "head"))
    else:
        model.to(precision.device)
    prepare_blocks(
        model,
        precision,
        (plan.micro_batch_size, plan.block_size),
        compiled=options.compile,
        recomputed=options.activation_checkpointing,
        masked=options.document_mask,
    )
    scorer = Scorer(model, tokenizer.eot if options.document_mask else None)
    if world.size > 1 and not options.fsdp:
        return distributed.replicate(scorer, precision.device)
    return scorer


def writer(
    options: TrainOptions, model: GPT2, tokenizer: Tokenizer
) -> Callable[[GPT2, Path], None]:
    """How the weights of this run are written into a folder: as a model, or as an adapter."""
    from minigpt2.lora import base_identity, save_adapter

    def write_model(model: GPT2, folder: Path) -> None:
        model.save_pretrained(folder, tokenizer)

    if not options.lora_rank:
        return write_model
    identity, source = base_identity(model), Path(options.model)
    base = str(source.resolve()) if source.exists() else options.model

    def write_adapter(model: GPT2, folder: Path) -> None:
        save_adapter(model, folder, base_model=base, identity=identity)
        tokenizer.save(folder)

    return write_adapter


class Display:
    """Shows each step, and redraws the pages of the run folder at each evaluation."""

    def __init__(self, options: TrainOptions, job: Job, start: Checkpoint | None) -> None:
        from minigpt2.progress import Progress
        from minigpt2.report import TensorBoardLog

        done = start.state.step if start else 0
        self._run = job.run
        self._progress = Progress(done=done, total=job.plan.max_steps)
        wanted = options.tensorboard and job.world.is_main
        self._board = TensorBoardLog(job.run.path / "tensorboard", done) if wanted else None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *problem: object) -> None:
        self._progress.close()
        if self._board:
            self._board.close()

    def __call__(self, metrics: Metrics) -> None:
        self._progress.update(metrics)
        if self._board:
            self._board(metrics)
        if "val_loss" in metrics:
            for sample in self._run.read_samples()[-1:]:
                if self._board:
                    self._board.sample(**sample)
            redraw(self._run)


def redraw(run: RunFolder) -> None:
    """Bring the pages of the run folder up to date; that never stops a run."""
    from minigpt2.card import write_card
    from minigpt2.report import draw_loss_curve, write_report

    try:
        draw_loss_curve(run)
        write_report(run)
        write_card(run)
    except OSError as problem:
        logger.warning("the pages of %s are not up to date: %s", run.path, problem.strerror)


def finish(options: TrainOptions, job: Job) -> None:
    """Leave the run folder as its reader wants it, and say in words how the run went."""
    from minigpt2.model import GPT2
    from minigpt2.record import summary

    run = job.run
    if options.merge_lora:
        GPT2.from_pretrained(run.path).save_pretrained(run.path / "merged", job.tokenizer)
    redraw(run)
    logger.info(summary(run.read_metrics(), pretrained=not options.preset))
    logger.info('done: python sample.py --model %s --prompt "..."', run.path)


def default_out(options: TrainOptions) -> str:
    """runs/<name of the first data path>-<preset or model>."""
    model = options.preset or Path(options.model).name
    return str(Path("runs") / f"{Path(options.data[0]).stem.strip('*') or 'data'}-{model}")


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its settings."""
    import platform

    import torch

    from minigpt2 import __version__

    return {
        "minigpt2": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def command(world: World) -> str:
    """What was typed."""
    import shlex

    several = f"torchrun --nproc-per-node={world.size}" if world.size > 1 else "python"
    return f"{several} {shlex.join(sys.argv)}"


def resume_command(world: World) -> str:
    """What to type to go on."""
    return command(world).replace(" --resume", "") + " --resume"


if __name__ == "__main__":
    sys.exit(run_script(main, TrainOptions))
