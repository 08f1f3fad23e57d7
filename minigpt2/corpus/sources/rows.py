"""The rows of .jsonl, .json, .csv, .tsv and .parquet files, and the texts in them.

Read row by row; only one row has to fit into memory, and of Parquet a few.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from ...arguments import did_you_mean
from ...errors import InputError, OptionError
from ...formats.chat import ChatTemplate
from ..options import TextConfig
from .chats import LISTS, chat_fields, messages_of
from .files import UnpackedFile, seekable, suffixes_of

FIELD_LIMIT = 2**31 - 1  # of the csv module, in characters
TABLES = (".csv", ".tsv")
DELIMITERS = (",", ";", "\t", "|")  # of .csv files, in the order in which they are tried
DELIMITER_LINE = re.compile(r'"?sep=([^"\r\n\0])"?[\r\n]*', re.IGNORECASE)  # Excel writes it
HEADER_CHARACTERS = 2**20  # that are looked at to tell the delimiter
LONGEST_ROW = 2**28  # characters of JSON: what is longer would need many gigabytes of memory
JSON_SPACE = re.compile(r"[ \t\n\r]*")
JSON_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "an array"}
JSON_KINDS |= {dict: "an object", type(None): "null"}
PAIR = ("prompt", "completion")

Row = tuple[int, Any]  # its number, and an object or a string


class Chunk(NamedTuple):
    """A part of a document, in the order of the file."""

    text: str  # "" only where is_last is True
    row: int  # from 1: its row, object or separated part; 0 where the file is one document
    is_last: bool  # the last chunk of its document
    position: int  # bytes of the file, as it lies on disk, that were read so far
    prompt: bool = False  # part of what asks for an answer
    shielded: bool = False  # its document is a chat (`ChatTemplate.shielded`)


class NoRowsError(OptionError):
    """A file that was to hold rows with text, and holds something else."""


def row_chunks(
    file: UnpackedFile, field: str, rows: Iterable[Row], chat: ChatTemplate
) -> Iterator[Chunk]:
    """The texts of rows: the field of this name, a prompt and its completion, or a chat."""
    for number, row in rows:
        if type(row) is list and row and type(row[0]) is dict:
            row = {LISTS[0]: row}
        prompt, body, name = "", row, field
        if isinstance(row, dict):
            columns = columns_of(row, field)
            if columns == (field,) and not row[field]:  # what else is there?
                columns = columns_of([name for name in row if name != field], field) or columns
            if is_chat(row, columns, field):
                yield from _chat_chunks(file, (number, row), columns, chat)
                continue
            if columns == (field,):
                body = row[field]
            elif columns:
                prompt, body, name = row["prompt"], row["completion"], "completion"
            else:
                lists = [name for name, value in row.items() if _holds_objects(value)]
                rows_in = [name for name in lists if columns_of(row[name][0], field)]
                raise _no_field(file, number, field, row, rows_in)
        elif not isinstance(row, str):
            kind = JSON_KINDS[type(row)]
            raise NoRowsError(
                f"{file.label}:row {number} is {kind}, allowed is an object or a string"
            )
        if prompt != "" and (prompt := _checked(prompt, file, number, "prompt")):
            yield Chunk(prompt, number, False, file.position, True)
        yield Chunk(_checked(body, file, number, name), number, True, file.position)


def records(file: UnpackedFile, wanted: Sequence[Sequence[str]]) -> Iterator[Row]:
    """The rows of a file with whatever their fields hold, texts, numbers and lists: of each row the
    first group of `wanted` fields that it has. Raises InputError for a row that has none of them.
    """
    if suffixes_of(file.label)[0] == ".parquet":
        rows = _parquet(file, lambda schema: _first_group(file, 1, schema.names, wanted))
    else:
        rows = ROW_READERS[suffixes_of(file.label)[0]](file, TextConfig())
    for number, row in rows:
        names = row if isinstance(row, dict) else ()
        yield number, {name: row[name] for name in _first_group(file, number, names, wanted)}


def _first_group(
    file: UnpackedFile, number: int, names: Collection[str], wanted: Sequence[Sequence[str]]
) -> list[str]:
    for group in wanted:
        if set(group) <= set(names):
            return list(group)
    found = f"has the fields {', '.join(names)[:200]}" if names else "is no object"
    expected = ", or ".join(" ".join(group) for group in wanted)
    raise InputError(f"{file.label}:row {number} {found}; the fields wanted are {expected}")


def columns_of(names: Collection[str], field: str) -> tuple[str, ...]:
    """The fields of a row with these names that hold its text; none if it is not understood."""
    if field in names:
        return (field,)
    return PAIR if set(PAIR) <= set(names) else chat_fields(names)


def is_chat(row: dict[str, Any], columns: tuple[str, ...], field: str) -> bool:
    """Whether these columns of a row are a chat: by their names, or a list in the named field."""
    if columns == (field,):
        value = row[field]
        if field in LISTS:
            return type(value) is list or (type(value) is str and value.lstrip().startswith("["))
        return _holds_objects(value)
    return columns not in ((), PAIR)


def _chat_chunks(
    file: UnpackedFile, row: Row, columns: tuple[str, ...], chat: ChatTemplate
) -> Iterator[Chunk]:
    number, values = row
    name = columns[-1]
    if type(values[name]) is dict and name in LISTS:  # such as the texts of a program, by language
        raise NoRowsError(
            f"{file.label}:row {number}: {name!r} is an object, allowed is a list of messages"
        )
    try:
        parts = chat.parts(messages_of(values, columns))
    except InputError as problem:
        raise InputError(f"{file.label}:row {number}: {problem}") from None
    if parts:  # the document has an end-of-text of its own
        parts[-1] = parts[-1]._replace(text=parts[-1].text.removesuffix(chat.eos))
    for text, is_answer in parts:
        if text:
            yield Chunk(text, number, False, file.position, not is_answer, True)
    yield Chunk("", number, True, file.position, bool(parts) and not parts[-1].is_answer, True)


def _checked(value: object, file: UnpackedFile, row: int, name: str) -> str:
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


def _no_field(
    file: UnpackedFile, row: int, field: str, names: Iterable[str], rows_in: Sequence[str] = ()
) -> NoRowsError:
    """An error that says which fields there are; those of `rows_in` are lists of rows."""
    listed = ", ".join(name if name == name.strip() else repr(name) for name in names)
    listed = listed if len(listed) <= 200 else f"{listed[:200]}..."
    cure = "name one with text_field"
    if suffixes_of(file.label)[0] in TABLES:
        cure += ", or several with csv_columns"
    elif rows_in:
        cure = f"the rows seem to be in {rows_in[0]!r}; save that list alone as a .json file"
    return NoRowsError(
        f"{file.label}:row {row} has no field {field!r}; its fields are {listed or 'none'}: {cure}",
        "text_field",
        "csv_columns",
    )


def _holds_objects(value: object) -> bool:
    return type(value) is list and bool(value) and type(value[0]) is dict


def _json_lines(file: UnpackedFile, _: TextConfig) -> Iterator[Row]:
    decode = json.JSONDecoder().decode
    for number, line in enumerate(lines_of(file), 1):
        if not line or line.isspace():
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as problem:
            at = f":column {problem.colno}" if isinstance(problem, json.JSONDecodeError) else ""
            reason = getattr(problem, "msg", problem)
            raise NoRowsError(
                f"{file.label}:row {number}{at} is not JSON ({reason}): every line must be a whole "
                "object or string; a file laid out otherwise is named .json"
            ) from None
        yield number, row


def lines_of(file: UnpackedFile) -> Iterator[str]:
    """Lines that end with \\n, without it."""
    held, size, row = list[str](), 0, 1
    for text in file.texts():
        first, *others = text.split("\n")
        held.append(first)
        size += len(first)
        if size > LONGEST_ROW:
            raise _too_long(file.label, row)
        if others:
            yield "".join(held)
            held, row = [others.pop()], row + len(others) + 1
            size = len(held[0])
            yield from others
    yield "".join(held)


def _too_long(label: str, row: int) -> InputError:
    return InputError(
        f"{label}:row {row} has more than {LONGEST_ROW:,} characters, too many for one row of "
        "JSON: cut its text into several rows, or save it as .txt"
    )


def _json_rows(file: UnpackedFile, _: TextConfig) -> Iterator[Row]:
    """The values one after another, and of an array its elements."""
    json_text, row = _Json(file), 0
    while opening := json_text.peek():
        if opening != "[":
            row += 1
            yield row, json_text.value(row)
            continue
        json_text.at += 1
        closed = json_text.peek() == "]"
        json_text.at += closed
        while not closed:
            row += 1
            yield row, json_text.value(row)
            after = json_text.peek()
            if after not in (",", "]"):
                raise json_text.problem(row, "Expecting ',' or ']' after it", json_text.at)
            json_text.at += 1
            closed = after == "]"
            json_text.peek()


class _Json:
    """JSON text that is parsed value by value and read as far as that needs."""

    def __init__(self, file: UnpackedFile) -> None:
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
                if cut and len(self._text) - self.at > LONGEST_ROW:
                    raise _too_long(self._label, row) from None
                if not (cut and self._read_more()):
                    raise self.problem(row, problem.msg, problem.pos) from None
            except (ValueError, RecursionError) as problem:
                raise self.problem(row, str(problem), self.at) from None

    def problem(self, row: int, reason: str, at: int) -> InputError:
        """An error that names a place in the text held."""
        line, column = self._place(at)
        where = f"{self._label}:row {row}"
        return NoRowsError(f"{where} is not JSON, at line {line} column {column}: {reason}")

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


def wanted_columns(names: Sequence[str], text: TextConfig) -> tuple[str, ...]:
    """Those of a table's columns that its documents are made of; none if they are not all there."""
    if text.columns:
        return text.columns if set(text.columns) <= set(names) else ()
    return columns_of(names, text.text_field)


