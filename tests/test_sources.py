"""Files of many formats to documents. Oracles: the documents that were written, and the same
operation on the whole text at once.
"""

import csv
import gzip
import io
import json
import lzma
import os
import shutil
import sys
import tempfile
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt2 import hub
from minigpt2.errors import InputError, NotFoundError
from minigpt2.options import TextConfig
from minigpt2.sources import SUFFIXES, Chunk, Source, find_sources, read_documents

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
TAGS = [
    *(
        "a b",
        "\n",
        "日",
        "<",
        ">",
        "<p>",
        "</p>",
        "<b>",
        "<pre>",
        "</pre>",
        "<br/>",
        "<td>",
        "<a b='",
    ),
    *("&", "&amp", "&amp;", "&#x65E5;", "&unknown;", "<!--", "-->", "<!DOCTYPE html>", "<?x", "="),
    *("<script>", "</script>", "<style>", "</style>", "<title>", "</title>", "<![if x]>", "'"),
]
texts = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
).filter(lambda text: text.count("\0") <= 8)
# Python 3.10's csv takes no NULs.
columns = st.lists(texts.map(lambda text: text.replace("\0", "")), max_size=5)
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


def write(folder, name, content):
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return source_of(path)


def put_together(chunks):
    """(row, prompt, text) of the documents of these chunks."""
    documents, parts = [], {True: "", False: ""}
    for chunk in chunks:
        assert chunk.text or chunk.ends
        assert not (chunk.prompt and (chunk.ends or parts[False]))
        parts[chunk.prompt] += chunk.text
        if chunk.ends:
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


@pytest.fixture
def tree(tmp_path):
    for name in (
        *("b.txt", "a.md", "c.RST", "D.TXT.GZ", "e.log", "noextension", ".hidden.txt", "x[1].txt"),
        *("sub/deeper/f.py", "sub/g.log", ".git/h.txt", "sub/.cache/i.txt", "bare/j.log"),
        "sub/k.txt.bak",
    ):
        write(tmp_path / "tree", name, name)
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("given_paths", "expected"),
    [
        (["."], "D.TXT.GZ a.md b.txt c.RST sub/deeper/f.py x[1].txt"),
        (["e.log", "noextension"], "e.log noextension"),
        ([".hidden.txt"], ".hidden.txt"),
        (["b.txt", "a.md", "b.txt", "sub/../b.txt"], "a.md b.txt"),
        (["*.log"], "e.log"),
        (["**/*.log"], "bare/j.log e.log sub/g.log"),
        (["**/?.l*", "b.txt"], "b.txt bare/j.log e.log sub/g.log"),
        (["[ab].*"], "a.md b.txt"),
        (["x[1].txt"], "x[1].txt"),
        (["s*", "bar?/*"], "bare/j.log sub/deeper/f.py"),
    ],
)
def test_files_folders_and_globs_are_found_sorted_and_once(
    tree, monkeypatch, given_paths, expected
):
    monkeypatch.chdir(tree)
    found = find_sources(given_paths)
    assert [source.label for source in found] == [str(Path(name)) for name in expected.split()]
    assert [source.path for source in found] == [Path(name) for name in expected.split()]
    assert [source.size for source in found] == [len(str(name)) for name in expected.split()]
    absolute = find_sources([str(tree / path) for path in given_paths])
    assert {source.path.resolve() for source in absolute} == {
        (tree / name).resolve() for name in expected.split()
    }


def test_one_path_that_is_no_list_is_that_path(tree):
    path = tree / "b.txt"
    assert find_sources(str(path)) == find_sources(path) == [source_of(path)]


def test_a_file_under_two_names_is_found_once(tree):
    (tree / "a.txt").symlink_to(tree / "b.txt")
    assert find_sources([tree / "b.txt", tree / "a.txt"]) == [source_of(tree / "a.txt")]


