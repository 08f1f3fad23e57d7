"""What the Hub says of its files: one file, all files of a path, the commit of a branch."""

import difflib
import os
from dataclasses import dataclass, replace
from urllib.parse import quote, urlsplit

from ..errors import InputError, NotFoundError
from .client import shown_endpoint
from .names import COMMIT, DIGEST, FILE_PATH, DatasetPath, is_dataset
from .patience import LOOK_UP_SECONDS, LOOK_UP_TRIES, PATIENCE_SECONDS, explained, not_a_hub, retry

NOT_TRUSTED = (
    "nothing is taken from there; unset HF_ENDPOINT or set it to https://huggingface.co, and check "
    "the proxy"
)
MOST_NAMED = 5  # files or suffixes in a message


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of one file; commit and ETag are plain hex, so they can be file names."""

    repo: str
    name: str
    url: str
    commit: str
    etag: str
    """Its digest: SHA-1 as a Git blob of a small file, SHA-256 of a large one."""
    size: int | None


@dataclass(frozen=True)
class _Page:
    """The Hub's answer to a question that may take several pages."""

    content: object
    next_query: str
    """The query that gets the next page; empty after the last."""


@dataclass(frozen=True)
class _Entry:
    """A file or folder as a list of the Hub has it, not checked yet."""

    path: str
    is_file: bool
    size: object
    digest: object


def look_up(repo: str, revision: str, name: str, token: str | bool) -> RemoteFile | None:
    """Ask the Hub about one file; None if the repository has none of that name.

    Raises UnreachableError if no Hub answers, InputError for an answer that is not to be trusted.
    """
    from huggingface_hub import errors, get_hf_file_metadata

    url, seconds = _url(repo, name, revision), _look_up_seconds()
    with explained(repo, revision, name):
        try:
            answer = retry(
                lambda: get_hf_file_metadata(url, token=token, timeout=seconds),
                f"asking for {name} of {repo}",
                tries=LOOK_UP_TRIES,
                patience=PATIENCE_SECONDS,
            )
        except errors.EntryNotFoundError:
            return None
    commit, etag = answer.commit_hash, answer.etag
    if commit is None or etag is None:
        raise not_a_hub()
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        expected = revision if COMMIT.fullmatch(revision) else "40 hexadecimal digits"
        raise InputError(
            f"{shown_endpoint()} has commit {commit[:80]!r} of {repo}, expected {expected}: "
            f"{NOT_TRUSTED}"
        )
    if not DIGEST.fullmatch(etag):
        raise InputError(
            f"{shown_endpoint()} gives {name} of {repo} the ETag {etag[:80]!r}, expected a digest "
            f"of 40 or 64 hexadecimal digits: {NOT_TRUSTED}"
        )
    # by the commit: the branch may have moved on when it is downloaded
    return RemoteFile(repo, name, _url(repo, name, commit), commit, etag, answer.size)


def look_up_commit(repo: str, revision: str, token: str | bool) -> str:
    """The commit that a revision of a dataset is; a commit is not asked for."""
    if COMMIT.fullmatch(revision):
        return revision
    question = f"revision/{quote(revision, safe='')}?expand=sha"
    answer = _ask(repo, revision, question, token).content
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise not_a_hub()
    return commit


def list_files(path: DatasetPath, token: str | bool) -> list[RemoteFile]:
    """All files that a path at a commit stands for: the file itself, a folder's, a glob's."""
    if not path.is_glob:
        if remote := look_up(path.repo, path.revision, path.glob, token):
            return [remote]
        path = replace(path, glob=f"{path.glob}/**")
    above = path.folders_above
    deep = "**" in path.parts or len(path.parts) > len(above) + 1
    return [
        _listed_file(path.repo, path.revision, entry)
        for entry in _list_folder(path, above, token, deep=deep)
        if entry.is_file and path.fits(entry.path)
    ]