def table_delimiter(file: UnpackedFile, text: TextConfig) -> str:
    """What stands between the columns of a .csv or .tsv file: what the options say, or its first
    line; otherwise tabs in .tsv, and in .csv that of DELIMITERS by which the header has the wanted
    columns, or else the most columns.
    """
    return _opened_table(file, text)[0]


def usual_delimiter(label: str) -> str:
    """What stands between the columns of a file with this name if nothing says otherwise."""
    return "\t" if suffixes_of(label)[0] == ".tsv" else ","


def _opened_table(file: UnpackedFile, text: TextConfig) -> tuple[str, Iterator[str]]:
    """The delimiter of a table, and its lines."""
    lines = _table_lines(file.texts())
    read = [next(lines, "")]
    delimiter, usual = text.delimiter, usual_delimiter(file.label)
    if said := DELIMITER_LINE.fullmatch(read[0]):
        read[0] = "\n"  # a blank line, so that the others keep their numbers
        delimiter = delimiter or said[1]
    if delimiter is None and usual == ",":
        delimiter = _detected(read, lines, text)
    return delimiter or usual, chain(read, lines)


def _detected(read: list[str], lines: Iterator[str], text: TextConfig) -> str:
    """The delimiter of a header; the lines looked at are added to those read."""
    most, best = 1, ","
    for delimiter in DELIMITERS:
        header = _header(_again(read, lines), delimiter, text)
        if wanted_columns(header, text):
            return delimiter
        if len(header) > most:
            most, best = len(header), delimiter
    return best


