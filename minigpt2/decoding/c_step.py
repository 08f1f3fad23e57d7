"""The decode step in C: all blocks in one call, so that nothing but the products takes time.

A token of a small model is a few hundred short torch operations, and to start them takes longer
than to do them. The function `decode_step` of assets/decode.c goes through the blocks of model.py
for few tokens at once, by all threads, and reads and writes the cache where it lies.

Letters: B rows, T tokens in this call, M = B T, C n_embd.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..cache import LayerCache
from ..equivalences import swap
from ..formats.activations import ACTIVATIONS
from ..model import GPT2, Block
from .c_library import library
from .c_products import FEW, CLinear, Matrix, address

NAMES = ("gelu_new", "gelu", "relu", "silu")  # the activation functions, as decode.c numbers them


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _Block(ctypes.Structure):
    _fields_ = [
        ("ln_1", _Norm),
        ("c_attn", Matrix),
        ("attn_c_proj", Matrix),
        ("ln_2", _Norm),
        ("c_fc", Matrix),
        ("mlp_c_proj", Matrix),
        ("scale", ctypes.c_float),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layer", "n_head", "n_embd", "n_inner")),
        ("activation", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("ln_f", _Norm),
    ]


class _Slots(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "capacity")),
    ]


class CDecodeStep:
    """`model.read` in C where it reads few tokens with a cache; everything else (long prompts,
    gradients, training) goes the plain way.
    """

    def __init__(self, model: GPT2) -> None:
        functions = library()
        assert functions is not None
        self._model, self._plain, self._functions = model, model.read, functions
        self._blocks = (_Block * len(model.h))(*map(_block, _blocks(model)))
        config = model.config
        self._n_inner = config.n_inner or 4 * config.n_embd
        self._shape = _Shape(
            config.n_layer,
            config.n_head,
            config.n_embd,
            self._n_inner,
            _activation(model),
            config.layer_norm_epsilon,
            _norm(model.ln_f),
        )
        widest = max(self._n_inner, config.n_embd)
        self._room = functions.room_for(ctypes.c_int64(widest))
        self._last: tuple[object, ctypes.Array[_Slots]] | None = None  # of `_slots_of`

    def __call__(
        self,
        idx: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        layers: Sequence[LayerCache | None],
    ) -> Tensor:
        """See GPT2.read."""
        few = idx.numel() <= FEW and not torch.is_grad_enabled() and not self._model.training
        opened = [layer for layer in layers if layer is not None]
        if not few or not opened:
            return self._plain(idx, positions, mask, layers)
        model, (n_rows, n_tokens) = self._model, idx.shape
        x = model.wte(idx) + model.wpe(positions)  # (B, T, C)
        slots = self._slots_of(opened)
        n_threads = torch.get_num_threads()
        work = torch.empty(self._work(idx.numel(), slots[0].capacity, n_threads))
        self._functions.decode_step(
            ctypes.byref(self._shape),
            self._blocks,
            slots,
            address(positions),
            address(x),
            ctypes.c_int64(n_rows),
            ctypes.c_int64(n_tokens),
            address(work),
            ctypes.c_int64(n_threads),
        )
        return x

    def _slots_of(self, layers: list[LayerCache]) -> ctypes.Array[_Slots]:
        """What the function is told of the cache, which is the same from token to token."""
        addresses = [tensor.data_ptr() for layer in layers for tensor in layer[:2]]
        key = addresses, layers[0].keys.stride(), layers[0].keys.shape
        last = self._last  # once: another thread may read with another cache
        if last is None or last[0] != key:
            self._last = last = key, (_Slots * len(layers))(*map(_slots, layers))
        return last[1]

    def _work(self, n_tokens: int, capacity: int, n_threads: int) -> int:
        """How many numbers the function needs room for, see decode.c."""
        width = self._model.config.n_embd
        shared = n_tokens * (4 * width + self._n_inner)
        return shared + n_threads * (n_tokens * (width + self._room) + capacity)


def can_step(model: GPT2) -> bool:
    """Whether the decode step of a model can be made in C, all Linears of whose blocks are."""
    linears = [linear for block in _blocks(model) for linear in _linears(block)]
    return all(isinstance(linear, CLinear) for linear in linears) and _activation(model) is not None


def step_in_c(model: GPT2) -> None:
    """Let a model whose Linears are in C read few tokens in C altogether, in place."""
    swap(model, "read", lambda _: CDecodeStep(model), "decode step in C")


def _blocks(model: GPT2) -> list[Block]:
    return [block for block in model.h if isinstance(block, Block)]


def _linears(block: Block) -> list[nn.Module]:
    """In the order of decode.c."""
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]


def _block(block: Block) -> _Block:
    matrices = [linear.matrix() for linear in _linears(block) if isinstance(linear, CLinear)]
    return _Block(
        _norm(block.ln_1), *matrices[:2], _norm(block.ln_2), *matrices[2:], block.attn.scale
    )


def _norm(norm: nn.LayerNorm) -> _Norm:
    return _Norm(address(norm.weight), address(norm.bias))


def _slots(layer: LayerCache) -> _Slots:
    keys, values = layer.keys, layer.values
    row, head, slot, number = keys.stride()
    assert values.stride() == keys.stride() and (slot, number) == (keys.shape[3], 1)
    assert keys.dtype == values.dtype == torch.float32
    return _Slots(address(keys), address(values), row, head, keys.shape[2])


def _activation(model: GPT2) -> int | None:
    """The number that decode.c has for the model's activation function."""
    function = ACTIVATIONS[model.config.activation_function]
    return next((i for i, name in enumerate(NAMES) if ACTIVATIONS[name] is function), None)
