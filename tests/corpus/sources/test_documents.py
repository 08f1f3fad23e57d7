"""The documents of a file, in chunks. Oracles: the documents that were written, and the same
operation on the whole text at once.
"""

import gzip
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.sources.documents import read_documents
from minigpt2.corpus.sources.rows import Chunk
from minigpt2.errors import InputError
from text_files import (
    DOCUMENTS,
    PACK,
    PLAIN,
    SHAPES,
    content_of,
    documents_of,
    give_stdin,
    quick,
    sources_in,
    texts,
    texts_of,
    write,
)


def test_eight_shapes_of_the_same_documents_are_the_same(tmp_path, monkeypatch):
    # A file's own leading mark is no text: where documents are files, none begins with one.
    texts = DOCUMENTS[:4]
    for number, text in enumerate(texts):
        write(tmp_path, f"folder/{number}.txt", text)
        write(tmp_path, f"globbed/{number}.other", text)
    shapes = {
        "folder": sources_in([tmp_path / "folder"]),
        "glob": sources_in([tmp_path / "globbed" / "*.other"]),
    }
    for suffix, make in SHAPES.items():
        for packing, pack in PACK.items():
            source = write(tmp_path, f"rows{suffix}{packing}", pack(make(texts)))
            shapes[suffix + packing] = sources_in([source.path])
    one = "<|endoftext|>".join(texts).encode()
    for packing, pack in PACK.items():
        shapes[f"one{packing}"] = [write(tmp_path, f"one.txt{packing}", pack(one))]
    give_stdin(monkeypatch, one)
    shapes["stdin"] = sources_in(["-"], spool=tmp_path)
    config = TextConfig(document_separator="<|endoftext|>")
    got = {
        name: [text for source in sources for text in texts_of(source, config)]
        for name, sources in shapes.items()
    }
    assert got == dict.fromkeys(shapes, texts)
    assert len(shapes) == 2 + 6 * 4 + 4 + 1


@pytest.mark.parametrize("suffix", [".txt", ".py", ".other", ".md", ""])
def test_a_text_file_is_one_document_as_it_is(tmp_path, suffix):
    for text in DOCUMENTS[:4]:
        source = write(tmp_path, f"a{suffix}", text)
        assert documents_of(source) == [(0, "", text)]
    assert documents_of(write(tmp_path, "empty.txt", "")) == [(0, "", "")]


@quick
@given(
    st.lists(st.one_of(texts, st.just("")), max_size=6),
    st.text(min_size=1, max_size=4) | st.sampled_from(["aba", "aa", "\n\n", "\n---\n", "\r\n"]),
    st.integers(1, 9),
    st.booleans(),
)
@example(["x", "", "y"], "aba", 1, False)
@example(["ab", "a"], "aba", 2, True)
def test_separated_documents_are_those_of_splitting_the_whole_text(
    parts, separator, chunk_bytes, mark
):
    text = separator.join(parts)
    if text.count("\0") > 8 or "\\" in separator:
        return
    content = "\ufeff" * (mark or text.startswith("\ufeff")) + text
    config = TextConfig(document_separator=separator)
    whole = enumerate(text.split(separator), 1)
    expected = [(row, "", part) for row, part in whole if part]
    for size in (chunk_bytes, 2**20):
        assert content_of("a.txt", content, config, chunk_bytes=size) == expected


def test_escapes_in_the_separator_are_understood(tmp_path):
    config = TextConfig(document_separator=r"\n\n")
    assert documents_of(write(tmp_path, "a.txt", "one\n\n\n\ntwo\n\n"), config) == [
        (1, "", "one"),
        (3, "", "two"),
    ]


def test_the_separator_is_for_text_files_alone(tmp_path):
    config = TextConfig(document_separator="a")
    assert texts_of(write(tmp_path, "a.html", "<p>banana"), config) == ["banana"]
    for suffix, make in SHAPES.items():
        assert texts_of(write(tmp_path, f"a{suffix}", make(["banana"])), config) == ["banana"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.html", "a.json"])
@pytest.mark.parametrize("packing", PACK)
def test_positions_never_fall_and_end_at_the_size(tmp_path, name, packing):
    suffix = Path(name).suffix
    texts = [f"{number} The lamp is lit. " * 20 for number in range(200)]
    content = SHAPES.get(suffix, lambda texts: "|".join(texts).encode())(texts) + b"\n" * 5000
    source = write(tmp_path, name + packing, PACK[packing](content))
    config = TextConfig(document_separator="|")
    positions = [chunk.position for chunk in read_documents(source, config, chunk_bytes=256)]
    assert positions == sorted(positions) and positions[-1] == source.size
    if not packing and suffix != ".html":
        assert positions[0] <= 2**16 and len(set(positions)) > 5


def test_parquet_positions_follow_the_rows(tmp_path):
    texts = [f"{number} The lamp is lit. " * 20 for number in range(200)]
    for packing, pack in PACK.items():
        source = write(tmp_path, f"a.parquet{packing}", pack(SHAPES[".parquet"](texts)))
        positions = [chunk.position for chunk in read_documents(source, PLAIN, chunk_bytes=4096)]
        assert positions == sorted(positions) and positions[-1] == source.size
        assert len(set(positions)) > 5 and positions[0] == 0


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")]
)
def test_a_missing_package_is_named_with_how_to_get_it(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"reading \.\w+ files needs {package}: pip install {package}$"
    with pytest.raises(InputError, match=message):
        documents_of(write(tmp_path, name, b"x"))


@pytest.mark.parametrize("name", ["a.txt", "b.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    texts = [f"{number} The lamp is lit. " * 20 for number in range(10_000)]
    path = Path(name.removesuffix(".gz"))
    content = SHAPES.get(path.suffix, lambda texts: "|".join(texts).encode())(texts)
    source = write(
        tmp_path, name, gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content
    )
    config = TextConfig(document_separator="|" if name == "a.txt" else None)
    del texts, content
    tracemalloc.start()
    try:
        for _ in read_documents(source, config, chunk_bytes=2**16):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**16


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_a_document_may_be_much_longer_than_a_chunk(tmp_path, suffix):
    text = "The lamp is lit. " * 6000
    source = write(tmp_path, f"a{suffix}", SHAPES.get(suffix, "".join)([text]))
    assert texts_of(source, chunk_bytes=100) == [text]


def test_chunks_have_about_the_size_that_was_asked_for(tmp_path):
    source = write(tmp_path, "a.txt", "x" * 10_000)
    chunks = list(read_documents(source, PLAIN, chunk_bytes=300))
    assert max(len(chunk.text) for chunk in chunks) == 300
    assert chunks[0] == Chunk("x" * 300, 0, False, chunks[0].position)
    assert [chunk.is_last for chunk in chunks] == [False] * 33 + [True]
