"""Retries: when the Hub does not answer, ask again, wait, or say in one line why not."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..errors import InputError, NotFoundError
from ..system import files
from ..system.messages import one_line
from .client import UnreachableError, hub_cache, shown_endpoint
from .names import is_dataset

logger = logging.getLogger(__name__)
T = TypeVar("T")
LOOK_UP_SECONDS = 5  # for one answer about a file: two silences and start-up stay below 15 s
PATIENCE_SECONDS = 8  # after this long without an answer, asking again will not help
LOOK_UP_TRIES, DOWNLOAD_TRIES = 3, 5
LONGEST_WAIT_SECONDS = 60  # that a server may ask for
TRY_AGAIN = (408, 429, 500, 502, 503, 504)


def not_a_hub() -> UnreachableError:
    """The error for an answer that no Hub gives, such as a log-in page."""
    return UnreachableError(
        f"{shown_endpoint()} is not a Hub (check HF_ENDPOINT, proxy and log-in page)"
    )


def retry(
    action: Callable[[], T],
    what: str,
    *,
    tries: int,
    patience: float = math.inf,
    progress: Callable[[], int] = int,
) -> T:
    """Repeat `action` after failures that may pass, each with a line for the user.

    `tries` are counted since the last progress; after `patience` seconds there is no other try.
    """
    started, failures, reached = time.monotonic(), 0, progress()
    while True:
        try:
            return action()
        except http_error() as problem:
            failures = 1 if progress() > reached else failures + 1
            reached = progress()
            wait = _wait_seconds(problem, failures)
            if wait is None or failures == tries or time.monotonic() - started > patience:
                raise
            again = f"again in {wait} s (try {failures + 1} of {tries})"
            logger.warning("%s: %s; %s", what, _brief(problem), again)
            time.sleep(wait)


def _wait_seconds(problem: Exception, failures: int) -> int | None:
    """How long to wait before the next try; None where it would not help."""
    response = getattr(problem, "response", None)
    if response is not None and response.status_code not in TRY_AGAIN:
        return None
    asked = "" if response is None else response.headers.get("Retry-After", "")
    wait = int(asked) if asked.isdecimal() else 2 ** (failures - 1)
    return wait if wait <= LONGEST_WAIT_SECONDS else None


def _brief(problem: Exception) -> str:
    """A failed request in a few words."""
    response = getattr(problem, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    text = one_line(problem)[:200]
    return f"{type(problem).__name__}: {text}".rstrip(": ")


def http_error() -> type[Exception]:
    """The base of all that the client's HTTP library raises: httpx or httpx2, by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return _http_base(HfHubHTTPError)


def _http_base(kind: type[Exception]) -> type[Exception]:
    """What an error of the client is to its HTTP library, whatever else it is derived from."""
    return next(
        base
        for base in kind.__mro__
        if base.__name__ == "HTTPError" and base.__module__.partition(".")[0].startswith("httpx")
    )


@contextmanager
def explained(repo: str, revision: str, name: str) -> Iterator[None]:
    """Turn what client, HTTP library and file system raise into one line for the user."""
    try:
        yield
    except InputError:
        raise
    except (http_error(), OSError) as problem:
        raise _explanation(problem, repo, revision, name) from problem


def _explanation(problem: Exception, repo: str, revision: str, name: str) -> InputError:
    """What went wrong with a file of a repository, and what the user can do about it."""
    from huggingface_hub import errors

    hub = shown_endpoint()
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, errors.RevisionNotFoundError):
        return NotFoundError(f"{repo} has no revision {revision}: see {hub}/{repo}/commits/main")
    if isinstance(problem, errors.GatedRepoError) or status == 403:
        terms = f"accept the terms at {hub}/{repo}"
        return InputError(f"{repo} is not open to you: {terms} and run `hf auth login`")
    if isinstance(problem, errors.RepositoryNotFoundError):
        private = "if it is private, run `hf auth login`"
        near = files.did_you_mean(Path(repo), folders_only=True)
        here = "" if is_dataset(repo) else f"folder {repo}{near} and no model "
        return NotFoundError(f"there is no {here}{repo} on {hub}: {private}")
    if status == 401:
        return InputError(f"{hub} refuses your token for {repo}: run `hf auth login`")
    if status is not None and status not in TRY_AGAIN:
        proxy = "check HF_ENDPOINT and proxy"
        return InputError(f"{hub} answered HTTP {status} for {name} of {repo}: {proxy}")
    if isinstance(problem, http_error()):
        return UnreachableError(f"cannot get {name} of {repo} from {hub} ({_brief(problem)})")
    advice = "see to room and rights there, or set HF_HOME to another folder"
    return InputError(f"cannot store {name} of {repo} in {hub_cache()} ({problem}): {advice}")
