"""Values in JSON files of other programs, each checked where it is read: its type and its range.

`where` is the file and the field, with which every complaint begins. (Characters are checked for
all of a file, by `read_json`.)
"""

from __future__ import annotations

from typing import Any

from ..arguments import shown
from ..errors import InputError

MOST_ROWS = 2**31 - 1  # of an embedding: ids lie below


def refuse(value: object, where: str, allowed: str) -> InputError:
    """The error to raise for a value."""
    return InputError(f"{where} is {shown(value)}, allowed is {allowed}")


def table(value: Any, where: str) -> dict[str, Any]:
    """A JSON object; InputError for anything else."""
    if not isinstance(value, dict):
        raise refuse(value, where, "an object")
    return value


def rows(value: Any, where: str) -> list[Any]:
    """A JSON array; InputError for anything else."""
    if not isinstance(value, list):
        raise refuse(value, where, "a list")
    return value


def text(value: Any, where: str) -> str:
    """A string; InputError for anything else."""
    if not isinstance(value, str):
        raise refuse(value, where, "a text")
    return value


def token_id(value: Any, where: str) -> int:
    """The id of a token; InputError for what cannot be one."""
    if type(value) is not int or not 0 <= value < MOST_ROWS:
        raise refuse(value, where, f"a whole number from 0 to {MOST_ROWS - 1}")
    return value


def token_ids(value: Any, where: str) -> dict[str, int]:
    """Tokens and their ids; InputError for what are none."""
    found = table(value, where)
    for name, id in found.items():
        if type(id) is not int or not 0 <= id < MOST_ROWS:
            token_id(id, f"{where}: the id of {shown(name)}")
    return found


def added_token(value: Any, where: str) -> dict[str, Any]:
    """An added token with its "content", "id" and flags; InputError for what is none."""
    found = table(value, where)
    text(found.get("content"), f"{where}.content")
    token_id(found.get("id"), f"{where}.id")
    for name in ("special", "single_word", "lstrip", "rstrip", "normalized"):
        if not isinstance(found.get(name, False), bool):
            raise refuse(found[name], f"{where}.{name}", "true or false")
    return found
