"""CUDA graphs: the decode step of one token is recorded once and replayed for every token.

A token of a small model is a few hundred short kernels, and launching them from Python takes longer
than running them. A CUDA graph launches all of them at once. It needs shapes and addresses that do
not change, so attention looks at all slots of the cache, masked; the text grows inside. The same
step can go through torch.compile first, which fuses the kernels (and the casts of int8 weights into
their products).

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

Letters: B rows, C n_embd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..cache import KVCache
from ..equivalences import difference, swap
from ..model import GPT2
from ..system.precision import guard_compiler_cache

logger = logging.getLogger(__name__)
ROOM = 256  # slots
WARM_UPS = 3  # runs before recording, in which kernels are chosen and memory is found
CLOSE = {8: 1e-9, 4: 1e-4, 2: 0.05}  # by bytes of a number: compiled kernels round otherwise
Read = Callable[[Tensor, Tensor, KVCache], Tensor]


class FixedDecodeStep:
    """`model.hidden`, where the decode step of one token a row has the same shapes every time.

    Everything else (prefill, draft tokens, training) goes the plain way. On CUDA the step is
    recorded for each cache, and replayed; elsewhere it is run as it is. A recording goes with its
    cache, so several texts that take turns each keep theirs.
    """

    def __init__(self, model: GPT2, *, compiled: bool) -> None:
        self._model, self._plain = model, model.hidden
        self._read: Read = self._run
        if compiled:
            guard_compiler_cache()
            self._read = torch.compile(self._run, dynamic=False)
        self._recordings: WeakKeyDictionary[KVCache, Recording | None] = WeakKeyDictionary()
        self._records, self._compared = True, False  # while it works; whether it was looked at

    def __call__(
        self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """See GPT2.hidden."""
        if cache is None or idx.shape[1:] != (1,) or torch.is_grad_enabled():
            return self._plain(idx, cache, documents)
        positions = cache.positions(1)
        recorded = idx.device.type == "cuda" and self._records
        x = (self._replayed if recorded else self._read)(idx, positions, cache)
        cache.advance(1)
        return x

    def _replayed(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """The recorded step; run as it is, with a notice, from the first time that recording fails
        or gives other numbers.
        """
        if cache not in self._recordings:  # many are read once only: a row at its window's end
            self._recordings[cache] = None
            return self._read(idx, positions, cache)
        try:
            recording = self._recordings[cache] or self._record(idx, positions, cache)
        except RuntimeError as problem:
            reason = next(iter(str(problem).splitlines()), type(problem).__name__)
            logger.warning("no CUDA graph can be recorded (%s): going on without", reason)
            self._records = False
            return self._read(idx, positions, cache)
        return recording.replay(idx, positions)

    def _run(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        mask, layers = cache.all_slots(positions)
        return self._model.read(idx, positions, mask, layers)

    def _record(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Recording:
        """A recording, the first of which is compared with the step run as it is."""
        recording = Recording(self._read, idx, positions, cache)
        if not self._compared:
            expected = self._run(idx, positions, cache)
            found = difference(recording.replay(idx, positions), expected)
            if not found <= CLOSE[expected.element_size()]:
                raise RuntimeError(f"it is off by {found:.1e} of the largest number")
            self._compared = True
        self._recordings[cache] = recording
        return recording


class Recording:
    """A CUDA graph of one decode step: its kernels, for idx (B, 1) at positions (B, 1) of a cache,
    at the addresses that they had.
    """

    def __init__(self, read: Read, idx: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Raises RuntimeError where CUDA refuses."""
        self._idx, self._positions = idx.clone(), positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what these write is written again by the first replay
            for _ in range(WARM_UPS):
                read(self._idx, self._positions, cache)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._x = read(self._idx, self._positions, cache)

    def replay(self, idx: Tensor, positions: Tensor) -> Tensor:
        """The hidden states (B, 1, C) at these tokens and positions."""
        self._idx.copy_(idx)
        self._positions.copy_(positions)
        self._graph.replay()
        return self._x.clone()


def fix_shapes(model: GPT2, *, compiled: bool = False) -> None:
    """Let a model take decode steps in fixed shapes, recorded on CUDA; in place, for decoding.

    Caches get room in steps of ROOM, so that few prompts need a shape of their own.
    """
    make_cache = model.eval().make_cache

    def roomy(batch_size: int, capacity: int | None = None) -> KVCache:
        return make_cache(batch_size, None if capacity is None else -(-capacity // ROOM) * ROOM)

    way = "CUDA graph" if model.ln_f.weight.device.type == "cuda" else "fixed shapes"
    way = "compiled decode step" if compiled else way
    swap(model, "make_cache", lambda _: roomy, way)
    swap(model, "hidden", lambda _: FixedDecodeStep(model, compiled=compiled), way)
