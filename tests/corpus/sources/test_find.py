"""What files paths, folders, globs, the Hub and stdin lead to. Oracle: the files written."""

import json
import os
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.sources import find
from minigpt2.corpus.sources.files import BINARY, Source
from minigpt2.corpus.sources.find import NO_SUFFIX, SUFFIXES, TWICE, find_sources, require_local
from minigpt2.corpus.sources.left_out import LeftOut
from minigpt2.corpus.sources.walk import NOWHERE
from minigpt2.errors import InputError, NotFoundError
from text_files import LATIN, PACK, documents_of, give_stdin, source_of, sources_in, texts_of, write


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
    found = sources_in(given_paths)
    assert [source.label for source in found] == [str(Path(name)) for name in expected.split()]
    assert [source.path for source in found] == [Path(name) for name in expected.split()]
    assert [source.size for source in found] == [len(str(name)) for name in expected.split()]
    absolute = sources_in([str(tree / path) for path in given_paths])
    assert {source.path.resolve() for source in absolute} == {
        (tree / name).resolve() for name in expected.split()
    }


def test_one_path_that_is_no_list_is_that_path(tree):
    path = tree / "b.txt"
    assert sources_in(str(path)) == sources_in(path) == [source_of(path)]


def test_a_file_under_two_names_is_found_once(tree):
    (tree / "a.txt").symlink_to(tree / "b.txt")
    assert sources_in([tree / "b.txt", tree / "a.txt"]) == [source_of(tree / "a.txt")]


@pytest.mark.parametrize("packing", PACK)
def test_folders_are_searched_for_every_suffix(tmp_path, packing):
    for suffix in SUFFIXES:
        content = '{"text": "x"}' if suffix == ".json" else "x"
        write(tmp_path, f"file{suffix}{packing}", PACK[packing](content.encode()))
    found = sources_in([tmp_path])
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
        ("none/**/*.csv", r"none/\*\*/\*\.csv does not exist and matches no file"),
        ("**/*.csv", r"csv matches no file of text; left out: 2 folders \(hidden\)$"),
        ("bare", r"bare has no \.txt, \.md, .*\.epub file: name others by a glob; left out: 1"),
        ("bar?", r"bar\? matches no file of text; left out: 1 \.log \(no suffix of text; a glob"),
    ],
)
def test_what_leads_to_no_file_is_named(tree, path, message):
    with pytest.raises(NotFoundError, match=message):
        sources_in([tree / "b.txt", tree / path])


def test_an_address_of_the_web_is_to_be_downloaded_first():
    with pytest.raises(NotFoundError, match=r"https://a\.b/c\.txt is no hf:.*: download it"):
        sources_in(["https://a.b/c.txt"])


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
        sources_in([unprivileged])


def test_text_from_stdin_is_kept_in_the_spool(tmp_path, monkeypatch):
    give_stdin(monkeypatch, LATIN.encode())
    assert sources_in(["-"], spool=tmp_path) == [Source(tmp_path / "stdin", "stdin", 17)]
    assert (tmp_path / "stdin").read_text() == LATIN


def test_stdin_named_twice_is_refused(tmp_path, monkeypatch):
    give_stdin(monkeypatch, LATIN.encode())
    with pytest.raises(InputError, match="- is named twice"):
        sources_in(["-", "-"], spool=tmp_path)
    with pytest.raises(InputError, match="- is named twice"):
        sources_in(["-"], spool=tmp_path)
    assert (tmp_path / "stdin").read_text() == LATIN


def test_a_process_without_stdin_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="- is stdin, which is closed here"):
        sources_in(["-"], spool=tmp_path)


def test_a_terminal_is_told_how_to_end(tmp_path, monkeypatch, caplog):
    give_stdin(monkeypatch, LATIN.encode())
    sys.stdin.isatty = lambda: True
    with caplog.at_level("INFO"):
        sources_in(["-"], spool=tmp_path)
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
    found = sources_in(["hf://datasets/o/n/*.jsonl"])
    assert asked == ["hf://datasets/o/n/*.jsonl"]
    # Equal files are one file in the Hub's cache, and yet two.
    assert found == [replace(blob, label=label) for label in sorted(labels)]
    assert [texts_of(source) for source in found] == [["one", "two"]] * 2


def test_json_of_the_hub_counts_if_it_is_named_or_has_the_text_field(tmp_path, monkeypatch):
    files = [write(tmp_path, "a.json", '["x"]'), write(tmp_path, "dataset_infos.json", "{}")]
    named = [(f"hf://datasets/o/n@1/{source.path.name}", source.path) for source in files]
    for answer, expected in ((named, named[:1]), (named[1:], named[1:])):
        monkeypatch.setattr(find, "dataset_files", lambda *_, answer=answer: answer)
        found = sources_in(["hf://datasets/o/n"])
        assert [(source.label, source.path) for source in found] == expected


