"""Names on the Hub as patterns: ids, revisions, files, and globs in data sets."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from urllib.parse import unquote

from ..errors import InputError

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
# of a small file (Git blob) or a large one (SHA-256)
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_dataset(repo: str) -> bool:
    """True for datasets/OWNER/NAME; a model is NAME or OWNER/NAME."""
    return repo.count("/") == 2


def checked_revision(revision: str) -> str:
    """A revision as it is, which is part of paths here; InputError for what cannot be one."""
    if not REVISION.fullmatch(revision):
        raise InputError(
            f"revision {revision!r} cannot be the name of a commit, branch or tag: give one as its "
            "page on the Hub lists it, such as main"
        )
    return revision


@dataclass(frozen=True)
class DatasetPath:
    """What a path in a dataset stands for: a glob, or a file or folder where no * is in it."""

    repo: str
    """datasets/OWNER/NAME."""
    revision: str
    glob: str
    suffixes: tuple[str, ...]
    """Of files that hold data."""

    @property
    def parts(self) -> list[str]:
        return self.glob.split("/")

    @property
    def is_glob(self) -> bool:
        return WILD.search(self.glob) is not None

    @property
    def folders_above(self) -> list[str]:
        """The folders that the glob says without * ? [, from the top."""
        return list(takewhile(lambda part: not WILD.search(part), self.parts))

    def fits(self, name: str) -> bool:
        """Whether a file of the repository is one that the glob means."""
        return name == self.glob or matches(name.split("/"), self.parts)

    def data_files(self, names: Iterable[str]) -> list[str]:
        """Of the files that the glob fits those which hold data, sorted."""
        if (names := sorted(names)) == [self.glob]:
            return names
        loader = f"{self.repo.rsplit('/', 1)[-1]}.py"
        about = ("README.md", "dataset_infos.json", loader) if self.glob == "**" else ()
        return [n for n in names if n not in about and n.lower().endswith(self.suffixes)]


def parse_dataset_path(path: str, suffixes: tuple[str, ...]) -> DatasetPath:
    """hf://datasets/OWNER/NAME[@REVISION][/PATH] in its parts; InputError for what is no such."""
    parts = DATASET.fullmatch(path)
    if parts is None or not HUB_ID.fullmatch(parts[1]):
        expected = "expected hf://datasets/OWNER/NAME[@REVISION][/PATH]"
        raise InputError(f"{path!r} leads to no dataset of the Hub: {expected}")
    revision = "main" if parts[2] is None else checked_revision(unquote(parts[2]))
    name = (parts[3] or "").strip("/")
    if name and not FILE_PATH.fullmatch(name):
        raise InputError(
            f"{path!r} has an empty name, a . or .. or a foreign letter in its path: give the path "
            "as the page of the dataset lists it"
        )
    return DatasetPath(f"datasets/{parts[1]}", revision, name or "**", suffixes)


def matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a file's path fits a glob, both cut at "/"; names with a leading dot are hidden."""
    if pattern == ["**"]:
        return bool(parts) and not any(part.startswith(".") for part in parts)
    if not parts or not pattern:
        return not parts and not pattern
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or (not hidden and matches(parts[1:], pattern))
    return not hidden and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
