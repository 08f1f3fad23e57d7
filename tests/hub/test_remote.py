"""What the Hub says of its files is believed only where it can be right."""

import pytest
from huggingface_hub import constants

import hub_fixtures
from hub_fixtures import REPO, WEIGHTS, content, files_below, refusal, tiny_model
from hub_server import Fault, portal
from minigpt2.errors import NotFoundError
from minigpt2.hub.folders import model_folder
from minigpt2.hub.snapshot import EXTRAS

cache, serve = hub_fixtures.cache, hub_fixtures.serve


def test_a_repository_that_was_renamed_is_followed(serve):
    server = serve()
    commit = server.commits[REPO]
    for name in ("config.json", WEIGHTS, *EXTRAS):
        moved = Fault(status=307, headers={"Location": f"/{REPO}/resolve/{commit}/{name}"})
        for method in ("HEAD", "GET"):
            server.add_fault(name, moved, method=method, times=1)
    assert content(model_folder("tiny", commit)) == tiny_model()


def test_row_82_repository_revision_and_file_are_told_apart(serve):
    serve({REPO: tiny_model(), "ada/empty": {}})
    texts = [refusal("ada/nobody"), refusal(REPO, "v9"), refusal("ada/empty")]
    assert "no folder ada/nobody and no model ada/nobody" in texts[0]
    assert "has no revision v9" in texts[1]
    assert "has no config.json" in texts[2]
    for source, revision in (("ada/nobody", None), (REPO, "v9"), ("ada/empty", None)):
        with pytest.raises(NotFoundError):
            model_folder(source, revision)


@pytest.mark.parametrize(
    "fault", [Fault(change=portal), Fault(status=302, headers={"Location": "http://127.0.0.2/"})]
)
def test_row_88_a_log_in_page_is_no_hub(serve, fault):
    nothing = {"X-Repo-Commit": None, "ETag": None, "X-Linked-Etag": None}
    page = Fault(status=fault.status, change=fault.change, headers={**nothing, **fault.headers})
    serve().add_fault("*", page, method="*")
    message = refusal()
    assert "is not a Hub (check HF_ENDPOINT, proxy and log-in page)" in message
    assert "run once with network" in message


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../evil"'},
        {"ETag": '"/tmp/minigpt2-evil"'},
        {"ETag": '"{}"'.format("a" * 39)},
        {"ETag": '"{}"'.format("A" * 40)},
        {"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'},
        {"X-Repo-Commit": "../../../../evil"},
        {"X-Repo-Commit": "main"},
    ],
    ids=str,
)
def test_row_90_etag_and_commit_must_be_plain_digests_before_anything_is_written(
    serve, tmp_path, headers
):
    server = serve()
    server.add_fault("config.json", Fault(headers=headers), method="HEAD")
    message = refusal()
    assert "hexadecimal digits: nothing is taken from there" in message
    assert f"unset HF_ENDPOINT or set it to {constants._HF_DEFAULT_ENDPOINT}" in message
    assert files_below(tmp_path) == []


def test_row_90_a_hub_may_not_answer_with_another_commit_than_the_one_asked_for(serve, tmp_path):
    server = serve()
    commit = server.commits[REPO]
    server.add_fault("*", Fault(headers={"X-Repo-Commit": "e" * 40}), method="HEAD")
    assert f"expected {commit}" in refusal(REPO, commit)
    assert files_below(tmp_path) == []
