"""What training computes: AdamW's steps against committed figures, and ways to train.

The ways are rows of the table of equivalences, each held against its plain twin.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...arguments import flag
from ...equivalences import WAYS, difference
from ...evaluation.figures import EXACT, figures, same_sketch, sketch, tiny
from ...evaluation.held_out_loss import mean_loss
from ...evaluation.proof import Item, NotHereError, Result, first_failure, notices, within
from ...evaluation.scorer import Scorer
from ...loss import summed_loss
from ...model import Block
from ...system.files import ASSETS
from ...system.precision import Precision, own_randomness
from ...training.blocks import prepare_blocks
from ...training.c_parts import c_trains
from ...training.dropout import attention_in_parts, plain_attention
from ...training.optimizer import lr_at, make_optimizer
from ...training.step import train_step
from ...training.ways import IN_C, go
from . import walk
from .place import Place

CPU = torch.device("cpu")
ROUNDED = 1e-6  # step.py counts the loss in float32
STEPS, ROWS, TOKENS = 4, 4, 16
SECONDS = 600  # that processes may take
CUDA = "there is no CUDA device that torch can use"


def items(place: Place) -> list[Item]:
    """The trajectory, and one for each row, under the row's name."""
    checks: dict[str, Callable[[], Result]] = {
        "loss in chunks": lambda: loss_in_chunks(place),
        "16-bit dropout": lambda: dropout(place),
        "micro-batches": lambda: row("micro-batches", place, micro_batch_size=1),
        "recomputed blocks": lambda: recomputed(place),
        "training in C": lambda: in_c(place),
        "bfloat16 autocast": lambda: row("bfloat16 autocast", place, dtype=torch.bfloat16),
        "float16 autocast": lambda: float16(place),
        "compiled blocks": lambda: compiled(place),
        "DDP": lambda: processes("DDP", place),
        "FSDP": lambda: processes("FSDP", place),
    }
    long = {"compiled blocks", "DDP", "FSDP"}
    rows = [
        Item(name, f"{WAYS[name].reached} as {WAYS[name].twin}", check, name in long)
        for name, check in checks.items()
    ]
    return [Item("AdamW", "five steps as torch takes them in float64", trajectory), *rows]


def trajectory() -> Result:
    """Losses, gradient norms and weights of five steps, with decay, clipping and schedule."""
    known, model = figures()["trajectory"], tiny().train()
    model.set_dropout(0)
    peak, warmup_steps, decay, clip = known["settings"].values()
    optimizer = make_optimizer(model, learning_rate=peak, weight_decay=decay)
    results, n_steps = [], len(known["losses"])
    for step, rows in enumerate(figures()["batches"]):
        idx = torch.tensor(rows)
        stats = train_step(
            Scorer(model),
            (idx[:, :-1], idx[:, 1:]),
            optimizer,
            Precision(CPU, torch.float32),
            micro_batch_size=2,
            learning_rate=lr_at(step, peak=peak, warmup_steps=warmup_steps, max_steps=n_steps),
            grad_clip=clip,
            seed=step,
        )
        loss, norm = known["losses"][step], known["norms"][step]
        place = f"step {step + 1}"
        results += [within(abs(stats.loss - loss) / loss, ROUNDED, f"the loss of {place}")]
        far = abs(stats.grad_norm - norm) / norm
        results += [within(far, EXACT, f"the gradient's norm of {place}")]
    found = sketch(dict(model.named_parameters()))
    return first_failure([*results, same_sketch(found, known["parameters"])])


class Trained(NamedTuple):
    """The losses of a short run, and its weights afterwards."""

    losses: Tensor
    weights: Tensor


def short_run(
    place: Place,
    *,
    micro_batch_size: int = ROWS,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    dropout: float = 0.0,
    compiled: bool = False,
    recomputed: bool = False,
    way: str = "",
) -> Trained:
    """A few steps from the tied model, and what they made of another text."""
    model = walk.plain(place.model("tied")).to(device).train()
    model.set_dropout(dropout)
    precision, scorer = Precision(device, dtype), Scorer(model)
    shape = (micro_batch_size, TOKENS)
    go(model, way)
    prepare_blocks(model, precision, shape, compiled=compiled, recomputed=recomputed)
    optimizer = make_optimizer(model, learning_rate=0.01, weight_decay=0.1)
    idx = walk.token_ids(walk.SHAPE["vocab_size"], (STEPS + 1) * ROWS, TOKENS + 1)
    *batches, held_out = ((part[:, :-1], part[:, 1:]) for part in idx.split(ROWS))
    losses = []
    for step, batch in enumerate(batches):
        stats = train_step(
            scorer, batch, optimizer, precision, micro_batch_size=micro_batch_size,
            learning_rate=0.01, grad_clip=1.0, seed=step,
        )  # fmt: skip
        losses.append(stats.loss)
    losses.append(mean_loss(scorer, [held_out], precision))
    weights = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    return Trained(torch.tensor(losses, dtype=torch.float64), weights)


def row(
    name: str,
    place: Place,
    *,
    micro_batch_size: int = ROWS,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    compiled: bool = False,
) -> Result:
    """The losses of a run in another way against those of the plain one."""
    found = short_run(
        place, micro_batch_size=micro_batch_size, dtype=dtype, device=device, compiled=compiled
    )
    return within(difference(found.losses, short_run(place).losses), WAYS[name].tolerance)


