"""Fine-tune GPT-2, or train a small one, on your own text: python train.py --data my.txt"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt2.console import run_script
from minigpt2.options import TrainOptions

if TYPE_CHECKING:
    from minigpt2.checkpoint import RunFolder
    from minigpt2.model import GPT2
    from minigpt2.training import Metrics

logger = logging.getLogger("train")


def main(options: TrainOptions) -> int:
    """Build what the run consists of, train, and say how it went."""
    from minigpt2.checkpoint import RunFolder
    from minigpt2.corpus import prepare
    from minigpt2.generate import check_fits
    from minigpt2.precision import Precision, pick_device, pick_dtype
    from minigpt2.tokenizer import Tokenizer
    from minigpt2.training import Job, Stopped, compiled, fit, settle

    run = RunFolder.claim(Path(options.out or default_out(options)), resume=options.resume)
    device = pick_device(options.device)
    precision = Precision(device, pick_dtype(options.dtype, device, training=True))

    model = first_model(options, run).to(device)
    if options.preset:
        tokenizer = Tokenizer.gpt2(model.config.vocab_size)
    else:
        tokenizer = Tokenizer.from_pretrained(options.model)
    check_fits(tokenizer, model)
    corpus = prepare(
        options.data, tokenizer, val_paths=options.val_data, val_fraction=options.val_fraction
    )
    plan = settle(
        options.training,
        model.config,
        preset=options.preset,
        n_tokens=len(corpus.train.tokens),
        device=device,
    )
    facts = {
        "--data": corpus.identity,
        "tokenizer": tokenizer.identity,
        "--preset" if options.preset else "--model": options.preset or options.model,
        "--batch-size": plan.batch_size,
        "--block-size": plan.block_size,
        "--seed": plan.seed,
    }
    start = run.newest(facts) if options.resume else None
    if start and start.state.step >= plan.max_steps:
        logger.info(
            "nothing to do: %s is at step %s of %s", run.path, start.state.step, plan.max_steps
        )
        return 0
    job = Job(model, tokenizer, corpus, plan, run, precision, facts)
    n_parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s parameters on %s in %s", f"{n_parameters:,}", device, str(precision.dtype).split(".")[1]
    )
    logger.info(
        "%s steps of %s x %s tokens, %s sequences at a time",
        f"{plan.max_steps:,}",
        plan.batch_size,
        plan.block_size,
        plan.micro_batch_size,
    )
    show = Display(run, done=start.state.step if start else 0, total=plan.max_steps)
    try:
        state = fit(
            job,
            start=start,
            forward=compiled(model, precision, plan) if options.compile else None,
            on_step=show,
        )
    except Stopped as stop:
        logger.info("%s; everything is saved, go on with: %s", stop, resume_command())
        return 128 + stop.signal_number
    finally:
        show.close()
    if state.best_val_loss is not None:
        logger.info("best: step %s, %s", state.best_step, describe_loss(state.best_val_loss))
    logger.info('done: python sample.py --model %s --prompt "..."', run.path)
    return 0


class Display:
    """Shows each step, and redraws the loss curve whenever there is an evaluation."""

    def __init__(self, run: RunFolder, *, done: int, total: int) -> None:
        from minigpt2.progress import Progress

        self._run, self._progress = run, Progress(done=done, total=total)

    def __call__(self, metrics: Metrics) -> None:
        from minigpt2.report import draw_loss_curve

        self._progress.update(metrics)
        if "val_loss" in metrics:
            draw_loss_curve(self._run)

    def close(self) -> None:
        """End the progress bar."""
        self._progress.close()


def first_model(options: TrainOptions, run: RunFolder) -> GPT2:
    """The model the run starts from: its newest checkpoint, random weights, or pretrained ones."""
    import torch

    from minigpt2.model import GPT2, PRESETS

    if options.resume:
        model = GPT2.from_pretrained(run.checkpoints()[0])
    elif options.preset:
        model = GPT2(
            PRESETS[options.preset], generator=torch.Generator().manual_seed(options.training.seed)
        )
    else:
        model = GPT2.from_pretrained(options.model)
    if options.dropout is not None:
        model.set_dropout(options.dropout)
    return model


def default_out(options: TrainOptions) -> str:
    """runs/<name of the first data path>-<preset or model>."""
    model = options.preset or Path(options.model).name
    return str(Path("runs") / f"{Path(options.data[0]).stem.strip('*') or 'data'}-{model}")


def describe_loss(loss: float) -> str:
    """A validation loss in both of its usual units."""
    from minigpt2.progress import perplexity

    return f"val loss {loss:.4f}, perplexity {perplexity(loss):,.1f}"


def resume_command() -> str:
    """What to type to go on."""
    import shlex

    given = [argument for argument in sys.argv if argument != "--resume"]
    return shlex.join(["python", *given, "--resume"])


if __name__ == "__main__":
    sys.exit(run_script(main, TrainOptions))