def _again(read: list[str], lines: Iterator[str]) -> Iterator[str]:
    """The lines that were read, then others, which are added, up to HEADER_CHARACTERS."""
    yield from read
    size = sum(map(len, read))
    while size < HEADER_CHARACTERS and (line := next(lines, "")):
        read.append(line)
        size += len(line)
        yield line


def _header(lines: Iterator[str], delimiter: str, text: TextConfig) -> list[str]:
    """The names in the first row that is not blank; none if it cannot be read."""
    try:
        return next(filter(None, csv.reader(lines, **_dialect(delimiter, text))), [])
    except csv.Error:
        return []


def _dialect(delimiter: str, text: TextConfig) -> dict[str, Any]:
    # Strict: otherwise a stray quote takes the rest of the file for one field, and loses itself.
    quoting = csv.QUOTE_NONE if text.csv_plain_quotes else csv.QUOTE_MINIMAL
    return {"delimiter": delimiter, "quoting": quoting, "strict": True}


def _table_rows(file: UnpackedFile, text: TextConfig) -> Iterator[Row]:
    delimiter, lines = _opened_table(file, text)
    reader = csv.reader(lines, **_dialect(delimiter, text))
    header, places, number = None, [], 0
    while True:
        limit = csv.field_size_limit(FIELD_LIMIT)  # is one for all of the process
        try:
            row = next(reader, None)
        except csv.Error as problem:
            raise OptionError(
                f"{file.label}:row {number + 1} cannot be read, near line {reader.line_num}: "
                f'{problem}; quotes stand around whole fields, and "" for one inside: where they '
                "are text, give csv_plain_quotes",
                "csv_plain_quotes",
            ) from problem
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if not row:
            continue  # a blank line
        if header is None:
            header = row
            continue
        number += 1
        if len(row) != len(header):
            quoted = f'put fields with {delimiter!r} in them in quotes ("...")'
            if text.csv_plain_quotes:
                quoted += " and take csv_plain_quotes away"
            raise OptionError(
                f"{file.label}:row {number} has {len(row)} fields, its header has {len(header)}: "
                f"{quoted}, or name another csv_delimiter",
                "csv_delimiter",
                "csv_plain_quotes",
            )
        if number == 1:
            places = _column_places(file.label, header, text)
        if places:
            yield number, "\n".join(filter(None, [row[place] for place in places]))
        else:
            yield number, dict(zip(header, row))


