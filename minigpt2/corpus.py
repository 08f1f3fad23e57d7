"""From files of text to a training part and a held-out part, as token ids on disk. Knows documents
and a tokenizer's ids, nothing of models and batches.

Text is read in chunks and tokenized by several processes, so neither size nor number of files is
limited by memory; what comes out depends on the text and the options alone. It is kept in a folder
named by a hash of both, so whatever changes one of them makes a new folder. All these folders can
be deleted at any time.

    python -m minigpt2.corpus PATHS     prepares text and reports what is in it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from .duplicates import near_duplicates
from .encoding import DRAFT, TextTokenizer, tokenize
from .errors import InputError
from .files import cache_folder, lock, read_json, sync, write_json
from .options import TextConfig
from .sources import Source, find_sources
from .split import hold_out
from .tokens import BLOCK_BYTES, DOCUMENT, TokenFile, dtype_for, file_sha256, write_token_file

logger = logging.getLogger(__name__)

DEFAULT = TextConfig()
FORMAT = 3  # raise it when the same text and options would give other files
LOCKS = ".locks"
WHOLE = "corpus.json"  # written last: the folder is complete


@dataclass(frozen=True, eq=False)
class Corpus:
    """The text to train on and the text held out, which share no document (or no token, where one
    document had to be cut), and how much both are.
    """

    train: TokenFile
    val: TokenFile | None
    n_documents: int  # that are not empty and were kept
    n_characters: int
    n_tokens: int  # with one end-of-text per document
    counts: Mapping[str, int] = field(default_factory=dict)  # of what was found and changed

    @property
    def identity(self) -> str:
        """The same for equal training and held-out tokens only, wherever they came from."""
        files = [self.train, *([self.val] if self.val else [])]
        prompts = [np.ascontiguousarray(file.documents["prompt"]) for file in files]
        digests = [
            hashlib.sha256(lengths.tobytes()).hexdigest() for lengths in prompts if lengths.any()
        ]
        return _hash_of([[file.info.sha256 for file in files], digests])[:16]


def prepare(
    paths: Sequence[str | Path],
    tokenizer: TextTokenizer,
    *,
    val_paths: Sequence[str | Path] = (),
    val_fraction: float = 0.1,
    text: TextConfig = DEFAULT,
    workers: int = 1,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Tokenize files, folders or globs, or find that this was done before.

    Held out are `val_paths` if there are any, or else about `val_fraction` of the tokens, in whole
    documents where that is possible (`split.hold_out`). With `workers` above 1 long texts are
    tokenized by as many processes: then call it below `if __name__ == "__main__"`. `cache_dir` is
    by default `default_cache_dir()`. Raises InputError or NotFoundError for files that are missing,
    empty or no text, or change meanwhile.
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}, allowed is from 0 to below 1")
    cache = Path(cache_dir or default_cache_dir())
    with _writable(cache), _spool(cache, paths, val_paths) as spool:
        train = find_sources(paths, spool=spool, text=text)
        val = find_sources(val_paths, spool=spool, text=text) if val_paths else []
        twice = {source.path.resolve() for source in train} & {s.path.resolve() for s in val}
        if twice:
            raise InputError(f"{min(twice)} is both training and held-out text: name it once")
        recipe = _Recipe.of(train, val, 0.0 if val else float(val_fraction), text)
        folder = cache / recipe.key(tokenizer)
        corpus, origin = _open_whole(folder, recipe), ", from cache"
        if corpus is None:
            with _workspace(cache, folder.name) as new:
                corpus = _open_whole(folder, recipe)  # another process may have made it
                if corpus is None:
                    _make(new, recipe, tokenizer, workers)
                    sync(new)
                    new.rename(folder)
                    sync(cache)
                    corpus, origin = _open_whole(folder, recipe), ""
    assert corpus is not None
    _report(corpus, origin)
    return corpus


def default_cache_dir() -> Path:
    """The folder "tokens" of our cache (files.py)."""
    return cache_folder("tokens")


@dataclass(frozen=True)
class _Recipe:
    """What decides, together with a tokenizer, which token files come out."""

    sources: tuple[Source, ...]  # to train on, then those that are held out
    n_train: int
    val_fraction: float
    text: TextConfig
    sha256: tuple[str, ...]  # of the sources' bytes
    stamps: tuple[tuple[int, ...], ...]  # what their sizes and times were before they were read

    @classmethod
    def of(
        cls, train: Sequence[Source], val: Sequence[Source], val_fraction: float, text: TextConfig
    ) -> _Recipe:
        sources = (*train, *val)
        stamps = tuple(_stamp(source) for source in sources)
        hashes = tuple(_content_hash(source) for source in sources)
        return cls(sources, len(train), val_fraction, text, hashes, stamps)

    @property
    def has_own_val(self) -> bool:
        return len(self.sources) > self.n_train

    def key(self, tokenizer: TextTokenizer) -> str:
        """The name of the folder: where the text lies and what its files are called, but for what
        their suffixes say of their format, does not matter.
        """
        kinds = [sorted(_suffixes(source)) for source in self.sources]
        content = [[*pair] for pair in zip(self.sha256, kinds)]
        parts = content[: self.n_train], content[self.n_train :]
        options = [self.val_fraction, asdict(self.text)]
        return _hash_of([FORMAT, tokenizer.identity, options, parts])

    def require_unchanged(self) -> None:
        """Raise InputError for a file that is no longer what it was when its hash was taken."""
        for source, stamp in zip(self.sources, self.stamps):
            if _stamp(source) != stamp:
                raise InputError(f"{source.label} changed while it was read: wait until it is done")


def _suffixes(source: Source) -> set[str]:
    """What says of which format a source is."""
    return set(Path(source.label.lower()).suffixes[-2:])


def _stamp(source: Source) -> tuple[int, ...]:
    with _readable(source):
        status = source.path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _content_hash(source: Source) -> str:
    with _readable(source):
        return file_sha256(source.path)


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise InputError(f"{source.label} cannot be read: {problem.strerror}") from problem


def _make(folder: Path, recipe: _Recipe, tokenizer: TextTokenizer, workers: int) -> None:
    """Fill a folder with the token files of a recipe."""
    ids = folder / "ids.tmp"
    drafts, cleaned = tokenize(ids, recipe.sources, recipe.text, tokenizer, workers)
    recipe.require_unchanged()
    dtype = dtype_for(tokenizer.vocab_size)
    held_out = drafts["source"] >= recipe.n_train
    for empty, first in (
        (held_out.all(), 0),
        (recipe.has_own_val and not held_out.any(), recipe.n_train),
    ):
        if empty:
            where = recipe.sources[first].label if recipe.sources else "no file"
            raise InputError(f"{where}: 0 tokens, there is no text: name files that are not empty")
    kept, dropped = _choose(drafts, held_out, recipe.text, np.memmap(ids, dtype, mode="r"))
    segments = _segments(drafts, kept, held_out, recipe)
    for number, name in enumerate(("train", "val")):
        part = segments[segments["part_of"] == number]
        if not len(part):
            continue
        first_source = recipe.n_train if number and recipe.has_own_val else 0
        write_token_file(
            folder / f"{name}.bin",
            _copied(ids, part, dtype),
            _as_documents(part, first_source),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.identity,
        )
    ids.unlink()
    totals = {
        "n_documents": int(kept.sum()),
        "n_characters": int(drafts["characters"][kept].sum()),
        "n_tokens": int((segments["end"] - segments["start"]).sum()),
    }
    pages = [bool({".html", ".htm"} & _suffixes(source)) for source in recipe.sources]
    dropped["html"] = int(np.array(pages)[drafts["source"][kept]].sum())
    files = sorted(path.stem for path in folder.glob("*.bin"))
    write_json(folder / WHOLE, {"files": files, **totals, "counts": {**cleaned, **dropped}})


def _choose(
    drafts: np.ndarray, held_out: np.ndarray, text: TextConfig, ids: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Which documents are kept, and how many were dropped or are there twice.

    Of copies in both the training text and held-out text of its own, the held-out one counts.
    """
    kept = drafts["characters"] >= text.min_characters
    counts = {"dropped_short": int((~kept).sum())}
    order = np.argsort(~held_out, kind="stable")
    copies = np.zeros(len(drafts), bool)
    seen: dict[bytes, bool] = {}  # key -> in held-out text
    leaked = copies.copy()
    for number in order[kept[order]].tolist():
        key = drafts["key"][number].tobytes()
        copies[number] = key in seen
        leaked[number] = seen.setdefault(key, bool(held_out[number])) and not held_out[number]
    counts["duplicates"] = int(copies.sum())
    drop = copies if text.duplicates != "keep" else leaked
    if n_leaked := int(leaked.sum()):
        some = "1 document" if n_leaked == 1 else f"{n_leaked:,} documents"
        verb = "is" if n_leaked == 1 else "are"
        logger.warning(f"{some} of the training text {verb} held-out text too: left out")
    kept &= ~drop
    counts["dropped_duplicates"] = int(drop.sum())
    if text.duplicates == "drop-near":
        numbers = order[kept[order]]
        starts = np.concatenate([[0], drafts["end"][:-1]])
        bodies = (ids[starts[n] : drafts["end"][n] - 1] for n in numbers.tolist())
        near = numbers[near_duplicates(bodies) >= 0]
        kept[near] = False
        counts["dropped_near_duplicates"] = len(near)
    if held_out.any() and not kept[held_out].any():
        raise InputError("nothing is left to judge by: every document of --val-data is too short")
    if not kept[~held_out].any():
        raise InputError(
            "nothing is left to train on: every document is too short, or held-out text too; lower "
            "--min-characters or give other --val-data"
        )
    return kept, counts


