"""What lies below folders and what globs match. Oracles: Python's glob, and links that one follows
by eye.
"""

import glob
import os
from pathlib import Path

import pytest

from minigpt2.corpus.sources.find import find_sources
from minigpt2.corpus.sources.left_out import Tally
from minigpt2.corpus.sources.walk import KNOWN, LOOP, Walk
from minigpt2.errors import NotFoundError
from minigpt2.runs.folder import RunFolder
from scripts import run_here
from text_files import write

EARLIER = Path(__file__).parents[2] / "earlier_runs" / "f07b90e"


def reasons(tally):
    return {(left.kind, left.reason): left.count for left in tally.all()}


def below(folder):
    tally = Tally()
    found = Walk(tally).files_below(folder)
    return [path.relative_to(folder).as_posix() for path in found], reasons(tally)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "*",
            "*.txt",
            "**",
            "**/*",
            "**/*.txt",
            "a/**",
            "**/a/*",
            "**/a/**/*.txt",
            "*/*/*",
            "a/?.*",
        ),
        *("[ab]/*", "**/[!a]", ".*", "**/.*", "*/../*.txt", "a/[c]/d.txt", "none/*", "*/none"),
        *("b/x[[]1].txt", "b/x[1].*", "**/**/d.txt", "*/c/d.txt", "*/.h/*"),
    ],
)
def test_a_glob_matches_what_it_does_in_python(tmp_path, monkeypatch, pattern):
    for name in ("1.txt", "a/2.txt", "a/c/d.txt", "a/a/3.md", "b/x[1].txt", "b/4", ".h/5.txt"):
        write(tmp_path, name, "x")
    write(tmp_path, "a/.h/6.txt", "x")
    monkeypatch.chdir(tmp_path)
    matched = Walk(Tally()).matches(Path(pattern))
    expected = {os.path.normpath(path) for path in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    got = {os.path.normpath(path) for path in matched}
    if "**" in pattern:  # of folders, only what is in them
        expected = {path for path in expected if Path(path).is_file()}
        got = {path for path in got if Path(path).is_file()}
    assert got == expected and len(matched) == len(set(matched))


def test_a_part_of_a_glob_that_is_a_name_is_that_name(tmp_path):
    for name in ("new [1]/a.txt", "new 1/b.txt"):
        write(tmp_path, name, "x")
    (found,) = Walk(Tally()).matches(tmp_path / "new [1]" / "*.txt")
    assert found.name == "a.txt"
    (found,) = Walk(Tally()).matches(tmp_path / "*" / "a.txt")
    assert found.name == "a.txt"


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    for name in ("top/a.txt", "top/sub/b.txt", "other/c.txt"):
        write(tmp_path, name, "x")
    top = tmp_path / "top"
    for name, target in {
        "aaa": "sub",  # although it comes first, the folder itself has its name
        "self": ".",
        "up": "..",
        "sub/loop": "../sub",
        "linked": "../other",
        "z": "../other",
    }.items():
        (top / name).symlink_to(target)
    (tmp_path / "other" / "back").symlink_to("../top")
    (tmp_path / "other" / "top").symlink_to("/")
    found, left = below(top)
    assert found == ["a.txt", "linked/c.txt", "sub/b.txt"]
    assert left == {("link", KNOWN): 5, ("link", LOOP): 2}
    for pattern in ("**/*.txt", "**/c.txt"):
        matched = Walk(Tally()).matches(top / pattern)
        assert [path for path in matched if path.name == "c.txt"] == [top / "linked" / "c.txt"]


def test_two_loops_do_not_multiply(tmp_path):
    write(tmp_path, "a.txt", "x")
    for name in "bcdefgh":
        (tmp_path / name).symlink_to(".")
    assert below(tmp_path)[0] == ["a.txt"]
    assert Walk(Tally()).matches(tmp_path / "**" / "*.txt") == [tmp_path / "a.txt"]


def test_runs_models_tokenizers_and_caches_are_no_text(tmp_path):
    files = {
        "a.txt": "kept",
        "b/vocab.json": "kept: alone it is any file",
        "run/run.json run/metrics.jsonl run/note.txt run/checkpoints/step-1/merges.txt": "run",
        "begun/run.owner begun/a.txt": "run",
        "step/state.json step/manifest.json step/merges.txt": "run",
        "gpt2/config.json gpt2/model.safetensors gpt2/merges.txt gpt2/README.md": "model",
        "lora/adapter_config.json lora/adapter_model.bin lora/README.md": "model",
        "bpe/vocab.json bpe/merges.txt": "tokenizer",
        "bpe2/tokenizer.json": "tokenizer",
        "tokens/corpus.json tokens/train.bin tokens/a.txt": "cache",
    }
    for names in files:
        for name in names.split():
            write(tmp_path, name, "x")
    for name in ("gpt2/text.txt", "bpe/README.md"):
        write(tmp_path, name, "kept: beside a model")
    found, left = below(tmp_path)
    assert found == ["a.txt", "b/vocab.json", "bpe/README.md", "gpt2/text.txt"]
    assert left == {
        ("folder", "a run of minigpt2"): 3,
        ("folder", "a cache of tokens"): 1,
        (".json", "a model"): 2,
        (".safetensors", "a model"): 1,
        (".bin", "a model"): 1,
        (".txt", "a model"): 1,
        (".md", "a model"): 2,
        (".json", "a tokenizer"): 2,
        (".txt", "a tokenizer"): 1,
    }
    matched = Walk(tally := Tally()).matches(tmp_path / "**" / "*.txt")
    assert [path.relative_to(tmp_path).as_posix() for path in matched] == ["a.txt", "gpt2/text.txt"]
    assert reasons(tally)["folder", "a run of minigpt2"] == 3
    assert not Walk(Tally()).matches(tmp_path / "run" / "*" / "*" / "merges.txt")
    assert not Walk(Tally()).matches(tmp_path / "r?n" / "note.txt")


def test_what_is_named_itself_is_taken_though_a_run_wrote_it(tmp_path):
    for name in ("run/run.json", "run/metrics.jsonl", "run/merges.txt", "run/mine.txt"):
        write(tmp_path, name, "x")
    (source,) = find_sources([tmp_path / "run" / "merges.txt"]).sources
    assert source.path.name == "merges.txt"
    # text that somebody put where a run is, which --out . makes of any folder
    for given in ("run", "run/*"):
        assert [s.path.name for s in find_sources([tmp_path / given]).sources] == ["mine.txt"]


def test_the_cache_of_tokens_is_no_text_even_where_it_lies_open(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    for name in ("a.txt", "cache/tokens/b.txt", "cache/c.txt"):
        write(tmp_path, name, "x")
    assert below(tmp_path)[0] == ["a.txt", "cache/c.txt"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_no_file_of_an_earlier_run_is_text(kind):
    with pytest.raises(NotFoundError, match=r"has no .* left out: .*a run of minigpt2"):
        find_sources([EARLIER / kind])


def test_a_run_goes_on_though_its_folder_lies_among_its_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    write(tmp_path, "a.txt", "The lamp is lit, and the sea says nothing.\n" * 40)
    small = ("--preset", "nano", "--batch-size", 1, "--block-size", 16, "--out", "out/run")
    text = ("--data", "**/*.txt")
    first = run_here(capsys, "train", *text, *small, "--max-steps", 1)
    assert first.code == 0 and "files           1 .txt\n" in first.err
    second = run_here(capsys, "train", *text, *small, "--max-steps", 2, "--resume")
    assert second.code == 0, second.err
    assert "files           1 .txt\n" in second.err
    assert "1 folder (a run of minigpt2)" in second.err
    assert len(RunFolder(Path("out/run")).checkpoints()) == 2
    for given in (".", "*", "**", "**/*.jsonl", "out/*"):
        try:
            found = find_sources([given])
        except NotFoundError as problem:
            assert "a run of minigpt2" in str(problem)
        else:
            assert [source.label for source in found.sources] == ["a.txt"]
    with pytest.raises(NotFoundError, match="has no"):
        find_sources(["out/run"])  # nothing that this version writes


def test_a_glob_follows_no_link_to_a_folder_that_it_lies_in(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "loop").symlink_to("..")
    for pattern, found in (("in/*", ["in/a.txt"]), ("in/*/*", []), ("in/**", ["in/a.txt"])):
        left_out = Tally()
        matches = Walk(left_out).matches(tmp_path / pattern)
        assert [match.relative_to(tmp_path).as_posix() for match in matches] == found
        assert [(left.kind, left.reason) for left in left_out.all()] == [("link", LOOP)]
