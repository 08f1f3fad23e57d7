"""Which files hold text: found by paths, folders, globs, hf://datasets/... and stdin.

Knows names, not what is in a file, but for a .json, whether its first row has text, and for what a
glob matches, whether it begins as text does. What is left out of folders and globs is counted.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError, NotFoundError
from ...hub.folders import dataset_files
from ...system.files import did_you_mean
from ...system.streams import read_stdin
from ..options import TextConfig
from .documents import chunks_of
from .files import (
    CHUNK_BYTES,
    PACKINGS,
    START_BYTES,
    NoTextError,
    Source,
    UnpackedFile,
    require_regular,
    suffixes_of,
)
from .left_out import LeftOut, Tally, reasons_in_words
from .papers import PAPER_READERS, missing_reader
from .rows import ROW_READERS, NoRowsError
from .walk import NOWHERE, VANISHED, Walk, is_folder

logger = logging.getLogger(__name__)

DEFAULT = TextConfig()
TEXT = (".txt", ".md", ".rst", ".tex", ".html", ".htm")
ROWS = tuple(ROW_READERS)
CODE = (
    ".py .pyi .js .jsx .mjs .ts .tsx .java .kt .scala .cs .swift .c .h .cc .cpp .cxx .hh .hpp .cu "
    ".go .rs .zig .jl .r .rb .php .pl .lua .dart .hs .ml .ex .exs .erl .clj .lisp .sh .bash .ps1 "
    ".sql .css .vue"
)
PAPERS = tuple(PAPER_READERS)
SUFFIXES = (*TEXT, *ROWS, *PAPERS, *CODE.split())  # that folders are searched for, packed or not
ENDINGS = [  # of the Hub, where papers are named one by one
    suffix + packing for suffix in SUFFIXES if suffix not in PAPERS for packing in ("", *PACKINGS)
]
NO_SUFFIX = "no suffix of text; a glob takes what is text"
EMPTY = "empty"
TWICE = "the same file as another"
MOST_REASONS = 4  # in an error
MOST_BEGUN = 100  # files that are looked into before anything is downloaded


@dataclass(frozen=True)
class Found:
    """The files that hold text, sorted by label, and what lay there that was not taken."""

    sources: tuple[Source, ...]
    left_out: tuple[LeftOut, ...] = ()


def find_sources(
    paths: Sequence[str | Path] | str | Path,
    *,
    spool: Path | None = None,
    text: TextConfig = DEFAULT,
) -> Found:
    """What files, folders, globs (also with `**`), "-" and hf://datasets/... name, each file once.

    Folders are searched for SUFFIXES at any depth, without hidden files; a .json there, or of a
    glob, counts if its first row has the text field. What is named itself may have any suffix, and
    what a glob matches too, if it begins as text does. Of folders and globs, runs of our own,
    models and token caches are no text. "-" is text from stdin, copied into the folder `spool`.
    Raises NotFoundError for a path that leads to no file, InputError for what cannot be read.
    """
    found, left_out = list[Source](), Tally()
    for given in [paths] if isinstance(paths, str | Path) else paths:
        if str(given) == "-":
            assert spool is not None, "text from stdin needs a folder to be kept in"
            found.append(_copy_stdin(spool))
        elif str(given).startswith("hf://"):
            pairs = dataset_files(str(given), ENDINGS)
            sources = [_source(path, label) for label, path in pairs]
            several = len(sources) > 1
            found += _without_other_json(sources, text, left_out) if several else sources
        else:
            found += _local_sources(given, text, left_out)
    once: dict[Path | str, Source] = {}
    for source in sorted(found, key=lambda source: source.label):
        # In the Hub's cache, equal files of a dataset are one file.
        remote = source.label.startswith("hf://")
        first = once.setdefault(source.label if remote else source.path.resolve(), source)
        if first.label != source.label:
            left_out.add(source.label, TWICE)
    sources = tuple(once.values())
    return Found(sources, left_out.all(but={source.label for source in sources}))


def require_local(paths: Sequence[str | Path], text: TextConfig | None = None) -> None:
    """Raise what `find_sources` raises of paths on this machine that lead to no file, and with a
    `text` also what `read_documents` raises of how the first files begin, so that it is said before
    anything is downloaded.
    """
    found: list[Source] = []
    for given in paths:
        if str(given) != "-" and not str(given).startswith("hf://"):
            found += _local_sources(given, None, Tally())
    for source in found[:MOST_BEGUN] if text else []:
        with suppress(NoRowsError) if suffixes_of(source.label)[0] == ".json" else nullcontext():
            next(chunks_of(UnpackedFile(source, START_BYTES), text or DEFAULT), None)


def _source(path: Path, label: str) -> Source:
    try:
        status = path.stat()
    except OSError as problem:
        raise InputError(f"{label} cannot be read: {problem.strerror}") from problem
    require_regular(label, status.st_mode)
    return Source(path, label, status.st_size)


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


def _local_sources(given: str | Path, text: TextConfig | None, left_out: Tally) -> list[Source]:
    """The files that a path on this machine leads to; without a `text` no .json is looked into."""
    if not str(given).strip() and not os.path.lexists(given):
        raise InputError(
            "the path of a text is empty: name a file, folder or glob; . is this folder"
        )
    path, here = _path_here(given), Tally()
    mode = _mode(path)
    if mode is not None and not stat.S_ISDIR(mode):
        return [_source(path, str(path))]
    if mode is not None:
        found = _texts_below(path, text, here, strict=True)
    else:
        found = _globbed(path, text, here)
    left_out.merge(here)
    if not found:
        raise _nothing(path, given, mode is not None, here)
    return found


def _path_here(given: str | Path) -> Path:
    """A path with the characters that it has here: one that a run recorded elsewhere may have some
    that the encoding of names does not have, as ASCII in a C locale.
    """
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        return Path(os.fsdecode(str(given).encode("utf-8", "surrogateescape")))
    return Path(given)


def _mode(path: Path) -> int | None:
    """What a path is; None where nothing is, so that it may be a glob."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if path.is_symlink():
            raise InputError(f"{path} cannot be read: it is a link that {NOWHERE}") from None
    except OSError as problem:
        if problem.errno != errno.EINVAL:  # Windows has no such names as *.txt
            raise InputError(f"{path} cannot be read: {problem.strerror}") from problem
    return None