SEGMENT = np.dtype(
    [("start", "<i8"), ("end", "<i8"), ("part_of", "<i4"), ("part", "<i4"), ("draft", DRAFT)]
)


def _segments(
    drafts: np.ndarray, kept: np.ndarray, held_out: np.ndarray, recipe: _Recipe
) -> np.ndarray:
    """Where the tokens of the kept documents lie, and whether they are to train on (part_of 0) or
    held out (1): SEGMENT records, one for each document and two for one that is cut.
    """
    segments = np.zeros(len(drafts), SEGMENT)
    segments["draft"], segments["end"] = drafts, drafts["end"]
    segments["start"][1:] = drafts["end"][:-1]
    segments["part_of"] = held_out
    segments = segments[kept]
    if recipe.has_own_val or not recipe.val_fraction:
        return segments
    lengths = segments["end"] - segments["start"]
    keys = [key.tobytes() for key in segments["draft"]["key"]]
    split = hold_out(lengths, keys, recipe.val_fraction)
    segments["part_of"] = split.held
    if not split.holds_out:
        logger.warning(
            "nothing is held out: the text is too short, or every document is there more than once"
        )
    if (number := split.cut_document) < 0:
        return segments
    both = np.repeat(segments[number : number + 1], 2)
    both["end"][0] = both["start"][1] = both["start"][0] + split.cut_at
    both["part_of"], both["part"] = (0, 1), (1, 2)
    n_prompt = both["draft"]["prompt"][0]
    both["draft"]["prompt"] = min(n_prompt, split.cut_at), max(0, n_prompt - split.cut_at)
    return np.concatenate([segments[:number], both, segments[number + 1 :]])