def nothing_found(path: DatasetPath, names: list[str], token: str | bool) -> InputError:
    """Why a path at a commit leads to no file of data, `names` being what it leads to; if that is
    nothing, with what is near it.
    """
    where = f"{path.repo} (commit {path.revision[:7]})"
    if names:
        kinds = [suffix for suffix in path.suffixes if suffix.count(".") == 1][:MOST_NAMED]
        expected = f"{', '.join(kinds)} or alike"
        return InputError(f"{where}: {path.glob} is only {_listed(names)}, expected {expected}")
    # up to the first folder that exists
    above, entries = path.folders_above, []
    while not (entries := _list_folder(path, above, token, deep=False)) and above:
        above.pop()
    path_of = {e.path.split("/")[-1]: e.path for e in entries if FILE_PATH.fullmatch(e.path)}
    missing = "".join(path.parts[len(above) : len(above) + 1])
    near = [path_of[name] for name in difflib.get_close_matches(missing, path_of)]
    visible = [found for name, found in path_of.items() if not name.startswith(".")]
    known = f"near it is {_listed(near)}" if near else f"there is {_listed(visible) or 'no file'}"
    return NotFoundError(f"{where} has no {path.glob}: {known}")


def _listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _listed_file(repo: str, commit: str, entry: _Entry) -> RemoteFile:
    """A file as a folder's list has it; its digest is the ETag that it would be sent with."""
    name, size, etag = entry.path, entry.size, entry.digest
    if not FILE_PATH.fullmatch(name):
        raise InputError(
            f"{repo} names a file {name[:80]!r}, and no such file can be stored here: give a path "
            "that leaves it out"
        )
    if not isinstance(size, int) or not isinstance(etag, str) or not DIGEST.fullmatch(etag):
        raise InputError(
            f"{shown_endpoint()} gives {name} of {repo} no size and digest: {NOT_TRUSTED}"
        )
    return RemoteFile(repo, name, _url(repo, name, commit), commit, etag, size)


def _list_folder(
    path: DatasetPath, folder: list[str], token: str | bool, *, deep: bool
) -> list[_Entry]:
    """What the Hub lists in a folder, or all below it; nothing if there is no such folder."""
    question = "/".join(("tree", path.revision, *(quote(name, safe="") for name in folder)))
    entries, query = [], f"recursive={str(deep).lower()}"
    while query:
        page = _ask(path.repo, path.revision, f"{question}?{query}", token)
        listed = page.content if isinstance(page.content, list) else [page.content]
        entries += map(_entry, listed)
        query = page.next_query
    return entries


def _entry(listed: object) -> _Entry:
    if not isinstance(listed, dict):
        raise not_a_hub()
    path, kind, large = listed.get("path"), listed.get("type"), listed.get("lfs")
    if not isinstance(path, str) or not isinstance(kind, str):
        raise not_a_hub()
    digest = (large if isinstance(large, dict) else listed).get("oid")
    return _Entry(path, kind == "file", listed.get("size"), digest)


def _ask(repo: str, revision: str, question: str, token: str | bool) -> _Page:
    """The Hub's answer to a question about a dataset.

    Of the next page's address only the query is used: the token goes nowhere else. An answer that
    there is no such thing is an empty list.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = f"{constants.ENDPOINT}/api/{repo}/{question}"
    headers = build_hf_headers(token=token)

    def get() -> _Page:
        answer = get_session().get(url, headers=headers, timeout=_look_up_seconds())
        hf_raise_for_status(answer)
        following = answer.links.get("next", {}).get("url", "")
        return _Page(answer.json(), urlsplit(following).query)

    with explained(repo, revision, "the list of files"):
        try:
            return retry(
                get,
                f"asking for the files of {repo}",
                tries=LOOK_UP_TRIES,
                patience=PATIENCE_SECONDS,
            )
        except errors.EntryNotFoundError:
            return _Page([], "")
        except (ValueError, RecursionError) as problem:
            raise not_a_hub() from problem


def _url(repo: str, name: str, revision: str) -> str:
    """The address of a file at a revision."""
    from huggingface_hub import constants, hf_hub_url

    return hf_hub_url(
        repo.removeprefix("datasets/") if is_dataset(repo) else repo,
        name,
        repo_type="dataset" if is_dataset(repo) else "model",
        revision=revision,
        endpoint=constants.ENDPOINT,
    )


def _look_up_seconds() -> float:
    return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or LOOK_UP_SECONDS)
