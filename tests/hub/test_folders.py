"""Where a model comes from: a folder, the cache or the Hub, with and without network."""

import re
from pathlib import Path

import pytest
from huggingface_hub import constants

import hub_fixtures
from hub_fixtures import REPO, WEIGHTS, asking, content, finish, refusal, tiny_model, warnings
from hub_server import Fault, HubServer
from minigpt2.errors import NotFoundError
from minigpt2.hub.folders import model_folder, revision_of

cache, serve, waits = hub_fixtures.cache, hub_fixtures.serve, hub_fixtures.waits


def test_an_existing_folder_is_returned_as_it_is_and_has_no_revision(tmp_path):
    assert model_folder(tmp_path) == tmp_path
    assert model_folder(str(tmp_path)) == tmp_path
    assert "no revisions" in refusal(str(tmp_path), "main")


@pytest.mark.parametrize(
    "source", ["./runs/first", "/no/such/run", "a/b/c", "", "a--b", "x.git", "é", "a b"]
)
def test_what_is_neither_folder_nor_hub_id_is_not_found(source):
    with pytest.raises(NotFoundError, match=re.escape(repr(source))):
        model_folder(source)


def test_a_path_that_is_no_folder_is_never_a_hub_id(tmp_path):
    with pytest.raises(NotFoundError):
        model_folder(Path("gpt2-of-mine"))
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(str(tmp_path / "file"))


def test_a_branch_costs_one_request_while_it_has_not_moved(serve):
    server = serve()
    first = model_folder(REPO)
    asked = len(server.requests)
    assert model_folder(REPO) == first
    assert len(server.requests) == asked + 1


def test_without_weights_only_the_small_files_are_fetched_and_later_the_weights_of_that_commit(
    serve,
):
    server = serve()
    small = model_folder(REPO, with_weights=False)
    assert content(small) == {n: data for n, data in tiny_model().items() if n != WEIGHTS}
    assert server.count("HEAD", WEIGHTS) == server.count("GET", WEIGHTS) == 0
    commit = revision_of(REPO, small)
    assert commit == server.commits[REPO]

    server.push(REPO, {**tiny_model(), WEIGHTS: b"trained further", "vocab.json": b"{}"})
    assert model_folder(REPO, commit) == small and content(small) == tiny_model()
    assert server.count("GET", "vocab.json") == 1
    assert (model_folder(REPO) / WEIGHTS).read_bytes() == b"trained further"


def test_a_folder_has_no_revision_to_come_back_to(tmp_path):
    assert revision_of(tmp_path, model_folder(tmp_path, with_weights=False)) is None


def test_small_files_alone_are_no_whole_model_without_network(serve, monkeypatch):
    server = serve()
    small = model_folder(REPO, with_weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(REPO, with_weights=False) == small
    assert "is not in the cache" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = len(server.requests)
    assert model_folder(REPO, server.commits[REPO], with_weights=False) == small
    assert len(server.requests) == asked


def test_a_whole_model_serves_without_weights_too(serve, cache):
    server = serve()
    folder = model_folder(REPO)
    (folder / WEIGHTS).unlink()  # to make room
    asked = len(server.requests)
    assert model_folder(REPO, server.commits[REPO], with_weights=False) == folder
    assert len(server.requests) == asked


def test_small_files_of_a_newer_commit_do_not_hide_the_whole_model_that_is_there(
    serve, monkeypatch
):
    server = serve()
    whole = model_folder(REPO)
    server.repos[REPO]["config.json"] = b'{"model_type": "gpt2", "newer": true}'
    server.commits[REPO] = "1" * 40
    assert model_folder(REPO, with_weights=False).name == "1" * 40
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(REPO) == whole


def test_row_79_offline_and_cached_takes_no_request_and_less_than_a_second(tmp_path):
    with HubServer({REPO: tiny_model()}) as server:
        first = finish(asking(REPO, home=tmp_path, url=server.url))
        assert first[0] == 0, first
        paths = {re.sub("/[^/]*$", "", request.path) for request in server.requests}
        assert all("/resolve/" in path for path in paths), "telemetry?"
        commit, asked = server.commits[REPO], len(server.requests)
        again = finish(asking(REPO, commit, home=tmp_path, url=server.url))
        assert len(server.requests) == asked
    gone = finish(asking(REPO, commit, home=tmp_path, url=server.url))
    for code, folder, messages, seconds in (again, gone):
        assert (code, folder, messages) == (0, first[1], "")
        assert seconds < 1


def test_row_80_no_network_and_not_cached_is_said_within_15_seconds(tmp_path):
    with HubServer({}) as server:
        url = server.url
    code, _, messages, seconds = finish(asking("gpt2", home=tmp_path, url=url))
    assert code == 2 and seconds < 15
    *retries, error = messages.splitlines()
    assert len(retries) == 2
    assert f"cannot get config.json of gpt2 from {url}" in error
    assert "is not in the cache" in error
    assert error.endswith("run once with network or pass a local folder")


@pytest.mark.slow
def test_row_80_a_silent_server_costs_less_than_15_seconds(tmp_path):
    with HubServer({"gpt2": tiny_model()}) as server:
        server.add_fault("*", Fault(silent=True), method="*")
        code, _, messages, seconds = finish(asking("gpt2", home=tmp_path, url=server.url))
        assert code == 2 and seconds < 15
        assert "try 2 of 3" in messages and "run once with network" in messages


def test_row_80_a_branch_that_cannot_be_asked_for_is_taken_from_the_cache(serve, waits, caplog):
    server = serve()
    folder = model_folder(REPO)
    server.add_fault("config.json", Fault(status=503), method="HEAD")
    assert model_folder(REPO) == folder
    assert "using the copy in the cache" in warnings(caplog)[-1]


def test_row_81_offline_mode_and_not_cached_names_the_variable_at_once(tmp_path):
    with HubServer({REPO: tiny_model()}) as server:
        offline = {"home": tmp_path, "url": server.url, "HF_HUB_OFFLINE": "1"}
        code, _, messages, seconds = finish(asking(REPO, **offline))
        assert code == 2 and seconds < 2
        assert messages.startswith("error: HF_HUB_OFFLINE is set and ada/tiny is not in the cache")
        assert not server.requests


def test_row_81_offline_mode_uses_the_cached_branch(serve, monkeypatch):
    server = serve()
    folder = model_folder(REPO)
    asked = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(REPO) == folder
    assert len(server.requests) == asked


def test_row_88_behind_a_log_in_page_the_cached_branch_is_used(serve, caplog):
    server = serve()
    folder = model_folder(REPO)
    server.add_fault("*", Fault(headers={"X-Repo-Commit": None}), method="HEAD")
    assert model_folder(REPO) == folder
    assert "is not a Hub" in warnings(caplog)[0]
