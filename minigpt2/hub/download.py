"""Downloads from the Hub into its cache, received in parts and checked by digest.

The Hub's client finds addresses, talks, redirects and locks. What is accepted, and when to stop, is
decided here: its hf_hub_download (measured, version 2.4) takes any bytes of the right size, writes
to whatever path the server's ETag spells, gives up at a connection reset and waits 395 s for a
silent server.
"""

import errno
import logging
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError, NotFoundError
from ..system import files
from ..system.messages import visible
from ..system.streams import draws_over
from .client import hub_cache, shown_endpoint, user_token
from .names import DatasetPath
from .patience import DOWNLOAD_TRIES, explained, http_error, retry
from .pins import public_model
from .remote import NOT_TRUSTED, RemoteFile, list_files, look_up, look_up_commit, nothing_found
from .snapshot import (
    WEIGHTS,
    DatasetFile,
    Snapshot,
    cached_dataset,
    cached_model,
    collect_model,
    digest_of,
    files_in,
    link,
    remove_leftovers,
    write_ref,
)

logger = logging.getLogger(__name__)


def download_model(repo: str, revision: str, with_weights: bool) -> Path:
    """Bring one revision into the cache, file by file, and give its folder.

    Raises NotFoundError for what the Hub has not, UnreachableError if no Hub answers, InputError
    for what is wrong with token, server or disk.
    """
    token = user_token(public=public_model(repo) is not None)
    config = look_up(repo, revision, "config.json", token)
    if config is None:
        raise NotFoundError(f"{repo} at {revision} has no config.json: is it a transformers model?")
    snapshot = Snapshot(repo, config.commit)

    def get(name: str) -> Path | None:
        remote = config if name == "config.json" else look_up(repo, config.commit, name, token)
        return remote and _fetch(remote, snapshot, token)

    if not cached_model(repo, config.commit, with_weights):
        if not collect_model(get, with_weights):
            raise NotFoundError(f"{repo} at {revision} has no {' or '.join(WEIGHTS)}")
        if with_weights:
            snapshot.write_record()
        remove_leftovers(snapshot.storage / "blobs")
    # without network, an older commit that has its weights is of more use
    if with_weights or not cached_model(repo, revision):
        write_ref(repo, revision, config.commit)
    return snapshot.folder


def download_dataset(path: DatasetPath) -> list[DatasetFile]:
    """Bring the files of a path into the cache.

    Raises what `download_model` does, and if nothing is found.
    """
    token = user_token(public=False)
    commit = look_up_commit(path.repo, path.revision, token)
    at_commit = replace(path, revision=commit)
    found = cached_dataset(at_commit)
    if found is None:
        remotes = {remote.name: remote for remote in list_files(at_commit, token)}
        names = path.data_files(remotes)
        if not names:
            raise nothing_found(at_commit, list(remotes), token)
        logger.info("%s: %d of %d files are data", path.repo, len(names), len(remotes))
        snapshot = Snapshot(path.repo, commit)
        snapshot.lists[path.glob] = list(remotes)
        _fetch_all([remotes[name] for name in names], snapshot, token)
        remove_leftovers(snapshot.storage / "blobs")
        found = files_in(snapshot, path)
        if found is None:
            raise InputError(f"{snapshot.folder} was changed during the download: try again")
    write_ref(path.repo, path.revision, commit)
    return found


def _fetch_all(remotes: list[RemoteFile], snapshot: Snapshot, token: str | bool) -> None:
    """Have all files in the snapshot, or say at once that there is no room for them."""
    blobs = snapshot.storage / "blobs"
    with explained(remotes[0].repo, snapshot.commit, f"{len(remotes)} files"):
        blobs.mkdir(parents=True, exist_ok=True)
        different = {remote.etag: remote for remote in remotes}.values()
        missing = sum(_missing_bytes(remote, snapshot) for remote in different)
        if missing > (free := shutil.disk_usage(blobs).free):
            raise OSError(errno.ENOSPC, f"{missing:,} bytes to come, {free:,} free")
    logger.info("%s bytes to download", f"{missing:,}")
    try:
        for remote in remotes:
            _fetch(remote, snapshot, token)
    finally:  # what is there is not read again by the run that gets the rest
        snapshot.write_record()


