"""From text files to one long row of token ids on disk. Knows files, documents and a tokenizer's
ids, nothing of models and batches.

Every file is a document and ends with the end-of-text id. Text is read in chunks, so a file may be
larger than memory. The ids are kept in a folder named by a hash of text, tokenizer and options, so
whatever changes one of them makes a new folder. All these folders can be deleted at any time.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import numpy as np

from .errors import InputError, NotFoundError
from .files import read_json, sync, write_json

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when the same text and options would give other files
SUFFIXES = (".txt", ".md", ".rst")
CHUNK_BYTES = 4 * 2**20
START_BYTES = 2**16  # what is looked at to tell text from other files
NOTICE_SECONDS = 10
REMEDY = "prepare the text again"

DOCUMENT = np.dtype(
    [
        ("end", "<i8"),  # the index after its last token in the token file
        ("row", "<i8"),  # its row in its source, from 1; 0 for a source that is one document
        ("source", "<i4"),  # its file's index among the files that were prepared
        ("part", "<i4"),  # an index into PARTS
    ]
)
PARTS = ("", " (first part)", " (last part)")  # where the held-out text begins inside a document

# No piece of GPT-2's pattern has whitespace after anything else, so a text can be cut there.
LAST_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)
OTHER_KINDS = {  # by their first bytes
    b"%PDF-": "a PDF: extract its text, for example with pdftotext",
    b"PK\x03\x04": "a zip archive, as Word's files are too: unpack it or save it as plain text",
    b"\x1f\x8b": "compressed with gzip: unpack it with gunzip",
    b"version https://git-lfs": "a Git LFS pointer, not the text itself: run git lfs pull",
}
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class TextTokenizer(Protocol):
    """What a corpus needs of a tokenizer."""

    @property
    def eot(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def identity(self) -> str: ...
    def encode(self, text: str, /) -> list[int]: ...


@dataclass(frozen=True)
class TokenFileInfo:
    """The JSON file beside a token file."""

    dtype: str  # uint16 or uint32, little-endian
    count: int
    vocab_size: int
    tokenizer: str  # its identity
    sha256: str  # of the token file: tells damage, and which tokens these are
    documents_sha256: str  # of the file that says where documents end
    source: str  # hash of all the text that was prepared
    options: dict[str, float]


@dataclass(frozen=True)
class Document:
    """One of the texts in a token file, and where its tokens are, end-of-text included."""

    number: int  # from 0, in the order of the token file; empty texts are not there
    label: str  # its file as the user named it, and which row or part of it
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Token ids on disk, opened for reading: tokens (N,) uint16 or uint32 are a memory map, and so
    are the documents, DOCUMENT records in their order.

    The same text under other names has the same files, so the names of the sources are not on disk:
    only `prepare` knows them.
    """

    path: Path
    tokens: np.ndarray
    info: TokenFileInfo
    documents: np.ndarray
    sources: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Open a .bin file, or the train.bin of a folder, if all of it is as it was written.

        Reads it once, at more than 1 GB/s. Raises NotFoundError, or InputError for damage; for an
        id outside the vocabulary with its index.
        """
        path = Path(path) / "train.bin" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist; {REMEDY}")
        info, size = _read_info(path.with_suffix(".json")), path.stat().st_size
        dtype = _dtype_for(info.vocab_size)
        if info.dtype != dtype.name or info.count * dtype.itemsize != size or not size:
            expected = f"{info.count:,} ids of {info.dtype}"
            raise InputError(f"{path} is damaged: {size:,} bytes are not {expected}; {REMEDY}")
        if _checked_sha256(path, info.vocab_size) != info.sha256:
            raise InputError(f"{path} is damaged: its bytes are not those written; {REMEDY}")
        documents = path.with_suffix(".documents")
        if not documents.is_file() or _sha256(documents) != info.documents_sha256:
            raise InputError(f"{documents} is missing or damaged; {REMEDY}")
        tokens, ends = np.memmap(path, dtype, mode="r"), np.memmap(documents, DOCUMENT, mode="r")
        return cls(path, tokens, info, ends)

    def documents_at(self, positions: Sequence[int] | np.ndarray) -> list[Document]:
        """The documents that hold these tokens, each once, in the order of the file.

        Takes 8 bytes of memory per document of the file for a moment. Positions are from 0 to N-1.
        """
        asked = np.asarray(positions, np.int64)
        assert not asked.size or 0 <= asked.min() <= asked.max() < len(self.tokens)
        ends = np.ascontiguousarray(self.documents["end"])
        numbers = np.unique(np.searchsorted(ends, asked, side="right"))
        return [self._document(int(number)) for number in numbers]

    def _document(self, number: int) -> Document:
        record = self.documents[number]
        start = int(self.documents[number - 1]["end"]) if number else 0
        label = self.sources[record["source"]] if self.sources else f"document {number}"
        if self.sources and record["row"]:
            label += f":row {record['row']}"
        return Document(number, label + PARTS[record["part"]], start, int(record["end"]))


@dataclass(frozen=True, eq=False)
class Corpus:
    """The text to train on and the text held out, which share no token, and how much both are."""

    train: TokenFile
    val: TokenFile | None
    n_documents: int  # that are not empty
    n_characters: int
    n_tokens: int  # with one end-of-text per document

    @property
    def identity(self) -> str:
        """The same for equal training and held-out tokens only, wherever they came from."""
        return _hash_of([self.train.info.sha256, self.val and self.val.info.sha256])[:16]


@dataclass(frozen=True)
class _Source:
    """A file that was read through once: it is text, and this one."""

    path: Path
    sha256: str
    characters: int


def prepare(
    paths: Sequence[str | Path],
    tokenizer: TextTokenizer,
    *,
    val_paths: Sequence[str | Path] = (),
    val_fraction: float = 0.1,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Tokenize files, folders or globs of UTF-8 text, or find that this was done before.

    Held out are `val_paths` if there are any, or else the last `val_fraction` of the tokens. The
    cut between is moved to the nearest document border if that changes the held-out part by a
    quarter of its length at most. `cache_dir` is by default `default_cache_dir()`. Raises
    InputError or NotFoundError for files that are missing, empty or no text, or change meanwhile.
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}, allowed is from 0 to below 1")
    train, val = _read_sources(paths), _read_sources(val_paths) if val_paths else []
    twice = {source.path.resolve() for source in train} & {source.path.resolve() for source in val}
    if twice:
        raise InputError(f"{min(twice)} is both training and held-out text: leave it out of one")
    share = 0.0 if val else float(val_fraction)
    source = _hash_of([[source.sha256 for source in part] for part in (train, val)])
    key = _hash_of([FORMAT, tokenizer.identity, share, source])
    folder = Path(cache_dir or default_cache_dir()) / key
    has_val = bool(val or share)
    cached = _open_cached(folder, has_val)
    if cached is None:
        with _new_folder(folder) as new:
            _write_tokens(new / "train.bin", train, tokenizer)
            if val:
                _write_tokens(new / "val.bin", val, tokenizer)
            elif share:
                _hold_out(new, share, _dtype_for(tokenizer.vocab_size))
            for path in new.glob("*.bin"):
                _describe(path, tokenizer, source, {"val_fraction": share})
    files = cached or _open_files(folder, has_val)
    names = [tuple(str(source.path) for source in part) for part in (train, val or train)]
    files = replace(files[0], sources=names[0]), files[1] and replace(files[1], sources=names[1])
    corpus = Corpus(
        *files,
        n_documents=sum(source.characters > 0 for source in train + val),
        n_characters=sum(source.characters for source in train + val),
        n_tokens=sum(file.info.count for file in files if file),
    )
    _report(corpus, ", from cache" if cached else "")
    return corpus


def default_cache_dir() -> Path:
    """$MINIGPT2_CACHE/tokens; without that, $XDG_CACHE_HOME or ~/.cache has minigpt2/tokens."""
    if own := os.environ.get("MINIGPT2_CACHE"):
        return Path(own) / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minigpt2" / "tokens"


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that files, folders and globs (also with `**`) name, sorted, each once.

    Folders are searched for SUFFIXES at any depth, without hidden files; what is named itself or by
    a glob may have any suffix. Raises NotFoundError for a path that leads to no file.
    """
    found: list[Path] = []
    for given in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        # Path.glob takes no absolute pattern, and does not skip hidden files.
        globbed = map(Path, glob.glob(str(given), recursive=True))  # noqa: PTH207
        matches = [given] if given.exists() else list(globbed)
        files = [_text_files_below(path) if path.is_dir() else [path] for path in matches]
        if not any(files) and given.is_dir():
            raise NotFoundError(f"{given} has no {', '.join(SUFFIXES)} file: name others by a glob")
        if not any(files):
            raise NotFoundError(f"{given} does not exist and matches no file: check its spelling")
        found += [file for part in files for file in part]
    once: dict[Path, Path] = {}
    for path in sorted(found):
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _text_files_below(folder: Path) -> list[Path]:
    def refuse(problem: OSError) -> NoReturn:
        raise InputError(f"{problem.filename} cannot be read: {problem.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [file for file in files if file.suffix.lower() in SUFFIXES]
    return found


def read_text(path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[str]:
    """The text of a UTF-8 file in parts, whose ids put together are the ids of the whole.

    One leading BOM is left out, nothing else changes. A part has about `chunk_bytes`, or more where
    the text has no word border. Raises InputError for what cannot be read or is no UTF-8 text.
    """
    held: list[str] = []  # has no place to cut
    for chunk in filter(None, _decoded(path, chunk_bytes)):
        before = held[-1][-1] if held else ""
        if cut := LAST_CUT.match(before + chunk):
            end = cut.end() - len(before)
            yield "".join([*held, chunk[:end]])
            held = [chunk[end:]]
        else:
            held.append(chunk)
    if held:
        yield "".join(held)


def _decoded(path: Path, chunk_bytes: int) -> Iterator[str]:
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file: save its text to one first")
    decoder, end = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            start = file.read(START_BYTES)
            _refuse_other_kinds(path, start)
            end = file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            while data := file.read(chunk_bytes):
                end += len(data)
                yield decoder.decode(data)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as problem:
        offset = end - len(problem.object) + problem.start  # the object may begin in older data
        raise InputError(
            f"{path} is not UTF-8 at byte {offset}: convert it with iconv -f ISO-8859-1 -t UTF-8 "
            "old.txt > new.txt, naming the encoding it has"
        ) from None
    except OSError as problem:
        raise InputError(f"{path} cannot be read: {problem.strerror}") from problem


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    for magic, kind in OTHER_KINDS.items():
        if start.startswith(magic):
            raise InputError(f"{path} is {kind}")
    encoding = next((name for bom, name in BYTE_ORDER_MARKS.items() if start.startswith(bom)), "")
    even, odd = start[::2].count(0), start[1::2].count(0)
    # A few NULs may stand in a text, however short; GPT-2 has a token for them.
    if not encoding and even + odd > max(8, len(start) // 100):
        # In UTF-16, mostly Latin text has a NUL in every other byte.
        if max(even, odd) < len(start) // 4 or min(even, odd) > len(start) // 20:
            raise InputError(f"{path} is a binary file, not text: leave it out or convert it")
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
    if encoding:
        raise InputError(
            f"{path} looks like {encoding}: convert it with iconv -f {encoding} -t UTF-8 old.txt "
            "> new.txt"
        )


def _read_sources(paths: Sequence[str | Path]) -> list[_Source]:
    """Read all files through, so that a bad one is known before hours of tokenizing."""
    sources = []
    for path in find_files(paths):
        digest, characters = hashlib.sha256(), 0
        for text in _decoded(path, CHUNK_BYTES):
            digest.update(text.encode())
            characters += len(text)
        sources.append(_Source(path, digest.hexdigest(), characters))
    if not any(source.characters for source in sources):
        where = sources[0].path if sources else "no file"
        raise InputError(f"{where}: 0 tokens, there is no text: name files that are not empty")
    return sources


def _write_tokens(path: Path, sources: Sequence[_Source], tokenizer: TextTokenizer) -> None:
    """Write the ids of documents, each with its end-of-text, and beside them where they end.

    Raises InputError for a file that is no longer what it was when it was checked.
    """
    count, characters = 0, 0
    total = sum(source.characters for source in sources)
    notice_at = time.monotonic() + NOTICE_SECONDS
    with path.open("wb") as file, path.with_suffix(".documents").open("wb") as documents:
        for number, source in enumerate(sources):
            digest = hashlib.sha256()
            for text in read_text(source.path):
                digest.update(text.encode())
                characters += len(text)
                count += _append(file, tokenizer.encode(text), tokenizer.vocab_size)
                if time.monotonic() > notice_at:
                    logger.info("tokenized %.0f%% of the text", 100 * characters / total)
                    notice_at += NOTICE_SECONDS
            if digest.hexdigest() != source.sha256:
                raise InputError(f"{source.path} changed while it was read: wait until it is done")
            if source.characters:
                count += _append(file, [tokenizer.eot], tokenizer.vocab_size)
                documents.write(np.array((count, 0, number, 0), DOCUMENT).tobytes())


def _append(file: BinaryIO, ids: Sequence[int], vocab_size: int) -> int:
    array = np.array(ids, np.int64)  # a conversion to uint16 would wrap silently
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise InputError(f"the tokenizer made the id {outside[0]}, its vocab_size is {vocab_size}")
    file.write(array.astype(_dtype_for(vocab_size)).tobytes())
    return len(array)


def _dtype_for(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _cut(ends: np.ndarray, val_fraction: float) -> int:
    """Where the held-out part begins; see `prepare`. Both parts have a token at least."""
    n_tokens = int(ends[-1])
    n_val = min(max(1, round(n_tokens * val_fraction)), n_tokens - 1)
    border = int(ends[np.abs(ends - (n_tokens - n_val)).argmin()])
    return border if abs(border - (n_tokens - n_val)) <= n_val // 4 else n_tokens - n_val


def _hold_out(folder: Path, val_fraction: float, dtype: np.dtype) -> None:
    """Make val's files of the last part of train's. Takes some 50 bytes of memory per document."""
    path = folder / "train.documents"
    documents = np.fromfile(path, DOCUMENT)
    cut = _cut(documents["end"], val_fraction)
    _move_tail(folder, cut, dtype)
    n_whole = int(np.searchsorted(documents["end"], cut, side="right"))
    train, val = documents[:n_whole], documents[n_whole:].copy()
    if cut > (train["end"][-1] if n_whole else 0):
        train = documents[: n_whole + 1]
        train["end"][-1], train["part"][-1], val["part"][0] = cut, 1, 2
    val["end"] -= cut
    path.write_bytes(train.tobytes())
    (folder / "val.documents").write_bytes(val.tobytes())


def _move_tail(folder: Path, cut: int, dtype: np.dtype) -> None:
    """Make val.bin of the ids from `cut` on in train.bin."""
    with (folder / "train.bin").open("r+b") as train, (folder / "val.bin").open("wb") as val:
        train.seek(cut * dtype.itemsize)
        shutil.copyfileobj(train, val, CHUNK_BYTES)
        train.truncate(cut * dtype.itemsize)


def _describe(path: Path, tokenizer: TextTokenizer, source: str, options: dict[str, float]) -> None:
    """Bring a token file and its documents to the disk, and write the JSON file beside them."""
    documents = path.with_suffix(".documents")
    sync(path)
    sync(documents)
    dtype = _dtype_for(tokenizer.vocab_size)
    info = TokenFileInfo(
        dtype=dtype.name,
        count=path.stat().st_size // dtype.itemsize,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.identity,
        sha256=_checked_sha256(path, tokenizer.vocab_size),
        documents_sha256=_sha256(documents),
        source=source,
        options=options,
    )
    write_json(path.with_suffix(".json"), asdict(info))


def _checked_sha256(path: Path, vocab_size: int) -> str:
    """The hash of a token file's bytes; InputError if an id is outside the vocabulary.

    Reads the file in the plain way: pages read through a memory map would count as our memory.
    """
    digest, dtype, index = hashlib.sha256(), _dtype_for(vocab_size), 0
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            ids = np.frombuffer(data, dtype)
            if ids.max() >= vocab_size:
                at = int((ids >= vocab_size).argmax())
                raise InputError(
                    f"{path} is damaged: id {ids[at]} at index {index + at} is outside the "
                    f"vocabulary of {vocab_size:,}; {REMEDY}"
                )
            digest.update(data)
            index += len(ids)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _read_info(path: Path) -> TokenFileInfo:
    with contextlib.suppress(InputError, TypeError):
        info = TokenFileInfo(**read_json(path))
        if type(info.count) is type(info.vocab_size) is int:
            return info
    raise InputError(f"{path} is missing or does not describe a token file; {REMEDY}")


def _open_files(folder: Path, has_val: bool) -> tuple[TokenFile, TokenFile | None]:
    val = TokenFile.open(folder / "val.bin") if has_val else None
    return TokenFile.open(folder / "train.bin"), val


def _open_cached(folder: Path, has_val: bool) -> tuple[TokenFile, TokenFile | None] | None:
    """What an earlier call made; None, with a notice, if it is damaged: then it is removed."""
    if not folder.exists():
        return None
    try:
        return _open_files(folder, has_val)
    except InputError as problem:
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
    logger.info(
        f"{documents:,} document{'s' * (documents != 1)}, {characters:,} characters, {tokens:,} "
        f"tokens ({tokens / characters:.2f} per character): {tokens - held_out:,} to train on, "
        f"{held_out:,} held out{origin}"
    )


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is whole; InputError if it cannot be written.

    Where another process was faster, its folder stays: the content is the same.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
            new = Path(temporary, folder.name)
            new.mkdir()
            yield new
            sync(new)
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            sync(folder.parent)
    except InputError:
        raise
    except OSError as problem:
        raise InputError(
            f"{folder.parent} cannot be written: {problem.strerror}; set MINIGPT2_CACHE to a "
            "folder with space for 2 to 4 bytes per token"
        ) from problem


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