@pytest.mark.parametrize("packing", PACK)
def test_folders_are_searched_for_every_suffix(tmp_path, packing):
    for suffix in SUFFIXES:
        content = '{"text": "x"}' if suffix == ".json" else "x"
        write(tmp_path, f"file{suffix}{packing}", PACK[packing](content.encode()))
    found = find_sources([tmp_path])
    assert {Path(source.label).name for source in found} == {
        f"file{suffix}{packing}" for suffix in SUFFIXES
    }
    assert {".txt", ".md", ".rst", ".html", ".htm", ".jsonl", ".json", ".csv", ".tsv"} < {*SUFFIXES}
    assert {".parquet", ".py", ".js", ".c", ".cpp", ".java", ".go", ".rs"} < {*SUFFIXES}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.txt", r"none\.txt does not exist"),
        ("*.csv", r"\*\.csv does not exist and matches no file"),
        ("**/*.csv", r"\*\*/\*\.csv does not exist and matches no file"),
        ("bare", r"bare has no \.txt, \.md, .*\.parquet file: name others by a glob"),
        ("bar?", r"bar\? does not exist and matches no file"),
    ],
)
def test_what_leads_to_no_file_is_named(tree, path, message):
    with pytest.raises(NotFoundError, match=message):
        find_sources([tree / "b.txt", tree / path])


def test_an_address_of_the_web_is_to_be_downloaded_first():
    with pytest.raises(NotFoundError, match=r"https://a\.b/c\.txt is no hf:.*: download it"):
        find_sources(["https://a.b/c.txt"])


@pytest.fixture
def unprivileged():
    """A new folder of a user who may not read everything, even where tests run as root."""
    if os.name == "nt":
        pytest.skip("POSIX permissions")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o700)
    shutil.rmtree(folder)


def test_unreadable_files_and_folders_are_named(unprivileged):
    source = write(unprivileged, "file.txt", "text")
    (unprivileged / "folder").mkdir()
    for name in ("file.txt", "folder"):
        (unprivileged / name).chmod(0)
    with pytest.raises(InputError, match=r"file\.txt cannot be read: Permission denied"):
        documents_of(source)
    with pytest.raises(InputError, match=r"folder cannot be read: Permission denied"):
        find_sources([unprivileged])


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"a\.txt cannot be read: No such file"):
        find_sources([tmp_path])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (source,) = find_sources([tmp_path / "pipe"])
    with pytest.raises(InputError, match=r"pipe is no regular file: .* or give it to stdin as -"):
        documents_of(source)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux")
def test_an_error_while_reading_is_named():
    with pytest.raises(InputError, match=r"/proc/self/mem cannot be read: Input/output error"):
        documents_of(source_of("/proc/self/mem"))


def give_stdin(monkeypatch, data):
    stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)


def test_text_from_stdin_is_kept_in_the_spool(tmp_path, monkeypatch):
    give_stdin(monkeypatch, LATIN.encode())
    assert find_sources(["-"], spool=tmp_path) == [Source(tmp_path / "stdin", "stdin", 17)]
    assert (tmp_path / "stdin").read_text() == LATIN


def test_stdin_named_twice_is_refused(tmp_path, monkeypatch):
    give_stdin(monkeypatch, LATIN.encode())
    with pytest.raises(InputError, match="- is named twice"):
        find_sources(["-", "-"], spool=tmp_path)
    with pytest.raises(InputError, match="- is named twice"):
        find_sources(["-"], spool=tmp_path)
    assert (tmp_path / "stdin").read_text() == LATIN


def test_a_process_without_stdin_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="- is stdin, and there is none"):
        find_sources(["-"], spool=tmp_path)


def test_a_terminal_is_told_how_to_end(tmp_path, monkeypatch, caplog):
    give_stdin(monkeypatch, LATIN.encode())
    sys.stdin.isatty = lambda: True
    with caplog.at_level("INFO"):
        find_sources(["-"], spool=tmp_path)
    assert "Ctrl-D" in caplog.text


def test_files_of_the_hub_have_its_labels_and_formats(tmp_path, monkeypatch):
    blob = write(tmp_path, "blob", json.dumps("one") + "\n" + json.dumps("two"))
    labels = ["hf://datasets/o/n@1/b.jsonl", "hf://datasets/o/n@1/a.jsonl"]
    asked = []

    def dataset_files(path, suffixes):
        asked.append(path)
        assert {".txt", ".jsonl.zst", ".parquet"} < {*suffixes}
        return [(label, blob.path) for label in labels]

    monkeypatch.setattr(hub, "dataset_files", dataset_files)
    found = find_sources(["hf://datasets/o/n/*.jsonl"])
    assert asked == ["hf://datasets/o/n/*.jsonl"]
    # Equal files are one file in the Hub's cache, and yet two.
    assert found == [replace(blob, label=label) for label in sorted(labels)]
    assert [texts_of(source) for source in found] == [["one", "two"]] * 2


