"""A replaced file is the old one or the new one, whole; damaged files are called what they are."""

import ast
import io
import itertools
import json
import math
import os
import random
import re
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from minigpt2.errors import InputError, NotFoundError
from minigpt2.formats.tensors import write_tensors
from minigpt2.system import files
from minigpt2.system.files import (
    describe,
    did_you_mean,
    exposed,
    own_folder,
    read_json,
    remove_leftovers,
    replace_file,
    write_json,
    write_text,
)
from scripts import ROOT


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_or_replaced_with_nothing_left_beside_it(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("first", "second, longer", "3"):
        replace_file(path, lambda temporary, text=text: temporary.write_text(text) and None)
        assert path.read_text() == text
        assert names_in(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("problem", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, problem):
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise problem

    with pytest.raises(type(problem)):
        replace_file(path, write)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["notes.txt"]


def test_names_that_are_not_utf8_are_kept_in_json_and_read_where_names_are_meant(tmp_path):
    path, name = tmp_path / "a.json", os.fsdecode(b"caf\xe9 \xff.txt")
    value = {"data": [name], name: "é 🤗"}
    write_json(path, value)
    assert "é 🤗" in path.read_text("utf-8")
    assert read_json(path, with_names=True) == json.loads(path.read_bytes()) == value
    with pytest.raises(InputError, match="has a lone surrogate"):
        read_json(path)
    write_json(path, {"data": "\ud83e"})  # which is no byte
    with pytest.raises(InputError, match="data has a lone surrogate"):
        read_json(path, with_names=True)


def test_data_is_on_the_disk_before_the_name_moves_and_the_folder_after(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    synced = []

    def fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if is_folder else "file", path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "new")
    assert synced == [("file", "old"), ("folder", "new")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "notes.txt", "x")
        write_text(tmp_path / "notes.txt", "y")
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3)})
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [mode] * 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_files_that_another_thread_makes_meanwhile_have_the_mode_of_the_umask(
    tmp_path, monkeypatch
):
    made, others, ended = tmp_path / "made", tmp_path / "others", threading.Event()
    made.mkdir()
    others.mkdir()

    def make_others():
        for number in itertools.count():
            (others / str(number)).touch()
            if ended.is_set():
                return

    def slow_umask(mask):  # whoever sets it for a moment is caught at it
        was = real(mask)
        time.sleep(0.01)
        return was

    real = os.umask
    before = real(0o022)
    monkeypatch.setattr(os, "umask", slow_umask)
    thread = threading.Thread(target=make_others)
    thread.start()
    try:
        for _ in range(5):
            write_text(made / "notes.txt", "x")
    finally:
        ended.set()
        thread.join()
        real(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [*others.iterdir(), *made.iterdir()]}
    assert modes == {0o644}


