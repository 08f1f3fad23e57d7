"""What documents lie in files of many formats. Knows paths, formats and text, nothing of tokens.

A file is read in chunks, so it may be larger than memory. Its suffix says how: text and source code
as they are, HTML as the text one sees, .jsonl, .json, .csv, .tsv and .parquet row by row, each also
compressed. What is no text is refused with a line that says how to convert it.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from . import hub
from .errors import InputError, NotFoundError
from .options import TextConfig
from .pages import Page

logger = logging.getLogger(__name__)

DEFAULT = TextConfig()
TEXT = (".txt", ".md", ".rst", ".tex", ".html", ".htm")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
CODE = (
    ".py .pyi .js .jsx .mjs .ts .tsx .java .kt .scala .cs .swift .c .h .cc .cpp .cxx .hh .hpp .cu "
    ".go .rs .zig .jl .r .rb .php .pl .lua .dart .hs .ml .ex .exs .erl .clj .lisp .sh .bash .ps1 "
    ".sql .css .vue"
)
SUFFIXES = (*TEXT, *ROWS, *CODE.split())  # that folders are searched for, packed or not
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
ENDINGS = [suffix + packing for suffix in SUFFIXES for packing in ("", *PACKINGS)]
CHUNK_BYTES = 4 * 2**20
START_BYTES = 2**16  # what is looked at to tell text from other files
ZSTD_BYTES = 2**14  # unpacked at once: however well they were packed, the text fits into memory
FIELD_LIMIT = 2**31 - 1  # of the csv module, in characters
EXTRA = 'pip install "minigpt2[data]"'

BINARY = "a binary file, not text: leave it out or convert it"
_SAVE = "save it as plain text, or convert it with pandoc -t plain -o new.txt"
OTHER_KINDS = [  # by how they begin; the first that matches
    (rb"%PDF-", "a PDF: extract its text, for example with pdftotext"),
    (rb"PK\x03\x04.{26}mimetypeapplication/epub", f"an EPUB book: {_SAVE}"),
    (rb"PK\x03\x04.{26}mimetypeapplication/vnd.oasis", f"an OpenDocument file: {_SAVE}"),
    (rb"PK\x03\x04.*[^\w]word/", f"a Word document: {_SAVE}"),
    (rb"PK\x03\x04.*[^\w]xl/", "an Excel file: save its sheet as .csv"),
    (rb"PK\x03\x04", "a zip archive: unpack it, and name the folder"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Word or Office file: save it as plain text"),
    (rb"\{\\rtf", f"an RTF document: {_SAVE}"),
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


JSON_SPACE = re.compile(r"[ \t\n\r]*")
JSON_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "an array"}
JSON_KINDS |= {dict: "an object", type(None): "null"}


class Chunk(NamedTuple):
    """A part of a document, in the order of the file."""

    text: str  # "" only where ends is True
    row: int  # from 1: its row, object or separated part; 0 where the file is one document
    ends: bool  # the last chunk of its document
    position: int  # bytes of the file, as it lies on disk, that were read so far
    prompt: bool = False  # part of the "prompt" of a row with "prompt" and "completion"


@dataclass(frozen=True)
class Source:
    """A file that holds documents."""

    path: Path  # where the bytes are
    label: str  # what the user calls it; its suffixes say how it is read
    size: int  # bytes


class _NoRows(InputError):
    """A file that was to hold rows with text, and holds something else."""


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
            files = hub.dataset_files(str(given), ENDINGS)
            sources = [_source(path, label) for label, path in files]
            found += _without_other_json(sources, text) if len(sources) > 1 else sources
        else:
            found += _local_sources(given, text)
    once: dict[Path | str, Source] = {}
    for source in sorted(found, key=lambda source: source.label):
        # In the Hub's cache, equal files of a dataset are one file.
        remote = source.label.startswith("hf://")
        once.setdefault(source.label if remote else source.path.resolve(), source)
    return list(once.values())


def read_documents(
    source: Source, text: TextConfig, *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """The documents of a file, in chunks of about `chunk_bytes` bytes that are cut anywhere.

    One leading BOM is left out, nothing else of the text changes. An empty row or file is a chunk
    with "" that ends; an empty part between two separators is none, but counts as a row. Only text
    files are separated, HTML is not. Takes memory for a few chunks and one row. Raises InputError
    for what cannot be read, is no text, or is a row without text.
    """
    last = None
    for chunk in _chunks(_File(source, chunk_bytes), text):
        if last is not None:
            yield last
        last = chunk
    if last is not None:
        yield last._replace(position=max(last.position, source.size))


def _chunks(file: _File, text: TextConfig) -> Iterator[Chunk]:
    suffix = _suffixes(file.label)[0]
    if rows := ROW_READERS.get(suffix):
        return _row_chunks(file, text.text_field, rows(file, text))
    if suffix in (".html", ".htm"):
        return _whole_chunks(file, filter(None, _page_texts(file)))
    if text.separator:
        return _separated_chunks(file, text.separator)
    return _whole_chunks(file, file.texts())


def _suffixes(name: str) -> tuple[str, str]:
    """The suffix that says the format, and the one that says how it is compressed."""
    path = Path(name.lower())
    if path.suffix in PACKINGS:
        return path.with_suffix("").suffix, path.suffix
    return path.suffix, ""


def _source(path: Path, label: str) -> Source:
    try:
        return Source(path, label, path.stat().st_size)
    except OSError as problem:
        raise InputError(f"{label} cannot be read: {problem.strerror}") from problem


def _copy_stdin(spool: Path) -> Source:
    if sys.stdin is None:
        raise InputError("- is stdin, and there is none here: name a file instead")
    if sys.stdin.isatty():
        logger.info("type the text, and end it with Ctrl-D on a line of its own")
    path = spool / "stdin"
    try:
        with path.open("xb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    except FileExistsError:
        raise InputError(
            "- is named twice, and stdin can be read only once: name it once"
        ) from None
    return _source(path, "stdin")


def _local_sources(given: str | Path, text: TextConfig) -> list[Source]:
    path = Path(given)
    # Path.glob takes no absolute pattern, and does not skip hidden files.
    globbed = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
    found: list[Source] = []
    for match in [path] if path.exists() else globbed:
        if match.is_dir():
            below = [_source(file, str(file)) for file in _files_below(match)]
            found += _without_other_json(below, text)
        else:
            found.append(_source(match, str(match)))
    if not found and path.is_dir():
        raise NotFoundError(f"{given} has no {', '.join(TEXT + ROWS)} file: name others by a glob")
    if not found and "://" in str(given):
        raise NotFoundError(f"{given} is no hf://datasets/ path: download it and name the file")
    if not found:
        raise NotFoundError(f"{given} does not exist and matches no file: check its spelling")
    return found


def _files_below(folder: Path) -> list[Path]:
    def refuse(problem: OSError) -> NoReturn:
        raise InputError(f"{problem.filename} cannot be read: {problem.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [file for file in files if _suffixes(file.name)[0] in SUFFIXES]
    return sorted(found)


def _without_other_json(sources: Sequence[Source], text: TextConfig) -> list[Source]:
    """All but package.json and the like, which lie beside text but hold none; says so."""
    others = [source for source in sources if _is_other_json(source, text)]
    if others:
        number = f"{len(others)} .json file{'s' * (len(others) > 1)}"
        logger.info(
            f"left out {number}, such as {others[0].label}, without a field {text.text_field!r}: "
            "--text-field names another"
        )
    left_out = set(others)
    return [source for source in sources if source not in left_out]


def _is_other_json(source: Source, text: TextConfig) -> bool:
    if _suffixes(source.label)[0] != ".json":
        return False
    try:
        next(_chunks(_File(source, CHUNK_BYTES), text), None)
    except _NoRows:
        return True
    return False


class _File:
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
                raise InputError(f"{self.label} is {BINARY}") from None
            at = end - len(problem.object) + problem.start  # the object may begin in older data
            raise InputError(
                f"{self.label} is not UTF-8 at byte {at}: convert it with iconv -f ISO-8859-1 -t "
                "UTF-8 old.txt > new.txt, naming the encoding it has"
            ) from None

    def blocks(self, signature: bytes = b"") -> Iterator[bytes]:
        """The bytes, unpacked; InputError if they are damaged, or no text and do not begin with
        this signature.
        """
        path, packing = self.source.path, _suffixes(self.label)[1]
        if path.exists() and not path.is_file():
            raise InputError(
                f"{self.label} is no regular file: save its text to one, or give it to stdin as -"
            )
        with _problems_named(self.label, packing), path.open("rb") as file:
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


@contextmanager
def _problems_named(label: str, packing: str) -> Iterator[None]:
    """What goes wrong while a file is read as InputErrors that name it."""
    try:
        yield
    except (_Damaged, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as problem:
        raise InputError(
            f"{label} is no whole {PACKINGS[packing]} file ({problem}): make or download it again, "
            "or rename it if it is not compressed"
        ) from problem
    except OSError as problem:
        raise InputError(f"{label} cannot be read: {problem.strerror or problem}") from problem


class _Damaged(Exception):
    """A compressed file that ends early or cannot be unpacked."""


def _unpacked(file: BinaryIO, packing: str, size: int) -> Iterator[bytes]:
    if packing == ".zst":
        yield from _unpacked_zstd(file, min(size, ZSTD_BYTES))
        return
    unpack: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open}
    unpacked = unpack[packing](file) if packing else file
    while data := unpacked.read(size):
        yield data


def _unpacked_zstd(file: BinaryIO, size: int) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as problem:
        raise InputError(f"reading .zst files needs zstandard: {EXTRA}") from problem
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


def _refuse_other_kinds(label: str, start: bytes) -> None:
    for pattern, kind in OTHER_KINDS:
        if re.match(pattern, start, re.DOTALL):
            raise InputError(f"{label} is {kind}")
    encoding = next((name for bom, name in BYTE_ORDER_MARKS.items() if start.startswith(bom)), "")
    even, odd = start[::2].count(0), start[1::2].count(0)
    # A few NULs may stand in a text, however short; GPT-2 has a token for them.
    if not encoding and even + odd > max(8, len(start) // 100):
        # In UTF-16, mostly Latin text has a NUL in every other byte.
        if max(even, odd) < len(start) // 4 or min(even, odd) > len(start) // 20:
            raise InputError(f"{label} is {BINARY}")
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
    if encoding:
        raise InputError(
            f"{label} looks like {encoding}: convert it with iconv -f {encoding} -t UTF-8 old.txt "
            "> new.txt"
        )


def _whole_chunks(file: _File, texts: Iterable[str]) -> Iterator[Chunk]:
    """Texts as chunks of one document."""
    held = ""
    for text in texts:
        if held:
            yield Chunk(held, 0, False, file.position)
        held = text
    yield Chunk(held, 0, True, file.position)


def _separated_chunks(file: _File, separator: str) -> Iterator[Chunk]:
    row, held, has_begun = 1, "", False
    for text in file.texts():
        *ended, rest = (held + text).split(separator)
        for part in ended:
            if part or has_begun:
                yield Chunk(part, row, True, file.position)
            row, has_begun = row + 1, False
        cut = max(0, len(rest) - len(separator) + 1)  # a separator may begin after it
        if cut:
            yield Chunk(rest[:cut], row, False, file.position)
            has_begun = True
        held = rest[cut:]
    if held or has_begun:
        yield Chunk(held, row, True, file.position)


def _page_texts(file: _File) -> Iterator[str]:
    page = Page()
    try:
        for part in file.texts():
            page.feed(part)
            yield page.take()
        page.close()
        yield page.take()
    except AssertionError as problem:  # the parser's way to say so
        raise InputError(
            f"{file.label} is HTML that cannot be parsed, at line {page.getpos()[0]}: mend it, or "
            "name it .txt to take it as it is"
        ) from problem


Row = tuple[int, Any]  # its number, and an object or a string


def _row_chunks(file: _File, field: str, rows: Iterable[Row]) -> Iterator[Chunk]:
    for number, row in rows:
        prompt, body, name = "", row, field
        if isinstance(row, dict):
            if field in row:
                body = row[field]
            elif "prompt" in row and "completion" in row:
                prompt, body, name = row["prompt"], row["completion"], "completion"
            else:
                raise _no_field(f"{file.label}:row {number}", field, row)
        elif not isinstance(row, str):
            kind = JSON_KINDS[type(row)]
            raise _NoRows(f"{file.label}:row {number} is {kind}, allowed is an object or a string")
        if prompt != "" and (prompt := _checked(prompt, file, number, "prompt")):
            yield Chunk(prompt, number, False, file.position, True)
        yield Chunk(_checked(body, file, number, name), number, True, file.position)


def _checked(value: object, file: _File, row: int, name: str) -> str:
    """The text of a field; "" for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = JSON_KINDS[type(value)]
        raise InputError(f"{file.label}:row {row} has {kind} in {name!r}, allowed is a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as problem:
            code = f"\\u{ord(value[problem.start]):04x}"
            raise InputError(
                f"{file.label}:row {row} has {code}, half a character, in {name!r}: correct what "
                "wrote it, or leave the row out"
            ) from None
    return value


def _no_field(where: str, field: str, names: Iterable[str]) -> _NoRows:
    listed = ", ".join(names)
    listed = listed if len(listed) <= 200 else f"{listed[:200]}..."
    return _NoRows(
        f"{where} has no field {field!r}; its fields are {listed or 'none'}: name one with "
        "--text-field"
    )


def _json_lines(file: _File, _: TextConfig) -> Iterator[Row]:
    decode = json.JSONDecoder().decode
    for number, line in enumerate(_lines(file.texts()), 1):
        if not line or line.isspace():
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as problem:
            at = f":column {problem.colno}" if isinstance(problem, json.JSONDecodeError) else ""
            reason = getattr(problem, "msg", problem)
            raise _NoRows(
                f"{file.label}:row {number}{at} is not JSON ({reason}): every line must be a whole "
                "object or string; a file laid out otherwise is named .json"
            ) from None
        yield number, row


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines that end with \\n, without it."""
    held: list[str] = []
    for text in texts:
        first, *others = text.split("\n")
        held.append(first)
        if others:
            yield "".join(held)
            held = [others.pop()]
            yield from others
    yield "".join(held)


def _json_rows(file: _File, _: TextConfig) -> Iterator[Row]:
    """The values one after another, and of an array its elements."""
    json_text, row = _Json(file), 0
    while opening := json_text.peek():
        if opening != "[":
            row += 1
            yield row, json_text.value(row)
            continue
        json_text.at += 1
        ends = json_text.peek() == "]"
        json_text.at += ends
        while not ends:
            row += 1
            yield row, json_text.value(row)
            after = json_text.peek()
            if after not in (",", "]"):
                raise json_text.problem(row, "Expecting ',' or ']' after it", json_text.at)
            json_text.at += 1
            ends = after == "]"
            json_text.peek()


class _Json:
    """JSON text that is parsed value by value and read as far as that needs."""

    def __init__(self, file: _File) -> None:
        self._label, self._texts = file.label, file.texts()
        self._decoder = json.JSONDecoder()
        self._text, self.at = "", 0  # where the next value begins
        self._line, self._column = 1, 1  # of the first character of the text held

    def peek(self) -> str:
        """Go to the next character that is no white space, and return it; "" at the end."""
        while True:
            found = JSON_SPACE.match(self._text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._read_more():
                return ""

    def value(self, row: int) -> object:
        """The value that begins here."""
        while True:
            try:
                value, self.at = self._decoder.raw_decode(self._text, self.at)
                return value
            except json.JSONDecodeError as problem:
                # What the end of the text held cuts off is wrong only if there is no more.
                cut = problem.pos > len(self._text) - 16 or problem.msg.startswith("Unterminated")
                if not (cut and self._read_more()):
                    raise self.problem(row, problem.msg, problem.pos) from None
            except (ValueError, RecursionError) as problem:
                raise self.problem(row, str(problem), self.at) from None

    def problem(self, row: int, reason: str, at: int) -> InputError:
        """An error that names a place in the text held."""
        line, column = self._place(at)
        where = f"{self._label}:row {row}"
        return _NoRows(f"{where} is not JSON, at line {line} column {column}: {reason}")

    def _place(self, at: int) -> tuple[int, int]:
        newlines = self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at) if newlines else self._column + at
        return self._line + newlines, column

    def _read_more(self) -> bool:
        """Drop what was parsed, and make what is left at least twice as long, so that the time a
        long value takes stays in proportion; False if there is no more.
        """
        parts, size = [self._text[self.at :]], 0
        for text in self._texts:
            parts.append(text)
            size += len(text)
            if size >= len(parts[0]):
                break
        if not size:
            return False
        self._line, self._column = self._place(self.at)
        self._text, self.at = "".join(parts), 0
        return True


def _table_rows(file: _File, _: TextConfig, dialect: str = "excel") -> Iterator[Row]:
    # Strict: otherwise a stray quote takes the rest of the file for one field, and loses itself.
    reader = csv.reader(_table_lines(file.texts()), dialect, strict=True)
    header, number = None, 0
    while True:
        limit = csv.field_size_limit(FIELD_LIMIT)  # is one for all of the process
        try:
            row = next(reader, None)
        except csv.Error as problem:
            raise InputError(
                f"{file.label}:row {number + 1} cannot be read, near line {reader.line_num}: "
                f'{problem}; quotes stand around whole fields, and "" for one inside'
            ) from problem
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if not row:
            continue  # a blank line
        if header is None:
            header = row
        else:
            number += 1
            if len(row) != len(header):
                raise InputError(
                    f"{file.label}:row {number} has {len(row)} fields, its header has "
                    f'{len(header)}: put fields with separators in them in quotes ("...")'
                )
            yield number, dict(zip(header, row))


def _table_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines with their ends, which may be \\n, \\r\\n or \\r."""
    held: list[str] = []
    for text in texts:
        if "\n" not in text:
            held.append(text)
            continue
        lines = io.StringIO("".join([*held, text]), newline="").readlines()
        held = [] if lines[-1].endswith("\n") else [lines.pop()]
        yield from lines
    yield from io.StringIO("".join(held), newline="")


def _parquet_rows(file: _File, text: TextConfig) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as problem:
        raise InputError(f"reading .parquet files needs pyarrow: {EXTRA}") from problem
    with _seekable(file) as seekable:
        try:
            table = pyarrow.parquet.ParquetFile(
                seekable, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
            )
            columns = _text_columns(file, table.schema_arrow, text.text_field)
            done, total, file.position = 0, table.metadata.num_rows, 0
            n_rows = _rows_at_once(table.metadata, columns, file.chunk_bytes)
            for batch in table.iter_batches(n_rows, columns=columns):
                rows = batch.to_pylist()
                yield from enumerate(rows, done + 1)
                done += len(rows)
                file.position = file.source.size * done // total
        except (pyarrow.ArrowException, UnicodeDecodeError) as problem:
            reason = str(problem).partition("\n")[0]
            raise InputError(
                f"{file.label} is no whole Parquet file ({reason}): make or download it again"
            ) from problem


@contextmanager
def _seekable(file: _File) -> Iterator[BinaryIO]:
    """The unpacked file, open for reading at any place."""
    packing = _suffixes(file.label)[1]
    blocks = file.blocks(b"PAR1")
    if packing:
        with tempfile.TemporaryFile() as unpacked:
            unpacked.writelines(blocks)
            yield unpacked
    else:
        next(blocks, None)  # refuses other kinds
        with _problems_named(file.label, packing), file.source.path.open("rb") as opened:
            yield opened


def _text_columns(file: _File, schema: Any, field: str) -> list[str]:
    """The columns that are read; InputError if they hold no text."""
    from pyarrow import types

    columns = [field] if field in schema.names else ["prompt", "completion"]
    if not set(columns) <= set(schema.names):
        raise _no_field(f"{file.label}:row 1", field, schema.names)
    for name in columns:
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        if not any(test(kind) for test in tests):
            raise InputError(f"{file.label}:row 1 has {kind} in {name!r}, allowed is a string")
    return columns


def _rows_at_once(metadata: Any, columns: Sequence[str], n_bytes: int) -> int:
    """How many rows have about this many bytes in the columns that are read."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    parts = [group.column(number) for group in groups for number in range(group.num_columns)]
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema in columns)
    return min(2**14, max(1, metadata.num_rows * n_bytes // max(1, size)))


ROW_READERS: dict[str, Callable[[_File, TextConfig], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": partial(_table_rows, dialect="excel-tab"),
    ".parquet": _parquet_rows,
}