def _column_places(label: str, header: Sequence[str], text: TextConfig) -> list[int]:
    """Where in a row csv_columns are, if that is given; OptionError for a name that is not there,
    InputError for a wanted one that is there twice.
    """
    listed = ", ".join(header)
    listed = listed if len(listed) <= 200 else f"{listed[:200]}..."
    for name in text.columns:
        if name not in header:
            raise OptionError(
                f"{label}:row 1 has no column {name!r}{_alike(name, header)}; its columns are "
                f"{listed}: name them with csv_columns",
                "csv_columns",
            )
    for name in wanted_columns(header, text):
        if (count := header.count(name)) > 1:
            raise InputError(
                f"{label}:row 1 has {count} columns {name!r}: give each a name of its own in the "
                "header"
            )
    return [header.index(name) for name in text.columns]


def _alike(name: str, names: Sequence[str]) -> str:
    """The name that one differs from by blanks around it or by case, or else a near one, as a
    question in parentheses, after a blank; "" if there is none.
    """
    bare = name.strip().casefold()
    alike = [repr(other) for other in names if other.strip().casefold() == bare]
    return f" (did you mean {alike[0]}?)" if alike else did_you_mean(name, names)


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


def _parquet_rows(file: UnpackedFile, text: TextConfig) -> Iterator[Row]:
    return _parquet(file, lambda schema: _text_columns(file, schema, text.text_field))


def _parquet(file: UnpackedFile, columns_in: Callable[[Any], list[str]]) -> Iterator[Row]:
    """The rows of a Parquet file, with those columns that are chosen by its schema."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as problem:
        raise InputError("reading .parquet files needs pyarrow: pip install pyarrow") from problem
    with seekable(file, b"PAR1") as opened:
        try:
            table = pyarrow.parquet.ParquetFile(
                opened, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
            )
            columns = columns_in(table.schema_arrow)
            done, total, file.position = 0, table.metadata.num_rows, 0
            n_rows = _rows_at_once(table.metadata, file.chunk_bytes)
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


def _text_columns(file: UnpackedFile, schema: Any, field: str) -> list[str]:
    """The columns that are read; InputError if they hold no text."""
    from pyarrow import types

    columns = columns_of(schema.names, field)
    if columns == (field,):  # where that is null, others count
        columns += columns_of([name for name in schema.names if name != field], field)
    if not columns:
        raise _no_field(file, 1, field, schema.names)
    for name in columns:
        kind = schema.field(name).type
        if types.is_list(kind) or types.is_large_list(kind):
            continue  # of messages, or refused row by row
        kind = kind.value_type if types.is_dictionary(kind) else kind
        tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        if not any(test(kind) for test in tests) and (name == field or field not in columns):
            raise InputError(f"{file.label}:row 1 has {kind} in {name!r}, allowed is a string")
    return list(columns)


def _rows_at_once(metadata: Any, n_bytes: int) -> int:
    """How many rows have about this many bytes in all columns. What the file says of each column is
    not asked for: pyarrow ends the process where that is damaged.
    """
    size = sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
    return min(2**14, max(1, metadata.num_rows * n_bytes // max(1, size)))


ROW_READERS: dict[str, Callable[[UnpackedFile, TextConfig], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".parquet": _parquet_rows,
}
