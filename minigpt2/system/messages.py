"""What a terminal may be shown of text that others wrote: no secret, nothing that it obeys.

Such text comes in files, names and answers of servers; nor may it look like a line of ours.
Messages go through here once, at the very end: `console` does that for all that the scripts say.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from ..errors import visible

HIDDEN = "***"
# user:password@ of an address; greedy, as a password may have a / or @ that it should not have
_USER = re.compile(r"\b((?:https?|socks\w*|ftp)://)[^\s'\"<>]*@", re.IGNORECASE)
# what makes a signed address (of a CDN) a key to what it leads to
_SIGNED = re.compile(
    r"([?&][\w-]*(?:sig|token|credential|key|policy|secret|password)[\w-]*=)[^\s&'\"<>]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}|(?<=\bBearer )[!-~]+")
_ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def one_line(text: object) -> str:
    """Text as a message may show it: without secrets, and all of it visible in one line."""
    return visible(" ".join(without_secrets(str(text)).split()))


def without_secrets(text: str) -> str:
    """Text without names and passwords in addresses, signatures of addresses, and tokens."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN + "@" * secret.endswith("@"))
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    return _TOKEN.sub(HIDDEN, _SIGNED.sub(rf"\1{HIDDEN}", text))


class MessageFormatter(logging.Formatter):
    """Notices as they may be shown: only the text that is ours has line ends, what is put into it
    has none, and neither anything that is held back here.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        shown = copy.copy(record)  # other handlers have theirs
        if isinstance(record.args, Mapping):
            shown.args = {name: _argument(value) for name, value in record.args.items()}
        elif record.args:
            shown.args = tuple(map(_argument, record.args))
        return shown_lines(super().format(shown))


@contextlib.contextmanager
def notices_on_stderr(name: str) -> Iterator[None]:
    """Inside `with`, what a library's loggers, those below `name`, tell of their work goes to
    stderr, unless the program's own logging shows it.
    """
    logger = logging.getLogger(name)
    level, propagates = logger.level, logger.propagate
    seen = logger.getEffectiveLevel() if logger.hasHandlers() else logging.WARNING
    if logger.handlers or seen <= logging.INFO:
        yield
        return
    handler = _Unseen(logger.parent or logging.getLogger(), seen)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


class _Unseen(logging.Handler):
    """Writes what is below the level that the program's logging shows, and hands it the rest."""

    def __init__(self, program: logging.Logger, seen: int) -> None:
        super().__init__()
        self._program, self._seen = program, seen
        self.setFormatter(MessageFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        if record.levelno >= self._seen:
            self._program.callHandlers(record)
        elif sys.stderr is not None:
            print(self.format(record), file=sys.stderr)


def _argument(value: object) -> object:
    """What a notice is filled with, numbers as they are."""
    if value is None or isinstance(value, int | float):
        return value
    return one_line(value) if isinstance(value, BaseException) else visible(str(value))


def shown_lines(text: str) -> str:
    """Text of several lines of ours as it may be shown."""
    return visible(without_secrets(text), keep="\n")


def _secrets() -> Iterator[str]:
    """What the environment holds of them, however it is written: longer ones first."""
    known = set()
    for name in _ADDRESSES:
        for address in filter(None, (os.environ.get(name), os.environ.get(name.lower()))):
            user, _, _ = address.partition("://")[2 * ("://" in address)].rpartition("@")
            password = user.partition(":")[2]
            known |= {f"{user}@", user} if password else {f"{user}@"}
            if len(password) >= 4:  # others may be part of any word
                known |= {password, unquote(password)}
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(token := os.environ.get(name, "").strip()) >= 8:
            known.add(token)
    yield from sorted(known - {"@"}, key=len, reverse=True)