def test_json_of_the_hub_counts_if_it_is_named_or_has_the_text_field(tmp_path, monkeypatch):
    files = [write(tmp_path, "a.json", '["x"]'), write(tmp_path, "dataset_infos.json", "{}")]
    named = [(f"hf://datasets/o/n@1/{source.path.name}", source.path) for source in files]
    for answer, expected in ((named, named[:1]), (named[1:], named[1:])):
        monkeypatch.setattr(hub, "dataset_files", lambda *_, answer=answer: answer)
        found = find_sources(["hf://datasets/o/n"])
        assert [(source.label, source.path) for source in found] == expected


def test_json_in_a_folder_counts_if_it_has_the_text_field(tmp_path, caplog):
    write(tmp_path, "a.json", json.dumps([{"text": "one"}, {"body": "later rows may be wrong"}]))
    write(tmp_path, "b.json", json.dumps({"body": "two"}))
    write(tmp_path, "c.json", '{"text": "three"}\n{"text": "four"}')
    write(tmp_path, "d.json", json.dumps({"prompt": "x", "completion": "y"}))
    write(tmp_path, "e.json", json.dumps(["five"]))
    write(tmp_path, "package.json", json.dumps({"name": "x", "version": 3}, indent=2))
    write(tmp_path, "tsconfig.json", '{\n  // a comment\n  "files": []}')
    write(tmp_path, "scores.json", "[0.1, 0.2]")

    def names(**options):
        caplog.clear()
        with caplog.at_level("INFO"):
            found = find_sources([tmp_path], text=TextConfig(**options))
        return " ".join(Path(source.label).stem for source in found)

    assert names() == "a c d e"
    assert "left out 4 .json files, such as" in caplog.text and "b.json" in caplog.text
    assert "without a field 'text'" in caplog.text
    assert names(text_field="body") == "b d e"
    assert "left out 5 .json files" in caplog.text


def test_json_that_is_named_counts_whatever_it_holds(tmp_path):
    write(tmp_path, "package.json", '{"name": "x"}')
    for path in (tmp_path / "package.json", tmp_path / "*.json"):
        (source,) = find_sources([path])
        with pytest.raises(InputError, match=r"package\.json:row 1 has no field 'text'"):
            documents_of(source)
    with pytest.raises(NotFoundError, match="has no"):
        find_sources([tmp_path])


def test_eight_shapes_of_the_same_documents_are_the_same(tmp_path, monkeypatch):
    # A file's own leading mark is no text: where documents are files, none begins with one.
    texts = DOCUMENTS[:4]
    for number, text in enumerate(texts):
        write(tmp_path, f"folder/{number}.txt", text)
        write(tmp_path, f"globbed/{number}.other", text)
    shapes = {
        "folder": find_sources([tmp_path / "folder"]),
        "glob": find_sources([tmp_path / "globbed" / "*.other"]),
    }
    for suffix, make in SHAPES.items():
        for packing, pack in PACK.items():
            source = write(tmp_path, f"rows{suffix}{packing}", pack(make(texts)))
            shapes[suffix + packing] = find_sources([source.path])
    one = "<|endoftext|>".join(texts).encode()
    for packing, pack in PACK.items():
        shapes[f"one{packing}"] = [write(tmp_path, f"one.txt{packing}", pack(one))]
    give_stdin(monkeypatch, one)
    shapes["stdin"] = find_sources(["-"], spool=tmp_path)
    config = TextConfig(document_separator="<|endoftext|>")
    got = {
        name: [text for source in sources for text in texts_of(source, config)]
        for name, sources in shapes.items()
    }
    assert got == dict.fromkeys(shapes, texts)
    assert len(shapes) == 2 + 6 * 4 + 4 + 1


@pytest.mark.parametrize("suffix", SHAPES)
def test_rows_are_numbered_from_one_and_their_texts_untouched(tmp_path, suffix):
    texts = [*DOCUMENTS, "", "\n", "end"]
    source = write(tmp_path, f"a{suffix}", SHAPES[suffix](texts))
    numbers = range(1, 2 * len(texts), 2) if suffix == ".ndjson" else range(1, len(texts) + 1)
    assert documents_of(source) == [(row, "", text) for row, text in zip(numbers, texts)]


