"""Writing so that nothing is lost, and naming what a damaged file looks like. Knows bytes and
folders, nothing of models.
"""

import contextlib
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock as Lock
from filelock import Timeout

from ..errors import InputError, NotFoundError

ASSETS = Path(__file__).parents[1] / "assets"  # what comes with the package

# the names that replace_file and safetensors' save_file give to what they write
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp|\.tmp[A-Za-z0-9]{6}")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape of JSON; pairs of them are a character
NAME_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))  # of os.fsdecode, for what is no UTF-8
WAITS = (0, 0.1, 0.3, 1, 2)  # seconds before each try to read files at one moment
TICK_NS = 20_000_000  # within which two changes of a file may bear the same time
HASHED_AT_ONCE = 2**22  # bytes
ALIKE = 0.6  # of two names: difflib's own measure of what is near
MOST_COMPARED = 10_000  # names of a folder
MOST_NEAR = 2

T = TypeVar("T")


class UnsettledError(InputError):
    """Files that go together changed each time that they were read."""


def cache_folder(name: str) -> Path:
    """Where things are kept that can be made again: $MINIGPT2_CACHE/name; without that,
    $XDG_CACHE_HOME or ~/.cache has minigpt2/name.
    """
    if own := os.environ.get("MINIGPT2_CACHE"):
        return Path(own) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minigpt2" / name


def own_folder(path: Path) -> str | None:
    """Make a folder, and those above it that are missing, for this user alone; what `exposed` says
    of it.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.exists():
            with contextlib.suppress(FileExistsError):  # made by another process meanwhile
                folder.mkdir(mode=0o700)
    return exposed(path)


def exposed(path: Path) -> str | None:
    """How somebody else but root could change what is found at a path; None if nobody could.

    Each folder on the way to it, and each link that leads there, has to belong to this user or to
    root, and only they may write: anybody may in a folder such as /tmp, where the sticky bit keeps
    what belongs to others. What is safe stays so, as only its owners can give it away. Raises
    OSError where nothing is found. Windows, whose folders below the user's are private, is not
    asked.
    """
    path.stat()  # an end to links that go round
    if os.name == "nt":
        return None
    path = path.absolute()
    for place in (*reversed(path.parents), path):
        status = place.lstat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user"
        if stat.S_ISLNK(status.st_mode):
            problem = exposed(place.parent / place.readlink())
            if problem:
                return problem
            continue
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
            return f"others can write to {place}"
    return None


def replace_file(path: Path, write: Callable[[Path], None], *, mode: int = 0o666) -> None:
    """Have `write` fill a temporary file beside `path`, then put it in its place in one step.

    A crash at any moment leaves the old file or the new one, whole: the data is on the disk before
    the name moves, and the folder after it. The mode is the one that a new file asking for `mode`
    gets there, by the umask or the folder (safetensors alone would leave 0600).
    """
    temporary, mode = _new_file_beside(path, mode)
    try:
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`replace_file` for text, as UTF-8 with line feeds."""
    replace_file(path, lambda temporary: _write_bytes(temporary, text.encode("utf-8")))


def write_json(path: Path, value: object) -> None:
    """`replace_file` for JSON, indented, with a final line feed; a number that is not finite, which
    JSON does not have, is a mistake of the caller's.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # names of files that are not UTF-8 have such characters in Python
    text = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
    write_text(path, text + "\n")


def read_json(path: Path, *, with_names: bool = False) -> dict:
    """The JSON object in a file; a leading BOM is accepted; NaN, numbers too large for a float,
    lone surrogates and anything but an object are not. `with_names` accepts those surrogates by
    which Python writes names of files that are not UTF-8.

    Raises NotFoundError or InputError, naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: is {path.parent} a complete model folder?")
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text, parse_float=_finite, parse_int=_whole, parse_constant=_finite)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{path} is not valid JSON ({describe(path)}): {problem}") from problem
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object {{...}}")
    kept = NAME_BYTES if with_names else ""
    if SURROGATE.search(text) and (place := _half_a_character(value, kept)):
        raise InputError(
            f"{path}: {place} has a lone surrogate, half a character, in it: it is not valid "
            "Unicode, replace or remove it"
        )
    return value


def at_one_moment(folder: Path, names: re.Pattern[str], read: Callable[[], T]) -> T:
    """What `read` gives, from one state of the files of a folder that have such names: where one of
    them was changed or replaced meanwhile, it reads again.

    Inside, nothing may be left to be read later. Raises what `read` raises of files that stayed as
    they were, and UnsettledError for those that changed at every try.
    """
    for number, wait in enumerate(WAITS):
        time.sleep(wait)
        before = _stamps(folder, names)
        try:
            value = read()
        except UnsettledError:
            raise
        except Exception:  # what files of two states make together may be anything
            # whoever copies over a file empties it first, some time before its own time changes
            emptied = any(stamp[2:3] == (0,) for stamp in before.values())
            if _stamps(folder, names) == before and not (emptied and number == 0):
                raise
            continue
        if _stamps(folder, names) == before:
            return value
        del value  # two models may not fit into memory
    raise UnsettledError(
        f"{folder} was changed each time that it was read: wait until nothing writes there, or "
        "copy it and give the copy"
    )