def _missing_bytes(remote: RemoteFile, snapshot: Snapshot) -> int:
    """How much of a file is still to come, by what is there of it under any name."""
    blob, here = snapshot.storage / "blobs" / remote.etag, 0
    for path in (blob, blob.with_name(f"{blob.name}.incomplete"), snapshot.folder / remote.name):
        with suppress(OSError):
            here = max(here, path.stat().st_size)
    return max(0, (remote.size or 0) - here)


def _fetch(remote: RemoteFile, snapshot: Snapshot, token: str | bool) -> Path | None:
    """Have one file in the snapshot, right to the last byte; one process downloads, others wait."""
    from huggingface_hub.utils import WeakFileLock

    expected = snapshot.digests.get(remote.name, remote.etag)
    if len(remote.etag) == len(expected) and remote.etag != expected:
        other = f"{shown_endpoint()} has another {remote.name} of {remote.repo}"
        raise InputError(f"{other}: SHA-256 {remote.etag}, expected {expected}: {NOT_TRUSTED}")
    blob, path = snapshot.storage / "blobs" / remote.etag, snapshot.folder / remote.name
    lock = hub_cache() / ".locks" / snapshot.storage.name / f"{remote.etag}.lock"
    with explained(remote.repo, remote.commit, remote.name):
        for parent in (blob.parent, path.parent, lock.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not snapshot.find(remote.name, remote.etag):
                if path.is_file():
                    logger.warning("%s is damaged (%s)", path, files.describe(path))
                if not blob.is_file() or digest_of(blob, expected) != expected:
                    _fill(blob, remote, expected, token)
                link(blob, path)
    return snapshot.find(remote.name, remote.etag)


def _fill(blob: Path, remote: RemoteFile, expected: str, token: str | bool) -> None:
    """Download a file and name it `blob` once its digest is right; wrong bytes get one more try."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    for last_try in (False, True):
        _receive(remote, partial, token)
        if (got := digest_of(partial, expected)) == expected:
            files.sync(partial)
            partial.replace(blob)
            return
        looks = f"{remote.name} of {remote.repo} came as {files.describe(partial)}"
        problem = f"{looks}, digest {got}, expected {expected}"
        partial.unlink()
        if last_try:
            raise InputError(f"{problem}: try again, or check HF_ENDPOINT and proxy")
        logger.warning("%s; downloading it once more", problem)


def _receive(remote: RemoteFile, partial: Path, token: str | bool) -> None:
    """Append to `partial` what it lacks, from where this or an earlier run was broken off.

    A full disk removes it again, a lost connection does not.
    """
    try:
        with open(partial, "ab", opener=files.open_no_link) as file:
            if remote.size is None or file.tell() > remote.size:
                file.seek(file.truncate(0))
            missing, free = (remote.size or 0) - file.tell(), shutil.disk_usage(partial.parent).free
            if missing > free:
                raise OSError(errno.ENOSPC, f"{missing:,} bytes to come, {free:,} free")
            retry(
                lambda: _receive_rest(remote, file, token),
                f"downloading {remote.name} of {remote.repo}",
                tries=DOWNLOAD_TRIES,
                progress=file.tell,
            )
    except OSError as problem:
        if not isinstance(problem, http_error()):
            partial.unlink(missing_ok=True)
        raise


def _receive_rest(remote: RemoteFile, file: BinaryIO, token: str | bool) -> None:
    """Append to a file what one request brings of the rest; one that ignores the range starts it
    afresh.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, tqdm

    start = file.tell()
    if start == remote.size:
        return
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # The session follows redirects, and drops the token where one leads to another origin.
    with get_session().stream("GET", remote.url, headers=headers, timeout=timeout) as answer:
        hf_raise_for_status(answer)
        if start and answer.status_code != 206:
            start = file.seek(file.truncate(0))
        style = {"desc": visible(remote.name), "unit": "B", "unit_scale": True}
        style["disable"] = not draws_over(sys.stderr)
        with tqdm(total=remote.size, initial=start, **style) as bar:
            for chunk in answer.iter_bytes():
                bar.update(file.write(chunk))
                if remote.size is not None and file.tell() > remote.size:
                    return  # the digest will tell; an endless answer must not fill the disk
