"""The words of a command line: which flags there are, what was given, and the help.

They are held against the fields of an options class before they become one. Knows no values but
their types and choices.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, cached_property
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ..arguments import ALLOWED, did_you_mean, refuse, shown
from ..errors import InputError

METAVARS = {int: "N", float: "X", str: "TEXT"}
INDENT = 22  # columns, of what a flag does
COMMON = (
    "-h, --help: show this and end; --version: show the version and end. --no-NAME turns the "
    "switch --NAME off. A value that begins with - is written as --NAME=VALUE."
)
MOST_LISTED = 60  # characters of choices in a usage
Given = Mapping[str, tuple[str, Sequence[str]]]  # field -> its flag as it is spelled, its values


@dataclass(frozen=True)
class Flag:
    """A field as a flag, or as an argument without one."""

    field: str
    kind: type  # of one value: str, int, float; bool is a switch
    many: bool
    choices: tuple[str, ...]
    default: Any
    required: bool
    help: str
    positional: bool = False

    @property
    def name(self) -> str:
        return self.field.upper() if self.positional else "--" + self.field.replace("_", "-")

    @property
    def usage(self) -> str:
        """The flag with what stands for its values."""
        more = "..." * self.many
        if self.positional or self.kind is bool:
            return self.name + more
        listed = f"{{{','.join(self.choices)}}}"
        fits = self.choices and len(listed) <= MOST_LISTED
        return f"{self.name} {listed if fits else METAVARS[self.kind]}{more}"

    @property
    def explained(self) -> str:
        """The help, with the choices where they are too many for the usage."""
        listed = ", ".join(self.choices)
        return f"{self.help} Known: {listed}." if len(listed) > MOST_LISTED else self.help


@dataclass(frozen=True)
class Group:
    """The flags of one dataclass."""

    title: str
    flags: tuple[Flag, ...]


class CommandLine:
    """The flags of an options class; with `positional`, its required fields take no flag."""

    def __init__(self, options_class: type, *, positional: bool = False) -> None:
        self._about = " ".join((options_class.__doc__ or "").split())
        self._groups = tuple(_groups(options_class, positional))

    @cached_property
    def _flags(self) -> Mapping[str, Flag]:
        """By every spelling that is taken."""
        named = [flag for group in self._groups for flag in group.flags if not flag.positional]
        off = {"--no-" + flag.name[2:]: flag for flag in named if flag.kind is bool}
        return {flag.name: flag for flag in named} | off

    def missing(self, told: str) -> str:
        """Of tyro's message, that lists what is missing with its help, the names alone."""
        flags = (flag for group in self._groups for flag in group.flags if flag.required)
        names = [flag.name for flag in flags if re.search(rf"\b{flag.name}\b", told)]
        return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} missing"

    def asks_for(self, word: str, argv: Sequence[str]) -> bool:
        """Whether this word is a flag here, not the value that another flag lacks."""
        before = ""
        for given in argv:
            if given == "--":
                return False
            flag = None if "=" in before else self._flags.get(_spelled(before))
            if given == word and (flag is None or flag.kind is bool or flag.many):
                return True
            before = given
        return False

    def given(self, argv: Sequence[str]) -> Given:
        """The fields that words name: each flag as it is spelled, and its values.

        Raises InputError for words that are no flags, flags that are given twice, and values that
        are none of the choices or no numbers.
        """
        seen: dict[str, tuple[str, list[str]]] = {}
        for name, flag, values in self._uses(argv):
            if flag.field in seen:
                _refuse_twice(flag, seen[flag.field], (name, values))
            seen[flag.field] = name, values
            for value in values:
                _check(flag, value)
        return seen

    def _uses(self, argv: Sequence[str]) -> Iterator[tuple[str, Flag, list[str]]]:
        """Each flag as it is spelled, and its values."""
        words = deque(argv)
        takes_loose = any(flag.positional for group in self._groups for flag in group.flags)
        while words and (word := words.popleft()) != "--":
            name, equals, value = _spelled(word), "=" in word, word.partition("=")[2]
            if (flag := self._flags.get(name)) is None:
                if self._ends_values(word):
                    self._refuse_unknown(word)
                if not takes_loose:
                    raise InputError(
                        f"{shown(word)} belongs to no flag: a text with spaces in it needs quotes "
                        "around it"
                    )
                continue
            if flag.kind is bool and equals:
                raise InputError(f"{name} takes no value: leave out {shown(f'={value}')}")
            values = [value] if equals else []
            while flag.kind is not bool and words and not self._ends_values(words[0]):
                if values and not flag.many:
                    break
                values.append(words.popleft())
            if not values and flag.kind is not bool:
                raise InputError(
                    f"{name} lacks its value; one that begins with - is written as {name}=VALUE"
                )
            yield name, flag, values

    def _ends_values(self, word: str) -> bool:
        """Whether a word is no value: a flag, or a dash before a letter."""
        if word == "--" or _spelled(word) in self._flags:
            return True
        if word.lower() in ("-inf", "-infinity", "-nan"):
            return False
        return word.startswith("-") and word.lstrip("-")[:1].isalpha()

    def _refuse_unknown(self, word: str) -> NoReturn:
        name = word.partition("=")[0]
        names = [*self._flags, "--help", "--version"]
        raise InputError(f"there is no flag {shown(name)}{did_you_mean(_spelled(name), names)}")

    def help(self, command: str, width: int) -> str:
        """What `command --help` shows, in lines of at most `width` columns where words allow it."""
        positional = [flag for group in self._groups for flag in group.flags if flag.positional]
        usage = " ".join([command, *(flag.usage for flag in positional), "[FLAGS]"])
        parts = [f"usage: {usage}", textwrap.fill(self._about, width)]
        for group in self._groups:
            lines = [line for flag in group.flags for line in _help_lines(flag, width)]
            title = [textwrap.fill(group.title, width)] if group.title else []
            parts.append("\n".join(title + lines))
        return "\n\n".join([*parts, textwrap.fill(COMMON, width)])


