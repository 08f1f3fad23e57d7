"""The activation functions that a config.json may name, under transformers' names.

All that transformers has without weights of their own; each equals its own in float64, up to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return F.silu(1.702 * x) / 1.702  # x sigmoid(1.702 x), of which autograd keeps one tensor


def _laplace(x: Tensor) -> Tensor:
    return (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))) / 2  # arXiv:2209.10655


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # GPT-2 was trained with the tanh form; the exact erf form ("gelu") differs by up to 4.7e-4
    **dict.fromkeys(["gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"], _gelu_tanh),
    **dict.fromkeys(["gelu_fast", "gelu_accurate"], _gelu_tanh),
    **dict.fromkeys(["gelu", "gelu_python"], F.gelu),
    "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    **dict.fromkeys(["silu", "swish"], F.silu),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "laplace": _laplace,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "linear": lambda x: x,
}
# how many tensors of its size it keeps for its backward pass, besides what it gives; others one
KEPT = {"relu": 0, "tanh": 0, "sigmoid": 0, "linear": 0, "gelu_10": 2}