def _as_documents(segments: np.ndarray, first_source: int) -> np.ndarray:
    documents = np.zeros(len(segments), DOCUMENT)
    documents["end"] = np.cumsum(segments["end"] - segments["start"])
    documents["part"] = segments["part"]
    for name in ("row", "prompt"):
        documents[name] = segments["draft"][name]
    documents["source"] = segments["draft"]["source"] - first_source
    return documents


def _copied(path: Path, segments: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """The bytes of these segments of a file of ids, neighbours in one go."""
    borders = np.flatnonzero(segments["start"][1:] != segments["end"][:-1]) + 1
    starts = segments["start"][[0, *borders]].tolist()
    ends = segments["end"][[*(borders - 1), -1]].tolist()
    with path.open("rb") as file:
        for start, end in zip(starts, ends):
            file.seek(start * dtype.itemsize)
            left = (end - start) * dtype.itemsize
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                left -= len(block)
                yield block


def _open_whole(folder: Path, recipe: _Recipe) -> Corpus | None:
    """What was made of a recipe; None, with a notice, if it is damaged: then it is removed."""
    if not folder.exists():
        return None
    try:
        totals = read_json(folder / WHOLE)
        files = totals.pop("files")
        train = TokenFile.open(folder)
        val = TokenFile.open(folder / "val.bin") if "val" in files else None
        labels = tuple(source.label for source in recipe.sources)
        train = replace(train, sources=labels[: recipe.n_train])
        if val:
            own = labels[recipe.n_train :] if recipe.has_own_val else labels
            val = replace(val, sources=own)
        return Corpus(train, val, **totals)
    except (InputError, KeyError, TypeError) as problem:
        logger.warning("%s: doing that now", problem)
    # Renamed first, so that no other process finds half of it.
    aside = tempfile.mkdtemp(prefix=".", dir=folder.parent)
    with contextlib.suppress(FileNotFoundError):  # another process did it
        folder.rename(Path(aside, folder.name))
    shutil.rmtree(aside, ignore_errors=True)
    return None


def _report(corpus: Corpus, origin: str) -> None:
    documents, characters, tokens = corpus.n_documents, corpus.n_characters, corpus.n_tokens
    held_out = corpus.val.info.count if corpus.val else 0
    logger.debug(
        f"{documents:,} document{'s' * (documents != 1)}, {characters:,} characters, {tokens:,} "
        f"tokens ({tokens / characters:.2f} per character): {tokens - held_out:,} to train on, "
        f"{held_out:,} held out{origin}"
    )


@contextlib.contextmanager
def _writable(cache: Path) -> Iterator[None]:
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
def _spool(cache: Path, *paths: Sequence[str | Path]) -> Iterator[Path | None]:
    """A folder for what comes from stdin, if it is named."""
    if not any("-" in map(str, part) for part in paths if not isinstance(part, Path)):
        yield None
        return
    name = f"stdin-{os.getpid()}"
    try:
        with _workspace(cache, name) as folder:
            yield folder
    finally:
        _lock_file(cache, name).unlink(missing_ok=True)


@contextlib.contextmanager
def _workspace(cache: Path, name: str) -> Iterator[Path]:
    """An empty folder for one process alone, removed afterwards unless it was renamed.

    What killed processes left of theirs is removed too: the kernel has taken back their locks.
    """
    (cache / LOCKS).mkdir(exist_ok=True)
    for old in cache.glob(".*.tmp"):
        if left := lock(_lock_file(cache, old.stem[1:]), wait=False):
            shutil.rmtree(old, ignore_errors=True)
            left.release()
    held = lock(_lock_file(cache, name), wait=False)
    if held is None:
        logger.info("another process prepares the same text: waiting for it")
        held = lock(_lock_file(cache, name), wait=True)
    assert held is not None
    folder = cache / f".{name}.tmp"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        held.release()


def _lock_file(cache: Path, name: str) -> Path:
    return cache / LOCKS / f"{name}.lock"


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    from .console import run_script
    from .options import CorpusOptions
    from .survey import main

    sys.exit(run_script(main, CorpusOptions, positional=True))
