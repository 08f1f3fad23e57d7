"""What a training step will need, in memory and time, before the first one is taken.

The micro-batch is chosen to fit by it. Knows the model's shapes, and what autograd keeps of them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch

from ..formats.activations import ACTIVATIONS, KEPT
from ..loss import MOST_LOGITS
from ..model import GPT2Config
from .dropout import parts
from .ways import IN_C, QUICK_DROPOUT

logger = logging.getLogger(__name__)
GB = 10**9
FLOAT = 4  # bytes of a float32

# What is no tensor. CPU: Python, torch and its libraries; CUDA: the workspaces of matrix products.
FIXED = {"cpu": 340_000_000, "cuda": 50_000_000, "mps": 50_000_000}
# Fragmentation: the C library serves what is below 32 MiB from a heap, in which freed pieces leave
# holes that the next tensors do not fit into: with 124M, 5 to 50 % of all tensors. These shares
# bring the totals of benchmarks/memory.py within 11 %. Where every tensor is mapped by itself,
# there are no holes, and the rest of the forecast is right within 2 %.
HEAP_PIECE = 2**25
FRAGMENTED_ACTIVATIONS, FRAGMENTED_GRADIENTS = 0.5, 0.3


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes, at the moment of a training step that needs most of them."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two averages of each trained weight
    activations: int  # what the forward pass keeps, and what the backward pass makes of it
    logits: int  # the chunks of the loss, and the gradients of embedding and output head
    overhead: int  # what is no tensor

    @property
    def total(self) -> int:
        """The peak."""
        return sum(getattr(self, field.name) for field in fields(self))


def forecast_memory(
    config: GPT2Config,
    *,
    micro_batch_size: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    activation_checkpointing: bool = False,
    n_trained: int | None = None,
    n_shards: int = 1,
    accumulated: bool = True,
    masked: bool = False,
    way: str = "",
) -> MemoryForecast:
    """What `step.train_step` takes of one device at its peak, in bytes.

    On CUDA that is torch.cuda.max_memory_allocated, on the CPU the resident memory of the process;
    `dtype` is that of matrix products. `n_trained` counts the trained numbers if not all are
    (LoRA), `n_shards` the processes that share weights, gradients and optimizer (FSDP).
    `accumulated` says that gradients lie there from the start: a batch has several micro-batches,
    or DDP keeps their place. Without it less is needed. `masked`: documents are kept apart.
    `way`: that of ways.py in which the step is computed.

    What autograd keeps was counted, and the whole measured, on the CPU. CUDA's fused attention, MPS
    and FSDP follow torch's sources and were not measured. Compiled blocks take less.
    """
    n_all, in_block = config.n_parameters, config.block_parameters
    adapters = n_trained if n_trained is not None and n_trained < n_all else 0
    shape = micro_batch_size, block_size
    batch = MicroBatch(config, *shape, dtype, device, masked, way, adapters > 0)
    trained = FLOAT * (adapters or n_all)
    weights = FLOAT * (n_all + adapters) // n_shards
    if n_shards > 1:  # whole for a while: two blocks with their gradients, and what is in no block
        weights += FLOAT * (n_all - (config.n_layer - 4) * in_block)
    gradients, activations, logits = max(
        (
            (gradients // n_shards, activations, logits)
            for gradients, activations, logits in _possible_peaks(
                batch, trained, not adapters, activation_checkpointing, accumulated
            )
        ),
        key=sum,
    )
    overhead = FIXED[device.type]
    if device.type == "cpu":
        overhead += _fragmentation(batch, trained)
    return MemoryForecast(
        weights=weights,
        gradients=gradients,
        optimizer=2 * trained // n_shards,
        activations=activations,
        logits=logits,
        overhead=overhead,
    )


@dataclass(frozen=True)
class MicroBatch:
    """The sequences computed at once, and the bytes of what becomes of them."""

    config: GPT2Config
    n_rows: int  # B
    row: int  # T, the tokens of each
    dtype: torch.dtype  # of matrix products
    device: torch.device
    masked: bool = False  # documents are kept apart
    way: str = ""  # of ways.py
    adapted: bool = False  # Linears have adapters

    @property
    def n_tokens(self) -> int:
        """B * T."""
        return self.n_rows * self.row

    @property
    def stream(self) -> int:
        """A (B, T, C) in float32, such as the residual stream."""
        return FLOAT * self.n_tokens * self.config.n_embd

    @property
    def scores(self) -> int:
        """The (B, H, T, T) of attention in float32."""
        return FLOAT * self.n_rows * self.config.n_head * self.row**2

    @property
    def masks(self) -> list[int]:
        """Those of attention where it is done in parts: a byte for each score that is made."""
        config, n_head = self.config, self.config.n_head
        exact = self.dtype == torch.float32 or config.reorder_and_upcast_attn
        in_parts = self.way == QUICK_DROPOUT or (self.in_c and self.masked)
        if not in_parts or config.attn_pdrop == 0 or not exact:
            return []
        return [
            n_head * len(range(self.n_rows)[rows]) * (queries.stop - queries.start) * queries.stop
            for rows, queries in parts(self.n_rows, n_head, self.row)
        ]

    @property
    def wide(self) -> int:
        """The inside of an MLP, in the dtype of matrix products."""
        return self.dtype.itemsize * self.n_tokens * _inner(self.config)

    @property
    def in_c(self) -> bool:
        """Whether c_parts.py finds masks again, and keeps one tensor inside of the MLP."""
        return self.way == IN_C

    @property
    def kept(self) -> list[int]:
        """The tensors that one block keeps for its backward pass, besides its weights."""
        config, n_numbers = self.config, self.n_tokens * self.config.n_embd
        narrow = self.dtype.itemsize * n_numbers
        # two layer norms: what they get, its mean and spread, and what the Linear behind gets
        kept = 2 * [self.stream, FLOAT * self.n_tokens, FLOAT * self.n_tokens, narrow]
        kept += [*self._kept_by_attention(narrow), narrow]
        in_c = self.in_c and not self.adapted
        if not in_c or ACTIVATIONS[config.activation_function] is not ACTIVATIONS["gelu_new"]:
            kept += KEPT.get(config.activation_function, 1) * [self.wide]
        kept.append(self.wide)
        if config.resid_pdrop and not self.in_c:
            kept += 2 * [narrow if self.device.type == "cpu" else n_numbers]
        return kept + self.rounded

    @property
    def rounded(self) -> list[int]:
        """Autocast's copies of a block's matrices."""
        if self.dtype == torch.float32:
            return []
        square, oblong = self.config.n_embd**2, self.config.n_embd * _inner(self.config)
        return [self.dtype.itemsize * n for n in (3 * square, square, oblong, oblong)]

    def _kept_by_attention(self, narrow: int) -> list[int]:
        """Between c_attn and c_proj."""
        config, dropout = self.config, self.config.attn_pdrop > 0
        on_cpu, exact = self.device.type == "cpu", self.dtype == torch.float32
        upcast = config.reorder_and_upcast_attn and not exact  # what it gives is kept, too
        qkv = 4 * [self.stream] if upcast else [3 * narrow]
        if self.masks:
            return [*qkv, *self.masks]
        # torch's fused attention has no dropout on the CPU, and is not for training on MPS
        if self.device.type == "mps" or (on_cpu and dropout and not self.in_c):
            # with one row, v is a view of all that c_attn gives
            v = self.stream * (3 if self.n_rows == 1 and exact else 1)
            mask = self.scores if on_cpu else self.scores // FLOAT
            return [self.stream, self.stream, v, self.scores, *dropout * [mask, self.scores]]
        sums = FLOAT * self.n_tokens * config.n_head  # of the exponentials of each row of scores
        # the mask, which torch turns into numbers in every layer anew
        mask = (FLOAT if upcast else self.dtype.itemsize) * self.n_rows * self.row**2
        return [*qkv, sums, *self.masked * [mask]]

    @property
    def kept_outside_blocks(self) -> int:
        """What is kept before the first block and after the last."""
        mask = self.stream if self.device.type == "cpu" else self.stream // FLOAT
        dropped = self.config.embd_pdrop > 0 and not self.in_c
        apart = self.masked * self.n_rows * self.row**2
        tokens = 4 * FLOAT * self.n_tokens
        return self.stream + dropped * mask + apart + tokens

    @property
    def made_by_backward(self) -> int:
        """What the backward pass of a block makes and lets go of, beyond what it has freed."""
        freed = 2 * self.wide  # the MLP's, when attention's turn comes
        attention = 0
        if self.masks:  # probabilities, masks as numbers, gradients of scores; and copies
            attention = 3 * FLOAT * max(self.masks) + 6 * self.stream
        elif self.scores in self.kept:
            attention = self.scores
        return 3 * self.stream + max(self.wide, attention - freed)

    def loss(self, head: int) -> int:
        """Logits, and the gradients of what they were made from; `head` is the size of the output
        head's, 0 where it has none.
        """
        vocab, size = self.config.vocab_size, self.dtype.itemsize
        chunk = min(max(1, MOST_LOGITS // vocab), self.n_tokens) * vocab
        two = min(2 * chunk, self.n_tokens * vocab)  # the last chunk lives until the next is there
        always = 3 * self.stream + head  # what goes in, its gradient, and one that was counted
        if self.dtype == torch.float32:
            return always + FLOAT * two
        rounded = size * vocab * self.config.n_embd  # the head
        # its gradient is rounded too, and the CPU widens it again before it is added
        added = (rounded + (head if self.device.type == "cpu" else 0)) if head else 0
        return always + rounded + max((FLOAT + size) * two, (FLOAT + size) * chunk + added)


def _possible_peaks(
    batch: MicroBatch, trained: int, trains_all: bool, recomputed: bool, accumulated: bool
) -> Iterator[tuple[int, int, int]]:
    """(gradients, activations, logits) at each moment that may be the tightest, in bytes; `trained`
    are those of all gradients.
    """
    config, kept = batch.config, sum(batch.kept)
    table = FLOAT * config.vocab_size * config.n_embd if trains_all else 0
    later = FLOAT * (config.n_layer - 1) * config.block_parameters if trains_all else trained
    # of a block: what is kept until its backward pass, and what is computed again there
    remembered, again = (batch.stream, kept) if recomputed else (kept, 0)
    forward = config.n_layer * remembered + batch.kept_outside_blocks
    # autocast rounds a trained matrix once, and keeps that until the forward pass is over
    rounded = config.n_layer * sum(batch.rounded) if recomputed and trains_all else 0
    before = trained if accumulated else 0
    yield before, forward + rounded, batch.loss(table)
    # the backward pass in the last block, where it begins, and in the first
    yield before, forward + again + batch.made_by_backward, table
    yield trained if accumulated else later, remembered + again + batch.made_by_backward, table
    # the embedding's gradient; it is the head's too if they are one
    yield trained, batch.stream, table * (config.tie_word_embeddings + accumulated)


def _fragmentation(batch: MicroBatch, trained: int) -> int:
    """The bytes of the heap's holes. They are there with recomputed blocks too: a block's gradients
    take the room that it leaves, and the block before it takes new room.
    """
    in_heap = batch.config.n_layer * sum(piece for piece in batch.kept if piece < HEAP_PIECE)
    return int(FRAGMENTED_ACTIVATIONS * in_heap + FRAGMENTED_GRADIENTS * trained)


def _inner(config: GPT2Config) -> int:
    return config.n_inner or 4 * config.n_embd


def fitting_micro_batch(
    need: Callable[..., MemoryForecast], *, rows: int, block_size: int, budget: int
) -> int:
    """How many of `rows` sequences to compute at once: the fewest micro-batches that fit into
    `budget` bytes, as equal as can be.

    `need` is `forecast_memory` but for micro_batch_size and block_size. At least 1: a warning is
    given when that does not fit either.
    """
    assert rows >= 1
    sizes = [math.ceil(rows / n_parts) for n_parts in range(1, rows + 1)]
    totals = [need(micro_batch_size=size, block_size=block_size).total for size in sizes]
    for size, total in zip(sizes, totals):
        if total <= budget:
            return size
    logger.warning(
        "one sequence of %s tokens needs about %.1f GB, and %.1f GB may be taken: if memory runs "
        "out, use --activation-checkpointing, a shorter --block-size, --lora-rank or a smaller "
        "model",
        block_size,
        totals[-1] / GB,
        budget / GB,
    )
    return 1


def forecast_in_words(need: MemoryForecast, budget: int) -> str:
    """A forecast in two lines for people, in GB, beside the bytes that may be taken."""
    compared = "more than" if need.total > budget else "of"
    parts = ", ".join(
        f"{field.name} {getattr(need, field.name) / GB:.1f}" for field in fields(need)
    )
    return (
        f"about {need.total / GB:.1f} GB of memory at the peak of a step, {compared} the "
        f"{budget / GB:.1f} GB that may be taken\n  {parts}"
    )


# Of the speed of a plain product of matrices training reaches about this share on two cores of an
# AMD EPYC (Zen 3): 124M in 6.6 s a step of 1,024 tokens, nano in 0.126 s a step of 2,048.
REACHED = 0.6


def estimate_seconds(
    n_parameters: int, n_tokens: int, speed: float, *, n_trained: int | None = None
) -> float:
    """How long it takes to train on so many tokens, evaluations not counted, with `speed` from
    `measured_speed`.
    """
    return count_operations(n_parameters, n_tokens, n_trained=n_trained) / speed


def count_operations(n_parameters: int, n_tokens: int, *, n_trained: int | None = None) -> int:
    """How many operations training on so many tokens takes: 6 for each parameter and token (Kaplan
    et al. 2020, section 2.1), 2 of them for the gradient of those that are trained.
    """
    trained = n_parameters if n_trained is None else n_trained
    return (4 * n_parameters + 2 * trained) * n_tokens


def measured_speed(device: torch.device, dtype: torch.dtype) -> float:
    """About how many operations a second training does, from a product of matrices that is timed
    for a fifth of a second.
    """
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    count, seconds = 0, 0.0
    (matrix @ matrix).sum().item()  # a first product has to wake the library up
    began = time.perf_counter()
    while seconds < 0.2:
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        count, seconds = count + 1, time.perf_counter() - began
    return REACHED * 2 * size**3 * count / seconds
