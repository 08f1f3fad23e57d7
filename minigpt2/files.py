"""Writing so that nothing is lost, and naming what a damaged file looks like. Knows bytes and
folders, nothing of models.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock as Lock
from filelock import Timeout

from .errors import InputError, NotFoundError

# the names that replace_file's mkstemp and safetensors' save_file give to what they write
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp|\.tmp[A-Za-z0-9]{6}")


def cache_folder(name: str) -> Path:
    """Where things are kept that can be made again: $MINIGPT2_CACHE/name; without that,
    $XDG_CACHE_HOME or ~/.cache has minigpt2/name.
    """
    if own := os.environ.get("MINIGPT2_CACHE"):
        return Path(own) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minigpt2" / name


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file beside `path`, then put it in its place in one step.

    A crash at any moment leaves the old file or the new one, whole: the data is on the disk before
    the name moves, and the folder after it. The mode is the umask's (safetensors alone would leave
    0600).
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~current_umask())
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`replace_file` for text, as UTF-8 with line feeds."""
    replace_file(path, lambda temporary: _write_bytes(temporary, text.encode("utf-8")))


def write_json(path: Path, value: object) -> None:
    """`replace_file` for JSON, indented, with a final line feed."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """The JSON object in a file; a leading BOM is accepted, NaN and anything but an object are not.

    Raises NotFoundError or InputError, naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: is {path.parent} a complete model folder?")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{path} is not valid JSON ({describe(path)}): {problem}") from problem
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object {{...}}")
    return value


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


def current_umask() -> int:
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
