"""Downloads of models from a Hub on the loopback interface: every byte, or a line that says why."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download

import hub_fixtures
from hub_fixtures import (
    PROBE,
    REPO,
    ROOT,
    WEIGHTS,
    asking,
    content,
    files_below,
    finish,
    refusal,
    tiny_model,
    warnings,
)
from hub_server import Fault, HubServer, flip_bit, portal
from minigpt2.hub import download
from minigpt2.hub.folders import model_folder

cache, serve, waits = hub_fixtures.cache, hub_fixtures.serve, hub_fixtures.waits


NO_SIZE = {"X-Linked-Size": None, "Content-Length": None}


def test_a_download_holds_the_files_and_the_client_itself_finds_them(serve, cache):
    server = serve()
    folder = model_folder(REPO)
    assert content(folder) == tiny_model()
    commit = server.commits[REPO]
    assert folder == cache / "models--ada--tiny" / "snapshots" / commit

    asked = len(server.requests)
    for revision in ("main", commit):
        path = hf_hub_download(REPO, WEIGHTS, revision=revision, local_files_only=True)
        assert Path(path) == folder / WEIGHTS
    assert len(server.requests) == asked
    report = scan_cache_dir(cache)
    assert not report.warnings
    assert [repo.repo_id for repo in report.repos] == [REPO]


def test_the_loopback_hub_also_serves_folders_and_whole_snapshots(serve, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    for name, data in tiny_model().items():
        (served / name).write_bytes(data)
    serve({REPO: served})
    assert content(Path(snapshot_download(REPO))) == tiny_model()


def test_a_branch_that_moved_is_fetched_anew(serve):
    server = serve()
    first = model_folder(REPO)
    server.repos[REPO][WEIGHTS] = b"trained further"
    server.commits[REPO] = "1" * 40
    second = model_folder(REPO)
    assert (second / WEIGHTS).read_bytes() == b"trained further"
    assert (first / WEIGHTS).read_bytes() == tiny_model()[WEIGHTS]
    assert server.count("GET", "vocab.json") == 1  # unchanged files are shared


@pytest.mark.parametrize("name", ["config.json", "vocab.json", WEIGHTS])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_branch_that_moves_during_the_download_is_that_of_its_beginning(serve, method, name):
    server = serve()
    newer = {**tiny_model(7000), "config.json": b'{"model_type": "gpt2", "newer": true}'}
    server.push_after(method, name, REPO, {**newer, "vocab.json": b'{"b": 1}'})
    assert content(model_folder(REPO)) == tiny_model()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights_come_with_every_shard_the_index_names(serve, kind):
    stem, suffix = kind.rsplit(".", 1)
    shards = {f"{stem}-{n}-of-2.{suffix}": random.Random(n).randbytes(500) for n in (1, 2)}
    index = {
        "weight_map": {name: shard for n, shard in enumerate(shards) for name in (f"a{n}", f"b{n}")}
    }
    files = tiny_model()
    del files[WEIGHTS]
    files |= {**shards, f"{kind}.index.json": json.dumps(index).encode()}
    serve({REPO: files})
    assert content(model_folder(REPO)) == files


def test_a_missing_shard_or_no_weights_at_all_is_said(serve):
    files = tiny_model()
    del files[WEIGHTS]
    serve({REPO: files})
    assert "has no model.safetensors or pytorch_model.bin" in refusal()
    files["model.safetensors.index.json"] = b'{"weight_map": {"a": "lost.safetensors"}}'
    serve({REPO: files})
    assert "has no model.safetensors" in refusal()


def test_row_85_a_reset_mid_file_is_continued_where_it_broke(serve, waits, caplog):
    files = tiny_model(3_000_017)
    server = serve({REPO: files})
    server.add_fault(WEIGHTS, Fault(stop_after=1_000_000, ending="reset"), times=2)
    assert content(model_folder(REPO)) == files
    ranges = [
        r.headers.get("range", "")
        for r in server.requests
        if r.method == "GET" and WEIGHTS in r.path
    ]
    assert len(ranges) == 3 and ranges[0] == ""
    assert all(re.fullmatch(r"bytes=\d+-", value) for value in ranges[1:])
    assert waits == [1, 1], "progress counts anew"
    assert len(warnings(caplog)) == 2


@pytest.mark.parametrize("ending", ["close", "stall"])
def test_row_86_truncated_and_stalled_bodies_are_continued(serve, waits, ending):
    files = tiny_model(3_000_017)
    server = serve({REPO: files})
    server.add_fault(WEIGHTS, Fault(stop_after=2_000_000, ending=ending), times=1)
    assert content(model_folder(REPO)) == files
    assert server.count("GET", WEIGHTS) == 2


def test_row_86_a_range_that_is_ignored_starts_the_file_afresh(serve, waits):
    files = tiny_model(300_017)
    server = serve({REPO: files})
    server.add_fault(WEIGHTS, Fault(stop_after=200_000), times=1)
    server.add_fault(WEIGHTS, Fault(ignore_range=True), times=1)
    assert content(model_folder(REPO)) == files
    assert server.count("GET", WEIGHTS) == 2


@pytest.mark.parametrize("ending", ["close", "stall", "reset"])
def test_row_86_a_body_that_never_ends_well_is_given_up_and_continued_by_the_next_run(
    serve, waits, cache, monkeypatch, ending
):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    files = tiny_model(300_017)
    server = serve({REPO: files})
    server.add_fault(WEIGHTS, Fault(stop_after=100_000), times=1)
    server.add_fault(WEIGHTS, Fault(stop_after=0, ending=ending), times=4)
    assert "cannot get model.safetensors of ada/tiny" in refusal()
    assert waits == [1, 2, 4, 8]
    assert not files_below(cache, WEIGHTS)
    assert content(model_folder(REPO)) == files
    ranges = [r.headers.get("range") for r in server.requests if r.method == "GET"]
    assert ranges.count("bytes=100000-") == 5
    assert not files_below(cache, "*.incomplete")


def test_row_87_wrong_bytes_get_a_second_try(serve, caplog):
    server = serve()
    server.add_fault(WEIGHTS, Fault(change=flip_bit), times=1)
    assert content(model_folder(REPO)) == tiny_model()
    assert server.count("GET", WEIGHTS) == 2
    assert "downloading it once more" in warnings(caplog)[0]


@pytest.mark.parametrize("name", [WEIGHTS, "merges.txt"])
def test_row_87_bytes_that_stay_wrong_are_refused_with_both_digests_and_deleted(serve, cache, name):
    server = serve()
    server.add_fault(name, Fault(change=flip_bit))
    message = refusal()
    assert re.search(r"digest [0-9a-f]{40,64}, expected [0-9a-f]{40,64}", message)
    assert server.count("GET", name) == 2
    assert not files_below(cache, name) and not files_below(cache, "*.incomplete")


def test_row_87_an_endless_body_is_cut_off_at_the_size_that_was_announced(serve, cache):
    server = serve()
    server.add_fault(WEIGHTS, Fault(change=lambda data: data + bytes(5_000_000)))
    came = re.search(r"came as ([\d,]+) bytes", refusal())
    assert came and 3001 < int(came[1].replace(",", "")) < 1_000_000
    assert not files_below(cache, "*.incomplete")


def test_row_88_a_log_in_page_instead_of_a_file_is_recognised(serve):
    serve().add_fault(WEIGHTS, Fault(change=portal))
    assert "came as an HTML or XML page" in refusal()


def test_row_90_headers_of_the_download_itself_are_not_believed(serve, tmp_path):
    """A server may answer the question honestly and the download not."""
    server = serve()
    server.add_fault("*", Fault(headers={"ETag": '"../evil"', "X-Repo-Commit": "../evil"}))
    assert content(model_folder(REPO)) == tiny_model()
    assert not list(tmp_path.rglob("*evil*"))


def small_disk(folder: Path, bytes_free: int) -> bool:
    """Mount a file system of its own there, if this user may."""
    folder.mkdir()
    size = f"size={bytes_free}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    return sys.platform == "linux" and subprocess.run(command, capture_output=True).returncode == 0


def test_row_91_a_disk_that_fills_up_is_said_and_leaves_no_partial_file(tmp_path):
    """On a small tmpfs; a user who may not mount one gets a limit on the size of files instead."""
    with HubServer({REPO: tiny_model(3_000_000)}) as server:
        server.add_fault(WEIGHTS, Fault(headers=NO_SIZE), method="HEAD")
        mounted = small_disk(tmp_path / "disk", 2_000_000)
        limit = (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        )
        try:
            probe = PROBE if mounted else limit + PROBE
            environment = {"HF_HOME": str(tmp_path / "disk"), "HF_ENDPOINT": server.url}
            done = subprocess.run(
                [sys.executable, "-c", probe, REPO],
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 2, done.stderr
            assert "cannot store model.safetensors of ada/tiny" in done.stderr
            assert ("No space left" if mounted else "too large") in done.stderr
            assert files_below(tmp_path, "*.incomplete") == []
        finally:
            if mounted:
                subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_row_91_a_disk_that_is_too_small_is_noticed_before_the_download(serve, monkeypatch, cache):
    server = serve()
    nearly_full = type("Usage", (), {"free": 3000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: nearly_full)
    message = refusal()
    assert "3,001 bytes to come, 3,000 free" in message and "HF_HOME" in message
    assert server.count("GET", WEIGHTS) == 0
    assert not files_below(cache, "*.incomplete")


def test_row_92_a_killed_download_is_continued_by_the_next_run(tmp_path):
    files = tiny_model(3_000_017)
    with HubServer({REPO: files}) as server:
        server.add_fault(WEIGHTS, Fault(stop_after=2_000_000, ending="stall"), times=1)
        process = asking(REPO, home=tmp_path, url=server.url, HF_HUB_DOWNLOAD_TIMEOUT="60")
        deadline = time.monotonic() + 20
        while sum(p.stat().st_size for p in tmp_path.rglob("*.incomplete")) < 1_000_000:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        code, folder, messages, _ = finish(asking(REPO, home=tmp_path, url=server.url))
        assert (code, messages) == (0, "")
        assert content(Path(folder)) == files
        last = [r for r in server.requests if r.method == "GET" and r.path.endswith(WEIGHTS)][-1]
        assert int(last.headers["range"][6:-1]) >= 1_000_000
    assert files_below(tmp_path, "*.incomplete") == []


def test_row_92_a_partial_file_that_is_wrong_or_too_long_does_no_harm(serve, cache):
    for left, size in ((b"wrong", 3001), (bytes(10_000), 3002)):
        files = tiny_model(size)
        server = serve({REPO: files})
        blobs = cache / "models--ada--tiny" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / f"{hashlib.sha256(files[WEIGHTS]).hexdigest()}.incomplete").write_bytes(left)
        assert content(model_folder(REPO, server.commits[REPO])) == files


def test_a_link_in_the_place_of_a_partial_file_is_not_written_through(serve, cache, tmp_path):
    server = serve()
    digest = hashlib.sha256(server.repos[REPO][WEIGHTS]).hexdigest()
    blobs = cache / "models--ada--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest}.incomplete").symlink_to(tmp_path / "elsewhere")
    assert f"cannot store {WEIGHTS} of {REPO}" in refusal()
    assert not (tmp_path / "elsewhere").exists()


def test_row_93_two_processes_at_once_download_each_file_once(tmp_path):
    with HubServer({REPO: tiny_model()}) as server:
        server.add_fault("*", Fault(delay=0.3), times=20)
        both = [asking(REPO, home=tmp_path, url=server.url) for _ in range(2)]
        (one, two) = (finish(process) for process in both)
        assert one[:3] == two[:3] and one[0] == 0
        assert content(Path(one[1])) == tiny_model()
        assert {name: server.count("GET", name) for name in tiny_model()} == dict.fromkeys(
            tiny_model(), 1
        )
