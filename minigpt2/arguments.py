"""What callers give, checked in one place for each kind.

A refusal is a line that says the parameter, what was given, and what is allowed.

Numbers may be those of numpy and torch, which are known by what they can do: imports nothing heavy.
"""

from __future__ import annotations

import difflib
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import OptionError

Preset = Literal["nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
SampleDType = Literal["auto", "float32", "bfloat16", "float16", "int8"]
# ROUTINES of decoding/cpu_layout.py, and one of them for one row and another for more
CpuRoutine = Literal["auto", "plain", "packed", "slices", "by-rows"]
MOST_SHOWN = 60  # characters of a value that is named in a message
ALLOWED = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def shown(value: object) -> str:
    """A value as a message names it: one line, not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def refuse(name: str, value: object, allowed: str) -> OptionError:
    """The error to raise for a value of the parameter `name`."""
    return OptionError(f"{name} is {shown(value)}, allowed is {allowed}", name)


def require(name: str, value: object, ok: bool, allowed: str) -> None:
    """Raise OptionError unless the value is ok."""
    if not ok:
        raise refuse(name, value, allowed)


def require_loaded(name: str, value: object, kind: str, has: str) -> None:
    """Raise OptionError for what is no object of the class `kind`, which is known by what it has:
    a name, perhaps, by which one is loaded.
    """
    require(name, value, hasattr(value, has), f"a {kind}: {kind}.from_pretrained loads one")


def check_field(options: object, name: str, ok: bool, allowed: str) -> None:
    """Raise OptionError unless the value of a field is ok."""
    require(name, getattr(options, name), ok, allowed)


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """The nearest of the names as a question in parentheses, after a blank; "" if none is near."""
    near = difflib.get_close_matches(given, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def whole(name: str, value: object, *, least: int | None = 0) -> int:
    """A whole number from `least` on as an int; OptionError for anything else."""
    number = _as(int, value)
    if number is None:
        raise refuse(name, value, ALLOWED[int])
    require(name, value, least is None or number >= least, f"{least} or more")
    return number


def texts(name: str, value: object) -> tuple[str, ...]:
    """Texts as a tuple, one alone too; OptionError for anything else."""
    if isinstance(value, str):
        return (value,)
    found: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) else (value,)
    for text in found:
        if not isinstance(text, str):
            raise OptionError(f"{name} holds {shown(text)}, allowed are texts", name)
    return found


def id_list(name: str, value: Any) -> list[int]:
    """Token ids as a list of ints: of a list or the like, a tensor or an array of one dimension, or
    one id alone; OptionError for anything else.
    """
    if isinstance(value, (str, bytes)):
        raise refuse(name, value, "token ids: a tokenizer's encode makes them of a text")
    listed = value.tolist() if hasattr(value, "tolist") else value  # tensors and arrays
    ids = list(listed) if isinstance(listed, Iterable) else [listed]
    for place, id in enumerate(ids):
        if type(id) is not int:
            number = _as(int, id)
            if number is None:
                raise OptionError(f"{name} holds {shown(id)}, allowed are whole numbers", name)
            ids[place] = number
    return ids


def id_rows(name: str, value: Any) -> list[list[int]]:
    """Rows of token ids, which may differ in length, each as `id_list` reads it."""
    rows = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        raise refuse(name, value, "a list of rows of token ids")
    if any(isinstance(row, numbers.Integral) or getattr(row, "ndim", 1) == 0 for row in rows):
        raise refuse(name, value, "a list of rows of token ids: put one row into a list, [row]")
    return [id_list(f"row {number} of {name}", row) for number, row in enumerate(rows)]


def check_types(options: Any) -> None:
    """Hold the numbers, switches, texts and choices of a dataclass against its annotations, and let
    numpy's numbers become Python's. Raises OptionError for the first that is something else.
    """
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        kind = hint
        if type(None) in get_args(hint):
            if value is None:
                continue
            kind = next(part for part in get_args(hint) if part is not type(None))
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise refuse(name, value, ", ".join(map(str, get_args(kind))))
        elif kind in ALLOWED:
            settled = _as(kind, value)
            if settled is None:
                raise refuse(name, value, ALLOWED[kind])
            if settled is not value:
                object.__setattr__(options, name, settled)  # it may be frozen


def _as(kind: type, value: Any) -> Any:
    """A value as an int, a float, a bool or a str; None for what is none."""
    if kind in (bool, str) or isinstance(value, (bool, str, bytes)):
        return value if isinstance(value, kind) and (kind is not int) else None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        real = kind is float and isinstance(value, numbers.Real)
        return (value if type(value) is float else float(value)) if real else None
