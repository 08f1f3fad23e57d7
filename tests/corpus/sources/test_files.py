"""The bytes of a file: unpacked, decoded, refused. Oracles: Python's decoder, what was packed."""

import gzip
import io
import lzma
import os
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt2.errors import InputError
from text_files import (
    LATIN,
    PACK,
    content_of,
    documents_of,
    parquet,
    quick,
    source_of,
    texts,
    texts_of,
    write,
)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is no regular file: .* or give it to stdin as -"):
        documents_of(source_of(tmp_path / "pipe"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux")
def test_an_error_while_reading_is_named():
    with pytest.raises(InputError, match=r"/proc/self/mem cannot be read: Input/output error"):
        documents_of(source_of("/proc/self/mem"))


@quick
@given(texts.map(lambda text: text.replace("\r", "\r\n")), st.integers(1, 9))
@example("\ufeff\ufeffx\ufeff", 1)
@example("\ufeff\ufeffx\ufeff", 9)
@example("a\r\n\rb\0\r\n", 2)
def test_every_byte_is_kept_but_one_leading_mark(text, chunk_bytes):
    ((_, _, got),) = content_of("a.txt", text, chunk_bytes=chunk_bytes)
    assert got.encode() == text.encode().removeprefix(b"\xef\xbb\xbf")


@quick
@given(
    st.text(max_size=20).filter(lambda text: not any(ord(letter) < 32 for letter in text)),
    st.sampled_from([b"\xff", b"\xe9 ", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x9f\xa4", b"\x80"]),
    st.sampled_from(["", "after", "日本"]),
    st.booleans(),
    st.integers(1, 9),
    st.sampled_from(["txt", "jsonl", "csv", "html"]),
)
def test_invalid_utf8_is_refused_with_its_place_in_the_file(
    before, bad, after, bom, chunk_bytes, suffix
):
    data = b"\xef\xbb\xbf" * bom + b"x" + before.encode() + bad + after.encode()
    if suffix != "txt":  # formats that read ahead may find another mistake first
        data, chunk_bytes = data.replace(b'"', b" "), 2**20
    with pytest.raises(UnicodeDecodeError) as oracle:
        data.decode()
    place = f"/a.{suffix} is not UTF-8 at byte {oracle.value.start}: convert it with iconv -f"
    assert content_of(f"a.{suffix}", data, chunk_bytes=chunk_bytes).startswith(place)


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


ODT = "application/vnd.oasis.opendocument.text"
TAR = b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(1000)
OTHER_FILES = [
    (LATIN.encode("utf-16"), r"looks like UTF-16: .* iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff" + "日本".encode("utf-16-be"), "looks like UTF-16: "),
    (LATIN.encode("utf-16-le"), "looks like UTF-16LE: .* iconv -f UTF-16LE"),
    ("naïve ışık ".encode("utf-16-be") * 9999, "looks like UTF-16BE: "),
    (LATIN.encode("utf-32"), "looks like UTF-32: "),
    (b"%PDF-1.7\n...", r"is a PDF: give it a name that ends in \.pdf"),
    (zipped(**{"a.txt": "x"}), "is a zip archive: unpack it"),
    (
        zipped(**{"[Content_Types].xml": "", "word/document.xml": ""}),
        r"is a Word document: give it a name that ends in \.docx",
    ),
    (zipped(**{"[Content_Types].xml": "", "xl/workbook.xml": ""}), r"is an Excel file: .*\.csv"),
    (zipped(mimetype=ODT), "is an OpenDocument file: save it as plain text, or .*pandoc"),
    (
        zipped(mimetype="application/epub+zip"),
        r"is an EPUB book: give it a name that ends in \.epub",
    ),
    (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99),
        "is an old or encrypted Office file: save it anew",
    ),
    (rb"{\rtf1\ansi text}", r"is an RTF document: give it a name that ends in \.rtf"),
    (b"7z\xbc\xaf\x27\x1c" + bytes(99), "is an archive: unpack it"),
    (b"Rar!\x1a\x07\x01\0", "is an archive: unpack it"),
    (TAR, "is an archive: unpack it"),
    (gzip.compress(LATIN.encode(), mtime=0), r"is compressed with gzip: .* ends in \.gz"),
    (lzma.compress(LATIN.encode()), r"is compressed with xz: .* ends in \.xz"),
    (zstandard.compress(LATIN.encode()), r"is compressed with zstd: .* ends in \.zst"),
    (b"BZh91AY&SY\xd9\x02", "is compressed with bzip2: unpack it with bunzip2"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
    (parquet({"text": ["x"]}), r"is a Parquet file: give it a name that ends in \.parquet"),
    (b"\x89PNG\r\n\x1a\n", "is an image: leave it out"),
    (b"\xff\xd8\xff\xe0\0\x10JFIF", "is an image: leave it out"),
    (b"GIF89a\1\0\1\0", "is an image: leave it out"),
    (b"RIFF\x24\0\0\0WAVEfmt ", "is audio or video: leave it out"),
    (b"ID3\x03\0\0\0", "is audio or video: leave it out"),
    (b"\0\0\0\x20ftypisom", "is audio or video: leave it out"),
    (b"SQLite format 3\0", "is a binary file, not text: leave it out"),
    (b"\x93NUMPY\1\0v\0{'descr': '<i8'}", "is a binary file"),
    (b"\x80\x04\x95\x0b\0\0\0", "is a binary file"),
    (b"ELF text\0\0\0\0\0" * 99, "is a binary file"),
    (bytes(1000), "is a binary file"),
    (b"x" * 60_000 + bytes(1000), "is a binary file"),
    (bytes(range(1, 256)), "is a binary file"),
]


@pytest.mark.parametrize(("content", "message"), OTHER_FILES)
def test_other_files_than_text_are_refused_by_name(tmp_path, content, message):
    for name in ("a.txt", "a.jsonl", "a.html"):
        with pytest.raises(InputError, match=rf"{name} {message}") as problem:
            documents_of(write(tmp_path, name, content))
        assert "\n" not in str(problem.value)
    packed = write(tmp_path, "a.txt.gz", gzip.compress(content, mtime=0))
    with pytest.raises(InputError, match=rf"a\.txt\.gz {message}"):
        documents_of(packed, chunk_bytes=16)


@pytest.mark.parametrize("text", ["a\0b", "\0", "x" * 9990 + "\0" * 90, "<html>PK\x03\x04 %PDF-"])
def test_a_few_nuls_and_harmless_beginnings_are_text(tmp_path, text):
    assert texts_of(write(tmp_path, "a.txt", text)) == [text]


@pytest.mark.parametrize(
    "text",
    ["The ftyp box", "RIFF is a format", "GIF89a is one too", "ID3 tags", "PAR1 ends", "BZh"],
)
def test_a_text_about_other_formats_is_text(tmp_path, text):
    assert texts_of(write(tmp_path, "a.txt", text)) == [text]


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_compressed_files_that_are_damaged_are_named(tmp_path, packing):
    name = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}[packing]
    options = {"write_checksum": True} if packing == ".zst" else {}
    text = "".join(f"{number} The lamp is lit. " for number in range(9999))
    whole = (
        zstandard.ZstdCompressor(**options).compress(text.encode())
        if options
        else PACK[packing](text.encode())
    )
    middle = len(whole) // 2
    damages = {
        "cut": whole[:middle],
        "cut early": whole[:5],
        "lacks one byte": whole[:-1],
        "changed": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "not compressed": LATIN.encode(),
    }
    for suffix in (".txt", ".parquet"):
        for damage, data in damages.items():
            source = write(tmp_path, f"a{suffix}{packing}", data)
            message = rf"a{suffix}{packing} is no whole {name} file \(.*\): make or download it"
            with pytest.raises(InputError, match=message) as problem:
                documents_of(source)
            assert "\n" not in str(problem.value), damage


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_compressed_files_may_have_several_parts(tmp_path, packing):
    data = PACK[packing](b"one ") + PACK[packing](b"") + PACK[packing](b"two")
    source = write(tmp_path, f"a.txt{packing}", data)
    for chunk_bytes in (1, 2**20):
        assert texts_of(source, chunk_bytes=chunk_bytes) == ["one two"]


def test_archives_of_the_web_with_a_long_window_are_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(LATIN.encode()) + compressor.flush()
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(data)
    assert texts_of(write(tmp_path, "a.txt.zst", data)) == [LATIN]