@pytest.mark.parametrize("suffix", [".txt", ".py", ".other", ".md", ""])
def test_a_text_file_is_one_document_as_it_is(tmp_path, suffix):
    for text in DOCUMENTS[:4]:
        source = write(tmp_path, f"a{suffix}", text)
        assert documents_of(source) == [(0, "", text)]
    assert documents_of(write(tmp_path, "empty.txt", "")) == [(0, "", "")]


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


@quick
@given(columns, st.integers(1, 40), st.sampled_from(sorted(PACK)))
def test_rows_do_not_depend_on_the_chunk_size(texts, chunk_bytes, packing):
    for suffix, make in SHAPES.items():
        got = content_of(f"a{suffix}{packing}", PACK[packing](make(texts)), chunk_bytes=chunk_bytes)
        assert [text for _, _, text in got] == texts


@quick
@given(columns, st.sampled_from(["\n", "\r\n", "\r"]), st.integers(1, 9))
def test_tables_may_end_their_lines_in_any_way(texts, newline, chunk_bytes):
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([["text"], *([text] for text in texts)])
    got = content_of("a.csv", file.getvalue(), chunk_bytes=chunk_bytes)
    assert [text for _, _, text in got] == texts


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@quick
@given(
    st.lists(st.text(max_size=9) | st.fixed_dictionaries({"text": st.text(), "x": json_values})),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 400),
    st.sampled_from(["", "x", '"', "]", "}", ",", "\\", "\n", "1"]),
)
def test_json_and_its_errors_do_not_depend_on_the_chunk_size(
    rows, indent, ascii, chunk_bytes, at, damage
):
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    content = content[:at] + damage + content[at + len(damage) :]
    if content.count("\0") > 8:
        return
    whole = content_of("a.json", content)
    assert content_of("a.json", content, chunk_bytes=chunk_bytes) == whole
    if not damage:
        texts = [row if isinstance(row, str) else row["text"] for row in rows]
        assert whole == [(row, "", text) for row, text in enumerate(texts, 1)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"text": "one"}', ["one"]),
        ('"one"', ["one"]),
        ("[]", []),
        (" \n", []),
        ("", []),
        ("[\n]\n[]", []),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ('{"text":\n"one"}{"text": "two"}', ["one", "two"]),
        ('\ufeff[ "one" ,\r\n{"text" : null} ]', ["one", ""]),
        ('["\\ud83e\\udd17", {"text": "two", "score": NaN}]', ["🤗", "two"]),
    ],
)
def test_json_is_an_array_or_values_one_after_another(tmp_path, content, texts):
    source = write(tmp_path, "a.json", content)
    for chunk_bytes in (1, 5, 999):
        assert texts_of(source, chunk_bytes=chunk_bytes) == texts


@pytest.mark.parametrize("suffix", SHAPES)
def test_one_leading_mark_is_left_out_of_every_format(tmp_path, suffix):
    if suffix != ".parquet":
        content = b"\xef\xbb\xbf" + SHAPES[suffix](DOCUMENTS)
        assert texts_of(write(tmp_path, f"a{suffix}", content), chunk_bytes=1) == DOCUMENTS


PAIRS = [
    {"prompt": "two and two", "completion": " is four", "id": 7},
    {"prompt": "", "completion": "alone"},
    {"prompt": None, "completion": "too"},
    {"prompt": "no answer", "completion": ""},
    {"prompt": "", "completion": None},
]
AS_READ = [
    (1, "two and two", " is four"),
    (2, "", "alone"),
    (3, "", "too"),
    (4, "no answer", ""),
    (5, "", ""),
]


def test_prompts_and_completions_are_told_apart(tmp_path):
    contents = {
        "a.jsonl": "\n".join(map(json.dumps, PAIRS)),
        "a.json": json.dumps(PAIRS, indent=1),
        "a.csv": table(
            [["prompt", "completion"], *([p["prompt"], p["completion"]] for p in PAIRS)]
        ),
        "a.parquet": parquet({key: [p[key] for p in PAIRS] for key in ("completion", "prompt")}),
    }
    for name, content in contents.items():
        source = write(tmp_path, name, content)
        assert documents_of(source) == AS_READ, name
        assert documents_of(source, TextConfig(text_field="prompt"))[0] == (1, "", "two and two")
    first, *_ = read_documents(write(tmp_path, "a.jsonl", contents["a.jsonl"]), PLAIN)
    assert first[:3] == ("two and two", 1, False) and first.prompt