def _spelled(word: str) -> str:
    """A flag as its field is called, without a value: --num-samples for --num_samples=3."""
    name = word.partition("=")[0]
    return "--" + name[2:].replace("_", "-") if name.startswith("--") else name


def _refuse_twice(flag: Flag, first: tuple[str, list[str]], second: tuple[str, list[str]]) -> None:
    if first[0] != second[0]:
        raise InputError(f"{first[0]} and {second[0]} are both given: choose one")
    if flag.kind is bool:
        raise InputError(f"{flag.name} is given twice: give it once")
    one, other = (shown(" ".join(values)) for _, values in (first, second))
    advice = f"give all values after one {flag.name}" if flag.many else "give one of them"
    raise InputError(f"{flag.name} is given twice, as {one} and as {other}: {advice}")


def _check(flag: Flag, value: str) -> None:
    if flag.choices and value not in flag.choices:
        near = did_you_mean(value, flag.choices)
        raise InputError(
            f"{flag.name} is {shown(value)}, allowed is {', '.join(flag.choices)}{near}"
        )
    if flag.kind in (int, float):
        try:
            flag.kind(value)
        except ValueError:
            raise refuse(flag.name, value, ALLOWED[flag.kind]) from None


def _groups(options_class: type, positional: bool, title: str = "") -> Iterator[Group]:
    """The class's own flags, then those of each dataclass that is a field of it."""
    hints, helps = get_type_hints(options_class), _helps(options_class)
    own, inner = [], []
    for field in fields(options_class):
        kind = hints[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            about = " ".join((kind.__doc__ or "").split())
            factory = field.default_factory
            default = None if factory is MISSING else factory()
            inner += [_with_defaults(g, default) for g in _groups(kind, positional, about)]
        else:
            required = field.default is MISSING and field.default_factory is MISSING
            default = None if required else field.default
            kind, many, choices = _kind(kind)
            help = helps.get(field.name, "")
            loose = positional and required
            own.append(Flag(field.name, kind, many, choices, default, required, help, loose))
    yield Group(title, tuple(sorted(own, key=lambda flag: not flag.positional)))
    yield from inner


def _with_defaults(group: Group, values: object) -> Group:
    """A group whose defaults are those of an object, not of its class."""
    taken = [(flag, getattr(values, flag.field, flag.default)) for flag in group.flags]
    return Group(group.title, tuple(Flag(**{**vars(f), "default": value}) for f, value in taken))


def _kind(hint: Any) -> tuple[type, bool, tuple[str, ...]]:
    """(type of one value, whether there may be many, choices) of an annotation."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        kind, _, choices = _kind(get_args(hint)[0])
        return kind, True, choices
    if get_origin(hint) is Literal:
        return str, False, get_args(hint)
    return hint, False, ()


@cache
def _helps(options_class: type) -> dict[str, str]:
    """The strings below a class's fields, by field."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(options_class))).body
    except OSError:  # no source is installed
        return {}
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[field.target.id] = " ".join(text.value.split())
    return found


def _help_lines(flag: Flag, width: int) -> list[str]:
    silent = flag.default is None or flag.default is False or flag.default in ((), "")
    # with a blank that is not broken at, so that it stays in one line
    default = "" if silent else f" (default:\N{NO-BREAK SPACE}{flag.default})"
    default = " (required)" if flag.required and not flag.positional else default
    wrapped = textwrap.wrap(flag.explained + default, width - INDENT, break_on_hyphens=False)
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in wrapped]
    usage = f"  {flag.usage}"
    first = [f"{usage:<{INDENT}}{lines.pop(0)}"] if len(usage) < INDENT - 1 and lines else [usage]
    return [*first, *(" " * INDENT + line for line in lines)]
