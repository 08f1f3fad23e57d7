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
ASKED = ("instruction", "question", "prompt")  # Alpaca and Dolly, GSM8K, many others
MORE = ("input", "context")  # of what is asked: Alpaca, Dolly
ANSWERED = ("output", "response", "answer")
SYSTEM = "system"  # a field beside them, as Alpaca's and ShareGPT's rows may have
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys((ANSWERS, "gpt", "chatgpt", "bot", "model", "ai"), ANSWERS),
    **{role: role for role in ("system", "developer", "tool", "function")},
}


def chat_fields(names: Collection[str]) -> tuple[str, ...]:
    """The fields of a row with these names that make a chat, in the order in which they are
    written; none if it is no chat. Case and blanks around a name do not matter.
    """
    by_name = {_plain(name): name for name in names}
    system = [SYSTEM] if SYSTEM in by_name else []
    for name in LISTS:
        if name in by_name:
            return tuple(by_name[part] for part in (*system, name))
    asked, more, answered = (
        [name for name in group if name in by_name] for group in (ASKED, MORE, ANSWERED)
    )
    if not asked or not answered:
        return ()
    return tuple(by_name[part] for part in (*system, *asked, *more, *answered))


def _plain(name: str) -> str:
    return name.strip().lower()


def messages_of(row: Mapping[str, Any], fields: tuple[str, ...]) -> list[Message]:
    """The messages of a row in these `chat_fields`, or in one field that has them all; InputError,
    without the row, for what is none.
    """
    names = [name for name in fields if _plain(name) != SYSTEM]
    messages = _listed(row[names[0]], names[0]) if len(names) == 1 else _exchange(row, names)
    (said,) = [_text(row, name) for name in fields if _plain(name) == SYSTEM] or [""]
    if not said:
        return messages
    if messages and messages[0]["role"] == "system" and messages[0]["content"] != said:
        raise InputError(
            f"the first message is of the system, and the field {SYSTEM!r} says something else"
        )
    begins = messages[:1] == [{"role": "system", "content": said}]
    return messages if begins else [{"role": "system", "content": said}, *messages]


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
    """A message with role and content, which may be called from and value; the role as we call it,
    whatever its case.
    """
    if not isinstance(message, dict):
        raise InputError(f"{where} is {shown(message)}, allowed is an object with role and content")
    found = dict(message)
    for name, other in (("role", "from"), ("content", "value")):
        if name not in found and other not in found:
            fields = ", ".join(map(str, message)) or "none"
            raise InputError(f"{where} has no {name!r} or {other!r}; its fields are {fields:.200}")
        if found.get(name) is None and other in found:  # null where rows of both kinds are a table
            found[name] = found.pop(other)
    role = found["role"]
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise InputError(
            f"{where} has the role {shown(role)}, allowed are user, {ANSWERS}, system, developer, "
            "tool and function"
        )
    return {**found, "role": known}


def _exchange(row: Mapping[str, Any], names: list[str]) -> list[Message]:
    answers = [name for name in names if _plain(name) in ANSWERED]
    if len(answers) > 1:
        listed = " and ".join(map(repr, answers))
        raise InputError(f"{listed} are both answers: rename one, or leave it out")
    texts = [_text(row, name) for name in names if name not in answers]
    question = "\n\n".join(text for text in texts if text.strip())
    return [
        {"role": "user", "content": question},
        {"role": ANSWERS, "content": _text(row, answers[0])},
    ]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{name!r} is {shown(value)}, allowed is a string")
    return value
