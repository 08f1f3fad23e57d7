"""What lies below folders and what globs match: each folder once, also where links lead to it.

Knows names; runs of our own, models of Hugging Face and token caches it tells by the names of their
files.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from ...runs import kept
from ...system.files import cache_folder
from .left_out import FOLDER, Tally

HIDDEN = "hidden"
RUN = "a run of minigpt2"
MODEL = "a model"
TOKENIZER = "a tokenizer"
CACHE = "a cache of tokens"
UNREADABLE = "cannot be read"
VANISHED = "gone before it was read"
NOWHERE = "leads nowhere"
KNOWN = "leads to a folder that is read already"
LOOP = "leads to a folder that it lies in"
SPECIAL = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}

BESIDE_RUN = {"checkpoints", "metrics.jsonl"}  # run.json, before and after a run has ended
CHECKPOINT = {"manifest.json", "state.json"}
WEIGHTS = {
    *("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
}
TOKENIZER_FILES = {
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
}
MODEL_FILES = TOKENIZER_FILES | WEIGHTS | {"README.md"}  # and what else is .json there
RUN_FILES = {
    *("run.json", "run.lock", "run.owner", "metrics.jsonl", "samples.jsonl", "loss.svg"),
    *("loss.png", "report.html", "checkpoints", "merged", "tensorboard"),
    *(kept.TEXTS, kept.BASE, *CHECKPOINT),
}


class Entry(NamedTuple):
    """What a folder lists."""

    path: Path
    is_folder: bool
    kind: str  # if it is neither file nor folder
    why_not: str  # why it is not taken; "" if it may be


class Walk:
    """Finds files below folders and by globs, and counts what of it is left out.

    Folders that cannot be read are an InputError below a folder that was named, which then is meant
    as a whole, and are counted among what a glob matches.
    """

    def __init__(self, left_out: Tally) -> None:
        self._left_out = left_out
        self._cache = _identity(cache_folder("tokens"))

    def files_below(self, top: Path, *, strict: bool = True) -> list[Path]:
        """All files at any depth, but for hidden ones and those of runs, models and caches."""
        found = []
        for _, entries in self._tree(top, self._listed(top, strict, is_top=True), strict):
            for entry in entries:
                if entry.is_folder:
                    continue
                if entry.why_not:
                    self._leave_out(entry)
                else:
                    found.append(entry.path)
        return sorted(found)

    def matches(self, pattern: Path) -> list[Path]:
        """The files and folders that a glob matches, in which `**` is any number of folders; names
        that begin with a dot only where the pattern says so.
        """
        parts = pattern.parts
        n_fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        if n_fixed == len(parts):
            return []
        top = Path(*parts[:n_fixed])
        try:
            top.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return []
        except OSError:
            pass  # which listing it will say
        entries = self._listed(top, False, is_top=True)
        return sorted(dict.fromkeys(self._matches(top, entries, parts[n_fixed:])))

    def _matches(
        self, place: Path, entries: Sequence[Entry], parts: Sequence[str]
    ) -> Iterator[Path]:
        part, *rest = parts
        if part == "**":
            for below, inside in self._tree(place, entries, strict=False):
                inside = inside if rest else [e for e in inside if not e.is_folder]
                yield from self._matches(below, inside, rest or ["*"])
            return
        for entry in _named(place, entries, part):
            if entry.why_not and not (entry.why_not == HIDDEN and part.startswith(".")):
                self._leave_out(entry)
            elif entry.is_folder and entry.path.is_symlink() and _leads_up(entry.path):
                self._left_out.add(entry.path, LOOP, "link")
            elif not rest:
                yield entry.path
            elif entry.is_folder:
                yield from self._matches(entry.path, self._listed(entry.path, False), rest)

    def _tree(
        self, top: Path, entries: Sequence[Entry], strict: bool
    ) -> Iterator[tuple[Path, Sequence[Entry]]]:
        """A folder and all below it, with what they list: those that are linked last, and only if
        they were not met before.
        """
        seen, links = {_identity(top)}, list[Entry]()
        waiting = [(top, entries)]
        while waiting or links:
            if not waiting:
                link = links.pop(0)
                known = (identity := _identity(link.path)) in seen
                if known or _leads_up(link.path):
                    self._left_out.add(link.path, KNOWN if known else LOOP, "link")
                    continue
                seen.add(identity)
                waiting.append((link.path, self._listed(link.path, strict)))
            place, entries = waiting.pop()
            yield place, entries
            for entry in entries:
                if not entry.is_folder:
                    continue
                if entry.why_not:
                    self._leave_out(entry)
                elif entry.path.is_symlink():
                    links.append(entry)
                elif (identity := _identity(entry.path)) not in seen:
                    seen.add(identity)
                    waiting.append((entry.path, self._listed(entry.path, strict)))

    def _listed(self, place: Path, strict: bool, *, is_top: bool = False) -> list[Entry]:
        """What a folder lists, sorted; nothing of one that is a run or cache as a whole, unless it
        is where the search begins: then only what is known to belong to it is not taken.
        """
        try:
            with os.scandir(place) as found:
                listed = sorted(found, key=lambda entry: entry.name)
        except OSError as problem:
            reason = f"{UNREADABLE}: {problem.strerror}"
            if strict:
                raise InputError(f"{place} {reason}") from problem
            self._left_out.add(place, reason, FOLDER)
            return []
        names = {entry.name for entry in listed}
        kind = CACHE if _identity(place) == self._cache else _kind_of_folder(names)
        if kind in (RUN, CACHE) and not is_top:
            self._left_out.add(place, kind, FOLDER)
            return []
        entries = [_entry(place, entry, kind) for entry in listed]
        for entry in entries if strict else []:
            if entry.why_not.startswith(UNREADABLE):
                raise InputError(f"{entry.path} {entry.why_not}")
        return entries

    def _leave_out(self, entry: Entry) -> None:
        kind = FOLDER if entry.is_folder else entry.kind
        self._left_out.add(entry.path, entry.why_not, kind)


def is_folder(path: Path) -> bool:
    """Whether a folder is there; False also where that cannot be known."""
    with suppress(OSError):
        return stat.S_ISDIR(path.stat().st_mode)
    return False


def kind_of_special(mode: int) -> str:
    """What that is which is neither a file nor a folder, by its mode."""
    return SPECIAL.get(stat.S_IFMT(mode), "device")


def _kind_of_folder(names: Collection[str]) -> str:
    """What a folder is, by the names in it; "" if it is any."""
    names = {*names}
    is_run = "run.owner" in names or ("run.json" in names and names & BESIDE_RUN)
    if is_run or names >= CHECKPOINT:
        return RUN
    if names >= {"corpus.json", "train.bin"}:
        return CACHE
    if names & WEIGHTS and names & {"config.json", "adapter_config.json"}:
        return MODEL
    has_tokens = "tokenizer.json" in names or names >= {"vocab.json", "merges.txt"}
    return TOKENIZER if has_tokens else ""


def _belongs(name: str, kind: str) -> bool:
    """Whether an entry of a folder of this kind is part of what makes it one."""
    if kind in ("", TOKENIZER):
        return bool(kind) and name in TOKENIZER_FILES
    if kind == CACHE or (kind == RUN and name in RUN_FILES):
        return True
    return name in MODEL_FILES or name.endswith(".json")


def _entry(place: Path, entry: os.DirEntry[str], kind: str) -> Entry:
    path, why_not, special = place / entry.name, "", ""
    is_folder = False
    if entry.name.startswith("."):
        why_not = HIDDEN
    elif _belongs(entry.name, kind):
        why_not = kind
    try:
        is_folder = entry.is_dir()
        if not is_folder and not entry.is_file():
            special = kind_of_special(path.stat().st_mode)
            why_not = "no regular file"
    except FileNotFoundError:
        special, why_not = ("link", NOWHERE) if entry.is_symlink() else ("", VANISHED)
    except OSError as problem:
        why_not = f"{UNREADABLE}: {problem.strerror}"
        if problem.errno == errno.ELOOP:
            special, why_not = "link", NOWHERE
    return Entry(path, is_folder, special, why_not)


def _named(place: Path, entries: Sequence[Entry], part: str) -> list[Entry]:
    """The entries that one part of a pattern matches; what is called just so comes before that."""
    same = [entry for entry in entries if entry.path.name == part]
    if same or not glob.has_magic(part):
        if same or part != "..":
            return same
        return [Entry(place / part, True, "", "")]
    names = {*fnmatch.filter([entry.path.name for entry in entries], part)}
    return [entry for entry in entries if entry.path.name in names]


def _leads_up(link: Path) -> bool:
    """Whether a link leads to a folder that it lies in, so that following it would never end."""
    return link.parent.resolve().is_relative_to(link.resolve())


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None
