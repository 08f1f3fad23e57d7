"""Names on the Hub: which are taken for ids, revisions and paths, and what a glob means."""

import glob

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hub_fixtures
from hub_fixtures import REPO, refusal
from minigpt2.hub.names import matches

cache = hub_fixtures.cache
NAMES = st.sampled_from(["a", "b", ".a", "ab", "a.txt", "[a]", "b.a"])
PARTS = st.sampled_from(["**", "*", "a*", "*a", "?", "a", "b", ".*", ".a", "[ab]", "[!a]*", "b.a"])


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a..b", "", "a b", "x\n"])
def test_a_revision_must_look_like_one(cache, revision):
    assert "revision" in refusal(REPO, revision)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=6),
    st.lists(PARTS, min_size=1, max_size=4),
)
def test_a_glob_means_what_it_means_for_local_files(tmp_path_factory, paths, parts):
    folder = tmp_path_factory.mktemp("tree")
    for path in paths:
        file = folder.joinpath(*path)
        if not any(parent.is_file() for parent in (file, *file.parents)) and not file.is_dir():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    below = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    expected = glob.glob("/".join(parts), root_dir=folder, recursive=True)  # noqa: PTH207
    assert sorted(name for name in below if matches(name.split("/"), parts)) == sorted(
        name for name in set(expected) if not name.endswith("/") and (folder / name).is_file()
    )