def test_json_in_a_folder_counts_if_it_has_the_text_field(tmp_path):
    write(tmp_path, "a.json", json.dumps([{"text": "one"}, {"body": "later rows may be wrong"}]))
    write(tmp_path, "b.json", json.dumps({"body": "two"}))
    write(tmp_path, "c.json", '{"text": "three"}\n{"text": "four"}')
    write(tmp_path, "d.json", json.dumps({"prompt": "x", "completion": "y"}))
    write(tmp_path, "e.json", json.dumps(["five"]))
    write(tmp_path, "package.json", json.dumps({"name": "x", "version": 3}, indent=2))
    write(tmp_path, "tsconfig.json", '{\n  // a comment\n  "files": []}')
    write(tmp_path, "scores.json", "[0.1, 0.2]")

    def names(**options):
        found = find_sources([tmp_path], text=TextConfig(**options))
        assert found == replace(
            find_sources([tmp_path / "*"], text=TextConfig(**options)), sources=found.sources
        )
        (left_out,) = found.left_out
        return " ".join(Path(source.label).stem for source in found.sources), left_out

    kept, left_out = names()
    assert kept == "a c d e"
    reason = "no field 'text'; --text-field names another"
    assert left_out == LeftOut(".json", reason, 4, str(tmp_path / "b.json"))
    kept, left_out = names(text_field="body")
    assert kept == "b d e" and left_out.count == 5


def test_json_that_is_named_counts_whatever_it_holds(tmp_path):
    write(tmp_path, "package.json", '{"name": "x"}')
    (source,) = sources_in([tmp_path / "package.json"])
    with pytest.raises(InputError, match=r"package\.json:row 1 has no field 'text'"):
        documents_of(source)
    for path, message in ((tmp_path, "has no"), (tmp_path / "*.json", "matches no file of text")):
        with pytest.raises(NotFoundError, match=rf"{message}.*; left out: 1 \.json \(no field"):
            find_sources([path])


def reasons(found):
    return {(left.kind, left.reason): left.count for left in found.left_out}


def test_a_folder_says_what_it_has_that_was_not_taken(tmp_path):
    for name in ("a.txt", "b.png", "c.PNG", "d.log", "noextension", ".e.txt", ".git/f", "g/h.txt"):
        write(tmp_path, name, name)
    write(tmp_path, "empty.md", "")
    write(tmp_path, "g/package.json", "{}")
    found = find_sources([tmp_path, tmp_path])
    assert [source.path.name for source in found.sources] == ["a.txt", "h.txt"]
    assert reasons(found) == {
        (".png", NO_SUFFIX): 2,
        (".log", NO_SUFFIX): 1,
        ("without suffix", NO_SUFFIX): 1,
        (".txt", "hidden"): 1,
        ("folder", "hidden"): 1,
        (".md", "empty"): 1,
        (".json", "no field 'text'; --text-field names another"): 1,
    }
    assert found.left_out[0] == LeftOut(".png", NO_SUFFIX, 2, str(tmp_path / "b.png"))
    named = find_sources([tmp_path, tmp_path / "d.log", tmp_path / ".e.txt"])
    assert {".log", ".txt"}.isdisjoint(left.kind for left in named.left_out)
    assert len(named.sources) == 4


def test_a_glob_takes_any_text_and_says_what_it_matched_that_is_none(tmp_path):
    for name in ("a.txt", "b.log", "noextension", ".hidden"):
        write(tmp_path, name, name)
    write(tmp_path, "c.png", b"\x89PNG\r\n\x1a\n")
    write(tmp_path, "d.dat", bytes(1000))
    write(tmp_path, "e.bin", bytes(range(1, 256)))
    found = find_sources([tmp_path / "*"])
    assert [source.path.name for source in found.sources] == ["a.txt", "b.log", "noextension"]
    assert reasons(found) == {
        (".png", "an image"): 1,
        (".dat", BINARY): 1,
        (".bin", BINARY): 1,
        ("without suffix", "hidden"): 1,
    }
    require_local([tmp_path / "*"], TextConfig())
    with pytest.raises(NotFoundError, match=r"png matches no file of text; left out: 1 \.png \(an"):
        find_sources([tmp_path / "*.png"])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.log", b"caf\xe9 au lait", r"a\.log is not UTF-8 at byte 3"),
        ("a.log", LATIN.encode("utf-16"), r"a\.log looks like UTF-16"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", r"a\.txt is an image"),
    ],
)
def test_text_that_is_damaged_is_no_kind_of_its_own(tmp_path, name, data, message):
    (source,) = sources_in([write(tmp_path, name, data).path.parent / "*"])
    with pytest.raises(InputError, match=message):
        documents_of(source)


