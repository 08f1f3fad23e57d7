"""A replaced file is the old one or the new one, whole; damaged files are called what they are."""

import io
import json
import os
import random
import stat
import subprocess
import sys
import time
import zipfile

import pytest

from minigpt2.errors import InputError, NotFoundError
from minigpt2.files import (
    current_umask,
    describe,
    read_json,
    remove_leftovers,
    replace_file,
    write_json,
    write_text,
)


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
        assert current_umask() == mask == current_umask()
        write_text(tmp_path / "notes.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "notes.txt").stat().st_mode) == mode


WRITER = """
import sys
from pathlib import Path
from minigpt2.files import write_text
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
from minigpt2.weights import write_tensors
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
