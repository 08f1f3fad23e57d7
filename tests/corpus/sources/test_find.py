"""What files paths, folders, globs, the Hub and stdin lead to. Oracle: the files written."""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.sources import find
from minigpt2.corpus.sources.files import Source
from minigpt2.corpus.sources.find import SUFFIXES, find_sources, require_local
from minigpt2.errors import InputError, NotFoundError
from text_files import LATIN, PACK, documents_of, give_stdin, source_of, texts_of, write


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


@pytest.mark.parametrize("check", [find_sources, require_local])
def test_an_empty_path_is_not_the_folder_that_one_is_in(check):
    with pytest.raises(InputError, match="the path of a text is empty: name a file"):
        check([""])


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
    with pytest.raises(InputError, match="- is stdin, which is closed here"):
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

    monkeypatch.setattr(find, "dataset_files", dataset_files)
    found = find_sources(["hf://datasets/o/n/*.jsonl"])
    assert asked == ["hf://datasets/o/n/*.jsonl"]
    # Equal files are one file in the Hub's cache, and yet two.
    assert found == [replace(blob, label=label) for label in sorted(labels)]
    assert [texts_of(source) for source in found] == [["one", "two"]] * 2


def test_json_of_the_hub_counts_if_it_is_named_or_has_the_text_field(tmp_path, monkeypatch):
    files = [write(tmp_path, "a.json", '["x"]'), write(tmp_path, "dataset_infos.json", "{}")]
    named = [(f"hf://datasets/o/n@1/{source.path.name}", source.path) for source in files]
    for answer, expected in ((named, named[:1]), (named[1:], named[1:])):
        monkeypatch.setattr(find, "dataset_files", lambda *_, answer=answer: answer)
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
