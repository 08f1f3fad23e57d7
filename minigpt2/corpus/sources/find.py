"""Which files hold text: found by paths, folders, globs, hf://datasets/... and stdin.

Knows names, not what is in a file, but for a .json: whether its first row has text.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

from ...errors import InputError, NotFoundError
from ...hub.folders import dataset_files
from ...system.files import did_you_mean
from ...system.streams import read_stdin
from ..options import TextConfig
from .documents import chunks_of
from .files import CHUNK_BYTES, PACKINGS, START_BYTES, Source, UnpackedFile, suffixes_of
from .rows import ROW_READERS, NoRowsError

logger = logging.getLogger(__name__)

DEFAULT = TextConfig()
TEXT = (".txt", ".md", ".rst", ".tex", ".html", ".htm")
ROWS = tuple(ROW_READERS)
CODE = (
    ".py .pyi .js .jsx .mjs .ts .tsx .java .kt .scala .cs .swift .c .h .cc .cpp .cxx .hh .hpp .cu "
    ".go .rs .zig .jl .r .rb .php .pl .lua .dart .hs .ml .ex .exs .erl .clj .lisp .sh .bash .ps1 "
    ".sql .css .vue"
)
SUFFIXES = (*TEXT, *ROWS, *CODE.split())  # that folders are searched for, packed or not
ENDINGS = [suffix + packing for suffix in SUFFIXES for packing in ("", *PACKINGS)]
MOST_BEGUN = 100  # files that are looked into before anything is downloaded


def find_sources(
    paths: Sequence[str | Path] | str | Path,
    *,
    spool: Path | None = None,
    text: TextConfig = DEFAULT,
) -> list[Source]:
    """What files, folders, globs (also with `**`), "-" and hf://datasets/... name, sorted by label,
    each file once.

    Folders are searched for SUFFIXES at any depth, without hidden files; a .json there counts if
    its first row has the text field. What is named itself or by a glob may have any suffix. "-" is
    text from stdin, copied into the folder `spool`. Raises NotFoundError for a path that leads to
    no file, InputError for what cannot be read.
    """
    found: list[Source] = []
    for given in [paths] if isinstance(paths, str | Path) else paths:
        if str(given) == "-":
            assert spool is not None, "text from stdin needs a folder to be kept in"
            found.append(_copy_stdin(spool))
        elif str(given).startswith("hf://"):
            pairs = dataset_files(str(given), ENDINGS)
            sources = [_source(path, label) for label, path in pairs]
            found += _without_other_json(sources, text) if len(sources) > 1 else sources
        else:
            found += _local_sources(given, text)
    once: dict[Path | str, Source] = {}
    for source in sorted(found, key=lambda source: source.label):
        # In the Hub's cache, equal files of a dataset are one file.
        remote = source.label.startswith("hf://")
        once.setdefault(source.label if remote else source.path.resolve(), source)
    return list(once.values())


def require_local(paths: Sequence[str | Path], text: TextConfig | None = None) -> None:
    """Raise what `find_sources` raises of paths on this machine that lead to no file, and with a
    `text` also what `read_documents` raises of how the first files begin, so that it is said before
    anything is downloaded.
    """
    found: list[Source] = []
    for given in paths:
        if str(given) != "-" and not str(given).startswith("hf://"):
            found += _local_sources(given, None)
    for source in found[:MOST_BEGUN] if text else []:
        with suppress(NoRowsError) if suffixes_of(source.label)[0] == ".json" else nullcontext():
            next(chunks_of(UnpackedFile(source, START_BYTES), text or DEFAULT), None)


def _source(path: Path, label: str) -> Source:
    try:
        return Source(path, label, path.stat().st_size)
    except OSError as problem:
        raise InputError(f"{label} cannot be read: {problem.strerror}") from problem


def _copy_stdin(spool: Path) -> Source:
    if sys.stdin is None:
        raise InputError("- is stdin, which is closed here: name a file instead")
    if sys.stdin.isatty():
        logger.info("type the text, and end it with Ctrl-D on a line of its own")
    path = spool / "stdin"
    try:
        with path.open("xb") as file:
            while data := read_stdin(CHUNK_BYTES):
                file.write(data)
    except FileExistsError:
        raise InputError(
            "- is named twice, and stdin can be read only once: name it once"
        ) from None
    return _source(path, "stdin")


def _local_sources(given: str | Path, text: TextConfig | None) -> list[Source]:
    """The files that a path on this machine leads to; without a `text` no .json is looked into."""
    if given == "":
        raise InputError(
            "the path of a text is empty: name a file, folder or glob; . is this folder"
        )
    path = Path(given)
    # Path.glob takes no absolute pattern, and does not skip hidden files.
    globbed = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
    found: list[Source] = []
    for match in [path] if path.exists() else globbed:
        if match.is_dir():
            below = [_source(file, str(file)) for file in _files_below(match)]
            found += _without_other_json(below, text) if text else below
        else:
            found.append(_source(match, str(match)))
    if not found and path.is_dir():
        raise NotFoundError(f"{given} has no {', '.join(TEXT + ROWS)} file: name others by a glob")
    if not found and "://" in str(given):
        raise NotFoundError(f"{given} is no hf://datasets/ path: download it and name the file")
    if not found:
        raise NotFoundError(
            f"{given} does not exist and matches no file{did_you_mean(path)}: check its spelling"
        )
    return found


def _files_below(folder: Path) -> list[Path]:
    def refuse(problem: OSError) -> NoReturn:
        raise InputError(f"{problem.filename} cannot be read: {problem.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [file for file in files if suffixes_of(file.name)[0] in SUFFIXES]
    return sorted(found)


def _without_other_json(sources: Sequence[Source], text: TextConfig) -> list[Source]:
    """All but package.json and the like, which lie beside text but hold none; says so."""
    others = [source for source in sources if _is_other_json(source, text)]
    if others:
        number = f"{len(others)} .json file{'s' * (len(others) > 1)}"
        logger.info(
            "left out %s, such as %s, without a field '%s': --text-field names another",
            number,
            others[0].label,
            text.text_field,
        )
    left_out = set(others)
    return [source for source in sources if source not in left_out]


def _is_other_json(source: Source, text: TextConfig) -> bool:
    if suffixes_of(source.label)[0] != ".json":
        return False
    try:
        next(chunks_of(UnpackedFile(source, CHUNK_BYTES), text), None)
    except NoRowsError:
        return True
    return False