def recomputed(place: Place) -> Result:
    """Bit for bit the same run, dropout included."""
    runs = [
        short_run(place, micro_batch_size=2, dropout=0.1, recomputed=recomputed)
        for recomputed in (True, False)
    ]
    return first_failure(
        (
            within(difference(runs[0].losses, runs[1].losses), 0.0, "the losses"),
            within(difference(runs[0].weights, runs[1].weights), 0.0, "the weights"),
        )
    )


def in_c(place: Place) -> Result:
    """Blocks whose layer norms, attention, GELU and dropout are C's."""
    with notices("minigpt2") as heard:
        if not c_trains():
            if any("something else" in line for line in heard):
                return Result("FAIL", heard[0])
            raise NotHereError(heard[0] if heard else "there are no C functions")
    found = short_run(place, way=IN_C)
    return within(difference(found.losses, short_run(place).losses), WAYS[IN_C].tolerance)


def float16(place: Place) -> Result:
    """float16 with a loss scaler."""
    if not torch.cuda.is_available():
        raise NotHereError(CUDA)
    return row("float16 autocast", place, dtype=torch.float16, device=torch.device("cuda"))


def compiled(place: Place) -> Result:
    """Blocks that go through torch.compile."""
    with notices("minigpt2") as heard:
        result = row("compiled blocks", place, compiled=True)
    refused = [line for line in heard if "torch.compile failed" in line]
    if not refused:
        return result
    if shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++"):
        return Result("FAIL", refused[0])
    raise NotHereError(refused[0])


def loss_in_chunks(place: Place) -> Result:
    """The loss, and the gradients of what it is made of, in parts and at once."""
    model = walk.plain(place.model("tied"))
    idx = walk.token_ids(walk.SHAPE["vocab_size"], 3, 20)
    targets, found = idx[:, 1:], []
    x = model.hidden(idx[:, :-1]).detach().requires_grad_()
    weight = model.wte.weight.detach().requires_grad_()
    most = len(weight) * 7  # logits: of seven tokens
    for loss in (
        summed_loss(x, weight, targets, most=most),
        F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten(), reduction="sum"),
    ):
        gradients = torch.autograd.grad(loss, (x, weight))
        found.append([loss.detach()[None], *gradients])
    tolerance = WAYS["loss in chunks"].tolerance
    names = ("the loss", "the gradient of x", "the gradient of the head")
    return first_failure(
        within(difference(a, b), tolerance, name) for a, b, name in zip(*found, names)
    )


def dropout(place: Place) -> Result:
    """Attention and its gradients in parts and at once, with the same masks."""
    model = walk.plain(place.model("tied"))
    idx, attn = walk.token_ids(walk.SHAPE["vocab_size"], 3, 20), cast(Block, model.h[0]).attn
    qkv = attn.c_attn(model.wte(idx)).unflatten(-1, (3, attn.n_head, -1)).detach()
    q, k, v = (x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).clone())
    found = []
    for attention in (attention_in_parts, plain_attention):
        with own_randomness(CPU):
            torch.manual_seed(5)
            y = attention(q, k, v, None, attn.scale, 0.1)
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), (q, k, v))])
    tolerance = WAYS["16-bit dropout"].tolerance
    names = ("what it gives", *(f"the gradient of {name}" for name in "qkv"))
    return first_failure(
        within(difference(a, b), tolerance, name) for a, b, name in zip(*found, names)
    )


def processes(name: str, place: Place) -> Result:
    """Two processes, by the command, against one."""
    if os.name == "nt" or not torch.distributed.is_available():
        raise NotHereError("this torch has no torch.distributed that can start two processes here")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = ["--fsdp"] if name == "FSDP" else []
    found = _losses(place, torchrun, more, place.folder / name)
    alone = place.folder / "one process"
    expected = _losses(place, [], [], alone) if not alone.exists() else _logged(alone)
    return within(difference(found, expected), WAYS[name].tolerance)


def _losses(place: Place, launcher: Sequence[str], flags: Sequence[str], out: Path) -> Tensor:
    argv = ["train", *short_flags(place, out, max_steps=4, eval_every=2), *flags]
    words = [sys.executable, *launcher, "-m", "minigpt2", *argv]
    done = subprocess.run(
        words, env=environment(place), capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        told = next((line for line in lines if line.startswith("error: ")), "".join(lines[-1:]))
        raise RuntimeError(f"train ended with {done.returncode}: {told}")
    return _logged(out)


def _logged(run: Path) -> Tensor:
    """The losses in a run's records."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = [line[key] for line in lines for key in ("loss", "val_loss") if line.get(key)]
    return torch.tensor(losses, dtype=torch.float64)


def short_settings() -> dict[str, Any]:
    """Those of a small run on the CPU, with dropout and accumulation."""
    return {
        "device": "cpu", "dtype": "float32", "batch_size": 4, "micro_batch_size": 2,
        "block_size": 16, "learning_rate": 0.01, "dropout": 0.1, "workers": 1,
    }  # fmt: skip


def short_flags(place: Place, out: Path, **settings: Any) -> list[str]:
    """The words of the command for a small run."""
    paths = {"model": place.model("draft"), "data": place.text(), "out": out}
    given = {**paths, **short_settings(), **settings}
    return [word for name, value in given.items() for word in (flag(name), str(value))]


def environment(place: Place) -> dict[str, str]:
    """That of a process which runs this minigpt2, and keeps nothing outside the place."""
    path = [str(ASSETS.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"MINIGPT2_CACHE": str(place.cache), "PYTHONPATH": os.pathsep.join(path)}
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as here, see `Item`
    return {**os.environ, **own, **one_thread}
