"""Models and data from the Hugging Face Hub: found in its cache, or downloaded and checked.

Knows names, commits, digests and the layout of the Hub's cache
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache), nothing of what the files mean.
The Hub's client finds addresses, talks, redirects and locks. What is accepted, and when to stop, is
decided here: its hf_hub_download (measured, version 2.4) takes any bytes of the right size, writes
to whatever path the server's ETag spells, gives up at a connection reset and waits 395 s for a
silent server.
"""

import difflib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit

from . import files
from .errors import InputError, NotFoundError

logger = logging.getLogger(__name__)
T = TypeVar("T")

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first there is, whole or in shards
TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
EXTRAS = (*TOKENIZER, "generation_config.json")

_NAME = r"\w([\w.-]{0,94}\w)?"
HUB_ID = re.compile(rf"(?!.*(--|\.\.|\.git$)){_NAME}(/{_NAME})?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]*", re.ASCII)
FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
FILE_PATH = re.compile(r"(?![A-Za-z]:|.*(^|/)\.{0,2}(/|$))[^\\\x00-\x1f\x7f\ud800-\udfff]+")
DATASET = re.compile(
    r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert/[^/]+|pr/\d+)|[^/]*))?(?:/(.*))?"
)
WILD = re.compile(r"[*?[]")
COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(
    r"[0-9a-f]{40}|[0-9a-f]{64}"
)  # of a small file (Git blob) or a large one (SHA-256)
TOKEN = re.compile(r"[!-~]*")
LOOPBACK = ("localhost", "127.0.0.1", "::1")

LOOK_UP_SECONDS = 5  # for one answer about a file: two silences and start-up stay below 15 s
PATIENCE_SECONDS = 8  # after this long without an answer, asking again will not help
LOOK_UP_TRIES, DOWNLOAD_TRIES = 3, 5
LONGEST_WAIT_SECONDS = 60  # that a server may ask for
NOT_A_HUB = "{} is not a Hub (check HF_ENDPOINT, proxy and log-in page)"
TRY_AGAIN = (408, 429, 500, 502, 503, 504)

