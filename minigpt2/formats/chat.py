"""Chats as text: what a chat template makes of messages, and which of it is an answer.

A template is Jinja, kept with a tokenizer as transformers keeps it. Those of others are programs of
others, so all of them run in Jinja's sandbox. Knows messages and texts, nothing of ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..arguments import shown
from ..errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template

ANSWERS = "assistant"  # the role whose messages are learned and written
ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
# ChatML but for the end of an answer, which is end-of-text: there a model stops by itself
TEMPLATE = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    r"{{ eos_token if message['role'] == 'assistant' else '<|im_end|>\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Noncharacters, which Unicode never assigns: a character's code stands between the two.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
SHIELDED = re.compile(f"{OPEN}([0-9a-f]*){CLOSE}")

Message = Mapping[str, Any]


class Part(NamedTuple):
    """A part of a chat's text, shielded; the parts of a chat put together are its text."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the words of a tokenizer that it may write as tokens."""

    source: str = TEMPLATE
    names: tuple[tuple[str, str], ...] = (("eos_token", "<|endoftext|>"),)
    """What the template can write besides messages: variables and their values."""
    words: tuple[str, ...] = ("<|endoftext|>",)
    """Names of tokens that are plain text where a message says them."""

    @cached_property
    def eos(self) -> str:
        """The name of end-of-text."""
        return dict(self.names)["eos_token"]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a chat, as transformers' `apply_chat_template` writes it; with
        `add_generation_prompt` up to where the next answer begins.

        Raises InputError for messages without a role and a content, and for what the template does
        not take.
        """
        return self._rendered(checked(messages), add_generation_prompt)

    def shielded(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """`render`, with the names of tokens in the contents of messages so changed that they are
        found no more; `unshielded` is `render` again.
        """
        return self._rendered(self._shielded(checked(messages)), add_generation_prompt)

    def parts(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[Part]:
        """`shielded`, cut where answers begin and end; an answer goes on to the end that the
        template gives it.

        Raises InputError also for a template that writes a turn otherwise when others follow it.
        """
        messages, split = self._shielded(checked(messages)), self._parts
        if self.source == TEMPLATE:
            split = self._own_parts
            _require_no_calls(messages)
        found = filter(lambda part: part.text, split(messages, add_generation_prompt))
        groups = groupby(found, key=lambda part: part.is_answer)
        return [
            Part("".join(part.text for part in group), is_answer) for is_answer, group in groups
        ]

    @cached_property
    def end_of_answer(self) -> str:
        """What the template writes after an answer, without white space around it; "" where that is
        end-of-text.
        """
        answer, asked = "(answer)", [{"role": "user", "content": "(question)"}]
        answered = [*asked, {"role": ANSWERS, "content": answer}]
        end = self._rendered(answered, False).rpartition(answer)[2].strip()
        return "" if end.startswith(self.eos) else end

    def _own_parts(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> Iterator[Part]:
        """What our own template writes, without Jinja, which takes three times as long in all."""
        begin = f"<|im_start|>{ANSWERS}\n"
        for message in messages:
            role, content = message["role"], message["content"]
            if role == ANSWERS:
                yield Part(begin, False)
                yield Part(content + self.eos, True)
            else:
                yield Part(f"<|im_start|>{role}\n{content}<|im_end|>\n", False)
        if add_generation_prompt:
            yield Part(begin, False)

    def _parts(self, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Part]:
        """Of any template the answers are what it writes more when one is given."""
        done = ""
        for number, message in enumerate(messages):
            if message["role"] == ANSWERS:
                asked = self._rendered(messages[:number], True)
                answered = self._rendered(messages[: number + 1], False)
                yield Part(_more(asked, done), False)
                yield Part(_more(answered, asked), True)
                done = answered
        yield Part(_more(self._rendered(messages, add_generation_prompt), done), False)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return _compiled(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **dict(self.names)
            )
        except Exception as problem:  # a template can raise anything
            reason = shown(str(problem) or type(problem).__name__)
            raise InputError(f"the chat template does not take these messages: {reason}") from None

    def _shielded(self, messages: Sequence[Message]) -> list[Message]:
        return [
            {
                name: self._shield(value) if isinstance(value, str) else value
                for name, value in message.items()
            }
            for message in messages
        ]

    def _shield(self, text: str) -> str:
        if OPEN not in text and not any(word in text for word in self.words):
            return text
        names = sorted(self.words, key=len, reverse=True)
        pattern = "|".join([OPEN, *(re.escape(name) for name in names if name)])
        return re.sub(pattern, lambda found: coded(found[0]), text)


def unshielded(text: str) -> str:
    """A shielded text as it is meant."""
    if OPEN not in text:
        return text
    return SHIELDED.sub(lambda found: chr(int(found[1], 16)), text)


def coded(word: str) -> str:
    """A word that is found no more, until it is `unshielded`."""
    return f"{OPEN}{ord(word[0]):x}{CLOSE}{word[1:]}"


def _more(text: str, begin: str) -> str:
    if not text.startswith(begin):
        raise InputError(
            "the chat template writes a turn otherwise when others follow, so it cannot be said "
            "what an answer is: use a model with another template"
        )
    return text[len(begin) :]


def checked(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages, each with a role and a content that is one text; InputError for others.

    A content may be a list of parts, as some programs write it, if all of them are text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"a chat is {shown(messages)}, expected a list of messages")
    return [_checked(message, number) for number, message in enumerate(messages, 1)]


def _checked(message: object, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {shown(message)}, expected an object with role and content")
    for name in ("role", "content"):
        if name not in message:
            listed = ", ".join(map(str, message)) or "none"
            raise InputError(f"{where} has no {name!r:.60}; its fields are {listed:.200}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise InputError(
            f"{where} has the role {shown(role)}, expected a word such as system, user, {ANSWERS}"
        )
    return {**message, "content": _content(content, where)}


def _content(content: object, where: str) -> str:
    """The text of a message; "" for null."""
    if isinstance(content, list):
        texts = [_text_of(part, where) for part in content]
        return "".join(texts)
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where} has the content {shown(content)}, expected a text")
    content = content or ""
    try:
        content.encode()
    except UnicodeEncodeError as problem:
        code = f"\\u{ord(content[problem.start]):04x}"
        raise InputError(f"{where} has {code}, half a character, in its content") from None
    return content


def _require_no_calls(messages: Sequence[Message]) -> None:
    """Raise InputError for what our own template would leave out."""
    for number, message in enumerate(messages, 1):
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise InputError(
                    f"message {number} has {name}, which our chat template cannot write: leave it "
                    "out, or use a model with a template of its own"
                )


def _text_of(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return _content(part.get("text"), where)
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise InputError(f"{where} has a part {shown(kind)} in its content, expected text alone")


def find_template(settings: Mapping[str, Any], files: Iterable[tuple[str, str]]) -> str | None:
    """The template that a tokenizer's files hold: that of a file, or else of its settings, where it
    is a text or one of several by the name "default".
    """
    if (source := dict(files).get("chat_template.jinja")) is not None:
        return source
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise InputError(f"the chat template is {shown(found)}, expected a text")
    return found


@cache
def _compiled(source: str) -> Template:
    """A template that can be rendered, with what transformers offers to it."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks answers for transformers; it writes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise InputError(message)

    def as_json(value: object, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)
