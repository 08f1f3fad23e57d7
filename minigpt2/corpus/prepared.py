"""Files of text to a training part and a held-out part, as token files.

Knows documents and a tokenizer's ids, nothing of models and batches.

Text is read in chunks and tokenized by several processes, so neither size nor number of files is
limited by memory; what comes out depends on the text and the options alone. It is kept in a folder
named by a hash of both, so whatever changes one of them makes a new folder. All these folders can
be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from ..arguments import flag
from ..errors import InputError, OptionError
from ..formats.chat import ChatTemplate
from ..system.files import file_sha256, read_json, write_json
from .cached import (
    default_cache_dir,
    hash_of,
    lock_file,
    made_once,
    set_aside,
    workspace,
    writable,
)
from .hold_out import hold_out
from .near_duplicates import near_duplicates
from .options import TextConfig
from .retokenizing import FIRST_PART, Spelling, begun_in, written_again
from .sources.documents import kind_of
from .sources.files import START_BYTES, Source, UnpackedFile, suffixes_of
from .sources.find import find_sources
from .sources.html_text import PARSER
from .sources.left_out import LeftOut, added_up, kind_of_name
from .sources.rows import TABLES, Chunk, table_delimiter, usual_delimiter
from .token_file import BLOCK_BYTES, DOCUMENT, SPAN, TokenFile, dtype_for, write_token_file
from .tokenizing import TOKENIZED, TextTokenizer, end_probe, tokenize

logger = logging.getLogger(__name__)

DEFAULT = TextConfig()
FORMAT = 5  # raise it when the same text and options would give other files
WHOLE = "corpus.json"


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
    special: Mapping[str, int] = field(default_factory=dict)  # names of special tokens in the text
    files: Mapping[str, int] = field(default_factory=dict)  # that were taken, by suffix
    left_out: tuple[LeftOut, ...] = ()  # of the folders and globs that were named
    # where the vocabulary is the text's own, how many tokens the parts have in GPT-2's
    in_gpt2s: tuple[int, int] | None = None

    @property
    def identity(self) -> str:
        """The same for equal training and held-out tokens only, wherever they came from."""
        files = _files(self)
        digests = [_prompts_digest(file) for file in files if len(file.prompts)]
        return hash_of([[file.info.sha256 for file in files], digests])[:16]


def _prompts_digest(file: TokenFile) -> str:
    """A hash of where prompts stand: where each begins its document, as runs have it of which that
    is known, of their lengths (0 for none) alone.
    """
    ends = np.ascontiguousarray(file.documents["end"])
    starts = np.concatenate([[0], ends[:-1]])
    owners = np.searchsorted(ends, file.prompts["start"], side="right")
    if not np.array_equal(starts[owners], file.prompts["start"]):
        return hashlib.sha256(file.prompts.tobytes()).hexdigest()
    lengths = np.zeros(len(ends), np.int64)
    lengths[owners] = file.prompts["end"] - file.prompts["start"]
    return hashlib.sha256(lengths.tobytes()).hexdigest()


@dataclass(frozen=True)
class CorpusInfo:
    """The JSON file of a prepared corpus, written last: the folder is complete."""

    files: tuple[str, ...]  # the parts that are there: "train", and "val" or not
    n_documents: int
    n_characters: int
    n_tokens: int
    counts: Mapping[str, int]
    special: Mapping[str, int]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> CorpusInfo:
        """Raises InputError for a file that is missing or says what no corpus consists of."""
        values = {"counts": {}, "special": {}, **read_json(path)}
        if values.keys() != {part.name for part in fields(cls)}:
            raise InputError(f"{path} is damaged")
        files, counts, special = (values.pop(name) for name in ("files", "counts", "special"))
        if files not in (["train"], ["train", "val"]):
            raise InputError(f"{path} is damaged")
        if not isinstance(counts, dict) or not isinstance(special, dict):
            raise InputError(f"{path} is damaged")
        totals, numbers = values.values(), [*counts.values(), *special.values(), *values.values()]
        if not all(type(n) is int and n >= 0 for n in numbers) or 0 in totals:
            raise InputError(f"{path} is damaged")
        return cls(tuple(files), counts=counts, special=special, **values)


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
    documents where that is possible (`hold_out`). With `workers` above 1 long texts are
    tokenized by as many processes: then call it below `if __name__ == "__main__"`. `cache_dir` is
    by default `default_cache_dir()`. Raises InputError or NotFoundError for files that are missing,
    empty or no text, or change meanwhile.
    """
    end_probe()
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}, allowed is from 0 to below 1")
    cache = Path(cache_dir or default_cache_dir())
    with writable(cache), _spool(cache, paths, val_paths) as spool:
        named = [find_sources(some, spool=spool, text=text) for some in (paths, val_paths)]
        train, val = (found.sources for found in named)
        _warn_of_idle_settings([*train, *val], text)
        _say_delimiters([*train, *val], text)
        twice = {source.path.resolve() for source in train} & {s.path.resolve() for s in val}
        if twice:
            raise InputError(f"{min(twice)} is both training and held-out text: name it once")
        inputs = _CorpusInputs.of(train, val, 0.0 if val else float(val_fraction), text)
        corpus, was_there = made_once(
            cache / inputs.key(tokenizer),
            lambda folder: _open_whole(folder, *inputs.labels),
            lambda folder: _make(folder, inputs, tokenizer, workers),
        )
    if text.special_tokens and not tokenizer.special_in(" ".join(corpus.special)):
        logger.warning("--special-tokens changes nothing: no special token is in the text")
    _log_totals(corpus, was_there)
    files = Counter(kind_of_name(source.label) for source in (*train, *val))
    left_out = added_up(left for found in named for left in found.left_out)
    return replace(corpus, files=dict(files), left_out=left_out)


