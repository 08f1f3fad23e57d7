"""Folders that are made once and kept, whole or not at all; all can be deleted at any time.

Several processes may want the same one: one makes it, the others wait. Knows files, nothing of what
is in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..errors import InputError
from ..system.files import cache_folder, lock, sync

logger = logging.getLogger(__name__)
LOCKS = ".locks"
T = TypeVar("T")


def default_cache_dir() -> Path:
    """The folder "tokens" of our cache (files.py)."""
    return cache_folder("tokens")


def made_once(
    folder: Path, find: Callable[[Path], T | None], make: Callable[[Path], None]
) -> tuple[T, bool]:
    """What `find` reads of a folder of the cache, and whether that was there; if not, `make` fills
    it, under another name until it is complete.
    """
    cache, found = folder.parent, find(folder)
    if found is not None:
        return found, True
    with workspace(cache, folder.name) as new:
        found = find(folder)  # another process may have made it
        if found is not None:
            return found, True
        make(new)
        sync(new)
        new.rename(folder)
        sync(cache)
        found = find(folder)
    assert found is not None
    return found, False


def set_aside(folder: Path) -> None:
    """Remove a folder that is damaged: renamed first, so that no other process finds half of it."""
    aside = tempfile.mkdtemp(prefix=".", dir=folder.parent)
    with contextlib.suppress(FileNotFoundError):  # another process did it
        folder.rename(Path(aside, folder.name))
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def writable(cache: Path) -> Iterator[None]:
    """Make the cache folder; InputError where it, or what is in it, cannot be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except InputError:
        raise
    except (OSError, NotImplementedError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(
            f"{cache} cannot be written: {reason}; set MINIGPT2_CACHE to a folder with space for 4 "
            "to 8 bytes per token"
        ) from problem


@contextlib.contextmanager
def workspace(cache: Path, name: str) -> Iterator[Path]:
    """An empty folder for one process alone, removed afterwards unless it was renamed.

    What killed processes left of theirs is removed too: the kernel has taken back their locks.
    """
    (cache / LOCKS).mkdir(exist_ok=True)
    for old in cache.glob(".*.tmp"):
        if left := lock(lock_file(cache, old.stem[1:]), wait=False):
            shutil.rmtree(old, ignore_errors=True)
            left.release()
    held = lock(lock_file(cache, name), wait=False)
    if held is None:
        logger.info("another process prepares the same text: waiting for it")
        held = lock(lock_file(cache, name), wait=True)
    assert held is not None
    folder = cache / f".{name}.tmp"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        held.release()


def lock_file(cache: Path, name: str) -> Path:
    """What a process holds that works on the folder of this name."""
    return cache / LOCKS / f"{name}.lock"


def hash_of(value: object) -> str:
    """A name for what JSON values decide."""
    return hashlib.sha256(json.dumps(value, allow_nan=False).encode()).hexdigest()
