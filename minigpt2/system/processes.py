"""Several processes as one training run (DDP, FSDP): who has which rows and weights.

torchrun starts the processes and tells each its place in environment variables; without it there is
one process, and everything here does nothing. Knows tensors and processes, nothing of GPT-2.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..equivalences import swap
from ..errors import InputError
from ..loss import IGNORE

Value = TypeVar("Value")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# one process may prepare hours of text while the others wait
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """This process's rows of a batch (B, T): B / size of them, rounded up.

        Where the rows do not suffice, there are rows without scored targets: every process computes
        as many as every other, which collective operations need.
        """
        rows = self.rows(len(batch[0]))
        idx, targets = (part[rows] for part in batch)
        missing = (0, 0, 0, rows.stop - rows.start - len(idx))
        return F.pad(idx, missing), F.pad(targets, missing, value=IGNORE)

    def rows(self, batch_size: int) -> slice:
        """Where this process's rows are in a batch; the last ones may not be there."""
        n_rows = -(-batch_size // self.size)
        return slice(self.rank * n_rows, (self.rank + 1) * n_rows)

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in the order of their ranks, the same list on each."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process of each machine go through this block before the others.

        Where one fails in it, the others raise InputError instead of waiting for it.
        """
        first = self.local_rank == 0
        if not first:
            self._meet(well=True)
        try:
            yield
        except Exception:
            with contextlib.suppress(RuntimeError):  # this error says more than that of others
                self._meet(well=False)
            raise
        self._meet(well=True)
        if first:
            self._meet(well=True)

    def _meet(self, *, well: bool) -> None:
        """Wait for every process; raise InputError where this one is well and another is not."""
        if not all(self.gather(well)) and well:
            raise InputError("another process of this run has failed: its own message says why")


ALONE = World()


@contextlib.contextmanager
def join(world: World, device: torch.device) -> Iterator[None]:
    """Meet the other processes, and part from them at the end."""
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield
    # not after an error: the others may wait in a collective operation that never comes, and
    # torchrun ends them
    dist.barrier()
    gc.collect()  # what DDP made keeps the group, with its threads, and refers to itself
    dist.destroy_process_group()


def world_from(environment: Mapping[str, str]) -> World:
    """What torchrun's variables say, or a world of one without them.

    Raises InputError when only some of them are set, or make no sense.
    """
    given = [name for name in VARIABLES if name in environment]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return ALONE
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise InputError(
            f"{', '.join(given)} is set and {', '.join(missing)} is not: start the processes with "
            "torchrun, or unset them to train with one process"
        )
    try:
        rank, size, local_rank = (int(environment[name]) for name in VARIABLES[:3])
    except ValueError:
        rank = size = local_rank = -1
    if not 0 <= local_rank <= rank < size:
        values = ", ".join(f"{name}={environment[name]}" for name in VARIABLES[:3])
        raise InputError(f"{values} makes no sense: start the processes with torchrun")
    return World(rank, size, local_rank)


def device_of(name: str, world: World) -> str:
    """The device a process asks for: each process of a machine takes a CUDA device of its own."""
    several = world.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{world.local_rank}" if several else name


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP: every process holds all weights, and gradients are averaged in the backward pass."""
    devices = [device] if device.type == "cuda" else None

    def replicated(whole: nn.Module) -> nn.Module:
        return DistributedDataParallel(whole, device_ids=devices, gradient_as_bucket_view=True)

    return swap(module, "", replicated, "DDP")


def shard(
    module: nn.Module, blocks: Sequence[str], device: torch.device, methods: Sequence[str]
) -> None:
    """FSDP2: every process holds a part of every weight, and gathers a block when it computes it.

    `blocks` are submodules by name, `methods` those of the module that may be called besides its
    forward.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def method(name: str) -> Callable:
        register_fsdp_forward_method(module, name)
        return getattr(module, name)

    for name in (*blocks, ""):
        swap(module, name, lambda part: fully_shard(part, mesh=mesh), "FSDP")
    for name in methods:
        swap(module, name, lambda _, name=name: method(name), "FSDP")


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied to this module."""
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Let go of weights that were gathered for an evaluation."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DDP, for forward passes that are not trained on."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@contextlib.contextmanager
def gradient_sync(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Average the gradients over the processes in the backward passes inside, or not yet.

    FSDP does it every time: it has no room to keep whole gradients.
    """
    if isinstance(module, DistributedDataParallel) and not wanted:
        with module.no_sync():
            yield
    else:
        yield


def whole(value: Tensor) -> Tensor:
    """A tensor as one process would have it; every process must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on `like`'s device, cut as `like` is; the inverse of `whole`."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    value = value.to(like.to_local().device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
