"""Measures the loss over a large vocabulary in three ways, in turns: python benchmarks/loss.py

In chunks, as training makes it (minigpt2/loss.py); with all logits at once, F.linear and
F.cross_entropy; and with torch's own F.linear_cross_entropy in chunks, where this torch has it.
Each is forward and backward from random vectors and a random matrix, in float32. Prints a Markdown
table: seconds, and how many times as long as in chunks. Each loss that was timed and both its
gradients are compared with those of F.cross_entropy over all logits before that: a way that
computes something else has no time, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.equivalences import difference
from minigpt2.loss import summed_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (N, C), weight (V, C), targets (N,) -> ()
OURS, PLAIN = "in chunks, loss.py", "all logits at once"
TOLERANCE = 1e-4  # of a gradient, as a share of its largest number: sums in another order


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a way computes something else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--width", type=int, default=768, help="of the vectors and the matrix")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways, in turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(argv)
    if min(options.tokens, options.vocabulary, options.width, options.rounds) < 1:
        parser.error("--tokens, --vocabulary, --width and --rounds are 1 or more")
    inputs = random_inputs(options.tokens, options.vocabulary, options.width, options.device)
    expected = computed(at_once, *inputs)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    off = dict.fromkeys(LOSSES, 0.0)
    for number in range(1 + options.rounds):  # the first is not timed: memory is found in it
        for name, loss in LOSSES.items():
            seconds, found = timed(loss, *inputs)
            off[name] = max(off[name], distance(found, expected))
            times[name] += [seconds] if number else []
    print("| loss | s | to loss.py | off by |\n| --- | ---: | ---: | ---: |")
    right = [name for name in LOSSES if off[name] <= TOLERANCE]
    for name in LOSSES:
        ours = times[OURS] if OURS in right else None
        cells = figures(times[name], ours) if name in right else "another loss | "
        print(f"| {name} | {cells} | {off[name]:.1e} |")
    return 0 if len(right) == len(LOSSES) else 1


def chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss that training makes."""
    return summed_loss(x, weight, targets)


def at_once(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What it is in words."""
    return F.cross_entropy(F.linear(x, weight), targets, reduction="sum")


def torchs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own in chunks, with its own choice of their size."""
    chunks = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, targets, reduction="sum", options=chunks)


LOSSES: dict[str, Loss] = {OURS: chunked, PLAIN: at_once}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    LOSSES["torch's linear_cross_entropy in chunks"] = torchs


def random_inputs(n_tokens: int, n_words: int, width: int, device: str) -> tuple[Tensor, ...]:
    """Vectors (N, C) and a matrix (V, C) whose gradients are asked for, and targets (N,)."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(n_tokens, width, generator=random).to(device).requires_grad_()
    weight = 0.02 * torch.randn(n_words, width, generator=random)
    targets = torch.randint(n_words, (n_tokens,), generator=random).to(device)
    return x, weight.to(device).requires_grad_(), targets


def computed(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of x and weight."""
    total = loss(x, weight, targets)
    return total.detach(), *torch.autograd.grad(total, (x, weight))


def distance(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """How far a loss and its gradients are from others at most, as a share of the largest number in
    each; infinite where one is not a number.
    """
    differences = [difference(*pair) for pair in zip(found, expected)]
    return max(d if d == d else float("inf") for d in differences)


def timed(
    loss: Loss, x: Tensor, weight: Tensor, targets: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    """Seconds of one forward and backward pass, and the loss and the gradients."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    found = computed(loss, x, weight, targets)
    wait()
    return time.perf_counter() - began, found


def figures(times: list[float], ours: list[float] | None) -> str:
    """The second and third column: medians of the rounds, with the least and the most."""
    seconds = f"{median(times):.3f} ({min(times):.3f} to {max(times):.3f})"
    if ours is None:
        return f"{seconds} | "
    ratios = [their / own for their, own in zip(times, ours)]
    return f"{seconds} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