def retokenize(
    corpus: Corpus,
    before: Spelling,
    tokenizer: TextTokenizer,
    *,
    workers: int = 1,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """The same documents as ids of another tokenizer, trained on and held out as they were, or find
    that this was done before; a document that is cut inside a character is cut before it.

    `before` made the corpus. For `workers` and `cache_dir` see `prepare`. Raises InputError if the
    text is too short for it.
    """
    cache, files = Path(cache_dir or default_cache_dir()), _files(corpus)
    labels = corpus.train.sources, corpus.val.sources if corpus.val else ()
    name = hash_of([FORMAT, "again", tokenizer.identity, *map(hashes_of, files)])
    with writable(cache):
        again, was_there = made_once(
            cache / name,
            lambda folder: _open_whole(folder, *labels),
            lambda folder: _make_again(folder, corpus, before, tokenizer, workers),
        )
    _log_totals(again, was_there)
    return replace(again, files=corpus.files, left_out=corpus.left_out)


def hashes_of(file: TokenFile) -> list[str]:
    """What tells the tokens and documents of a token file from others."""
    return [file.info.sha256, file.info.documents_sha256, file.info.prompts_sha256]


def _make_again(
    folder: Path, corpus: Corpus, before: Spelling, tokenizer: TextTokenizer, workers: int
) -> None:
    """Fill a folder with the token files of a corpus in the ids of another tokenizer."""
    ids_path, by_path = folder / "ids.tmp", {file.path: file for file in _files(corpus)}
    begun = begun_in(corpus.train, before)

    def read(source: Source, text: TextConfig, chat: ChatTemplate) -> Iterator[Chunk]:
        chunks = written_again(by_path[source.path], before, begun=begun)
        return (chunk for _, chunk in chunks)

    sources = [Source(path, path.name, path.stat().st_size) for path in by_path]
    found = tokenize(ids_path, sources, DEFAULT, tokenizer, workers, read=read)
    documents = np.concatenate([file.documents for file in by_path.values()])
    if len(found.documents) < len(documents):  # less than a character is left of a first part
        raise InputError("the text is too short to be tokenized again: add some")
    segments = np.zeros(len(documents), SEGMENT)
    segments["end"], segments["start"][1:] = found.documents["end"], found.documents["end"][:-1]
    segments["end"] -= documents["part"] == FIRST_PART  # end-of-text stands behind the last one
    segments["held_out"], segments["part"] = found.documents["source"], documents["part"]
    segments["document"] = found.documents
    for name in ("row", "source"):
        segments["document"][name] = documents[name]
    names = _write_parts(folder, ids_path, segments, found.prompts, (0, 0), tokenizer)
    ids_path.unlink()
    n_tokens = int((segments["end"] - segments["start"]).sum())
    totals = corpus.n_documents, corpus.n_characters, n_tokens
    info = CorpusInfo(names, *totals, counts=corpus.counts, special=corpus.special)
    info.write(folder / WHOLE)


def _files(corpus: Corpus) -> list[TokenFile]:
    return [corpus.train, *([corpus.val] if corpus.val else [])]


def _warn_of_idle_settings(sources: Sequence[Source], text: TextConfig) -> None:
    """Say which settings are for files of another kind."""
    kinds = [kind_of(source) for source in sources]
    tables, has_field = _tables(sources), text.text_field != DEFAULT.text_field
    if has_field and "rows" not in kinds:
        logger.warning("--text-field changes nothing: no file has rows with fields")
    elif has_field and text.columns and kinds.count("rows") == len(tables):
        logger.warning("--text-field changes nothing: --csv-columns names what is read")
    for name in ("csv_columns", "csv_delimiter", "csv_plain_quotes"):
        if getattr(text, name) != getattr(DEFAULT, name) and not tables:
            logger.warning(f"{flag(name)} changes nothing: no file is .csv or .tsv")
    if text.document_separator is not None and "text" not in kinds:
        logger.warning(
            "--document-separator changes nothing: it is for plain text, and none is here"
        )


def _say_delimiters(sources: Sequence[Source], text: TextConfig) -> None:
    """Say which tables have other delimiters than their names say, unless one was given."""
    found: dict[str, list[str]] = {}
    for source in _tables(sources) if text.delimiter is None else ():
        delimiter = table_delimiter(UnpackedFile(source, START_BYTES), text)
        if delimiter != usual_delimiter(source.label):
            found.setdefault(delimiter, []).append(source.label)
    if found:
        parts = [
            f"by {delimiter!r} in {len(labels):,} file{'s' * (len(labels) != 1)}"
            for delimiter, labels in found.items()
        ]
        logger.info(
            "columns are divided %s, such as %s: --csv-delimiter names another delimiter",
            " and ".join(parts),
            next(iter(found.values()))[0],
        )


def _tables(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if suffixes_of(source.label)[0] in TABLES]


@dataclass(frozen=True)
class _CorpusInputs:
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
    ) -> _CorpusInputs:
        sources = (*train, *val)
        stamps = tuple(_stamp(source) for source in sources)
        hashes = tuple(_content_hash(source) for source in sources)
        return cls(sources, len(train), val_fraction, text, hashes, stamps)

    @property
    def has_own_val(self) -> bool:
        return len(self.sources) > self.n_train

    @property
    def labels(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the user calls the sources of the training part, and those of the held-out part."""
        labels = tuple(source.label for source in self.sources)
        return labels[: self.n_train], labels[self.n_train :] if self.has_own_val else labels

    def key(self, tokenizer: TextTokenizer) -> str:
        """The name of the folder: where the text lies and what its files are called, but for what
        their suffixes say of their format, does not matter.
        """
        kinds = [sorted(_formats(source)) for source in self.sources]
        content = [[*pair] for pair in zip(self.sha256, kinds)]
        parts = content[: self.n_train], content[self.n_train :]
        options = [self.val_fraction, asdict(self.text)]
        return hash_of([FORMAT, tokenizer.identity, asdict(tokenizer.chat), options, parts])

    def require_unchanged(self) -> None:
        """Raise InputError for a file that is no longer what it was when its hash was taken."""
        for source, stamp in zip(self.sources, self.stamps):
            if _stamp(source) != stamp:
                raise InputError(f"{source.label} changed while it was read: wait until it is done")


def _formats(source: Source) -> set[str]:
    """What says of which format a source is, and of HTML what reads it."""
    parser = {PARSER} if kind_of(source) == "page" else set()
    return {*Path(source.label.lower()).suffixes[-2:], *parser}


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


def _make(folder: Path, inputs: _CorpusInputs, tokenizer: TextTokenizer, workers: int) -> None:
    """Fill a folder with the token files of these inputs."""
    ids_path = folder / "ids.tmp"
    # 1. Tokenize every document, in order, into one file of ids.
    found = tokenize(ids_path, inputs.sources, inputs.text, tokenizer, workers)
    tokenized = found.documents
    inputs.require_unchanged()
    # 2. Leave out what is too short or there twice.
    own_val = tokenized["source"] >= inputs.n_train  # in held-out text of its own
    _require_text(inputs, own_val)
    dtype = dtype_for(tokenizer.vocab_size)
    # No name holds the memory map: Windows removes no file that is open.
    kept, dropped = _keep(tokenized, own_val, inputs.text, np.memmap(ids_path, dtype, mode="r"))
    # 3. Hold out a part.
    segments = _segments(tokenized, kept, own_val, inputs)
    # 4. Write both parts, and last what makes the folder whole.
    first_sources = (0, inputs.n_train if inputs.has_own_val else 0)
    files = _write_parts(folder, ids_path, segments, found.prompts, first_sources, tokenizer)
    ids_path.unlink()
    pages = np.array([kind_of(source) == "page" for source in inputs.sources])
    dropped["html"] = int(pages[tokenized["source"][kept]].sum())
    info = CorpusInfo(
        files=files,
        n_documents=int(kept.sum()),
        n_characters=int(tokenized["characters"][kept].sum()),
        n_tokens=int((segments["end"] - segments["start"]).sum()),
        counts={**found.counts, **dropped},
        special=found.special,
    )
    info.write(folder / WHOLE)


def _require_text(inputs: _CorpusInputs, own_val: np.ndarray) -> None:
    """Raise InputError if nothing is there to train on, or to judge by where that was named."""
    if own_val.all():  # also where there is no document at all
        first = 0
    elif inputs.has_own_val and not own_val.any():
        first = inputs.n_train
    else:
        return
    source = inputs.sources[first] if inputs.sources else None
    label, has_rows = (source.label, kind_of(source) == "rows") if source else ("no file", False)
    what = "rows that are" if has_rows else "files that are"
    raise InputError(f"{label}: 0 tokens, there is no text: name {what} not empty")


def _keep(
    tokenized: np.ndarray, own_val: np.ndarray, text: TextConfig, ids: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Which documents are kept, and how many were dropped or are there twice.

    Of copies in both the training text and held-out text of its own, the held-out one counts.
    """
    kept = tokenized["characters"] >= text.min_characters
    counts = {"dropped_short": int((~kept).sum())}
    order = np.argsort(~own_val, kind="stable")  # held-out text first: of copies the first counts
    copies, leaked = _copies(tokenized["key"], order[kept[order]], own_val)
    if n_leaked := int(leaked.sum()):
        some = "1 document" if n_leaked == 1 else f"{n_leaked:,} documents"
        verb = "is" if n_leaked == 1 else "are"
        logger.warning(f"{some} of the training text {verb} held-out text too: left out")
    drop = copies if text.duplicates != "keep" else leaked
    kept &= ~drop
    counts["duplicates"] = int(copies.sum())
    counts["dropped_duplicates"] = int(drop.sum())
    if text.duplicates == "drop-near":
        numbers = order[kept[order]]
        starts = np.concatenate([[0], tokenized["end"][:-1]])
        bodies = (ids[starts[n] : tokenized["end"][n] - 1] for n in numbers.tolist())
        near = numbers[near_duplicates(bodies) >= 0]
        kept[near] = False
        counts["dropped_near_duplicates"] = len(near)
    _require_both_parts(kept, own_val)
    return kept, counts


def _copies(
    keys: np.ndarray, order: np.ndarray, own_val: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which documents, met in this order, have the key of an earlier one; and which of them are
    training text whose first copy is held-out text of its own: two masks (documents,).
    """
    copies, leaked = np.zeros(len(keys), bool), np.zeros(len(keys), bool)
    first_is_own_val: dict[bytes, bool] = {}  # by key
    for number in order.tolist():
        key = keys[number].tobytes()
        copies[number] = key in first_is_own_val
        first = first_is_own_val.setdefault(key, bool(own_val[number]))
        leaked[number] = first and not own_val[number]
    return copies, leaked


def _require_both_parts(kept: np.ndarray, own_val: np.ndarray) -> None:
    """Raise OptionError if what was dropped leaves nothing to judge by, or to train on."""
    if own_val.any() and not kept[own_val].any():
        raise OptionError(
            "nothing is left to judge by: every document of val_paths is too short", "val_paths"
        )
    if not kept[~own_val].any():
        raise OptionError(
            "nothing is left to train on: every document is too short, or held-out text too; lower "
            "min_characters or give other val_paths",
            "min_characters",
            "val_paths",
        )


SEGMENT = np.dtype(
    [
        ("start", "<i8"),
        ("end", "<i8"),
        ("held_out", "<i4"),
        ("part", "<i4"),
        ("document", TOKENIZED),
    ]
)


def _segments(
    tokenized: np.ndarray, kept: np.ndarray, held_out: np.ndarray, inputs: _CorpusInputs
) -> np.ndarray:
    """Where the tokens of the kept documents lie, and whether they are to train on (held_out 0) or
    held out (1): SEGMENT records, one for each document and two for one that is cut.
    """
    segments = np.zeros(len(tokenized), SEGMENT)
    segments["document"], segments["end"] = tokenized, tokenized["end"]
    segments["start"][1:] = tokenized["end"][:-1]
    segments["held_out"] = held_out
    segments = segments[kept]
    if inputs.has_own_val or not inputs.val_fraction:
        return segments
    lengths = segments["end"] - segments["start"]
    keys = [key.tobytes() for key in segments["document"]["key"]]
    split = hold_out(lengths, keys, inputs.val_fraction)
    segments["held_out"] = split.held
    if not split.holds_out:
        logger.warning(
            "nothing is held out: the text is too short, or every document is there more than once"
        )
    if (number := split.cut_document) < 0:
        return segments
    both = np.repeat(segments[number : number + 1], 2)
    both["end"][0] = both["start"][1] = both["start"][0] + split.cut_at
    both["held_out"], both["part"] = (0, 1), (1, 2)
    return np.concatenate([segments[:number], both, segments[number + 1 :]])


def _write_parts(
    folder: Path,
    ids_path: Path,
    segments: np.ndarray,
    prompts: np.ndarray,
    first_sources: tuple[int, int],
    tokenizer: TextTokenizer,
) -> tuple[str, ...]:
    """Write the token files of the parts that have tokens, whose sources are counted from these
    first ones; their names, without a suffix.
    """
    written = []
    for held_out, name in enumerate(("train", "val")):
        part = segments[segments["held_out"] == held_out]
        if not len(part):
            continue
        write_token_file(
            folder / f"{name}.bin",
            _copied(ids_path, part, dtype_for(tokenizer.vocab_size)),
            _as_documents(part, first_sources[held_out]),
            _prompts_in(part, prompts),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.identity,
        )
        written.append(name)
    return tuple(written)


def _as_documents(segments: np.ndarray, first_source: int) -> np.ndarray:
    documents = np.zeros(len(segments), DOCUMENT)
    documents["end"] = np.cumsum(segments["end"] - segments["start"])
    documents["part"] = segments["part"]
    documents["row"] = segments["document"]["row"]
    documents["source"] = segments["document"]["source"] - first_source
    return documents


def _prompts_in(segments: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Where the prompts, SPAN records of all ids, stand in the ids of these segments alone.

    A prompt lies in one document, of which a part has one segment at most.
    """
    at = np.searchsorted(segments["start"], prompts["end"], side="left") - 1
    there = at >= 0
    prompts, at = prompts[there], at[there]
    owners, moved = segments[at], np.cumsum(segments["end"] - segments["start"])
    spans = np.empty(len(prompts), SPAN)
    shift = moved[at] - owners["end"]
    spans["start"] = np.maximum(prompts["start"], owners["start"]) + shift
    spans["end"] = np.minimum(prompts["end"], owners["end"]) + shift
    return spans[spans["start"] < spans["end"]]


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


def _open_whole(
    folder: Path, train_labels: tuple[str, ...], val_labels: tuple[str, ...]
) -> Corpus | None:
    """What was made there; None, with a notice, if it is damaged: then it is removed."""
    if not folder.exists():
        return None
    try:
        info = CorpusInfo.read(folder / WHOLE)
        train = replace(TokenFile.open(folder), sources=train_labels)
        val = TokenFile.open(folder / "val.bin") if "val" in info.files else None
        val = val and replace(val, sources=val_labels)
        totals = info.n_documents, info.n_characters, info.n_tokens
        return Corpus(train, val, *totals, dict(info.counts), dict(info.special))
    except InputError as problem:
        logger.warning("%s: doing that now", problem)
    set_aside(folder)
    return None


def _log_totals(corpus: Corpus, was_there: bool) -> None:
    documents, characters, tokens = corpus.n_documents, corpus.n_characters, corpus.n_tokens
    held_out = corpus.val.info.count if corpus.val else 0
    logger.debug(
        f"{documents:,} document{'s' * (documents != 1)}, {characters:,} characters, {tokens:,} "
        f"tokens ({tokens / characters:.2f} per character): {tokens - held_out:,} to train on, "
        f"{held_out:,} held out{', from cache' * was_there}"
    )


@contextlib.contextmanager
def _spool(cache: Path, *paths: Sequence[str | Path]) -> Iterator[Path | None]:
    """A folder for what comes from stdin, if it is named."""
    if not any("-" in map(str, part) for part in paths if not isinstance(part, Path)):
        yield None
        return
    name = f"stdin-{os.getpid()}"
    try:
        with workspace(cache, name) as folder:
            yield folder
    finally:
        lock_file(cache, name).unlink(missing_ok=True)
