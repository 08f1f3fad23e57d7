"""One commit of a repository in the Hub's cache: what is there, and whether it is intact.

The layout is the Hub client's own
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..system import files
from .client import hub_cache
from .names import COMMIT, DIGEST, FILE_NAME, DatasetPath, is_dataset
from .pins import pinned_digests

logger = logging.getLogger(__name__)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first there is, whole or in shards
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
EXTRAS = (*TOKENIZER_FILES, "generation_config.json")
# all that makes a model, an adapter's files and shards of any name included
MODEL_FILES = re.compile(
    "|".join(map(re.escape, ("config.json", "adapter_config.json", *EXTRAS)))
    + r"|\w[\w.-]*\.(safetensors|bin)(\.index\.json)?"
)


@dataclass(frozen=True)
class FileStamp:
    """What changes when a file is written to."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns)


class DatasetFile(NamedTuple):
    """A file of a dataset, and the path with its commit by which it is known."""

    label: str
    path: Path


class Snapshot:
    """One commit in the cache: `snapshots/<commit>/<name>` are links to `blobs/<digest>`.

    Beside them `.minigpt2/<commit>.json` keeps size and time of each file whose digest was right,
    so that the next start need not read 500 MB again and still notices a file that was changed, and
    `<commit>.lists.json` the files that each glob in a dataset stands for.
    """

    def __init__(self, repo: str, commit: str) -> None:
        self.repo = repo
        self.storage = storage_of(repo)
        self.commit = commit
        self.folder = self.storage / "snapshots" / commit
        self.digests = pinned_digests(repo, commit)
        self._record = self.storage / ".minigpt2" / f"{commit}.json"
        self._lists = self._record.with_suffix(".lists.json")
        recorded = read_record(self._record, int)
        self.verified = {n: FileStamp(*pair) for n, pair in recorded.items() if len(pair) == 2}
        self.lists: dict[str, list[str]] = read_record(self._lists, str)

    def find(self, name: str, etag: str = "") -> Path | None:
        """The file, if there and as its digest (pinned, the Hub's, or its blob's name) says."""
        path = self.folder / name
        if not path.is_file():
            return None
        stamp = FileStamp.of(path)
        if self.verified.get(name) != stamp:
            expected = self.digests.get(name) or etag or path.resolve().name
            if DIGEST.fullmatch(expected) and digest_of(path, expected) != expected:
                return None
            self.verified[name] = stamp
        return path

    def write_record(self) -> None:
        """Keep what is known to be right, if the cache may be written to."""
        try:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            stamps = {name: astuple(stamp) for name, stamp in self.verified.items()}
            files.write_json(self._record, stamps)
            if self.lists:  # with those that other runs have added by now
                files.write_json(self._lists, read_record(self._lists, str) | self.lists)
        except OSError as problem:  # a cache for reading only
            logger.info("%s: the files will be read and checked at every start", problem)


def storage_of(repo: str) -> Path:
    """The folder of a repository in the Hub's cache."""
    kind = "" if is_dataset(repo) else "models--"
    return hub_cache() / f"{kind}{repo.replace('/', '--')}"


def read_record(path: Path, kind: type) -> dict:
    """Lists of such values by name; what else is in a file does not count."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        name: values
        for name, values in found
        if isinstance(values, list) and all(type(value) is kind for value in values)
    }


def cached_snapshot(repo: str, revision: str) -> Snapshot | None:
    """The commit that a revision was when it was last asked for; nobody is asked."""
    if not COMMIT.fullmatch(revision):
        with suppress(OSError, UnicodeDecodeError):
            revision = (storage_of(repo) / "refs" / revision).read_text(encoding="ascii")
    return Snapshot(repo, revision) if COMMIT.fullmatch(revision) else None


def cached_model(repo: str, revision: str, with_weights: bool = True) -> Path | None:
    """The snapshot's folder if all that makes the model is there and intact; nobody is asked."""
    snapshot = cached_snapshot(repo, revision)
    if snapshot is None:
        return None
    recorded = dict(snapshot.verified)
    if recorded:
        wanted = recorded if with_weights else recorded.keys() & {"config.json", *EXTRAS}
        known = all(snapshot.find(name) for name in wanted)
    else:  # another program's download: the Hub may have more files, but these are enough
        known = bool(snapshot.find("tokenizer.json") or snapshot.find("merges.txt"))
    complete = known and collect_model(snapshot.find, with_weights)
    if complete and with_weights and snapshot.verified != recorded:
        snapshot.write_record()
    return snapshot.folder if complete else None


def collect_model(get: Callable[[str], Path | None], with_weights: bool) -> bool:
    """`get` each file of a model that exists; False without a config or any kind of weights that
    are asked for.
    """
    if get("config.json") is None:
        return False
    if with_weights and not any(_collect_weights(name, get) for name in WEIGHTS):
        return False
    for name in EXTRAS:
        get(name)
    return True


def _collect_weights(name: str, get: Callable[[str], Path | None]) -> bool:
    """`get` a file of weights, or all shards that its index names."""
    if get(name):
        return True
    index = get(f"{name}.index.json")
    return index is not None and all(get(shard) for shard in shard_names(index))


def shard_names(index: Path) -> list[str]:
    """The files that a weight index names: plain file names only, for they become paths here."""
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index} has no weight_map that names the weight files: get it anew, or another copy"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise InputError(
                f"{index} names the weight file {name!r}, expected a plain file name: do not trust "
                "this copy of the model, take another"
            )
    return list(dict.fromkeys(weight_map.values()))


def cached_dataset(path: DatasetPath) -> list[DatasetFile] | None:
    """The files of a path if it is known that these are all, and intact; nobody is asked."""
    snapshot = cached_snapshot(path.repo, path.revision)
    return snapshot and files_in(snapshot, path)


def files_in(snapshot: Snapshot, path: DatasetPath) -> list[DatasetFile] | None:
    """The files of a path in a snapshot; None if one is missing, or it is not known which."""
    recorded = dict(snapshot.verified)
    one = [] if path.is_glob else [path.glob]  # maybe another program's download
    names = path.data_files(snapshot.lists.get(path.glob, one))
    found = [snapshot.find(name) for name in names]
    if not found or None in found:
        return None
    if snapshot.verified != recorded:
        snapshot.write_record()
    at = f"hf://{snapshot.repo}@{snapshot.commit}"
    return [DatasetFile(f"{at}/{name}", snapshot.folder / name) for name in names]


def write_ref(repo: str, revision: str, commit: str) -> None:
    """Note which commit a revision is, as the Hub's client does."""
    ref = storage_of(repo) / "refs" / revision
    if revision != commit:
        with suppress(OSError):  # the ref only serves to find the commit without network
            ref.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(ref, commit)


def link(blob: Path, path: Path) -> None:
    """Make `path` stand for `blob`, in one step."""
    temporary = path.with_name(f".{path.name}.{blob.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:  # Windows without the right to make links: the client moves the file there, too
        blob.replace(temporary)
    temporary.replace(path)


def remove_leftovers(blobs: Path) -> None:
    """Remove what downloads broken off more than a day ago have left, the client's included."""
    for left in blobs.glob("*.incomplete"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                left.unlink()
                logger.info("removed %s, left of a download that was broken off", left)


def digest_of(path: Path, like: str) -> str:
    """A file's SHA-256, or its SHA-1 as a Git blob where `like` has the 40 digits of one."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        start = f"blob {path.stat().st_size}\0".encode()
        digest = hashlib.sha1(start, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