def test_the_text_field_goes_before_prompt_and_completion(tmp_path):
    row = {"prompt": "x", "completion": "y", "text": "z"}
    for suffix, content in (
        (".jsonl", json.dumps(row)),
        (".csv", table([row, row.values()])),
        (".parquet", parquet({key: [value] for key, value in row.items()})),
    ):
        assert documents_of(write(tmp_path, f"a{suffix}", content)) == [(1, "", "z")]


HALF = "\\ud800"
NO_FIELD = (
    r"a\.{}:row {} has no field 'text'; its fields are title, body: name one with --text-field"
)
BAD_ROWS = [
    ("jsonl", '{"text": "x"}\n\n{"title": 1, "body": 2}', NO_FIELD.format("jsonl", 3)),
    ("json", '[{"text": "x"}, {"title": 1, "body": 2}]', NO_FIELD.format("json", 2)),
    ("csv", "title,body\nx,y\n", NO_FIELD.format("csv", 1)),
    ("tsv", "title\tbody\nx\ty\n", NO_FIELD.format("tsv", 1)),
    ("parquet", parquet({"title": ["x"], "body": ["y"]}), NO_FIELD.format("parquet", 1)),
    ("jsonl", "{}", r"row 1 has no field 'text'; its fields are none: "),
    ("jsonl", json.dumps({"k" * 999: 1}), r"its fields are k{200}\.\.\.: "),
    ("jsonl", '{"text": "x"}\n{"text": 5}', r"row 2 has a number in 'text', allowed is a string"),
    ("json", '{"text": ["x"]}', r"a\.json:row 1 has an array in 'text', allowed is a string"),
    ("jsonl", '{"text": {"a": "x"}}', r"row 1 has an object in 'text'"),
    ("jsonl", '{"text": false}', r"row 1 has true or false in 'text'"),
    ("jsonl", '{"prompt": 0, "completion": "x"}', r"row 1 has a number in 'prompt'"),
    ("jsonl", '{"prompt": "x", "completion": 0.5}', r"row 1 has a number in 'completion'"),
    ("parquet", parquet({"text": [1, 2]}), r"a\.parquet:row 1 has int64 in 'text'"),
    ("parquet", parquet({"text": [b"x"]}), r"a\.parquet:row 1 has binary in 'text'"),
    ("jsonl", '["x"]', r"row 1 is an array, allowed is an object or a string"),
    ("jsonl", "null", r"row 1 is null, allowed"),
    ("json", '["x", 12]', r"row 2 is a number, allowed"),
    ("jsonl", f'{{"text": "x{HALF}"}}', r"row 1 has \\ud800, half a character, in 'text'"),
    ("json", f'["x", "{HALF}x"]', r"a\.json:row 2 has \\ud800, half a character"),
    ("jsonl", '{"text": "x"}\n{"text": "x}', r"a\.jsonl:row 2:column 10 is not JSON \(Unterm"),
    ("jsonl", '[\n"x"\n]', r"row 1:column 2 is not JSON .*; a file laid out otherwise is .*\.json"),
    ("jsonl", '{"text": "x"} {}', r"row 1:column 15 is not JSON \(Extra data\)"),
    ("jsonl", '{"n": ' + "1" * 9999 + "}", r"row 1 is not JSON \(.*digits"),
    ("jsonl", "[" * 99999, r"row 1 is not JSON \(maximum recursion"),
    ("json", "[" + '{"x":' * 99999, r"row 1 is not JSON, at line 1 column 2: maximum recursion"),
    (
        "json",
        '["x", {"n": ' + "1" * 9999 + "}]",
        r"row 2 is not JSON, at line 1 column 7: .*digits",
    ),
    ("json", '[\n "x",\n  {"text" "y"}]', r"row 2 is not JSON, at line 3 column 11: Expecting ':'"),
    ("json", '["x"\n"y"]', r"row 1 is not JSON, at line 2 column 1: Expecting ',' or '\]' after"),
    ("json", '["x",]', r"row 2 is not JSON, at line 1 column 6: Expecting value"),
    ("json", '["x", "y', r"row 2 is not JSON, at line 1 column 7: Unterminated string"),
    ("json", '["x", "y"', r"row 2 is not JSON, at line 1 column 10: Expecting ','"),
    ("json", '"x" y', r"row 2 is not JSON, at line 1 column 5: Expecting value"),
    ("csv", "id,text\n1,x,y\n", r"a\.csv:row 1 has 3 fields, its header has 2: put .* quotes"),
    ("csv", "id,text\n1,x\n\n2\n", r"a\.csv:row 2 has 1 fields, its header has 2"),
    ("csv", 'text\nx\n"y\nz\n', r"a\.csv:row 2 cannot be read, near line 4: unexpected end"),
    ("tsv", 'text\tid\n"x," he said\t1\n', r"a\.tsv:row 1 cannot be read, near line 2: '\t' exp"),
]


