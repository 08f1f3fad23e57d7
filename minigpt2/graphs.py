"""One new token on a GPU without the CPU in its way: record the reading once, replay it per token.

A token of a small model is a few hundred short kernels, and launching them from Python takes longer
than running them. A CUDA graph launches all of them at once. It needs shapes and addresses that do
not change, so attention looks at all slots of the cache, masked; the text grows inside. The same
reading can go through torch.compile first, which fuses the kernels (and the casts of int8 weights
into their products).

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

Letters: B rows, C n_embd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .cache import KVCache
from .model import GPT2

logger = logging.getLogger(__name__)
ROOM = 256  # slots
WARM_UPS = 3  # runs before recording, in which kernels are chosen and memory is found


class FixedReading:
    """`model.hidden`, where the reading of one new token a row has the same shapes every time.

    Everything else (prompts, guesses, training) goes the plain way. On CUDA the reading is recorded
    for each new cache; elsewhere it is run as it is.
    """

    def __init__(self, model: GPT2, *, compiled: bool) -> None:
        self._model, self._plain = model, model.hidden
        self._read: Callable[[Tensor, Tensor, KVCache], Tensor] = self._run
        if compiled:
            self._read = torch.compile(self._run, dynamic=False)
        self._keys: Tensor | None = None  # of the cache that was recorded
        self._records = True  # while that works

    def __call__(
        self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """See GPT2.hidden."""
        if cache is None or idx.shape[1] != 1 or torch.is_grad_enabled():
            return self._plain(idx, cache, documents)
        positions = cache.positions(1)
        recorded = idx.device.type == "cuda" and self._records
        x = (self._replayed if recorded else self._read)(idx, positions, cache)
        cache.advance(1)
        return x

    def _replayed(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """The recorded reading; run as it is, with a notice, from the first time that recording
        fails.
        """
        if self._keys is not cache.keys:
            try:
                self._record(idx, positions, cache)
            except RuntimeError as problem:
                reason = next(iter(str(problem).splitlines()), type(problem).__name__)
                logger.warning("no CUDA graph can be recorded (%s): going on without", reason)
                self._records = False
                return self._read(idx, positions, cache)
        self._idx.copy_(idx)
        self._positions.copy_(positions)
        self._graph.replay()
        return self._x.clone()  # (B, 1, C)

    def _run(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        mask, layers = cache.all_slots(positions)
        return self._model.read(idx, positions, mask, layers)

    def _record(self, idx: Tensor, positions: Tensor, cache: KVCache) -> None:
        self._idx, self._positions, self._keys = idx.clone(), positions.clone(), None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what these write is written again by the first replay
            for _ in range(WARM_UPS):
                self._read(self._idx, self._positions, cache)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._x = self._read(self._idx, self._positions, cache)
        self._keys = cache.keys


def fix_shapes(model: GPT2, *, compiled: bool = False) -> None:
    """Let a model read new tokens in fixed shapes, recorded on CUDA; in place, for decoding.

    Caches get room in steps of ROOM, so that few prompts need a shape of their own.
    """
    make_cache = model.eval().make_cache

    def roomy(batch_size: int, capacity: int | None = None) -> KVCache:
        return make_cache(batch_size, None if capacity is None else -(-capacity // ROOM) * ROOM)

    model.make_cache = roomy
    model.hidden = FixedReading(model, compiled=compiled)
