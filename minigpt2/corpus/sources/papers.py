"""The text of papers and books: .docx, .rtf, .pdf and .epub files. Paragraphs are lines.

Each file is one document, and is read as a whole, so its text may not be longer than MOST_BYTES.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import unquote
from xml.etree import ElementTree

from ...errors import InputError
from .files import UnpackedFile, seekable, suffixes_of
from .html_text import Page

MOST_BYTES = 2**28  # of XML and the like in one file, unpacked, or of text
INSTALL = 'pip install "minigpt2[documents]"'
PACKAGES = {".docx": "mammoth", ".rtf": "striprtf", ".pdf": "pypdf"}  # .epub needs none
ZIP, PDF, RTF = b"PK\x03\x04", b"%PDF-", rb"{\rtf"
CONTAINER, ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
UNSEEN = (".jpeg", ".jpg", ".png", ".gif", ".emf", ".wmf", ".mp3", ".mp4")  # is not unpacked


def missing_reader(name: str) -> str:
    """How to get what reads a file of this name; "" if it is there or none is needed."""
    package = PACKAGES.get(suffixes_of(name)[0])
    return INSTALL if package and importlib.util.find_spec(package) is None else ""


def paper_texts(file: UnpackedFile) -> Iterator[str]:
    """The text of such a file, in parts; InputError where it cannot be read, is encrypted or has
    none.
    """
    suffix = suffixes_of(file.label)[0]
    if install := missing_reader(file.label):
        raise InputError(f"reading {suffix} files needs {PACKAGES[suffix]}: {install}")
    if not file.source.size:
        return
    size, has_text = 0, False
    for text in PAPER_READERS[suffix](file):
        size += len(text)
        has_text = has_text or bool(text.strip())
        if size > MOST_BYTES:
            raise _too_large(file)
        if text:
            yield text
    if not has_text:
        scanned = ", and may be a scan: recognise it first, for example with ocrmypdf"
        raise InputError(
            f"{file.label} has no text in it"
            f"{scanned if suffix == '.pdf' else ': leave it out, or save it as plain text'}"
        )


def _docx_texts(file: UnpackedFile) -> Iterator[str]:
    from mammoth import docx

    with _read_as(file, "Word", ZIP) as data:
        # it would take the name of a temporary file, which is a number, for a path
        document = docx.read(io.BytesIO(data.read())).value
        notes: list[Any] = []
        yield _word_text(document, notes)
        for reference in notes:  # which grows: notes may have notes
            yield _word_text(document.notes.resolve(reference), notes)


def _word_text(element: Any, notes: list[Any]) -> str:
    """The text of an element of a Word document; its references to notes are put into `notes`."""
    kind = type(element).__name__
    if kind == "Text":
        return element.value
    if kind == "NoteReference":
        notes.append(element)
    if kind in ("Tab", "Break"):
        return "\t" if kind == "Tab" else "\n"
    parts = [
        _word_text(child, notes)
        for child in getattr(element, "children", getattr(element, "body", []))
    ]
    if kind == "TableRow":
        return "\t".join(" ".join(cell.split("\n")).strip(" ") for cell in parts) + "\n"
    return "".join(parts) + "\n" * (kind == "Paragraph")


def _rtf_texts(file: UnpackedFile) -> Iterator[str]:
    from striprtf.striprtf import rtf_to_text

    data = bytearray()
    for block in file.blocks(RTF):
        data += block
        if len(data) > MOST_BYTES:
            raise _too_large(file)
    if not data.startswith(RTF):
        raise _is_no(file, "RTF")
    if not data.rstrip(b"\0\r\n\t ").endswith(b"}"):
        raise InputError(f"{file.label} is no whole RTF file: it ends early, copy it again")
    # a byte beyond ASCII means what its escape does: a letter of the file's code page
    text = re.sub(rb"[\x80-\xff]", lambda byte: b"\\'%02x" % byte[0][0], bytes(data)).decode(
        "ascii"
    )
    with _problems_named(file, "RTF"):
        yield rtf_to_text(text)


def _pdf_texts(file: UnpackedFile) -> Iterator[str]:
    import pypdf

    log = logging.getLogger("pypdf")
    if log.level == logging.NOTSET:
        log.setLevel(logging.ERROR)  # it says of much that is odd that it is, and not where
    with _read_as(file, "PDF", PDF) as data:
        reader = pypdf.PdfReader(data)
        if reader.is_encrypted and not reader.decrypt(""):
            raise _is_encrypted(file, "a password")
        n_pages = len(reader.pages)
        for number, page in enumerate(reader.pages, 1):
            text = page.extract_text()
            # half a character, of a font that names its letters wrongly
            text = re.sub("[\ud800-\udfff]", "\ufffd", text.rstrip("\n"))
            file.position = file.source.size * number // n_pages
            yield text + "\n" * bool(text)


def _epub_texts(file: UnpackedFile) -> Iterator[str]:
    with _read_as(file, "EPUB", ZIP) as data, zipfile.ZipFile(data) as archive:
        container = ElementTree.fromstring(archive.read(CONTAINER))
        package = next(_elements(container, "rootfile")).attrib["full-path"]
        book = ElementTree.fromstring(archive.read(package))
        names = {item.attrib["id"]: item.attrib["href"] for item in _elements(book, "item")}
        pages = [names[item.attrib["idref"]] for item in _elements(book, "itemref")]
        folder = posixpath.dirname(package)
        for page in pages:
            name = posixpath.normpath(posixpath.join(folder, unquote(page)))
            try:
                text = _page_text(archive.read(name).decode("utf-8-sig"))
            except UnicodeDecodeError:
                if ENCRYPTION not in archive.namelist():
                    raise
                raise _is_encrypted(file, "copy protection") from None
            yield text + "\n" * bool(text)


def _page_text(html: str) -> str:
    page = Page()
    page.feed(html)
    page.close()
    return page.take()


def _elements(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """The elements of this name, in whichever namespace."""
    return (element for element in root.iter() if str(element.tag).rpartition("}")[2] == name)


def _require_small(file: UnpackedFile, data: BinaryIO) -> None:
    """Raise InputError for a zip file that says of its parts that they are too large; zipfile
    unpacks no more than it says.
    """
    with zipfile.ZipFile(data) as archive:
        sizes = (m.file_size for m in archive.infolist() if not m.filename.lower().endswith(UNSEEN))
        if sum(sizes) > MOST_BYTES:
            raise _too_large(file)
    data.seek(0)


def _is_encrypted(file: UnpackedFile, how: str) -> InputError:
    return InputError(f"{file.label} is encrypted: save it without {how}")


def _too_large(file: UnpackedFile) -> InputError:
    return InputError(
        f"{file.label} unpacks to more than {MOST_BYTES >> 20} MiB of text: save it as plain text"
    )


def _is_no(file: UnpackedFile, kind: str) -> InputError:
    return InputError(f"{file.label} is no {kind} file: give it the suffix of what it is")


@contextmanager
def _read_as(file: UnpackedFile, kind: str, signature: bytes) -> Iterator[BinaryIO]:
    """The file, open at its beginning, which is the one that such files have."""
    with seekable(file, signature) as data:
        if data.read(len(signature)) != signature:
            raise _is_no(file, kind)
        data.seek(0)
        with _problems_named(file, kind):
            if signature == ZIP:
                _require_small(file, data)
            yield data


@contextmanager
def _problems_named(file: UnpackedFile, kind: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as problem:  # readers raise whatever a damaged file leads them into
        reason = str(problem).partition("\n")[0] or type(problem).__name__
        raise InputError(
            f"{file.label} cannot be read as {kind} ({reason}): open and save it anew, or save it "
            "as plain text"
        ) from problem


PAPER_READERS: dict[str, Callable[[UnpackedFile], Iterator[str]]] = {
    ".docx": _docx_texts,
    ".rtf": _rtf_texts,
    ".pdf": _pdf_texts,
    ".epub": _epub_texts,
}
