"""Data sets from a Hub on the loopback interface: what is found, fetched, refused and said."""

import json
import logging
import os
import random
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir

import hub_fixtures
from hub_fixtures import files_below, use_endpoint, warnings
from hub_server import Fault, HubServer, flip_bit, portal
from minigpt2.errors import InputError, NotFoundError
from minigpt2.hub import download, snapshot
from minigpt2.hub.folders import dataset_files

cache, serve, waits = hub_fixtures.cache, hub_fixtures.serve, hub_fixtures.waits

REPO = "datasets/ada/books"
HUB = f"hf://{REPO}"
SUFFIXES = (".txt", ".md", ".json", ".py", ".parquet")
BOOKS = {
    ".gitattributes": b"*.parquet filter=lfs",
    "README.md": b"---\nlicense: mit\n---\n",
    "dataset_infos.json": b"{}",
    "books.py": b"raise SystemExit\n",
    "notes.txt": b"seen by all\n",
    "cover.png": b"\x89PNG",
    ".hidden/secret.txt": b"no",
    "data/test-0.parquet": random.Random(1).randbytes(307),
    "data/train-0.parquet": random.Random(2).randbytes(1009),
    "data/train-1.parquet": random.Random(3).randbytes(1013),
    "data/README.md": b"about the data\n",
    "data/old/Train 1#%.TXT": "Grüße\n".encode(),
    "data/old/deep/x.txt": b"x\n",
}
DATA = {
    "notes.txt",
    "data/test-0.parquet",
    "data/train-0.parquet",
    "data/train-1.parquet",
    "data/README.md",
    "data/old/Train 1#%.TXT",
    "data/old/deep/x.txt",
}


@pytest.fixture
def books(serve) -> HubServer:
    return serve({REPO: BOOKS})


def found(path: str = HUB) -> dict[str, bytes]:
    """Name in the repository -> content of each file that a path stands for."""
    pairs = dataset_files(path, SUFFIXES)
    labels = [label for label, _ in pairs]
    assert labels == sorted(set(labels))
    names = [re.fullmatch(rf"{HUB}@[0-9a-f]{{40}}/(.*)", label) for label in labels]
    return {name[1]: file.read_bytes() for name, (_, file) in zip(names, pairs) if name}


def refusal(path: str = HUB, kind: type[InputError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        dataset_files(path, SUFFIXES)
    message = str(caught.value)
    assert "\n" not in message
    return message


def of_books(*names: str) -> dict[str, bytes]:
    return {name: BOOKS[name] for name in names}


def downloads(server: HubServer) -> list[str]:
    """The files that were sent, in order."""
    return [
        urlsplit(request.path).path.rsplit("/", 1)[-1]
        for request in server.requests
        if request.method == "GET" and "/resolve/" in request.path
    ]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", DATA),
        ("/", DATA),
        ("/notes.txt", {"notes.txt"}),
        ("/cover.png", {"cover.png"}),
        ("/README.md", {"README.md"}),
        ("/.hidden/secret.txt", {".hidden/secret.txt"}),
        ("/.hidden/*", {".hidden/secret.txt"}),
        ("/data/old", {"data/old/Train 1#%.TXT", "data/old/deep/x.txt"}),
        ("/data/old/", {"data/old/Train 1#%.TXT", "data/old/deep/x.txt"}),
        ("/data/old/Train 1#%.TXT", {"data/old/Train 1#%.TXT"}),
        ("/data/train-*.parquet", {"data/train-0.parquet", "data/train-1.parquet"}),
        ("/data/train-[1-9].parquet", {"data/train-1.parquet"}),
        ("/data/*", {name for name in DATA if name.count("/") == 1}),
        ("/d*/*-0.parquet", {"data/test-0.parquet", "data/train-0.parquet"}),
        ("/data/**", {name for name in DATA if "/" in name}),
        ("/**/*.txt", {"notes.txt", "data/old/deep/x.txt"}),
        ("/*", {"notes.txt", "README.md", "dataset_infos.json", "books.py"}),
    ],
)
def test_a_path_is_a_file_a_folder_or_a_glob(books, path, names):
    assert found(f"{HUB}{path}") == of_books(*names)


def test_only_folders_that_can_hold_files_of_the_glob_are_listed(books):
    for path, question in (("*.txt", "?recursive=false"), ("data/o*/**", "/data?recursive=true")):
        found(f"{HUB}/{path}")
        lists = [request.path for request in books.requests if "/tree/" in request.path]
        assert lists.pop().partition(books.commits[REPO])[2] == question


@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_a_list_in_pages_is_read_to_its_end(serve, page_size):
    serve({REPO: BOOKS}, page_size=page_size)
    assert found() == of_books(*DATA)