def _texts_below(
    folder: Path, text: TextConfig | None, left_out: Tally, *, strict: bool
) -> list[Source]:
    found = []
    for file in Walk(left_out).files_below(folder, strict=strict):
        suffix = suffixes_of(file.name)[0]
        if suffix not in SUFFIXES:
            left_out.add(file, NO_SUFFIX)
        elif source := _filled(file, left_out):
            found.append(source)
    return _without_other_json(found, text, left_out) if text else found


def _globbed(pattern: Path, text: TextConfig | None, left_out: Tally) -> list[Source]:
    found, below = [], []
    for match in Walk(left_out).matches(pattern):
        if is_folder(match):
            below += _texts_below(match, text, left_out, strict=False)
        elif (source := _filled(match, left_out)) and _begins_as_text(source, left_out):
            found.append(source)
    return [*(_without_other_json(found, text, left_out) if text else found), *below]


def _filled(file: Path, left_out: Tally) -> Source | None:
    """A file that was come upon; None for one that nothing here reads, that holds nothing, or is
    gone already.
    """
    if install := missing_reader(file.name):
        left_out.add(file, install)
        return None
    try:
        source = _source(file, str(file))
    except InputError:
        if os.path.lexists(file):
            raise
        left_out.add(file, VANISHED)
        return None
    if source.size:
        return source
    left_out.add(file, EMPTY)
    return None


def _begins_as_text(source: Source, left_out: Tally) -> bool:
    """Whether a file that a glob matches is no image or the like; those with a suffix of text are
    to be text.
    """
    if suffixes_of(source.label)[0] in SUFFIXES:
        return True
    try:
        next(UnpackedFile(source, START_BYTES).texts(), None)
    except NoTextError as problem:
        left_out.add(source.label, problem.kind.removesuffix(": leave it out"))
        return False
    except InputError:
        pass  # text that is damaged, which reading it will say
    return True


def _nothing(path: Path, given: str | Path, is_folder: bool, left_out: Tally) -> NotFoundError:
    """What to say of a path that leads to no text."""
    reasons = "; ".join(list(reasons_in_words(left_out.all()))[:MOST_REASONS])
    left = f"; left out: {reasons}" * bool(reasons)
    if is_folder:
        suffixes = ", ".join(TEXT + ROWS + PAPERS)
        return NotFoundError(f"{given} has no {suffixes} file: name others by a glob{left}")
    if reasons:
        return NotFoundError(f"{given} matches no file of text{left}")
    if "://" in str(given):
        return NotFoundError(f"{given} is no hf://datasets/ path: download it and name the file")
    return NotFoundError(
        f"{given} does not exist and matches no file{did_you_mean(path)}: check its spelling"
    )


def _without_other_json(
    sources: Sequence[Source], text: TextConfig, left_out: Tally
) -> list[Source]:
    """All but package.json and the like, which lie beside text but hold none."""
    found = []
    for source in sources:
        if _is_other_json(source, text):
            left_out.add(source.label, f"no field {text.text_field!r}; --text-field names another")
        else:
            found.append(source)
    return found


def _is_other_json(source: Source, text: TextConfig) -> bool:
    if suffixes_of(source.label)[0] != ".json":
        return False
    try:
        next(chunks_of(UnpackedFile(source, CHUNK_BYTES), text), None)
    except NoRowsError:
        return True
    return False
