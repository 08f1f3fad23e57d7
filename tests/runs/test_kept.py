"""Files that a run keeps are named without their folder, and found wherever that is."""

from pathlib import Path

import pytest

from minigpt2.runs.kept import BASE, TEXTS, found, named


@pytest.mark.parametrize("name", [TEXTS, BASE])
def test_what_a_run_keeps_is_found_after_its_folder_was_moved(name):
    told = named(f"./runs/mine/{name}", Path("runs/mine"))
    assert told == f"{{out}}/{name}"
    assert found(told, Path("/elsewhere/x")) == str(Path("/elsewhere/x") / name)


@pytest.mark.parametrize("path", ["gpt2", "texts.jsonl", "runs/other/base", "runs/mine/a.txt", "-"])
def test_other_paths_are_what_they_are(path):
    assert named(path, Path("runs/mine")) == path == found(path, Path("runs/mine"))