def open_no_link(path: str, flags: int) -> int:
    """An `opener` for open() that raises OSError where the name is a link, which somebody else may
    have led to another file.
    """
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes.

    Reads in the plain way: pages read through a memory map would count as this process's memory.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASHED_AT_ONCE):
            digest.update(data)
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove from a folder the temporary files of processes that were killed while they wrote."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def lock(path: Path, *, wait: bool) -> Lock | None:
    """Lock a file, made if need be, until `release` or the end of the process, however that ends.

    Without `wait`, None when another process has it. Raises OSError or NotImplementedError where
    the file system has no locks.
    """
    held = Lock(path, timeout=-1 if wait else 0)
    try:
        held.acquire()
    except Timeout:
        return None
    return held


def own(path: Path) -> Lock | None:
    """`lock`, without waiting, a file that goes with `disown`."""
    while True:
        with open(path, "ab", opener=open_no_link) as seen:
            held = lock(path, wait=False)
            if held is None:
                return None
            # whoever had it may have removed it between the two: then nothing of that name is held
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(seen.fileno()), path.stat()):
                    return held
        held.release()


def disown(held: Lock) -> None:
    """Release a file that was locked with `own`, and remove it where that can be done."""
    path = Path(held.lock_file)
    if os.name == "nt":  # what is open cannot be removed
        held.release()
    with contextlib.suppress(OSError):
        path.unlink()
    held.release()


def describe(path: Path) -> str:
    """What the first bytes of a file say it is, for messages about files that could not be read."""
    if path.is_dir():
        return "a folder"
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "an HTML or XML page, probably a failed download"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive"
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    return f"{path.stat().st_size:,} bytes"


def sync(path: Path) -> None:
    """Push a file's data, or a folder's names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; its rename is durable with the file's own flush
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_file_beside(path: Path, mode: int) -> tuple[Path, int]:
    """An empty file of a name that nothing had, and its mode: by the kernel's decision, as the
    umask could only be read by setting it for all threads.
    """
    while True:
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        except FileExistsError:
            continue
        try:
            return new, stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)


def did_you_mean(path: Path, *, folders_only: bool = False) -> str:
    """The existing paths that are spelled like one that does not exist, as a question in
    parentheses, after a blank; "" if there is none.
    """
    near = [repr(str(found)) for found in _near(path, folders_only)[:MOST_NEAR]]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _near(path: Path, folders_only: bool) -> list[Path]:
    """Existing paths like this one, the nearest first; where its folder does not exist, in folders
    that are spelled like it.
    """
    if path.name in ("", ".", "..") or "\0" in str(path):
        return []
    found: list[tuple[float, Path]] = []
    for parent in [path.parent] if path.parent.is_dir() else _near(path.parent, True)[:MOST_NEAR]:
        with contextlib.suppress(OSError), os.scandir(parent) as entries:
            for entry in itertools.islice(entries, MOST_COMPARED):
                ratio = difflib.SequenceMatcher(None, entry.name, path.name).ratio()
                if ratio >= ALIKE and (entry.is_dir() or not folders_only):
                    found.append((-ratio, parent / entry.name))
    return [near for _, near in sorted(found)]


def _stamps(folder: Path, names: re.Pattern[str]) -> dict[str, tuple[int, ...]]:
    """What tells the states of a folder's files apart; nothing of a folder that cannot be read."""
    try:
        found = [path for path in folder.iterdir() if names.fullmatch(path.name)]
    except OSError:
        return {}
    return {path.name: _stamp(path) for path in found}


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    if 0 <= time.time_ns() - status.st_mtime_ns < TICK_NS:
        time.sleep(TICK_NS / 1e9)  # so that the next change does not bear the same time
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _half_a_character(value: dict, kept: str) -> str | None:
    """Where a JSON value has a lone surrogate, which can be written as an escape only, but for
    those that are `kept`.
    """
    parts: list[tuple[str, object]] = [("", value)]
    for place, part in parts:  # which grows
        if isinstance(part, str) and not _is_unicode(part, kept):
            return place
        if isinstance(part, dict):
            if odd := next((name for name in part if not _is_unicode(name, kept)), None):
                return f"{place}.{odd}".removeprefix(".")
            parts += [(f"{place}.{name}".removeprefix("."), inner) for name, inner in part.items()]
        elif isinstance(part, list):
            parts += [(f"{place}[{number}]", inner) for number, inner in enumerate(part)]
    return None


def _is_unicode(text: str, kept: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" and c not in kept for c in text)


def _whole(number: str) -> int:
    _finite(number)
    return int(number)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value