def test_a_file_named_like_a_glob_is_found_by_its_name(serve):
    serve({REPO: {"data/[1].txt": b"one"}})
    assert found(f"{HUB}/data/[1].txt") == {"data/[1].txt": b"one"}


@pytest.mark.parametrize(
    "written", ["@refs%2Fconvert%2Fparquet", "@refs/convert/parquet", "@v1.0", "@{commit}"]
)
def test_a_revision_is_a_branch_tag_commit_or_conversion(serve, cache, monkeypatch, written):
    other = {"default/train/0000.parquet": b"converted", "notes.txt": b"of old\n"}
    names = ("refs/convert/parquet", "v1.0")
    branches = {REPO: dict.fromkeys(names, "datasets/ada/other")}
    server = serve({REPO: BOOKS, "datasets/ada/other": other}, branches=branches)
    commit = server.commits["datasets/ada/other"]
    path = HUB + written.format(commit=commit)

    assert found(path) == other
    assert [label.split("@")[1] for label, _ in dataset_files(f"{path}/notes.txt", SUFFIXES)] == [
        f"{commit}/notes.txt"
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found(path) == other


def test_a_commit_that_was_listed_and_fetched_costs_no_request(books):
    path = f"{HUB}@{books.commits[REPO]}"
    assert found(f"{path}/data") == found(f"{path}/data")
    assert len(books.requests) == 2 + 6
    found(f"{path}/data/train-0.parquet")
    assert len(books.requests) == 2 + 6


def test_a_branch_costs_one_request_while_it_has_not_moved(books):
    found(f"{HUB}/data")
    asked = len(books.requests)
    found(f"{HUB}/data")
    assert len(books.requests) == asked + 1


def test_of_a_branch_that_moved_only_what_changed_is_fetched(books):
    found()
    books.repos[REPO] = {**BOOKS, "notes.txt": b"new\n", "data/train-2.parquet": b"more"}
    books.commits[REPO] = "1" * 40
    before = len(downloads(books))
    expected = {**of_books(*DATA), "notes.txt": b"new\n", "data/train-2.parquet": b"more"}
    assert found() == expected
    assert sorted(downloads(books)[before:]) == ["notes.txt", "train-2.parquet"]


def test_the_client_itself_finds_what_was_downloaded(books, cache):
    pairs = dataset_files(HUB, SUFFIXES)
    for label, file in pairs:
        name = label.split("@")[1].split("/", 1)[1]
        arguments = {"repo_type": "dataset", "local_files_only": True}
        assert hf_hub_download("ada/books", name, **arguments) == str(file)
    report = scan_cache_dir(cache)
    assert not report.warnings
    assert [(repo.repo_type, repo.repo_id) for repo in report.repos] == [("dataset", "ada/books")]


def test_a_file_that_the_client_downloaded_is_used_offline(books, monkeypatch):
    hf_hub_download("ada/books", "data/train-0.parquet", repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found(f"{HUB}/data/train-0.parquet") == of_books("data/train-0.parquet")
    assert "HF_HUB_OFFLINE is set" in refusal(f"{HUB}/data", NotFoundError)
    monkeypatch.setattr(snapshot, "digest_of", lambda *_: pytest.fail("read again"))
    dataset_files(f"{HUB}/data/train-0.parquet", SUFFIXES)


def test_offline_a_list_that_is_not_known_or_not_whole_is_refused(books, monkeypatch):
    found(f"{HUB}/data")
    file = dict(dataset_files(f"{HUB}/data/**/*.txt", SUFFIXES))
    asked = len(books.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found(f"{HUB}/data") == of_books(*(name for name in DATA if "/" in name))
    for path in (HUB, f"{HUB}/notes.txt", f"{HUB}@v1/data", "hf://datasets/ada/others"):
        assert "is not, or not whole, in the cache" in refusal(path, NotFoundError)
    next(iter(file.values())).write_bytes(b"changed")
    assert "unset it or pass a local folder" in refusal(f"{HUB}/data", NotFoundError)
    assert len(books.requests) == asked


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(ending="reset"), Fault(change=portal)])
def test_when_nobody_answers_the_copy_in_the_cache_is_used(books, waits, caplog, fault):
    expected = found(f"{HUB}/data")
    books.add_fault("main", fault)
    assert found(f"{HUB}/data") == expected
    assert "using the copy in the cache " in warnings(caplog)[-1]
    assert "run once with network or pass a local folder" in refusal(f"{HUB}/notes.txt")


def test_when_nobody_answers_the_first_time_the_way_out_is_said(serve, waits, monkeypatch):
    serve().__exit__()
    assert "run once with network or pass a local folder" in refusal()
    assert waits == [1, 2]


def test_a_download_that_was_broken_off_is_not_taken_for_whole_and_is_continued(
    books, monkeypatch, waits
):
    books.add_fault("train-0.parquet", Fault(stop_after=500), times=1)
    books.add_fault("train-0.parquet", Fault(stop_after=0), times=4)
    assert "cannot get data/train-0.parquet" in refusal(f"{HUB}/data")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not whole" in refusal(f"{HUB}/data", NotFoundError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = len(downloads(books))
    assert found(f"{HUB}/data") == of_books(*(name for name in DATA if "/" in name))
    assert downloads(books)[before:] == ["train-0.parquet", "train-1.parquet"]
    assert books.requests[-2].headers["range"] == "bytes=500-"


def test_intact_files_are_read_only_once(books, monkeypatch):
    path = f"{HUB}@{books.commits[REPO]}"
    found(path)
    monkeypatch.setattr(snapshot, "digest_of", lambda *_: pytest.fail("read again"))
    dataset_files(path, SUFFIXES)


def test_a_set_that_does_not_fit_is_refused_before_its_first_byte(books, monkeypatch, cache):
    found(f"{HUB}/data/test-0.parquet")
    missing = sum(len(BOOKS[name]) for name in DATA if "/" in name) - 307
    for free in (missing - 1, missing):
        monkeypatch.setattr(
            download.shutil, "disk_usage", lambda _, f=free: type("", (), {"free": f})
        )
        if free < missing:
            assert f"{missing:,} bytes to come, {free:,} free" in refusal(f"{HUB}/data")
            assert downloads(books) == ["test-0.parquet"]
    assert len(found(f"{HUB}/data")) == 6


def test_equal_files_are_downloaded_and_counted_once(serve, monkeypatch):
    same = {f"{n}.parquet": bytes(1009) for n in range(3)}
    server = serve({REPO: same})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("", (), {"free": 1009}))
    assert found() == same
    assert downloads(server) == ["0.parquet"]


