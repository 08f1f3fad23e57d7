"""What a training run will do, decided before it starts. Knows settings and sizes, nothing of how
steps are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import InputError
from .model import GPT2Config
from .options import RECIPES, Recipe, TrainConfig


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


def recipe_for(preset: str | None, *, lora: bool) -> Recipe:
    """What suits a preset from random weights, LoRA, or else the fine-tuning of all weights."""
    if lora:
        return RECIPES["lora"]
    return RECIPES.get(preset, RECIPES["from-scratch"]) if preset else RECIPES["fine-tune"]


def settle(
    config: TrainConfig,
    model: GPT2Config,
    recipe: Recipe,
    *,
    n_tokens: int,
    n_processes: int = 1,
    fitting: Callable[[int, int], int] = lambda rows, block_size: rows,
) -> Plan:
    """Decide what was left open, from the recipe, the model and the number of training tokens.

    `fitting` says how many of `rows` sequences of `block_size` tokens fit into memory at once; it
    is asked for the rows of one process. A text of fewer tokens than a window makes the window
    shorter. Raises InputError when block_size is beyond the model's
    context, or when there are fewer sequences in a batch than processes.
    """
    block_size = config.block_size or model.block_size
    if block_size > model.block_size:
        raise InputError(
            f"--block-size is {block_size}, the model has {model.block_size} positions"
        )
    block_size = max(1, min(block_size, n_tokens - 1))
    batch_size = config.batch_size or recipe.batch_size
    if batch_size < n_processes:
        raise InputError(
            f"--batch-size is {batch_size}, and {n_processes} processes need a sequence each: "
            "raise it, or start fewer processes"
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
        micro_batch_size=min(config.micro_batch_size or fitting(rows, block_size), rows),
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
