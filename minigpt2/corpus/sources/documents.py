"""A file's documents, in chunks: plain or separated text, rows, HTML as one sees it, papers.

A file is read in chunks, so it may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from ...errors import InputError
from ...formats.chat import ChatTemplate
from ..options import TextConfig
from .files import CHUNK_BYTES, Source, UnpackedFile, suffixes_of
from .html_text import DamagedPage, Page
from .papers import PAPER_READERS, paper_texts
from .rows import ROW_READERS, Chunk, row_chunks

OWN_TEMPLATE = ChatTemplate()


def kind_of(source: Source) -> Literal["rows", "page", "paper", "text"]:
    """How a file is read, by its suffix: row by row, as HTML, by the reader of a program that
    writes papers, or as plain text.
    """
    suffix = suffixes_of(source.label)[0]
    if suffix in ROW_READERS:
        return "rows"
    if suffix in PAPER_READERS:
        return "paper"
    return "page" if suffix in (".html", ".htm") else "text"


def read_documents(
    source: Source,
    text: TextConfig,
    chat: ChatTemplate = OWN_TEMPLATE,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Chunk]:
    """The documents of a file, in chunks of about `chunk_bytes` bytes that are cut anywhere.

    One leading BOM is left out, nothing else of the text changes. An empty row or file is one
    chunk with ""; an empty part between two separators is none, but counts as a row. Only text
    files are separated, HTML is not; a chat is what the template makes of it. Takes memory for a
    few chunks and one row. Raises InputError for what cannot be read, is no text, or is a row
    without text.
    """
    last = None
    for chunk in chunks_of(UnpackedFile(source, chunk_bytes), text, chat):
        if last is not None:
            yield last
        last = chunk
    if last is not None:
        yield last._replace(position=max(last.position, source.size))


def chunks_of(
    file: UnpackedFile, text: TextConfig, chat: ChatTemplate = OWN_TEMPLATE
) -> Iterator[Chunk]:
    """The documents of a file in chunks, as its kind is read."""
    kind = kind_of(file.source)
    if kind == "rows":
        rows = ROW_READERS[suffixes_of(file.label)[0]]
        return row_chunks(file, text.text_field, rows(file, text), chat)
    if kind == "page":
        return _whole_chunks(file, filter(None, _page_texts(file)))
    if kind == "paper":
        return _whole_chunks(file, paper_texts(file))
    if text.separator:
        return _separated_chunks(file, text.separator)
    return _whole_chunks(file, file.texts())


def _whole_chunks(file: UnpackedFile, texts: Iterable[str]) -> Iterator[Chunk]:
    """Texts as chunks of one document."""
    held = ""
    for text in texts:
        if held:
            yield Chunk(held, 0, False, file.position)
        held = text
    yield Chunk(held, 0, True, file.position)


def _separated_chunks(file: UnpackedFile, separator: str) -> Iterator[Chunk]:
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


def _page_texts(file: UnpackedFile) -> Iterator[str]:
    page = Page()
    try:
        for part in file.texts():
            page.feed(part)
            yield page.take()
        page.close()
        yield page.take()
    except DamagedPage as problem:
        raise InputError(
            f"{file.label} is HTML that cannot be parsed, {problem}: mend it, or name it .txt to "
            "take it as it is"
        ) from problem