def test_a_cache_that_takes_no_records_serves_what_it_holds(books, monkeypatch):
    def refuse(path: Path, _: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(snapshot.files, "write_json", refuse)
    assert found() == found() == of_books(*DATA)
    assert len(downloads(books)) == len(DATA)


def test_lists_of_runs_at_the_same_time_are_all_kept(books, monkeypatch):
    fetch_all = download._fetch_all

    def fetch_while_another_run_does(*arguments) -> None:
        monkeypatch.setattr(download, "_fetch_all", fetch_all)
        found(f"{HUB}/data")
        fetch_all(*arguments)

    monkeypatch.setattr(download, "_fetch_all", fetch_while_another_run_does)
    found(f"{HUB}/*.txt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert set(found(f"{HUB}/*.txt")) | set(found(f"{HUB}/data")) == DATA


def test_what_older_downloads_left_is_removed(books, cache):
    blobs = cache / "datasets--ada--books" / "blobs"
    blobs.mkdir(parents=True)
    old = blobs / ("a" * 64 + ".incomplete")
    old.write_bytes(b"part")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    found()
    assert not old.exists()


@pytest.mark.parametrize("damage", [flip_bit, portal, lambda data: data[:-1]])
def test_bytes_that_are_not_those_of_the_list_are_refused(books, cache, damage):
    books.add_fault("train-1.parquet", Fault(change=damage))
    message = refusal(f"{HUB}/data")
    assert "data/train-1.parquet of datasets/ada/books came as" in message
    assert not list(cache.rglob("train-1.parquet")) and not files_below(cache, "*.incomplete")


@pytest.mark.parametrize(
    "path",
    [
        "hf://models/ada/books",
        "hf://ada/books",
        "hf://datasets/books",
        "hf://datasets/",
        "hf://datasets/a--b/c",
        "hf://datasets/ada/books@/x.txt",
        "hf://datasets/ada/books@..%2F..%2Fx",
        "hf://datasets/ada/books/../x",
        "hf://datasets/ada/books/a//b",
        "hf://datasets/ada/books/a/./b",
        "hf://datasets/ada/books/a\\b",
        "hf://datasets/ada/books/a\nb",
        "hf://datasets/ada/books/C:/b",
    ],
)
def test_what_is_no_path_in_a_data_set_is_refused_without_a_question(books, path):
    refusal(path)
    assert books.requests == []


@pytest.mark.parametrize("ending", ["", "/notes.txt", "/data", "/data/*.parquet"])
def test_a_data_set_or_revision_that_does_not_exist_is_named(books, ending):
    message = refusal(f"hf://datasets/ada/boks{ending}", NotFoundError)
    assert f"there is no datasets/ada/boks on {books.url}" in message
    for revision in ("v7", "7" * 40):
        message = refusal(f"{HUB}@{revision}{ending}", NotFoundError)
        assert f"datasets/ada/books has no revision {revision}" in message


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/note.txt", "no note.txt: near it is notes.txt"),
        ("/date/train-0.parquet", "no date/train-0.parquet: near it is data"),
        ("/data/trian-0.parquet", "near it is data/train-0.parquet"),
        ("/data/old/dep", "near it is data/old/deep"),
        ("/data/dev-*", "there is data/old, "),
        ("/data/nothing/**/*.txt", "there is data/old, "),
        ("/zzz", "there is data, README.md, dataset_infos.json, books.py, notes.txt and 1 more"),
    ],
)
def test_a_file_that_does_not_exist_is_named_with_what_is_near(serve, path, said):
    serve({REPO: {name: data for name, data in BOOKS.items() if name != ".hidden/secret.txt"}})
    message = refusal(f"{HUB}{path}", NotFoundError)
    assert f"has no {path[1:]}: " in message
    assert all(word in message for word in said.split(": ")), message


