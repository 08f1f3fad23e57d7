"""Compares the forecast of a training step's memory with what it takes: python benchmarks/memory.py

Prints a Markdown table, each case run in a fresh process with random weights. On CUDA the peak is
torch.cuda.max_memory_allocated, on the CPU the resident memory of the process, Python included.
There the C library's heap has holes that differ from run to run by a few percent and from case to
case by more; with --mapped (glibc) each tensor has pages of its own, there are no holes, and the
forecast is compared without them. A case that is not forecast to fit is left out. --quick takes
four small cases.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import torch

from minigpt2.evaluation.scorer import Scorer
from minigpt2.lora import add_lora
from minigpt2.model import GPT2, PRESETS
from minigpt2.system.memory import memory_budget, memory_kept, peak_memory
from minigpt2.system.precision import DTYPES, Precision, pick_device
from minigpt2.training.blocks import prepare_blocks
from minigpt2.training.forecast import FIXED, GB, MemoryForecast, forecast_memory
from minigpt2.training.optimizer import make_optimizer
from minigpt2.training.step import train_step
from minigpt2.training.ways import COMPILED, choose_way, go

N_STEPS = 4  # the heap has grown to its size after three
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    preset: str
    rows: int
    block_size: int
    n_parts: int = 1  # micro-batches in a batch
    dtype: str = "float32"
    recomputed: bool = False
    dropout: float | None = None
    lora_rank: int = 0
    compiled: bool = False  # as with train.py --compile

    def __str__(self) -> str:
        parts = [f"{self.preset} {self.n_parts} x {self.rows} x {self.block_size}"]
        parts += [self.dtype] * (self.dtype != "float32")
        parts += ["recomputed"] * self.recomputed
        parts += [] if self.dropout is None else [f"dropout {self.dropout:g}"]
        parts += [f"LoRA {self.lora_rank}"] * (self.lora_rank > 0)
        parts += ["compiled"] * self.compiled
        return ", ".join(parts)


CASES = [
    Case("nano", 16, 128),
    Case("gpt2", 1, 256),
    Case("gpt2", 4, 256, recomputed=True),
    Case("gpt2", 4, 256, lora_rank=8),
    # not quick from here on
    Case("gpt2", 4, 256),
    Case("gpt2", 4, 256, n_parts=2),
    Case("gpt2", 4, 256, dropout=0.0),
    Case("gpt2", 4, 256, n_parts=2, recomputed=True),
    Case("gpt2", 4, 256, dtype="bfloat16"),
    Case("gpt2", 1, 1024),
    Case("gpt2", 4, 1024),
    Case("gpt2", 4, 1024, n_parts=2, dropout=0.0),
    Case("gpt2", 4, 1024, recomputed=True),
    Case("gpt2-medium", 1, 256),
    Case("gpt2-medium", 1, 256, n_parts=2),
]
N_QUICK = 4


def main() -> int:
    """Print the table; the exit code is 1 when a case broke."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--quick", action="store_true", help="four small cases")
    parser.add_argument("--mapped", action="store_true", help="CPU: a heap without holes")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # how this script starts itself
    parser.add_argument("--compile", action="store_true", help="as train.py --compile")
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.case:
        print(measure(Case(**json.loads(options.case)), device))
        return 0
    print("| case | forecast, GB | peak, GB | error |\n| --- | ---: | ---: | ---: |", flush=True)
    broken = 0
    for case in CASES[: N_QUICK if options.quick else None]:
        case = replace(case, compiled=options.compile)
        need = forecast(case, device)
        expected = need.total
        if options.mapped:
            expected += FIXED[device.type] - need.overhead
        if expected > memory_budget(device):
            row = f"| {case} | {gigabytes(expected)} | does not fit | |"
        else:
            peak = peak_of(case, device, MAPPED if options.mapped else {})
            broken += peak is None
            error = "" if peak is None else f"{expected / peak - 1:+.1%}"
            row = f"| {case} | {gigabytes(expected)} | {gigabytes(peak)} | {error} |"
        print(row, flush=True)
    return 1 if broken else 0


def forecast(case: Case, device: torch.device) -> MemoryForecast:
    """What `minigpt2.training.forecast` says of a case."""
    model = skeleton(case)
    return forecast_memory(
        model.config,
        micro_batch_size=case.rows,
        block_size=case.block_size,
        dtype=DTYPES[case.dtype],
        device=device,
        activation_checkpointing=case.recomputed,
        n_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        accumulated=case.n_parts > 1,
        way=way_of(case, device),
    )


def way_of(case: Case, device: torch.device) -> str:
    """The way in which train.py would compute the case."""
    return choose_way(Precision(device, DTYPES[case.dtype]), compiled=case.compiled)


def skeleton(case: Case) -> GPT2:
    """The case's model without values."""
    with torch.device("meta"):
        return prepared(case, GPT2(PRESETS[case.preset]))


def prepared(case: Case, model: GPT2) -> GPT2:
    """The model with the case's dropout and adapters."""
    if case.dropout is not None:
        model.set_dropout(case.dropout)
    if case.lora_rank:
        add_lora(model, rank=case.lora_rank, alpha=2 * case.lora_rank)
    return model


def peak_of(case: Case, device: torch.device, environment: dict[str, str]) -> int | None:
    """The bytes that a process of its own took for a case; None when it broke."""
    command = [
        sys.executable,
        __file__,
        "--device",
        str(device),
        "--case",
        json.dumps(asdict(case), allow_nan=False),
    ]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    return int(done.stdout) if done.returncode == 0 else None


def measure(case: Case, device: torch.device) -> int:
    """Train for a few steps, and say how many bytes that took at most. Raises MemoryError where
    fewer rows fit than the case has.
    """
    model = prepared(case, GPT2(PRESETS[case.preset])).to(device).train()
    precision = Precision(device, DTYPES[case.dtype])
    shape = case.rows, case.block_size
    way = way_of(case, device)
    go(model, way)
    prepare_blocks(model, precision, shape, compiled=way == COMPILED, recomputed=case.recomputed)
    optimizer = make_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
    idx = torch.randint(model.config.vocab_size, (case.n_parts * case.rows, case.block_size))
    mapped = MAPPED.keys() <= os.environ.keys()
    with contextlib.nullcontext() if mapped else memory_kept():
        for seed in range(N_STEPS):
            stats = train_step(
                Scorer(model),
                (idx, idx),
                optimizer,
                precision,
                micro_batch_size=case.rows,
                learning_rate=1e-4,
                grad_clip=1.0,
                seed=seed,
            )
            if stats.micro_batch_size < case.rows:  # it was halved, and is another case
                raise MemoryError(f"{stats.micro_batch_size} of {case.rows} rows fitted at once")
    return peak_memory(device)


def gigabytes(size: int | None) -> str:
    """10^9 bytes, as a person reads them."""
    return "broke" if size is None else f"{size / GB:.2f}"


if __name__ == "__main__":
    sys.exit(main())
