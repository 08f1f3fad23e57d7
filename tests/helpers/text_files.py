"""Files of many formats that hold given documents, and the documents that are read from files."""

import csv
import gzip
import io
import json
import lzma
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import settings
from hypothesis import strategies as st

from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.sources.documents import read_documents
from minigpt2.corpus.sources.files import Source
from minigpt2.corpus.sources.find import find_sources
from minigpt2.errors import InputError

PLAIN = TextConfig()
LATIN = "The lamp is lit.\n"
DOCUMENTS = [
    "The lamp is lit,\r\nand the sea says nothing.\n",
    'says "nothing", 日本; 🤗 e\u0301\t\\n\\',
    " \u2028\x85 white \x0b\x0c space\n\n",
    "x" * 3000,
    "\ufeffa mark that stays",
]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
FRAGMENTS = [
    *(
        "a",
        "b",
        "ab",
        "aba",
        " ",
        "\n",
        "\r\n",
        "\r",
        "\t",
        "日本",
        "🤗",
        "e\u0301",
        "\ufeff",
        "\0",
    ),
    *('"', '""', ",", "\\", "\\n", "<p>", "</p>", "&amp;", "&", "[", "]", "{", "\u2028", "\x1c"),
]
texts = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
).filter(lambda text: text.count("\0") <= 8)
quick = settings(max_examples=60, deadline=None)


def table(rows, delimiter=","):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue().encode()


def parquet(columns, **options):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


SHAPES = {  # bytes of a file that holds these documents, by its suffix
    ".jsonl": lambda texts: "".join(
        json.dumps({"id": 1, "text": t}) + "\n" for t in texts
    ).encode(),
    ".ndjson": lambda texts: "\n\n".join(json.dumps(t, ensure_ascii=False) for t in texts).encode(),
    ".json": lambda texts: json.dumps([{"text": t, "more": [1, {}]} for t in texts]).encode(),
    ".csv": lambda texts: table([["id", "text"], *(["1", t] for t in texts)]),
    ".tsv": lambda texts: table([["text", "id"], *([t, "1"] for t in texts)], "\t"),
    ".parquet": lambda texts: parquet({"text": texts, "id": [1] * len(texts)}),
}


def source_of(path):
    return Source(Path(path), str(path), Path(path).stat().st_size)


def sources_in(paths, **options):
    """What is found to be text, without what is left out."""
    return list(find_sources(paths, **options).sources)


def write(folder, name, content):
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return source_of(path)


def put_together(chunks):
    """(row, prompt, text) of the documents of these chunks."""
    documents, parts = [], {True: "", False: ""}
    for chunk in chunks:
        assert chunk.text or chunk.is_last
        assert not (chunk.prompt and (chunk.is_last or parts[False]))
        parts[chunk.prompt] += chunk.text
        if chunk.is_last:
            documents.append((chunk.row, parts[True], parts[False]))
            parts = {True: "", False: ""}
    assert not any(parts.values())
    return documents


def documents_of(source, text=PLAIN, **options):
    return put_together(read_documents(source, text, **options))


def texts_of(source, text=PLAIN, **options):
    return [text for _, _, text in documents_of(source, text, **options)]


def content_of(name, content, text=PLAIN, **options):
    """The documents of a file with this name and content, or what was wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return documents_of(write(folder, name, content), text, **options)
        except InputError as problem:
            return str(problem).replace(folder, "")


def give_stdin(monkeypatch, data):
    stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)


def lamp_lines(n_lines):
    """Lines that all differ, and of which a tiny model learns something in a few steps."""
    return [f"The {n}th lamp is lit, and the sea says {n * n}.\n" for n in range(n_lines)]
