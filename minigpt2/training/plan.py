"""The plan of a run: steps, batches and learning rate, settled before it starts.

Knows settings and sizes, nothing of how steps are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import OptionError
from ..model import GPT2Config
from .options import RECIPES, Recipe, TrainConfig

MANY_TIMES = 100  # passes over a text, after which it is known by heart, whatever it is


@dataclass(frozen=True)
class Plan:
    """A TrainConfig in which everything is decided: the fields mean the same; sizes are in
    sequences and tokens, the rest in optimizer steps.
    """

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


def recipe_for(preset: str | None, *, lora: bool) -> Recipe:
    """What suits a preset from random weights, LoRA, or else the fine-tuning of all weights."""
    if lora:
        return RECIPES["lora"]
    return RECIPES.get(preset, RECIPES["from-scratch"]) if preset else RECIPES["fine-tune"]


def make_plan(
    config: TrainConfig,
    model: GPT2Config,
    recipe: Recipe,
    *,
    n_tokens: int,
    n_processes: int = 1,
) -> Plan:
    """Decide what was left open, from the recipe, the model and the number of training tokens.

    Without a micro-batch size it is all rows of one process, whatever memory there is. A text of
    fewer tokens than a window makes the window shorter. Raises InputError when block_size is beyond
    the model's context, or when there are fewer sequences in a batch than processes.
    """
    block_size = config.block_size or model.block_size
    if block_size > model.block_size:
        raise OptionError(
            f"block_size is {block_size}, the model has {model.block_size} positions", "block_size"
        )
    block_size = max(1, min(block_size, n_tokens - 1))
    batch_size = config.batch_size or recipe.batch_size
    if batch_size < n_processes:
        raise OptionError(
            f"batch_size is {batch_size}, and {n_processes} processes need a sequence each: "
            "raise it, or start fewer processes",
            "batch_size",
        )
    max_steps = config.max_steps or (recipe.max_steps if config.epochs is None else None)
    if max_steps is None:
        windows = math.ceil(n_tokens / block_size)
        max_steps = math.ceil((config.epochs or recipe.epochs) * windows / batch_size)
    rows = math.ceil(batch_size / n_processes)
    eval_every = config.eval_every or max(1, max_steps // 10)
    return Plan(
        max_steps=max_steps,
        batch_size=batch_size,
        micro_batch_size=min(config.micro_batch_size or rows, rows),
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


def remarks(
    config: TrainConfig, plan: Plan, *, n_tokens: int, n_processes: int = 1
) -> Iterator[str]:
    """What of the settings given changes nothing in this plan, and what of it is odd: a line
    each.
    """
    steps = f"the run has {plan.max_steps:,} steps"
    rows = math.ceil(plan.batch_size / n_processes)
    if (config.micro_batch_size or 0) > rows:
        yield f"--micro-batch-size is {config.micro_batch_size}, a process has {rows} at a step"
    if plan.warmup_steps > plan.max_steps:
        share = plan.max_steps / plan.warmup_steps
        yield (
            f"--warmup-steps is {plan.warmup_steps:,}, {steps}: the learning rate gets to "
            f"{share:.0%} of {plan.learning_rate:g}"
        )
    if plan.eval_every > plan.max_steps:
        yield (
            f"--eval-every is {plan.eval_every:,}, {steps}: the model is judged at the start and "
            "the end alone"
        )
    if config.save_every and plan.save_every > plan.max_steps:
        yield f"--save-every is {plan.save_every:,}, {steps}: it is saved at the end alone"
    if plan.patience and plan.patience * plan.eval_every >= plan.max_steps:
        count = math.ceil(plan.max_steps / plan.eval_every)
        yield f"--patience is {plan.patience}, the run has {count} evaluations: it cannot stop"
    windows = math.ceil(n_tokens / plan.block_size)
    if plan.batch_size > windows:
        yield (
            f"a step is {plan.batch_size} sequences, the training text {windows}: every step goes "
            f"over it {plan.batch_size / windows:.1f} times"
        )
    passes = plan.max_steps * plan.batch_size / windows
    if passes > MANY_TIMES:
        yield (
            f"the run goes over the training text {passes:,.0f} times, and will know it by heart: "
            "fewer --epochs or --max-steps, or more text"
        )