def test_the_same_file_under_another_name_is_counted(tmp_path):
    write(tmp_path, "a.txt", "x")
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "c.txt").symlink_to("none")
    found = find_sources([tmp_path])
    assert [source.path.name for source in found.sources] == ["a.txt"]
    assert reasons(found) == {(".txt", TWICE): 1, ("link", NOWHERE): 1}
    for path in ("c.txt", "c.txt/d"):
        with pytest.raises(InputError, match=r"c\.txt.* (leads nowhere|does not exist)"):
            find_sources([tmp_path / path])


@pytest.mark.parametrize("given", ["", " ", "\t\n"])
@pytest.mark.parametrize("check", [find_sources, require_local])
def test_a_blank_path_is_a_path_only_where_a_file_has_that_name(
    tmp_path, monkeypatch, check, given
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.txt", "x")
    with pytest.raises(InputError, match="the path of a text is empty: name a file"):
        check(["a.txt", given])
    if given:
        write(tmp_path, given, "x")
        assert [source.label for source in sources_in([given])] == [given]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes")
@pytest.mark.parametrize(
    "name", [b"-x.txt", b"a b.txt", b"'\".txt", b"a\nb.txt", b"[a].txt", b"\xff\xe9.txt", b"*?.txt"]
)
def test_any_name_is_found_by_itself_its_folder_and_a_glob(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(name)
    write(tmp_path, name, "x")
    for given in (name, f"./{name}", ".", "*", "**/*.txt"):
        require_local([given], TextConfig())
        assert [source.label for source in sources_in([given])] == [name]
    if name.isprintable():
        return
    Path(name).write_bytes(b"\xff")
    with pytest.raises(InputError) as problem:
        documents_of(sources_in(["*"])[0])
    assert str(problem.value).isprintable()


def special_files(folder):
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(folder)  # its address may not be long
        listener.bind("socket.txt")
        os.chdir(before)
    (folder / "null.txt").symlink_to("/dev/null")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_pipes_sockets_and_devices_are_never_opened(tmp_path):
    special_files(tmp_path)
    write(tmp_path, "a.txt", "x")
    for given in (tmp_path, tmp_path / "*"):
        found = find_sources([given])
        assert [source.path.name for source in found.sources] == ["a.txt"]
        kinds = ("device", "pipe", "socket")
        assert reasons(found) == {(kind, "no regular file"): 1 for kind in kinds}
    for name in ("pipe.txt", "socket.txt", "null.txt", "/dev/null"):
        for check in (find_sources, require_local):
            with pytest.raises(InputError, match=rf"{name} is no regular file: save its text"):
                check([tmp_path / name])


def test_a_path_that_the_system_refuses_is_named(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / "/".join(["x" * 200] * 30)):
        with pytest.raises(InputError, match=r"x cannot be read: File name too long"):
            find_sources([path])
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop cannot be read: Too many levels"):
        find_sources([tmp_path / "loop"])
    with pytest.raises(NotFoundError, match=r"a\\x00b does not exist"):
        find_sources(["a\0b"])


def test_a_name_that_a_run_recorded_elsewhere_is_found_in_a_c_locale(tmp_path, monkeypatch):
    write(tmp_path, "é.txt", "x")
    bytes_of = os.fsencode

    def in_ascii(path):
        return os.fspath(path).encode("ascii", "surrogateescape")

    monkeypatch.setattr(os, "fsencode", in_ascii)
    monkeypatch.setattr(os, "fsdecode", lambda data: data.decode("ascii", "surrogateescape"))
    (source,) = sources_in([tmp_path / "é.txt"])
    assert in_ascii(source.path) == bytes_of(tmp_path / "é.txt")


def test_a_file_that_vanishes_meanwhile_is_counted(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "x")
    monkeypatch.setattr(find.Walk, "files_below", lambda *_, **__: [tmp_path / "gone.txt"])
    with pytest.raises(NotFoundError, match=r"left out: 1 \.txt \(gone before it was read\)"):
        find_sources([tmp_path])


def test_a_folder_that_cannot_be_read_is_an_error_by_name_and_counted_by_a_glob(
    tmp_path, monkeypatch
):
    for name in ("a.txt", "closed/b.txt"):
        write(tmp_path, name, "x")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"closed cannot be read: Permission denied"):
        find_sources([tmp_path])
    for pattern in ("*", "**/*.txt", "*/*", "**"):
        if pattern == "*/*":
            with pytest.raises(
                NotFoundError, match=r"1 folder \(cannot be read: Permission denied"
            ):
                find_sources([tmp_path / pattern])
            continue
        found = find_sources([tmp_path / pattern])
        assert reasons(found) == {("folder", "cannot be read: Permission denied"): 1}
