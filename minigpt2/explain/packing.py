"""Numbers and texts as a page can carry them: arrays in base64, JSON that is never markup."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["f32", "f16", "i32", "share"]
# what would end a script, or a line of one where JSON is read as JavaScript
ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029\x7f"}


def packed(values: Tensor, kind: Kind = "f32") -> dict[str, object]:
    """An array as `{"kind", "shape", "data"}`, its numbers in base64, low byte first.

    A "share" is a number from 0 to 1 in steps of 1/65535, in two bytes.
    """
    flat = values.detach().cpu().flatten()
    if kind == "share":
        flat = (flat.double() * 65535).round().to(torch.int32).numpy().astype("<u2")
    elif kind == "i32":
        flat = flat.to(torch.int32).numpy().astype("<i4")
    else:
        flat = flat.double().numpy().astype("<f4" if kind == "f32" else "<f2")
    data = b64encode(flat.tobytes()).decode("ascii")
    return {"kind": kind, "shape": list(values.shape), "data": data}


def lower_triangle(squares: Tensor) -> Tensor:
    """Of squares (..., T, T) the diagonal and what is below, row by row: (..., T (T + 1) / 2)."""
    rows, columns = torch.tril_indices(*squares.shape[-2:])
    return squares[..., rows, columns]


def script_json(value: object) -> str:
    """A value as JSON that may stand in a script element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(ESCAPED)
