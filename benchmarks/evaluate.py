"""Measures how fast a text is judged beside training's forward pass: python benchmarks/evaluate.py

A text is scored by `evaluate`, in windows that do not overlap, and by what training judges held-out
text with (evaluation/held_out_loss.py), with batches of as many tokens, in turns; the model is a
random one, plain and laid out as the command loads it. Prints a Markdown table: tokens per second,
and how many times as many as training's pass. Losses are compared before that: a way to another
figure has no speed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch

from minigpt2.decoding.cpu_layout import pack
from minigpt2.evaluation.corpus_score import LongRow, evaluate_row
from minigpt2.evaluation.held_out_loss import mean_loss
from minigpt2.evaluation.score import MOST_TOKENS
from minigpt2.evaluation.scorer import Scorer
from minigpt2.model import GPT2, PRESETS
from minigpt2.system.precision import Precision, pick_device
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.batches import validation_batches

TRAINING, OURS = "training's forward pass", "evaluate, not packed"
PACKED = "evaluate, packed as loaded"
CLOSE = 1e-4  # of the loss: sums in another order


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a way computes something else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3, help="of all ways, in turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(argv)
    if min(options.tokens, options.rounds, options.threads) < 1:
        parser.error("--tokens, --rounds and --threads are 1 or more")
    torch.set_num_threads(options.threads)
    ways = ways_for(options.preset, options.tokens, pick_device(options.device))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for number in range(1 + options.rounds):  # the first is not timed: memory is found in it
        for name, loss in ways.items():
            began = time.perf_counter()
            losses[name] = loss()
            seconds[name] += [time.perf_counter() - began] if number else []
    print("| way | tokens/s | to training's pass | loss |\n| --- | ---: | ---: | ---: |")
    right = [n for n, loss in losses.items() if abs(loss / losses[TRAINING] - 1) <= CLOSE]
    for name, loss in losses.items():
        cells = figures(seconds[name], seconds[TRAINING], options.tokens)
        print(f"| {name} | {cells if name in right else 'another loss | '} | {loss:.6f} |")
    return 0 if len(right) == len(ways) else 1


def ways_for(preset: str, n_tokens: int, device: torch.device) -> dict[str, Callable[[], float]]:
    """The mean loss of random tokens after a random model, by every way."""
    config = PRESETS[preset]
    model, packed = (
        GPT2(config, generator=torch.Generator().manual_seed(1)).to(device).eval() for _ in range(2)
    )
    pack(packed.requires_grad_(False), cpu_routine="packed")
    tokenizer = Tokenizer.gpt2(config.vocab_size)
    ids = np.random.default_rng(1).integers(0, tokenizer.eot, n_tokens)
    row, scorer = LongRow.of_documents([ids], tokenizer.eot), Scorer(model)
    precision = Precision(device, torch.float32)
    block_size = config.block_size

    def training() -> float:
        batches = validation_batches(
            row.read(0, row.n_tokens).astype(np.int64),
            block_size=block_size,
            batch_size=max(1, MOST_TOKENS // block_size),
        )
        return mean_loss(scorer, batches, precision)

    def ours(judged: GPT2) -> Callable[[], float]:
        return lambda: evaluate_row(judged, tokenizer, row, stride=block_size).loss

    return {TRAINING: training, OURS: ours(model), PACKED: ours(packed)}


def figures(times: list[float], trainings: list[float], n_tokens: int) -> str:
    """The second and third column: medians of the rounds, with the least and the most."""
    speeds = [n_tokens / seconds for seconds in times]
    ratios = [theirs / own for theirs, own in zip(trainings, times)]
    speed = f"{median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"
    return f"{speed} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