# Commit, SHA-256 of config.json, SHA-256 of model.safetensors; a digest fixes the size as well.
# Each is stated alike by at least two public projects, among them:
#   gpt2         huggingface_hub's ResolvedRevision docs (commit); SyedNaveedMahmood/kd-sink
#                protocols/s1_artifact_partial_v1.json (commit, config); weights: many manifests
#   gpt2-medium  soyuniverse/NetLLM docs/experiment_phase/phase2a/GPT2_ARTIFACT_MANIFEST.md (all)
#   gpt2-large   kd-sink, the same file (all); andreas2301/ola-guardrails models.sha256 (files)
#   gpt2-xl      mikepfrank/GPT-2-tools src/gpt2_local/runtime.py (commit, weights); config: the
#                fingerprint lists of two studies
#   distilgpt2   the Hub's list through hf-mirror.com (commit, weights); config: many manifests
PINS = {
    "openai-community/gpt2": (
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "openai-community/gpt2-medium": (
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        "ef1a44d889ad1a0acc7731c78134f1b87d2d222f110e97dd10fd4117331caf22",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "openai-community/gpt2-large": (
        "32b71b12589c2f8d625668d2335a01cac3249519",
        "7fccdcfd6622055342a734c663ee0b61ff4fd697f42467595df0bf4448c8c170",
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "openai-community/gpt2-xl": (
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
    "distilbert/distilgpt2": (
        "2290a62682d06624634c1f46a6ad5be0f47f38aa",
        "4ec5947c1d59fee6212cdf3b0ec1a53eac02092554c5ff0a733488cbd2c64f3a",
        "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
    ),
}
TOKENIZER_DIGESTS = {  # SHA-256 of the same three files in all five
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "tokenizer.json": "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6",
}
SHORT_NAMES = {full.split("/")[1]: full for full in PINS}
TWINS = SHORT_NAMES | {full: short for short, full in SHORT_NAMES.items()}


def model_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder that holds a model's config, weights and tokenizer files, downloaded if need be.

    An existing folder is returned as it is. A Hub id ("gpt2", "user/name") is looked for in the
    Hub's cache at `revision`: a commit, branch or tag; by default the pinned commit of the five
    public GPT-2 models, `main` of others. A complete cached commit costs no request; a branch is
    asked for, and its cached copy serves when nobody answers. Raises NotFoundError or InputError
    for what is wrong with name, network, server or disk.
    """
    if str(source) and Path(source).is_dir():
        if revision is not None:
            raise InputError(f"{source} is a folder and has no revisions: leave out {revision!r}")
        return Path(source)
    repo, revision = _address(source, revision)
    _prepare_client()
    from huggingface_hub import constants

    cached = _cached(repo, revision)
    if cached is None and repo in TWINS:
        cached = _cached(TWINS[repo], revision)
    return _cached_or_downloaded(
        cached,
        revision,
        lambda: _download(repo, revision, _token(public=repo in TWINS)),
        missing=f"{repo} is not in the cache {constants.HF_HUB_CACHE} nor a folder here",
    )


def dataset_files(path: str, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """The files that a path in a dataset of the Hub stands for, downloaded if need be, with labels.

    `path` is hf://datasets/OWNER/NAME[@REVISION][/PATH]: the revision a commit, branch or tag with
    its "/" as %2F; PATH a file, a folder, or a glob in which `**` is any number of folders. A file
    is taken whatever its name is, of folders and globs those that end in one of `suffixes` and are
    not hidden, of a whole repository not its card. A label is the path with its commit; the list is
    sorted by it. What was listed and downloaded before serves without network, as with
    `model_folder`. Raises NotFoundError or InputError for what is wrong with path, network, server
    or disk, or if nothing is found.
    """
    wish = _dataset_wish(path, tuple(suffixes))
    _prepare_client()
    from huggingface_hub import constants

    return _cached_or_downloaded(
        _cached_files(wish),
        wish.revision,
        lambda: _download_files(wish),
        missing=f"{path} is not, or not whole, in the cache {constants.HF_HUB_CACHE}",
    )


def shard_names(index: Path) -> list[str]:
    """The files that a weight index names: plain file names only, for they become paths here."""
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map that names the weight files")
    for name in weight_map.values():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise InputError(f"{index} names the weight file {name!r}, expected a plain file name")
    return list(dict.fromkeys(weight_map.values()))


class _Unreachable(InputError):
    """Nobody answered, or nobody who is a Hub: a cached copy may serve instead."""


def _cached_or_downloaded(
    cached: T | None, revision: str, download: Callable[[], T], *, missing: str
) -> T:
    """What the cache has, if that is sure to be right or there is no better; else the download."""
    from huggingface_hub import constants

    if cached and (COMMIT.fullmatch(revision) or constants.HF_HUB_OFFLINE):
        return cached
    if constants.HF_HUB_OFFLINE:
        raise NotFoundError(f"HF_HUB_OFFLINE is set and {missing}: unset it or pass a local folder")
    try:
        return download()
    except _Unreachable as problem:
        if cached is None:
            advice = "run once with network or pass a local folder"
            raise InputError(f"{problem}, and {missing}: {advice}") from problem
        logger.warning("%s; using the copy in the cache %s", problem, constants.HF_HUB_CACHE)
        return cached


def _address(source: str | Path, revision: str | None) -> tuple[str, str]:
    """(Hub id, revision) of a source that is not a folder."""
    if Path(source).is_file():
        raise InputError(f"{source} is a file, expected a model folder or a Hub id such as gpt2")
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise NotFoundError(f"there is no folder {str(source)!r}, nor is it a Hub id such as gpt2")
    if revision is None:
        pin = PINS.get(SHORT_NAMES.get(source, source))
        return source, pin[0] if pin else "main"
    return source, _checked_revision(revision)


def _checked_revision(revision: str) -> str:
    if not REVISION.fullmatch(revision):
        raise InputError(f"revision {revision!r} cannot be the name of a commit, branch or tag")
    return revision


@dataclass(frozen=True)
class _Wish:
    """What a path in a dataset stands for: a glob, or a file or folder where no * is in it."""

    repo: str
    revision: str
    glob: str
    suffixes: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        return self.glob.split("/")

    @property
    def above(self) -> list[str]:
        """The folders that the glob says without * ? [, from the top."""
        return list(takewhile(lambda part: not WILD.search(part), self.parts))

    def choose(self, names: Iterable[str]) -> list[str]:
        """Of the files that the glob fits those which hold data, sorted."""
        if (names := sorted(names)) == [self.glob]:
            return names
        own = f"{self.repo.rsplit('/', 1)[-1]}.py"
        beside = ("README.md", "dataset_infos.json", own) if self.glob == "**" else ()
        return [n for n in names if n not in beside and n.lower().endswith(self.suffixes)]


def _dataset_wish(path: str, suffixes: tuple[str, ...]) -> _Wish:
    parts = DATASET.fullmatch(path)
    if parts is None or not HUB_ID.fullmatch(parts[1]):
        expected = "expected hf://datasets/OWNER/NAME[@REVISION][/PATH]"
        raise InputError(f"{path!r} leads to no dataset of the Hub: {expected}")
    revision = "main" if parts[2] is None else _checked_revision(unquote(parts[2]))
    name = (parts[3] or "").strip("/")
    if name and not FILE_PATH.fullmatch(name):
        raise InputError(f"{path!r} has an empty name, a . or .. or a foreign letter in its path")
    return _Wish(f"datasets/{parts[1]}", revision, name or "**", suffixes)


def _pinned_digests(repo: str, commit: str) -> Mapping[str, str]:
    """SHA-256 by file name, where it is known from more than the server's word."""
    pinned, config, weights = PINS.get(SHORT_NAMES.get(repo, repo), ("", "", ""))
    if commit != pinned:
        return {}
    return {"config.json": config, "model.safetensors": weights, **TOKENIZER_DIGESTS}


def _prepare_client() -> None:
    """Set what the client reads when first imported, and refuse an endpoint that cannot be one."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        from huggingface_hub import constants
    except ValueError as problem:
        raise InputError(f"huggingface_hub refuses an HF_ variable: {problem}") from problem
    if not re.match(r"https?://\w", constants.ENDPOINT):
        example = "an address such as https://huggingface.co"
        raise InputError(f"HF_ENDPOINT is {constants.ENDPOINT!r}, expected {example}")


def _token(*, public: bool) -> str | bool:
    """The user's token if needed and safe to send, otherwise False; no message ever shows it."""
    from huggingface_hub import constants, get_token

    if not TOKEN.fullmatch(os.environ.get("HF_TOKEN", "").strip()):
        raise InputError("HF_TOKEN has a blank, line break or foreign letter in it: set it anew")
    if public or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN or not (token := get_token()):
        return False
    if not TOKEN.fullmatch(token):
        raise InputError(f"{constants.HF_TOKEN_PATH} holds no valid token: run `hf auth login`")
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme == "https" or endpoint.hostname in LOOPBACK:
        return token
    logger.warning("%s is not https: your token is not sent there", constants.ENDPOINT)
    return False


class _Snapshot:
    """One commit in the cache: `snapshots/<commit>/<name>` are links to `blobs/<digest>`.

    Beside them `.minigpt2/<commit>.json` keeps size and time of each file whose digest was right,
    so that the next start need not read 500 MB again and still notices a file that was changed, and
    `<commit>.lists.json` the files that each glob in a dataset stands for.
    """

    def __init__(self, repo: str, commit: str) -> None:
        self.storage = _storage(repo)
        self.commit = commit
        self.folder = self.storage / "snapshots" / commit
        self.digests = _pinned_digests(repo, commit)
        self._record = self.storage / ".minigpt2" / f"{commit}.json"
        self._lists = self._record.with_suffix(".lists.json")
        self.verified: dict[str, list[int]] = _read_record(self._record)
        self.lists: dict[str, list[str]] = _read_record(self._lists)

    def find(self, name: str, etag: str = "") -> Path | None:
        """The file, if there and as its digest (pinned, the Hub's, or its blob's name) says."""
        path = self.folder / name
        if not path.is_file():
            return None
        seen = [path.stat().st_size, path.stat().st_mtime_ns]
        if self.verified.get(name) != seen:
            expected = self.digests.get(name) or etag or path.resolve().name
            if DIGEST.fullmatch(expected) and _digest(path, expected) != expected:
                return None
            self.verified[name] = seen
        return path

    def write_record(self) -> None:
        try:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(self._record, self.verified)
            if self.lists:  # with those that other runs have added by now
                files.write_json(self._lists, _read_record(self._lists) | self.lists)
        except OSError as problem:  # a cache for reading only
            logger.info("%s: the files will be read and checked at every start", problem)


def _storage(repo: str) -> Path:
    from huggingface_hub import constants

    kind = "" if _is_dataset(repo) else "models--"
    return Path(constants.HF_HUB_CACHE) / f"{kind}{repo.replace('/', '--')}"


def _is_dataset(repo: str) -> bool:
    """True for datasets/OWNER/NAME; a model is NAME or OWNER/NAME."""
    return repo.count("/") == 2


def _read_record(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _cached_snapshot(repo: str, revision: str) -> _Snapshot | None:
    """The commit that a revision was when it was last asked for; nobody is asked."""
    if not COMMIT.fullmatch(revision):
        with suppress(OSError, UnicodeDecodeError):
            revision = (_storage(repo) / "refs" / revision).read_text(encoding="ascii")
    return _Snapshot(repo, revision) if COMMIT.fullmatch(revision) else None


def _cached(repo: str, revision: str) -> Path | None:
    """The snapshot's folder if all that makes the model is there and intact; nobody is asked."""
    snapshot = _cached_snapshot(repo, revision)
    if snapshot is None:
        return None
    recorded = dict(snapshot.verified)
    if recorded:
        complete = all(snapshot.find(name) for name in recorded)
    else:  # another program's download: the Hub may have more files, but these are enough
        tokenizer = snapshot.find("tokenizer.json") or snapshot.find("merges.txt")
        complete = tokenizer is not None and _collect(snapshot.find)
    if complete and snapshot.verified != recorded:
        snapshot.write_record()
    return snapshot.folder if complete else None


def _collect(get: Callable[[str], Path | None]) -> bool:
    """`get` each file of a model that exists; False without a config or any kind of weights."""
    if get("config.json") is None or not any(_collect_weights(name, get) for name in WEIGHTS):
        return False
    for name in EXTRAS:
        get(name)
    return True


def _collect_weights(name: str, get: Callable[[str], Path | None]) -> bool:
    if get(name):
        return True
    index = get(f"{name}.index.json")
    return index is not None and all(get(shard) for shard in shard_names(index))


def _cached_files(wish: _Wish) -> list[tuple[str, Path]] | None:
    """(Label, file) of each file of a wish if it is known that these are all, and intact."""
    snapshot = _cached_snapshot(wish.repo, wish.revision)
    return snapshot and _files_in(snapshot, wish)


def _files_in(snapshot: _Snapshot, wish: _Wish) -> list[tuple[str, Path]] | None:
    recorded = dict(snapshot.verified)
    one = [] if WILD.search(wish.glob) else [wish.glob]  # maybe another program's download
    names = wish.choose(snapshot.lists.get(wish.glob, one))
    found = [snapshot.find(name) for name in names]
    if not found or None in found:
        return None
    if snapshot.verified != recorded:
        snapshot.write_record()
    label = f"hf://{wish.repo}@{snapshot.commit}"
    return [(f"{label}/{name}", snapshot.folder / name) for name in names]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a file's path fits a glob, both cut at "/"; names with a leading dot are hidden."""
    if pattern == ["**"]:
        return bool(parts) and not any(part.startswith(".") for part in parts)
    if not parts or not pattern:
        return not parts and not pattern
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (not hidden and _matches(parts[1:], pattern))
    return not hidden and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


@dataclass(frozen=True)
class _Remote:
    """What the Hub says of one file; commit and ETag are plain hex, so they can be file names."""

    repo: str
    name: str
    url: str
    commit: str
    etag: str
    size: int | None


def _download(repo: str, revision: str, token: str | bool) -> Path:
    """Bring one revision into the cache, file by file."""
    config = _look_up(repo, revision, "config.json", token)
    if config is None:
        raise NotFoundError(f"{repo} at {revision} has no config.json: is it a transformers model?")
    snapshot = _Snapshot(repo, config.commit)

    def get(name: str) -> Path | None:
        remote = config if name == "config.json" else _look_up(repo, config.commit, name, token)
        return remote and _fetch(remote, snapshot, token)

    if not _cached(repo, config.commit):
        if not _collect(get):
            raise NotFoundError(f"{repo} at {revision} has no {' or '.join(WEIGHTS)}")
        snapshot.write_record()
        _sweep(snapshot.storage / "blobs")
    _write_ref(repo, revision, config.commit)
    return snapshot.folder


def _download_files(wish: _Wish) -> list[tuple[str, Path]]:
    """Bring the files of a wish into the cache."""
    token = _token(public=False)
    commit = _look_up_commit(wish.repo, wish.revision, token)
    at_commit = replace(wish, revision=commit)
    found = _cached_files(at_commit)
    if found is None:
        remotes = {remote.name: remote for remote in _list_files(at_commit, token)}
        names = wish.choose(remotes)
        if not names:
            raise _nothing_found(at_commit, list(remotes), token)
        logger.info("%s: %d of %d files are data", wish.repo, len(names), len(remotes))
        snapshot = _Snapshot(wish.repo, commit)
        snapshot.lists[wish.glob] = list(remotes)
        _fetch_all([remotes[name] for name in names], snapshot, token)
        _sweep(snapshot.storage / "blobs")
        found = _files_in(snapshot, wish)
        if found is None:
            raise InputError(f"{snapshot.folder} was changed during the download: try again")
    _write_ref(wish.repo, wish.revision, commit)
    return found


def _fetch_all(remotes: list[_Remote], snapshot: _Snapshot, token: str | bool) -> None:
    """Have all files in the snapshot, or say at once that there is no room for them."""
    blobs = snapshot.storage / "blobs"
    with _explained(remotes[0].repo, snapshot.commit, f"{len(remotes)} files"):
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


def _missing_bytes(remote: _Remote, snapshot: _Snapshot) -> int:
    blob, here = snapshot.storage / "blobs" / remote.etag, 0
    for path in (blob, blob.with_name(f"{blob.name}.incomplete"), snapshot.folder / remote.name):
        with suppress(OSError):
            here = max(here, path.stat().st_size)
    return max(0, (remote.size or 0) - here)


def _write_ref(repo: str, revision: str, commit: str) -> None:
    ref = _storage(repo) / "refs" / revision
    if revision != commit:
        with suppress(OSError):  # the ref only serves to find the commit without network
            ref.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(ref, commit)


def _list_files(wish: _Wish, token: str | bool) -> list[_Remote]:
    """All files that a wish at a commit stands for: the file itself, a folder's, a glob's."""
    if not WILD.search(wish.glob):
        if remote := _look_up(wish.repo, wish.revision, wish.glob, token):
            return [remote]
        wish = replace(wish, glob=f"{wish.glob}/**")
    parts, above = wish.parts, wish.above
    deep = "**" in parts or len(parts) > len(above) + 1
    return [
        _remote(wish.repo, wish.revision, entry)
        for entry in _list_folder(wish, above, token, deep=deep)
        if entry["type"] == "file"
        and (entry["path"] == wish.glob or _matches(entry["path"].split("/"), parts))
    ]


def _remote(repo: str, commit: str, entry: Mapping) -> _Remote:
    """A file as a folder's list has it; its digest is the ETag that it would be sent with."""
    from huggingface_hub import constants

    name, size, large = entry["path"], entry.get("size"), entry.get("lfs")
    etag = (large if isinstance(large, dict) else entry).get("oid")
    if not FILE_PATH.fullmatch(name):
        raise InputError(f"{repo} names a file {name[:80]!r}: no such file can be stored here")
    if not isinstance(size, int) or not isinstance(etag, str) or not DIGEST.fullmatch(etag):
        raise InputError(f"{constants.ENDPOINT} gives {name} of {repo} no size and digest")
    return _Remote(repo, name, _url(repo, name, commit), commit, etag, size)


def _nothing_found(wish: _Wish, names: list[str], token: str | bool) -> InputError:
    """Why a wish at a commit is for no file of data, with what is near it."""
    where = f"{wish.repo} (commit {wish.revision[:7]})"
    if names:
        kinds = f"{', '.join([s for s in wish.suffixes if s.count('.') == 1][:5])} or alike"
        return InputError(f"{where}: {wish.glob} is only {_some(names)}, expected {kinds}")
    above, entries = wish.above, []
    while not (entries := _list_folder(wish, above, token, deep=False)) and above:
        above.pop()
    there = {e["path"].split("/")[-1]: e["path"] for e in entries if FILE_PATH.fullmatch(e["path"])}
    wrong = "".join(wish.parts[len(above) : len(above) + 1])
    near = [there[name] for name in difflib.get_close_matches(wrong, there)]
    there = [path for name, path in there.items() if not name.startswith(".")]
    known = f"near it is {_some(near)}" if near else f"there is {_some(there) or 'no file'}"
    return NotFoundError(f"{where} has no {wish.glob}: {known}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _look_up_commit(repo: str, revision: str, token: str | bool) -> str:
    from huggingface_hub import constants

    if COMMIT.fullmatch(revision):
        return revision
    question = f"revision/{quote(revision, safe='')}?expand=sha"
    page, _ = _ask(repo, revision, question, token)
    commit = page.get("sha") if isinstance(page, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _Unreachable(NOT_A_HUB.format(constants.ENDPOINT))
    return commit


def _list_folder(wish: _Wish, folder: list[str], token: str | bool, *, deep: bool) -> list[dict]:
    """What the Hub lists in a folder, or all below it; nothing if there is no such folder."""
    from huggingface_hub import constants

    question = "/".join(("tree", wish.revision, *(quote(name, safe="") for name in folder)))
    entries, query = [], f"recursive={str(deep).lower()}"
    while query:
        page, query = _ask(wish.repo, wish.revision, f"{question}?{query}", token)
        for entry in page if isinstance(page, list) else [page]:
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(key), str) for key in ("type", "path")
            ):
                raise _Unreachable(NOT_A_HUB.format(constants.ENDPOINT))
            entries.append(entry)
    return entries


def _ask(repo: str, revision: str, question: str, token: str | bool) -> tuple[object, str]:
    """The Hub's answer to a question about a dataset, and the query of its next page.

    Of the next page's address only the query is used: the token goes nowhere else. An answer that
    there is no such thing is an empty list.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = f"{constants.ENDPOINT}/api/{repo}/{question}"
    headers = build_hf_headers(token=token)

    def get() -> tuple[object, str]:
        answer = get_session().get(url, headers=headers, timeout=_look_up_seconds())
        hf_raise_for_status(answer)
        return answer.json(), urlsplit(answer.links.get("next", {}).get("url", "")).query

    with _explained(repo, revision, "the list of files"):
        try:
            return _retry(
                get,
                f"asking for the files of {repo}",
                tries=LOOK_UP_TRIES,
                patience=PATIENCE_SECONDS,
            )
        except errors.EntryNotFoundError:
            return [], ""
        except (ValueError, RecursionError) as problem:
            raise _Unreachable(NOT_A_HUB.format(constants.ENDPOINT)) from problem


def _look_up(repo: str, revision: str, name: str, token: str | bool) -> _Remote | None:
    """Ask the Hub about one file; None if the repository has none of that name."""
    from huggingface_hub import constants, errors, get_hf_file_metadata

    hub, url, seconds = constants.ENDPOINT, _url(repo, name, revision), _look_up_seconds()
    with _explained(repo, revision, name):
        try:
            answer = _retry(
                lambda: get_hf_file_metadata(url, token=token, timeout=seconds),
                f"asking for {name} of {repo}",
                tries=LOOK_UP_TRIES,
                patience=PATIENCE_SECONDS,
            )
        except errors.EntryNotFoundError:
            return None
    commit, etag = answer.commit_hash, answer.etag
    if commit is None or etag is None:
        raise _Unreachable(NOT_A_HUB.format(hub))
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        raise InputError(f"{hub} has commit {commit[:80]!r} of {repo}, expected {revision}")
    if not DIGEST.fullmatch(etag):
        raise InputError(f"{hub} gives {name} of {repo} the ETag {etag[:80]!r}, expected a digest")
    return _Remote(repo, name, url, commit, etag, answer.size)


def _url(repo: str, name: str, revision: str) -> str:
    from huggingface_hub import constants, hf_hub_url

    kind = "dataset" if _is_dataset(repo) else "model"
    repo = repo.removeprefix("datasets/") if _is_dataset(repo) else repo
    hub = constants.ENDPOINT
    return hf_hub_url(repo, name, repo_type=kind, revision=revision, endpoint=hub)


def _look_up_seconds() -> float:
    return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or LOOK_UP_SECONDS)


def _fetch(remote: _Remote, snapshot: _Snapshot, token: str | bool) -> Path | None:
    """Have one file in the snapshot, right to the last byte; one process downloads, others wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    expected = snapshot.digests.get(remote.name, remote.etag)
    if len(remote.etag) == len(expected) and remote.etag != expected:
        other = f"{constants.ENDPOINT} has another {remote.name} of {remote.repo}"
        raise InputError(f"{other}: SHA-256 {remote.etag}, expected {expected}")
    blob, path = snapshot.storage / "blobs" / remote.etag, snapshot.folder / remote.name
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / snapshot.storage.name / f"{remote.etag}.lock"
    with _explained(remote.repo, remote.commit, remote.name):
        for parent in (blob.parent, path.parent, lock.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not snapshot.find(remote.name, remote.etag):
                if path.is_file():
                    logger.warning("%s is damaged (%s)", path, files.describe(path))
                if not blob.is_file() or _digest(blob, expected) != expected:
                    _fill(blob, remote, expected, token)
                _link(blob, path)
    return snapshot.find(remote.name, remote.etag)


def _fill(blob: Path, remote: _Remote, expected: str, token: str | bool) -> None:
    """Download a file and name it `blob` once its digest is right; wrong bytes get one more try."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    for last_try in (False, True):
        _receive(remote, partial, token)
        if (got := _digest(partial, expected)) == expected:
            files.sync(partial)
            partial.replace(blob)
            return
        looks = f"{remote.name} of {remote.repo} came as {files.describe(partial)}"
        problem = f"{looks}, digest {got}, expected {expected}"
        partial.unlink()
        if last_try:
            raise InputError(f"{problem}: try again, or check HF_ENDPOINT and proxy")
        logger.warning("%s; downloading it once more", problem)


def _receive(remote: _Remote, partial: Path, token: str | bool) -> None:
    """Append to `partial` what it lacks, from where this or an earlier run was broken off.

    A full disk removes it again, a lost connection does not.
    """
    try:
        with partial.open("ab") as file:
            if remote.size is None or file.tell() > remote.size:
                file.seek(file.truncate(0))
            missing, free = (remote.size or 0) - file.tell(), shutil.disk_usage(partial.parent).free
            if missing > free:
                raise OSError(errno.ENOSPC, f"{missing:,} bytes to come, {free:,} free")
            _retry(
                lambda: _receive_rest(remote, file, token),
                f"downloading {remote.name} of {remote.repo}",
                tries=DOWNLOAD_TRIES,
                progress=file.tell,
            )
    except OSError as problem:
        if not isinstance(problem, _http_error()):
            partial.unlink(missing_ok=True)
        raise


def _receive_rest(remote: _Remote, file: BinaryIO, token: str | bool) -> None:
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
        style = {"desc": remote.name, "unit": "B", "unit_scale": True, "disable": None}
        with tqdm(total=remote.size, initial=start, **style) as bar:
            for chunk in answer.iter_bytes():
                bar.update(file.write(chunk))
                if remote.size is not None and file.tell() > remote.size:
                    return  # the digest will tell; an endless answer must not fill the disk


def _link(blob: Path, path: Path) -> None:
    """Make `path` stand for `blob`, in one step."""
    temporary = path.with_name(f".{path.name}.{blob.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:  # Windows without the right to make links: the client moves the file there, too
        blob.replace(temporary)
    temporary.replace(path)


def _sweep(blobs: Path) -> None:
    """Remove what downloads broken off more than a day ago have left, the client's included."""
    for left in blobs.glob("*.incomplete"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                left.unlink()
                logger.info("removed %s, left of a download that was broken off", left)


def _digest(path: Path, like: str) -> str:
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


def _retry(
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
    begun, failures, reached = time.monotonic(), 0, progress()
    while True:
        try:
            return action()
        except _http_error() as problem:
            failures = 1 if progress() > reached else failures + 1
            reached = progress()
            wait = _wait_seconds(problem, failures)
            if wait is None or failures == tries or time.monotonic() - begun > patience:
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


def _http_error() -> type[Exception]:
    """The base of all that the client's HTTP library raises: httpx or httpx2, by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _brief(problem: Exception) -> str:
    response = getattr(problem, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    text = "".join(letter if letter.isprintable() else " " for letter in str(problem)[:200])
    return f"{type(problem).__name__}: {text}".rstrip(": ")


@contextmanager
def _explained(repo: str, revision: str, name: str) -> Iterator[None]:
    """Turn what client, HTTP library and file system raise into one line for the user."""
    try:
        yield
    except InputError:
        raise
    except (_http_error(), OSError) as problem:
        raise _explanation(problem, repo, revision, name) from problem


def _explanation(problem: Exception, repo: str, revision: str, name: str) -> InputError:
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, errors.RevisionNotFoundError):
        return NotFoundError(f"{repo} has no revision {revision}: see {hub}/{repo}/commits/main")
    if isinstance(problem, errors.GatedRepoError) or status == 403:
        terms = f"accept the terms at {hub}/{repo}"
        return InputError(f"{repo} is not open to you: {terms} and run `hf auth login`")
    if isinstance(problem, errors.RepositoryNotFoundError):
        private = "if it is private, run `hf auth login`"
        here = "" if _is_dataset(repo) else f"folder {repo} and no model "
        return NotFoundError(f"there is no {here}{repo} on {hub}: {private}")
    if status == 401:
        return InputError(f"{hub} refuses your token for {repo}: run `hf auth login`")
    if status is not None and status not in TRY_AGAIN:
        proxy = "check HF_ENDPOINT and proxy"
        return InputError(f"{hub} answered HTTP {status} for {name} of {repo}: {proxy}")
    if isinstance(problem, _http_error()):
        return _Unreachable(f"cannot get {name} of {repo} from {hub} ({_brief(problem)})")
    place = "see to room and rights there, or set HF_HOME to another folder"
    return InputError(f"cannot store {name} of {repo} in {cache} ({problem}): {place}")