@pytest.mark.parametrize(("suffix", "content", "message"), BAD_ROWS)
def test_a_row_without_text_is_named_with_what_is_wrong(tmp_path, suffix, content, message):
    source = write(tmp_path, f"a.{suffix}", content)
    for chunk_bytes in (7, 2**20):
        with pytest.raises(InputError, match=message) as problem:
            documents_of(source, chunk_bytes=chunk_bytes)
        assert "\n" not in str(problem.value)


def test_a_field_may_have_any_length_and_the_limit_of_csv_stays(tmp_path):
    text = "x, " * 100_000 + "\n"
    source = write(tmp_path, "a.csv", table([["text"], [text], ["y"]]))
    before = csv.field_size_limit(1234)
    try:
        rows = read_documents(source, PLAIN, chunk_bytes=50_000)
        assert next(rows).text == text and csv.field_size_limit() == 1234
        assert [row.text for row in rows] == ["y"] and csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)


def test_parquet_text_may_be_of_any_string_type(tmp_path):
    for kind in (
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ):
        column = pyarrow.array(["one", None, "日本"], pyarrow.string()).cast(kind)
        source = write(tmp_path, "a.parquet", parquet({"text": column}))
        assert texts_of(source) == ["one", "", "日本"]
    source = write(tmp_path, "a.parquet", parquet({"text": pyarrow.nulls(2)}))
    assert texts_of(source) == ["", ""]


def test_parquet_rows_are_numbered_through_all_its_groups(tmp_path):
    texts = [str(number) * 50 for number in range(300)]
    source = write(tmp_path, "a.parquet", parquet({"text": texts}, row_group_size=70))
    for chunk_bytes in (1, 1000, 2**20):
        chunks = list(read_documents(source, PLAIN, chunk_bytes=chunk_bytes))
        assert [(chunk.row, chunk.text) for chunk in chunks] == list(enumerate(texts, 1))


@pytest.mark.parametrize(
    ("page", "seen"),
    [
        ("plain", "plain"),
        ("<p>one<p>two", "one\n\ntwo"),
        ("<div>one</div>\n <div> two </div>", "one\ntwo"),
        ("<div><div><p>one</p></div></div><div>two", "one\n\ntwo"),
        ("a <b>bold</b>, <i> slanted</i>word", "a bold, slantedword"),
        ("a\n\t  b&#32;\r\n c", "a b c"),
        ("one<br>two<br/><br>three<br><br><br>four", "one\ntwo\n\nthree\n\nfour"),
        ("fish &amp; chips &lt;now&gt; &eacute;&#x65E5; &nbsp;x", "fish & chips <now> é日 \xa0x"),
        ("AT&T <3 a < b &unknown; &", "AT&T <3 a < b &unknown; &"),
        ("x<script>if (a < b) document.write('<p>y</p>')</script>z", "xz"),
        ("<style>p { color: red }</style><!-- no --><!DOCTYPE html>x", "x"),
        ("<html><head><title>no</title><meta name=a></head><body>yes</body></html>", "yes"),
        ("<head><title>no</title><body>yes", "yes"),
        ("<noscript>turn it <b>on</b></noscript><svg><title>no</title>no</svg>yes", "yes"),
        ("<pre>\n  a\n    b  </pre>c", "  a\n    b  \n\nc"),
        ("x <pre>  a <b> b</b>\n</pre>", "x\n\n  a  b\n"),
        ("<ul><li>one<li>two</ul>three", "one\ntwo\n\nthree"),
        ("<table><tr><th>a<th>b<tr><td>1</td> <td>2</td></table>", "a\tb\n1\t2"),
        ("<h1>Title</h1><p>text", "Title\n\ntext"),
        ("<P CLASS='a > b'>one</P>", "one"),
        ("</p></pre></script>x", "x"),
        ("</pre><pre> a  b</pre>", " a  b"),
        ("", ""),
        ("<p> </p>", ""),
    ],
)
def test_html_is_the_text_one_sees(tmp_path, page, seen):
    for name in ("a.html", "a.HTM"):
        assert documents_of(write(tmp_path, name, page)) == [(0, "", seen)]


