"""Token files: long rows of token ids on disk, with the places where documents end.

Opened as memory maps, trusted only if they are as they were written. Knows ids, nothing of text.

Beside `train.bin` lie `train.documents`, where its documents end, `train.prompts`, where prompts
stand, and `train.json`, which says what the ids are and what the files' SHA-256 are.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, NotFoundError
from ..system.files import file_sha256, read_json, sync, write_json

REMEDY = "prepare the text again"
BLOCK_BYTES = 4 * 2**20

DOCUMENT = np.dtype(
    [
        ("end", "<i8"),  # the index after its last token in the token file
        ("row", "<i8"),  # its row in its source, from 1; 0 for a source that is one document
        ("source", "<i4"),  # its file's index among the files that were prepared
        ("part", "<i4"),  # an index into PARTS
    ]
)
SPAN = np.dtype([("start", "<i8"), ("end", "<i8")])  # tokens from start to before end
PARTS = ("", " (first part)", " (last part)")  # where the held-out text begins inside a document


@dataclass(frozen=True)
class TokenFileInfo:
    """The JSON file beside a token file."""

    dtype: str  # uint16 or uint32, little-endian
    count: int
    vocab_size: int
    tokenizer: str  # its identity
    sha256: str  # of the token file: tells damage, and which tokens these are
    documents_sha256: str  # of the file that says where documents end
    prompts_sha256: str  # of the file that says where prompts stand

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> TokenFileInfo:
        """Raises InputError for a file that is missing or has other fields."""
        with contextlib.suppress(InputError, TypeError):
            info = cls(**read_json(path))
            if type(info.count) is type(info.vocab_size) is int:
                return info
        raise InputError(f"{path} is missing or does not describe a token file; {REMEDY}")


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
    are the documents, DOCUMENT records in their order. The prompts, which ask for the tokens after
    them, are SPAN records in their order; none goes over the end of a document.

    The same text under other names has the same files, so the names of the sources are not on disk:
    only `prepare` knows them.
    """

    path: Path
    tokens: np.ndarray
    info: TokenFileInfo
    documents: np.ndarray
    prompts: np.ndarray
    sources: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Open a .bin file, or the train.bin of a folder, if all of it is as it was written.

        Reads it once, in the time that its SHA-256 takes: above 1 GB/s where the processor has
        instructions for that, less elsewhere. Raises NotFoundError, or InputError for damage; for
        an id outside the vocabulary with its index.
        """
        path = Path(path) / "train.bin" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist; {REMEDY}")
        info, size = TokenFileInfo.read(path.with_suffix(".json")), path.stat().st_size
        dtype = dtype_for(info.vocab_size)
        if info.dtype != dtype.name or info.count * dtype.itemsize != size or not size:
            expected = f"{info.count:,} ids of {info.dtype}"
            raise InputError(f"{path} is damaged: {size:,} bytes are not {expected}; {REMEDY}")
        if _checked_sha256(path, info.vocab_size) != info.sha256:
            raise InputError(f"{path} is damaged: its bytes are not those written; {REMEDY}")
        documents, prompts = path.with_suffix(".documents"), path.with_suffix(".prompts")
        for beside, sha256 in (
            (documents, info.documents_sha256),
            (prompts, info.prompts_sha256),
        ):
            if not beside.is_file() or file_sha256(beside) != sha256:
                raise InputError(f"{beside} is missing or damaged; {REMEDY}")
        tokens, ends = np.memmap(path, dtype, mode="r"), np.memmap(documents, DOCUMENT, mode="r")
        # not mapped: a file of no bytes cannot be
        return cls(path, tokens, info, ends, np.fromfile(prompts, SPAN))

    def block(self, start: int, end: int) -> np.ndarray:
        """A copy of some tokens, as many as there are.

        Read in the plain way: pages read through a memory map count as this process's memory.
        """
        end = min(end, len(self.tokens))
        if not isinstance(self.tokens, np.memmap):
            return self.tokens[start:end].copy()
        offset, dtype = start * self.tokens.itemsize, self.tokens.dtype
        return np.fromfile(self.path, dtype, max(0, end - start), offset=offset)

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


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer, little-endian, that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_token_file(
    path: Path,
    blocks: Iterable[bytes],
    documents: np.ndarray,
    prompts: np.ndarray,
    *,
    vocab_size: int,
    tokenizer: str,
) -> None:
    """Write ids, given as the bytes of `dtype_for(vocab_size)`, where their documents end and
    prompts stand, and the JSON file beside them; all of it is on the disk afterwards.
    """
    digest, dtype = hashlib.sha256(), dtype_for(vocab_size)
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
    sync(path)
    for suffix, records in ((".documents", documents), (".prompts", prompts)):
        path.with_suffix(suffix).write_bytes(records.tobytes())
        sync(path.with_suffix(suffix))
    info = TokenFileInfo(
        dtype=dtype.name,
        count=path.stat().st_size // dtype.itemsize,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        sha256=digest.hexdigest(),
        documents_sha256=file_sha256(path.with_suffix(".documents")),
        prompts_sha256=file_sha256(path.with_suffix(".prompts")),
    )
    info.write(path.with_suffix(".json"))


def _checked_sha256(path: Path, vocab_size: int) -> str:
    """The hash of a token file's bytes; InputError if an id is outside the vocabulary."""
    digest, dtype, index = hashlib.sha256(), dtype_for(vocab_size), 0
    with path.open("rb") as file:
        while data := file.read(BLOCK_BYTES):
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