def test_an_empty_data_set_says_so(serve):
    serve({REPO: {}})
    assert "there is no file" in refusal(HUB, NotFoundError)


def test_files_of_other_kinds_only_are_named_with_the_kinds_expected(serve):
    serve({REPO: {f"{n}.png": b"" for n in range(7)}})
    message = refusal(f"{HUB}/*.png")
    assert "*.png is only 0.png, 1.png, 2.png, 3.png, 4.png and 2 more" in message
    assert "expected .txt, .md" in message


@pytest.mark.parametrize("name", ["main", "notes.txt"])
def test_a_gated_data_set_says_how_to_get_in(books, name):
    books.add_fault(name, Fault(status=403, headers={"X-Error-Code": "GatedRepo"}), method="*")
    message = refusal()
    assert f"accept the terms at {books.url}/{REPO} and run `hf auth login`" in message


BAD_ENTRIES = {
    "climbs": {"path": "data/x/../../../evil.txt"},
    "empty": {"path": "data//evil.txt"},
    "absolute": {"path": "/evil.txt"},
    "drive": {"path": "C:/evil.txt"},
    "backslash": {"path": "data\\..\\..\\evil.txt"},
    "surrogate": {"path": "\ud800evil.txt"},
    "digest": {"oid": "../../evil"},
    "no digest": {"oid": None},
    "large without digest": {"lfs": {"oid": "e" * 63}},
    "size": {"size": "evil"},
    "no path": {"path": None},
    "no type": {"type": 7},
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_a_list_that_cannot_be_right_is_refused_before_anything_is_written(books, tmp_path, kind):
    def spoil(data: bytes) -> bytes:
        good = [entry for entry in json.loads(data) if entry["path"] == "notes.txt"]
        return json.dumps([*good, {**good[0], **BAD_ENTRIES[kind]}]).encode()

    books.add_fault(books.commits[REPO], Fault(change=spoil))
    refusal(f"{HUB}/**/.*/.*/.*/*" if kind == "climbs" else HUB)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("answer", [b"7", b"{}", b"[7]", b"[[", b"", b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("question", ["main", "tree"])
def test_an_answer_that_no_hub_gives_is_recognised(books, answer, question):
    name = books.commits[REPO] if question == "tree" else question
    books.add_fault(name, Fault(change=lambda _: answer))
    assert "is not a Hub (check HF_ENDPOINT, proxy and log-in page)" in refusal()


def test_a_hub_may_not_name_another_commit_than_a_commit(books, tmp_path):
    answer = json.dumps({"sha": "../../../evil"}).encode()
    books.add_fault("main", Fault(change=lambda _: answer))
    assert "is not a Hub" in refusal()
    assert files_below(tmp_path) == []


def test_the_token_goes_to_the_hub_and_nowhere_else(serve, monkeypatch):
    """Neither to where files lie, nor to where the list says that it goes on."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server = serve({REPO: BOOKS}, cdn=True, page_size=4)
    elsewhere = {
        "Link": f'<{server.cdn_url}/api/{REPO}/tree/x?recursive=true&cursor=4>; rel="next"'
    }
    server.add_fault(server.commits[REPO], Fault(headers=elsewhere), times=1)
    assert found() == of_books(*DATA)
    for request in server.requests:
        sent = request.headers.get("authorization")
        assert sent == (None if request.path.startswith("/cdn/") else "Bearer hf_secret")
    assert sum(request.path.startswith("/cdn/") for request in server.requests) == 3


def test_no_token_is_sent_over_plain_http_to_another_machine(books, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    use_endpoint(monkeypatch, books.url.replace("127.0.0.1", "0.0.0.0"))
    found()
    assert books.requests and not any("authorization" in r.headers for r in books.requests)
    assert "not https" in warnings(caplog)[0] and "secret" not in caplog.text


def test_what_is_left_out_is_said(books, caplog):
    caplog.set_level(logging.INFO, logger="minigpt2.hub")
    found()
    assert warnings(caplog)[0] == f"{REPO}: 7 of 11 files are data"
    assert Path(constants.HF_HUB_CACHE).is_dir()