def test_a_name_that_is_taken_is_never_written_to(tmp_path, monkeypatch):
    names = iter(["00000000", "00000000", "11111111"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda n_bytes: next(names))
    (tmp_path / ".notes.txt.00000000.tmp").write_text("theirs")
    write_text(tmp_path / "notes.txt", "ours")
    assert (tmp_path / ".notes.txt.00000000.tmp").read_text() == "theirs"
    assert (tmp_path / "notes.txt").read_text() == "ours"


WRITER = """
import sys
from pathlib import Path
from minigpt2.system.files import write_text
path = Path(sys.argv[1])
write_text(path, "0" * 100_000)
print(flush=True)
n = 0
while True:
    n += 1
    write_text(path, str(n % 10) * 100_000)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path, moments = tmp_path / "notes.txt", random.Random(5)
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        ) as writer:
            writer.stdout.readline()
            time.sleep(moments.uniform(0, 0.02))
            writer.kill()
        text = path.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1


def test_what_a_killed_writer_left_is_removed(tmp_path):
    class Killed(BaseException):
        pass

    def die(temporary):
        os.link(temporary, tmp_path / "kept")  # the name is all that matters here
        left.append(temporary.name)
        raise Killed

    left = []
    with pytest.raises(Killed):
        replace_file(tmp_path / "notes.txt", die)
    (tmp_path / "kept").rename(tmp_path / left[0])
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == []


LARGE_WRITER = """
import sys, torch
from pathlib import Path
from minigpt2.formats.tensors import write_tensors
print(flush=True)
while True:
    write_tensors(Path(sys.argv[1]), {"a": torch.zeros(4_000_000)})
"""


@pytest.mark.slow
def test_all_that_a_killed_writer_of_tensors_leaves_is_removed(tmp_path):
    folder, moments, n_left = tmp_path / "run", random.Random(6), 0
    folder.mkdir()
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", LARGE_WRITER, str(folder / "w.safetensors")],
            stdout=subprocess.PIPE,
        ) as writer:
            writer.stdout.readline()
            time.sleep(moments.uniform(0.02, 0.2))
            writer.kill()
        n_left += len(names_in(folder)) - (folder / "w.safetensors").exists()
        remove_leftovers(folder)
        assert names_in(folder) in ([], ["w.safetensors"])
    assert n_left > 0, "no kill came while a file was written"


def test_only_the_names_that_are_ours_are_removed(tmp_path):
    ours = [".model.safetensors.ab3_x9zq.tmp", ".tmpAb3xZ9"]
    theirs = ["notes.tmp", ".hidden", "tmpAb3xZ9", ".tmp", ".tmpAb3xZ", ".notes.ABCDEFGH.tmp"]
    for name in ours + theirs:
        (tmp_path / name).write_text("x")
    (tmp_path / ".folder.abcdefgh.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == sorted([*theirs, ".folder.abcdefgh.tmp"])


def test_text_is_written_as_utf8_with_line_feeds(tmp_path):
    write_text(tmp_path / "t", "naïve\n日本 🤗\n")
    assert (tmp_path / "t").read_bytes() == "naïve\n日本 🤗\n".encode()


def test_json_comes_back_and_ends_with_a_line_feed(tmp_path):
    value = {"name": "naïve 日本", "eps": 1e-5, "none": None, "list": [1, True], "inner": {}}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    text = (tmp_path / "v.json").read_text(encoding="utf-8")
    assert text == json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def test_a_byte_order_mark_before_json_is_accepted(tmp_path):
    (tmp_path / "v.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "v.json") == {"a": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"a": 1',
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": [1e999]}',
        b'{"a": "\xff"}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_not_json_is_refused_by_name(tmp_path, content):
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} is not valid JSON (")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_never_written(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "v.json", {"a": [value]})
    assert names_in(tmp_path) == []


SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("minigpt2/**/*.py"), *ROOT.glob("benchmarks/*.py")]


def test_json_is_written_nowhere_with_numbers_that_it_does_not_have():
    n_found = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(r"json\.dumps?", ast.unparse(node.func)):
                assert "allow_nan=False" in ast.unparse(node), f"{path.name}:{node.lineno}"
                n_found += 1
    assert n_found > 5


@pytest.mark.parametrize(("content", "kind"), [("[1]", "list"), ('"a"', "str"), ("1", "int")])
def test_json_that_is_no_object_is_refused_by_name(tmp_path, content, kind):
    path = tmp_path / "v.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path} holds a JSON {kind}, expected an object {{...}}"


def test_a_missing_json_file_is_named_with_its_folder(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "v.json", tmp_path / "folder.json", tmp_path / "none" / "v.json"):
        with pytest.raises(NotFoundError) as caught:
            read_json(path)
        message = f"{path} does not exist: is {path.parent} a complete model folder?"
        assert str(caught.value) == message


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "description"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not"),
        (b"<!DOCTYPE html><html>", "an HTML or XML page, probably a failed download"),
        (b"\n  <?xml version='1.0'?>", "an HTML or XML page, probably a failed download"),
        (zipped(), "a zip archive"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\0" * 1234, "1,234 bytes"),
        (b"x" * 9, "9 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_file_is_described_by_its_first_bytes(tmp_path, content, description):
    (tmp_path / "f").write_bytes(content)
    assert describe(tmp_path / "f").startswith(description)


def test_a_folder_is_described_as_one(tmp_path):
    assert describe(tmp_path) == "a folder"


posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")


@posix
def test_what_only_this_user_and_root_can_change_is_not_exposed(tmp_path):
    place = tmp_path / "a" / "b"
    assert own_folder(place) is None
    assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    (place / "file").touch(mode=0o644)
    (place / "link").symlink_to("../b/file")
    for name in ("file", "link", "../b/link"):
        assert exposed(place / name) is None


@posix
def test_a_sticky_folder_keeps_what_is_in_it_but_not_what_is_open_itself(tmp_path):
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    assert own_folder(tmp_path / "sticky" / "mine") is None
    (tmp_path / "sticky" / "mine").chmod(0o1770)  # whoever may write there may make a file first
    file = tmp_path / "sticky" / "mine" / "file"
    file.touch()
    file.chmod(0o620)
    assert exposed(file) == f"others can write to {file}"


@posix
def test_every_folder_that_a_link_leads_through_counts(tmp_path):
    open_, safe = tmp_path / "open", tmp_path / "safe"
    (open_ / "inner").mkdir(parents=True)
    safe.mkdir()
    (open_ / "inner" / "file").touch(mode=0o600)
    open_.chmod(0o777)
    (safe / "one").symlink_to(open_ / "inner")
    (safe / "two").symlink_to("one/file")
    for name in ("one", "one/file", "two"):
        assert exposed(safe / name) == f"others can write to {open_}"
    (open_ / "back").symlink_to(safe)
    assert exposed(open_ / "back") == f"others can write to {open_}"  # they could turn it


@posix
def test_what_belongs_to_others_is_exposed(tmp_path, monkeypatch):
    (tmp_path / "file").touch(mode=0o600)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    (problem,) = {exposed(tmp_path / "file")} - {None} or {"root's"}
    assert problem == "root's" if me == 0 else problem.endswith("belongs to another user")


@posix
def test_links_that_go_round_and_names_of_nothing_are_no_endless_walk(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "none"):
        with pytest.raises(OSError):
            exposed(tmp_path / name)


def test_what_was_meant_by_a_path_is_looked_for_in_its_folder_and_in_folders_like_it(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/first", "runs/second", "ruins/first", "odd"):
        Path(name).mkdir(parents=True)
    Path("runs/furst").write_text("a file")
    assert did_you_mean(Path("runs/frist")) == " (did you mean 'runs/first' or 'runs/furst'?)"
    assert did_you_mean(Path("runs/frist"), folders_only=True) == " (did you mean 'runs/first'?)"
    assert did_you_mean(Path("rnus/frist"), folders_only=True).count("/first'") == 2
    assert did_you_mean(tmp_path / "oddd") == f" (did you mean '{tmp_path}/odd'?)"
    for nothing in ("runs/zzz", "zzz/zzz/zzz", "", ".", "..", "/", "a\0b", "runs/first/none"):
        assert did_you_mean(Path(nothing)) == ""


def test_names_of_files_are_shown_without_what_takes_over_a_terminal(tmp_path):
    (tmp_path / "fir\x1b[31mst").mkdir()
    assert r"fir\x1b[31mst" in did_you_mean(tmp_path / "first")
