"""The entrance: a model or data of the Hub as a folder, from its cache or downloaded.

Knows names, commits and digests, nothing of what the files mean.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import InputError, NotFoundError
from ..system import files
from .client import (
    UnreachableError,
    hub_cache,
    is_offline,
    prepare_client,
    prepare_requests,
)
from .download import download_dataset, download_model
from .names import COMMIT, HUB_ID, checked_revision, parse_dataset_path
from .pins import ids_of, public_model
from .snapshot import (
    MODEL_FILES,
    DatasetFile,
    cached_dataset,
    cached_model,
    shard_names,
    storage_of,
)

__all__ = [
    "MODEL_FILES",
    "cached_folder",
    "dataset_files",
    "model_folder",
    "require_source",
    "revision_of",
    "shard_names",
]
logger = logging.getLogger(__name__)
T = TypeVar("T")


def model_folder(
    source: str | Path, revision: str | None = None, *, with_weights: bool = True
) -> Path:
    """The folder that holds a model's config, weights and tokenizer files, downloaded if need be;
    without its weights where they are not asked for.

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
    prepare_client()
    copies = (cached_model(id, revision, with_weights) for id in ids_of(repo))
    return _cached_or_downloaded(
        next(filter(None, copies), None),
        revision,
        lambda: download_model(repo, revision, with_weights),
        missing=f"{repo} is not in the cache {hub_cache()} nor a folder here"
        f"{files.did_you_mean(Path(repo), folders_only=True)}",
    )


def cached_folder(source: str | Path) -> Path | None:
    """The folder of a model that is here, as a folder or whole in the Hub's cache, at the revision
    that `model_folder` takes; None where that would have to ask somebody.

    Raises what `model_folder` raises of a source that is no folder and no Hub id.
    """
    if str(source) and Path(source).is_dir():
        return Path(source)
    repo, revision = _address(source, None)
    prepare_client()
    return next(filter(None, (cached_model(id, revision) for id in ids_of(repo))), None)


def revision_of(source: str | Path, folder: Path) -> str | None:
    """The revision at which `model_folder` finds a source in this folder once more: the commit of a
    Hub id, though its branch moves on; None for a source that is a folder.
    """
    return None if Path(source).is_dir() else folder.name


def dataset_files(path: str, suffixes: Sequence[str]) -> list[DatasetFile]:
    """The files that a path in a dataset of the Hub stands for, downloaded if need be, with labels.

    `path` is hf://datasets/OWNER/NAME[@REVISION][/PATH]: the revision a commit, branch or tag with
    its "/" as %2F; PATH a file, a folder, or a glob in which `**` is any number of folders. A file
    is taken whatever its name is, of folders and globs those that end in one of `suffixes` and are
    not hidden, of a whole repository not its card. A label is the path with its commit; the list is
    sorted by it. What was listed and downloaded before serves without network, as with
    `model_folder`. Raises NotFoundError or InputError for what is wrong with path, network, server
    or disk, or if nothing is found.
    """
    wanted = parse_dataset_path(path, tuple(suffixes))
    prepare_client()
    return _cached_or_downloaded(
        cached_dataset(wanted),
        wanted.revision,
        lambda: download_dataset(wanted),
        missing=f"{path} is not, or not whole, in the cache {hub_cache()}",
    )


def require_source(source: str | Path) -> None:
    """Raise what `model_folder` raises of a source that is no folder and no Hub id, so that it is
    said before anything heavy is imported, read or asked.
    """
    if not (str(source) and Path(source).is_dir()):
        _address(source, None)


def _address(source: str | Path, revision: str | None) -> tuple[str, str]:
    """(Hub id, revision) of a source that is not a folder.

    OWNER/NAME is taken for a folder here if there is a folder OWNER, unless it is in the cache.
    """
    if Path(source).is_file():
        raise InputError(f"{source} is a file, expected a model folder or a Hub id such as gpt2")
    near = files.did_you_mean(Path(source), folders_only=True)
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise NotFoundError(
            f"there is no folder {str(source)!r}{near}, nor is it a Hub id such as gpt2"
        )
    owner = source.rpartition("/")[0]
    if owner and not public_model(source) and Path(owner).is_dir() and not _is_cached(source):
        raise NotFoundError(
            f"there is no folder {source}{near}; the Hub is not asked for it, because there is a "
            f"folder {owner} here"
        )
    if revision is None:
        known = public_model(source)
        return source, known.commit if known else "main"
    return source, checked_revision(revision)


def _is_cached(repo: str) -> bool:
    """Whether anything of a repository was downloaded before."""
    prepare_client()
    return storage_of(repo).is_dir()


def _cached_or_downloaded(
    cached: T | None, revision: str, download: Callable[[], T], *, missing: str
) -> T:
    """What the cache has, if that is sure to be right or there is no better; else the download."""
    if cached and (COMMIT.fullmatch(revision) or is_offline()):
        return cached
    if is_offline():
        raise NotFoundError(f"HF_HUB_OFFLINE is set and {missing}: unset it or pass a local folder")
    try:
        prepare_requests()
        return download()
    except UnreachableError as problem:
        if cached is None:
            advice = "run once with network or pass a local folder"
            raise InputError(f"{problem}, and {missing}: {advice}") from problem
        logger.warning("%s; using the copy in the cache %s", problem, hub_cache())
        return cached