@quick
@given(
    st.lists(st.sampled_from(TAGS), max_size=12).map("".join),
    st.integers(1, 9),
)
def test_html_does_not_depend_on_the_chunk_size(page, chunk_bytes):
    assert content_of("a.html", page, chunk_bytes=chunk_bytes) == content_of("a.html", page)


def test_html_that_cannot_be_parsed_is_named(tmp_path, monkeypatch):
    def fail(page, data):
        raise AssertionError("the parser's way")

    monkeypatch.setattr("minigpt2.pages.Page.feed", fail)
    with pytest.raises(InputError, match=r"a\.html is HTML that cannot be parsed, at line 1: "):
        documents_of(write(tmp_path, "a.html", "<![foo[ x ]]>"))


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
    (b"%PDF-1.7\n...", "is a PDF: .*pdftotext"),
    (zipped(**{"a.txt": "x"}), "is a zip archive: unpack it"),
    (
        zipped(**{"[Content_Types].xml": "", "word/document.xml": ""}),
        "is a Word document: .*pandoc",
    ),
    (zipped(**{"[Content_Types].xml": "", "xl/workbook.xml": ""}), r"is an Excel file: .*\.csv"),
    (zipped(mimetype=ODT), "is an OpenDocument file: save it as plain text, or .*pandoc"),
    (zipped(mimetype="application/epub+zip"), "is an EPUB book: .*pandoc"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "is an old Word or Office file: save it"),
    (rb"{\rtf1\ansi text}", "is an RTF document: .*pandoc"),
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


def test_parquet_files_that_are_damaged_or_none_are_named(tmp_path):
    whole = parquet({"text": ["The lamp is lit."] * 999})
    for data in (whole[:-9], whole[: len(whole) // 2], LATIN.encode(), b"PAR1", b""):
        source = write(tmp_path, "a.parquet", data)
        with pytest.raises(InputError, match=r"a\.parquet (is no whole Parquet|cannot be read)"):
            documents_of(source)
    pointer = write(tmp_path, "a.parquet", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"a\.parquet is a Git LFS pointer.*git lfs pull"):
        documents_of(pointer)


def test_text_in_parquet_that_is_not_utf8_is_named(tmp_path):
    column = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    source = write(tmp_path, "a.parquet", parquet({"text": column}))
    with pytest.raises(InputError, match=r"a\.parquet is no whole Parquet file \('utf-8'"):
        documents_of(source)


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")]
)
def test_a_missing_package_is_named_with_how_to_get_it(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf'reading \.\w+ files needs {package}: pip install "minigpt2\[data\]"'
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


def test_long_json_is_parsed_few_times(tmp_path, monkeypatch):
    calls = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, *args):
            calls.append(args)
            return super().raw_decode(*args)

    monkeypatch.setattr(json, "JSONDecoder", Counting)
    source = write(tmp_path, "a.json", json.dumps(["The lamp is lit. " * 6000]))
    assert len(texts_of(source, chunk_bytes=100)) == 1
    assert 9 <= len(calls) <= 13  # each time on twice as much


def test_chunks_have_about_the_size_that_was_asked_for(tmp_path):
    source = write(tmp_path, "a.txt", "x" * 10_000)
    chunks = list(read_documents(source, PLAIN, chunk_bytes=300))
    assert max(len(chunk.text) for chunk in chunks) == 300
    assert chunks[0] == Chunk("x" * 300, 0, False, chunks[0].position)
    assert [chunk.ends for chunk in chunks] == [False] * 33 + [True]
