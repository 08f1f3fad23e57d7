"""The bytes of a file: unpacked, decoded, refused where damaged or no text.

What is no text is refused with a line that says how to convert it.
"""

from __future__ import annotations

import codecs
import gzip
import lzma
import re
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import InputError

PACKINGS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
CHUNK_BYTES = 4 * 2**20  # read at once, by default
START_BYTES = 2**16  # what is looked at to tell text from other files
ZSTD_BYTES = 2**9  # unpacked at once: however well they were packed, they are 16 MB at most

BINARY = "a binary file, not text: leave it out or convert it"
_SAVE = "save it as plain text, or convert it with pandoc -t plain -o new.txt"
OTHER_KINDS = [  # by how they begin; the first that matches
    (rb"%PDF-", "a PDF: give it a name that ends in .pdf"),
    (
        rb"PK\x03\x04.{26}mimetypeapplication/epub",
        "an EPUB book: give it a name that ends in .epub",
    ),
    (rb"PK\x03\x04.{26}mimetypeapplication/vnd.oasis", f"an OpenDocument file: {_SAVE}"),
    (rb"PK\x03\x04.*[^\w]word/", "a Word document: give it a name that ends in .docx"),
    (rb"PK\x03\x04.*[^\w]xl/", "an Excel file: save its sheet as .csv"),
    (rb"PK\x03\x04", "a zip archive: unpack it, and name the folder"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old or encrypted Office file: save it anew"),
    (rb"\{\\rtf", "an RTF document: give it a name that ends in .rtf"),
    (
        rb"7z\xbc\xaf|Rar!\x1a\x07|.{257}ustar(\0|  \0)",
        "an archive: unpack it, and name the folder",
    ),
    (rb"\x1f\x8b", "compressed with gzip: give it a name that ends in .gz"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd: give it a name that ends in .zst"),
    (rb"\xfd7zXZ\0", "compressed with xz: give it a name that ends in .xz"),
    (rb"BZh\d1AY&SY", "compressed with bzip2: unpack it with bunzip2"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the text itself: run git lfs pull"),
    (rb"PAR1.*\0", "a Parquet file: give it a name that ends in .parquet"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a.*\0|RIFF....WEBP|II\*\0|MM\0\*", "an image: leave it out"),
    (
        rb"ID3[\x02-\x04]|RIFF....(WAVE|AVI )|OggS\0|fLaC\0|\0\0\0.ftyp",
        "audio or video: leave it out",
    ),
    (rb"\x80[\x02-\x05][\0-\x1f\x80-\xff]|\x93NUMPY|SQLite format 3\0", BINARY),
]
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
CONTROLS = bytes({*range(32)} - {*b"\b\t\n\f\r\x1b"})  # are rare in any encoding of text


@dataclass(frozen=True)
class Source:
    """A file that holds documents."""

    path: Path  # where the bytes are
    label: str  # what the user calls it; its suffixes say how it is read
    size: int  # bytes


class NoTextError(InputError):
    """A file of another kind than text, said in words that follow "it is"."""

    def __init__(self, label: str, kind: str) -> None:
        super().__init__(f"{label} is {kind}")
        self.kind = kind


class UnpackedFile:
    """The bytes or the text of a source, unpacked, and how much of the file was read for it."""

    def __init__(self, source: Source, chunk_bytes: int) -> None:
        self.source, self.label, self.chunk_bytes = source, source.label, chunk_bytes
        self.position = 0
        self._start = b""

    def texts(self) -> Iterator[str]:
        """The text, without a leading BOM, in chunks cut anywhere."""
        texts = filter(None, self._decoded())
        if first := next(texts, "").removeprefix("\ufeff"):
            yield first
        yield from texts

    def _decoded(self) -> Iterator[str]:
        decoder, end = codecs.getincrementaldecoder("utf-8")(), 0
        try:
            for data in self.blocks():
                end += len(data)
                yield decoder.decode(data)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as problem:
            if len(self._start) - len(self._start.translate(None, CONTROLS)) > 8:
                raise NoTextError(self.label, BINARY) from None
            at = end - len(problem.object) + problem.start  # the object may begin in older data
            raise InputError(
                f"{self.label} is not UTF-8 at byte {at}: convert it with iconv -f ISO-8859-1 -t "
                "UTF-8 old.txt > new.txt, naming the encoding it has"
            ) from None

    def blocks(self, signature: bytes = b"") -> Iterator[bytes]:
        """The bytes, unpacked; InputError if they are damaged, or no text and do not begin with
        this signature.
        """
        path, packing = self.source.path, suffixes_of(self.label)[1]
        with read_errors_named(self.label, packing):
            require_regular(self.label, path.stat().st_mode)
        with read_errors_named(self.label, packing), path.open("rb") as file:
            blocks = _unpacked(file, packing, self.chunk_bytes)
            held, size = [], 0
            for data in blocks:
                held.append(data)
                size += len(data)
                if size >= START_BYTES:
                    break
            self._start = b"".join(held)[:START_BYTES]
            if not (signature and self._start.startswith(signature)):
                _refuse_other_kinds(self.label, self._start)
            for data in chain(held, blocks):
                self.position = file.tell()
                yield data


def require_regular(label: str, mode: int) -> None:
    """Raise InputError for a pipe, socket or device, which may be read once or never end."""
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{label} is no regular file: save its text to one, or give it to stdin as -"
        )


@contextmanager
def seekable(file: UnpackedFile, signature: bytes) -> Iterator[BinaryIO]:
    """The unpacked file, open for reading at any place; InputError for another kind, unless it
    begins with this signature.
    """
    packing = suffixes_of(file.label)[1]
    blocks = file.blocks(signature)
    if packing:
        with tempfile.TemporaryFile() as unpacked:
            try:
                unpacked.writelines(blocks)
                unpacked.seek(0)
            except OSError as problem:  # not of the file: those have been named
                raise InputError(
                    f"{file.label} cannot be unpacked into {tempfile.gettempdir()}: "
                    f"{problem.strerror}; set TMPDIR to a folder with space"
                ) from problem
            yield unpacked
    else:
        next(blocks, None)  # refuses other kinds
        with read_errors_named(file.label, packing), file.source.path.open("rb") as opened:
            yield opened


@contextmanager
def read_errors_named(label: str, packing: str) -> Iterator[None]:
    """What goes wrong while a file is read as InputErrors that name it."""
    try:
        yield
    except (_Damaged, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as problem:
        raise InputError(
            f"{label} is no whole {PACKINGS[packing]} file ({problem}): make or download it again, "
            "or rename it if it is not compressed"
        ) from problem
    except OSError as problem:
        reason = problem.strerror or str(problem).partition("\n")[0]  # pyarrow's have no number
        raise InputError(f"{label} cannot be read: {reason}") from problem


class _Damaged(Exception):
    """A compressed file that ends early or cannot be unpacked."""


def _unpacked(file: BinaryIO, packing: str, size: int) -> Iterator[bytes]:
    if packing == ".zst":
        yield from _gathered(_unpacked_zstd(file, min(size, ZSTD_BYTES)), min(size, START_BYTES))
        return
    unpack: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open}
    unpacked = unpack[packing](file) if packing else file
    while data := unpacked.read(size):
        yield data


def _unpacked_zstd(file: BinaryIO, size: int) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as problem:
        raise InputError("reading .zst files needs zstandard: pip install zstandard") from problem
    # Archives of the web are made with `zstd --long=31`, which it refuses by default.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    try:
        while data := file.read(size):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as problem:
        raise _Damaged(problem) from problem
    if frame:
        raise _Damaged("it ends early")


def _gathered(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in blocks of at least this size."""
    held, n_held = [], 0
    for block in blocks:
        held.append(block)
        n_held += len(block)
        if n_held >= size:
            yield b"".join(held)
            held, n_held = [], 0
    yield b"".join(held)


def _refuse_other_kinds(label: str, start: bytes) -> None:
    for pattern, kind in OTHER_KINDS:
        if re.match(pattern, start, re.DOTALL):
            raise NoTextError(label, kind)
    encoding = next((name for bom, name in BYTE_ORDER_MARKS.items() if start.startswith(bom)), "")
    even, odd = start[::2].count(0), start[1::2].count(0)
    # A few NULs may stand in a text, however short; GPT-2 has a token for them.
    if not encoding and even + odd > max(8, len(start) // 100):
        # In UTF-16, mostly Latin text has a NUL in every other byte.
        if max(even, odd) < len(start) // 4 or min(even, odd) > len(start) // 20:
            raise NoTextError(label, BINARY)
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
    if encoding:
        raise InputError(
            f"{label} looks like {encoding}: convert it with iconv -f {encoding} -t UTF-8 old.txt "
            "> new.txt"
        )


def suffixes_of(name: str) -> tuple[str, str]:
    """The suffix that says the format, and the one that says how it is compressed."""
    path = Path(name.lower())
    if path.suffix in PACKINGS:
        return path.with_suffix("").suffix, path.suffix
    return path.suffix, ""
