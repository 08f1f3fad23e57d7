"""The model's matrices, laid out once for the CPU's product routines: same numbers, sooner.

Decoding reads every weight once a token, so its speed is that of memory, if the routine keeps up.
torch's float32 product (MKL) does not for one row or a few. oneDNN's does, from a matrix that was
reordered for it once; FBGEMM's reads int8 as it is. Both are part of torch's wheels for x86, so
nothing is compiled and nothing is waited for. Where one is missing the module stays as it was: the
plain path is always there, and this one equals it (float32 up to the order of sums, int8 up to
`SPLIT`, below).

For decoding only: a packed model cannot be trained, moved or saved.

Letters: M rows, N outputs of a Linear, K its inputs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..arguments import require
from ..equivalences import WAYS, ways_of
from ..errors import OptionError
from ..formats.hugging_face import StoredLinear
from ..model import GPT2
from .c_products import CLinear, c_works
from .c_step import can_step, step_in_c
from .int8 import Int8Linear, check_no_adapters, probe, round_rows, swap_linears
from .routines import Choice, Routine, choose
from .torch_step import FEW as FEW_TOKENS
from .torch_step import can_step as can_step_in_torch
from .torch_step import step_in_torch

logger = logging.getLogger(__name__)
LAID_FOR = 8  # rows, of whose products oneDNN chooses the layout; it is fast for one, too
SLICES = 4  # of a matrix's rows, which are multiplied side by side
FEW = 16  # rows, up to which slices are worth it

# FBGEMM multiplies unsigned by signed bytes and adds pairs of products in 16 bits, which hold them
# while the unsigned ones stay below 128. So an activation is cut into two digits of -63 to 63: its
# rounded value, and the rest 126 times larger. Together they are off by at most 1 / (126 * 126) of
# the row's largest, and the sums of their products are whole numbers without any rounding.
DIGIT, SPLIT, ZERO_POINT = 63, 126, 64


class PackedLinear(nn.Module):
    """A float32 Linear in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), LAID_FOR)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PlainLinear(nn.Module):
    """A float32 Linear as torch has it, whose matrix lies in memory row by row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight.detach().contiguous()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return F.linear(x, self.weight, self.bias)


class SlicedLinear(PlainLinear):
    """A float32 Linear whose products with few rows are those of slices of its matrix, in one call:
    on some processors a batch of products is read sooner than one of many rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        if len(rows) > FEW:
            return super().forward(x)
        n, k = self.weight.shape
        whole = n - n % SLICES  # rows of the matrix that are in slices
        slices = self.weight[:whole].view(SLICES, whole // SLICES, k)
        y = torch.bmm(slices, rows.T.expand(SLICES, -1, -1)).flatten(0, 1).T  # (M, whole)
        if whole < n:
            y = torch.cat((y, F.linear(rows, self.weight[whole:])), dim=1)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], n).contiguous()


class LinearByRows(PlainLinear):
    """A float32 Linear that one routine multiplies by one row in a decode step, and another by
    some. Their layouts are made when they are first asked for; prompts are multiplied plainly.
    """

    def __init__(self, linear: nn.Linear, choice: Choice, most_rows: int) -> None:
        """A call with up to `most_rows` is taken for a decode step's."""
        super().__init__(linear)
        self._choice, self._most_rows = choice, most_rows
        self._made: dict[str, nn.Module] = {}

    def for_rows(self, n_rows: int) -> nn.Module:
        """What multiplies so many rows in a decode step."""
        routine = self._choice[n_rows > 1]
        if routine.name not in self._made:
            self._made[routine.name] = routine.make(self)
        return self._made[routine.name]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        n_rows = x.numel() // x.shape[-1]
        return self.for_rows(n_rows)(x) if n_rows <= self._most_rows else super().forward(x)


# the plain one first
ROUTINES = (
    Routine("plain", "plain float32", PlainLinear),
    Routine("packed", "packed float32", PackedLinear),
    Routine("slices", "sliced float32", SlicedLinear),
)


