"""Rows that are chats: lists of messages, instructions, questions with answers.

Knows the fields in which people keep them, nothing of files and templates.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ...arguments import shown
from ...errors import InputError
from ...formats.chat import ANSWERS, Message

LISTS = ("messages", "conversations")  # OpenAI's, and ShareGPT's
EXCHANGES = (  # (what is asked, more of it that may be missing, what is answered)
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", "context", "answer"),  # GSM8K has no context
)
SYSTEM = "system"  # a field beside them, as Alpaca's and ShareGPT's rows may have
ROLES = {"human": "user", "gpt": ANSWERS, "chatgpt": ANSWERS, "bot": ANSWERS, "model": ANSWERS}


def chat_fields(names: Collection[str]) -> tuple[str, ...]:
    """The fields of a row with these names that make a chat; none if it is no chat."""
    for name in LISTS:
        if name in names:
            return (name, *_system(names))
    for asked, more, answered in EXCHANGES:
        if asked in names and answered in names:
            return (asked, *([more] if more in names else []), answered, *_system(names))
    return ()


def _system(names: Collection[str]) -> tuple[str, ...]:
    return (SYSTEM,) if SYSTEM in names else ()


def messages_of(row: Mapping[str, Any], fields: tuple[str, ...]) -> list[Message]:
    """The messages of a row in these `chat_fields`, or in one field that has them all; InputError,
    without the row, for what is none.
    """
    names = [name for name in fields if name != SYSTEM]
    messages = _listed(row[names[0]], names[0]) if len(names) == 1 else _exchange(row, names)
    said = _text(row, SYSTEM) if SYSTEM in fields else ""
    has_one = bool(messages) and messages[0].get("role") == "system"
    return messages if has_one or not said else [{"role": "system", "content": said}, *messages]


def _listed(value: object, name: str) -> list[Message]:
    """The messages in a list, or in the JSON of one, as a table holds it; null is none."""
    if isinstance(value, str):
        value = _from_json(value, name) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise InputError(f"{name!r} is {shown(value)}, allowed is a list of messages")
    return [_message(message, f"message {n} of {name!r}") for n, message in enumerate(value, 1)]


def _from_json(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise InputError(
            f"{name!r} is {shown(text)}, which is not JSON ({problem}): allowed is a list of "
            "messages"
        ) from None


def _message(message: object, where: str) -> Message:
    """A message with role and content, which may be called from and value."""
    if not isinstance(message, dict):
        raise InputError(f"{where} is {shown(message)}, allowed is an object with role and content")
    if "role" not in message and "from" in message:
        role = message["from"]
        role = ROLES.get(role, role) if isinstance(role, str) else role
        message = {**message, "role": role}
        del message["from"]
    if "content" not in message and "value" in message:
        message = {**message, "content": message["value"]}
        del message["value"]
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message:
            fields = ", ".join(map(str, message)) or "none"
            raise InputError(f"{where} has no {name!r} or {other!r}; its fields are {fields:.200}")
    return message


def _exchange(row: Mapping[str, Any], names: list[str]) -> list[Message]:
    asked, *more, answered = names
    texts = [_text(row, name) for name in (asked, *more)]
    question = "\n\n".join(text for text in texts if text.strip())
    return [
        {"role": "user", "content": question},
        {"role": ANSWERS, "content": _text(row, answered)},
    ]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{name!r} is {shown(value)}, allowed is a string")
    return value