class PackedInt8Linear(nn.Module):
    """An int8 Linear in FBGEMM's own layout."""

    def __init__(self, linear: Int8Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        n_rows = len(linear.weight)
        with warnings.catch_warnings():
            # torch plans to drop its quantized tensors; the day it does, the plain path stays
            warnings.simplefilter("ignore")
            matrix = torch._make_per_channel_quantized_tensor(  # pyright: ignore[reportPrivateImportUsage]
                linear.weight, linear.scale.double(), torch.zeros(n_rows, dtype=torch.int64), 0
            )
            engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
            try:
                self.packed = torch.ops.quantized.linear_prepack(matrix, None)
            finally:
                torch.backends.quantized.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        rows = x.flatten(0, -2)  # (M, K)
        step = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / DIGIT  # (M, 1)
        scaled = rows / step
        first = scaled.round()
        digits = torch.cat((first, (scaled - first) * SPLIT))  # (2M, K), rounded by the product
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        first, second = product(digits, 1.0, ZERO_POINT, self.packed).chunk(2)  # (M, N) each
        y = torch.add(first, second, alpha=1 / SPLIT).mul_(step)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


def pack(model: GPT2, *, compiled: bool = False, cpu_routine: str = "auto") -> None:
    """Lay out the Linears and the head of a model on the CPU for speed, in place; what cannot be
    stays plain. With `compiled`, products of few rows and the decode step are made in C.
    Without it, `cpu_routine` is the routine of all float32 matrices, "by-rows", which is plain for
    one row and packed for more, or "auto", by which routines.py chooses.

    Raises InputError for a model with adapters, and for a routine that is not to be had here.
    """
    model.eval()
    if model.ln_f.weight.device.type != "cpu":
        return
    if model.ln_f.weight.dtype == torch.float32:
        _lay_out(model, compiled, cpu_routine)
    if "read" not in ways_of(model) and can_step_in_torch(model):
        step_in_torch(model)
    model.eval()  # the new parts, too: modes that differ are set at every token


def _lay_out(model: GPT2, compiled: bool, cpu_routine: str) -> None:
    rounded = any(isinstance(module, Int8Linear) for module in model.modules())
    if compiled and c_works(torch.int8 if rounded else torch.float32):
        _in_c(model)
    elif rounded:
        _pack_int8(model)
    else:
        _in_routines(model, cpu_routine)


def _in_routines(model: GPT2, name: str) -> None:
    """Let each Linear be multiplied by the routine with this name, or by those chosen for it."""
    check_no_adapters(model)
    shapes, table = _shapes(model), model.wte.weight
    if name == "auto":
        chosen = choose([routine for routine in ROUTINES if _is_there(routine)], shapes)
    else:
        chosen = dict.fromkeys(shapes, _named(name))
        logger.debug("products on the CPU: %s (as asked for)", name)

    def laid_out(linear: nn.Linear) -> nn.Module:
        shape = linear.out_features, linear.in_features
        if shape == table.shape and linear.weight.equal(table):
            own = nn.Linear(*table.T.shape, bias=False, device="meta")
            own.weight, own.bias = table, linear.bias  # in memory once, as in the file
            linear = own
        one, some = chosen[shape]
        # the head is asked for what is read last, whichever way the blocks went
        most_rows = FEW_TOKENS if shape == table.shape else 0
        return one.make(linear) if one is some else LinearByRows(linear, (one, some), most_rows)

    def way(linear: nn.Linear) -> str:
        one, some = chosen[linear.out_features, linear.in_features]
        return one.way if one is some else "float32 by rows"

    swap_linears(model, nn.Linear, laid_out, way)


def _named(name: str) -> Choice:
    """The routines that `name` asks for. Raises OptionError for those that are not to be had."""
    plain, packed, _ = ROUTINES
    choices = {r.name: (r, r) for r in ROUTINES} | {"by-rows": (plain, packed)}
    require("cpu_routine", name, name in choices, ", ".join(["auto", *choices]))
    if not all(map(_is_there, choices[name])):
        raise OptionError(
            f"cpu_routine is {name!r}, which this torch does not have on this processor: use "
            "plain, or auto, which takes the fastest of those that are there",
            "cpu_routine",
        )
    return choices[name]


def _is_there(routine: Routine) -> bool:
    return routine is ROUTINES[0] or works(routine.make, _example(), routine.way)


def _shapes(model: GPT2) -> list[tuple[int, int]]:
    """(N, K) of every Linear, the head included."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    tied = model.config.tie_word_embeddings
    return shapes + [(model.config.vocab_size, model.config.n_embd)] * tied


def _in_c(model: GPT2) -> None:
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        swap_linears(model, Int8Linear, lambda x: CLinear(x.weight, x.scale, x.bias), "int8 in C")
    else:
        halves = _are_half(model) and c_works(torch.float16)

        def in_c(linear: nn.Linear) -> CLinear:
            table = model.wte.weight
            weight = linear.as_stored() if isinstance(linear, StoredLinear) else linear.weight
            weight = weight if halves else weight.to(table.dtype)
            same = (weight.shape, weight.dtype) == (table.shape, table.dtype)
            return CLinear(table if same and weight.equal(table) else weight, None, linear.bias)

        swap_linears(model, nn.Linear, in_c, "float16 in C" if halves else "float32 in C")
    if can_step(model):
        step_in_c(model)


def _are_half(model: GPT2) -> bool:
    """Whether all matrices lie in a file as float16."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return all(isinstance(x, StoredLinear) and x.stored_dtype == torch.float16 for x in linears)


def _pack_int8(model: GPT2) -> None:
    linear = _example()
    if works(PackedInt8Linear, Int8Linear(*round_rows(linear.weight), linear.bias), "packed int8"):
        swap_linears(model, Int8Linear, PackedInt8Linear, "packed int8")


def works(kind: Callable[[Any], nn.Module], plain: nn.Module, way: str) -> bool:
    """Whether this torch, on this processor, has what `kind` needs, and computes with it what the
    plain module computes; with a notice where it computes something else.
    """
    try:
        fast = kind(plain)
        same = all(WAYS[way].agrees(fast(x), plain(x)) for x in probe().rows)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    if not same:
        logger.warning("%s computes something else on this machine: going on without it", way)
    return same


def _example() -> nn.Linear:
    weight, bias, _ = probe()
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return linear
