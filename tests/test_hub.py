"""The Hub's client against a Hub on the loopback interface: what is fetched, refused and said."""

import hashlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import (
    close_session,
    constants,
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
)

from hub_server import Fault, HubServer, flip_bit, portal
from minigpt2 import hub
from minigpt2.errors import InputError, NotFoundError
from minigpt2.hub import model_folder

ROOT = Path(__file__).parent.parent
REPO = "ada/tiny"
WEIGHTS = "model.safetensors"
NO_SIZE = {"X-Linked-Size": None, "Content-Length": None}

PROBE = """
import logging, sys, time
logging.basicConfig(format="%(message)s")
from minigpt2.errors import InputError
from minigpt2.hub import model_folder
began = time.monotonic()
try:
    print(model_folder(*sys.argv[1:]))
except InputError as problem:
    print("error:", problem, file=sys.stderr)
    sys.exit(2)
finally:
    print(f"seconds: {time.monotonic() - began}", file=sys.stderr)
"""


def tiny_model(weights: int = 3001) -> dict[str, bytes]:
    """A model folder's files by name, with nonsense for weights."""
    return {
        "config.json": b'{"model_type": "gpt2"}',
        WEIGHTS: random.Random(weights).randbytes(weights),
        "vocab.json": b'{"a": 0}',
        "merges.txt": b"#version: 0.2\n",
        "tokenizer_config.json": b"{}",
    }


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a client that uses it as if it had been started with it."""
    folder = tmp_path / "home" / "hub"
    for name in ("HF_TOKEN", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET"):
        monkeypatch.setenv(name, "1")
        monkeypatch.setattr(constants, name, True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    yield folder
    close_session()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def serve(cache, monkeypatch):
    """Start a Hub and have the client use it."""
    servers = []

    def start(repos=None, **options) -> HubServer:
        server = HubServer(repos or {REPO: tiny_model()}, **options)
        servers.append(server.__enter__())
        use_endpoint(monkeypatch, server.url)
        return server

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def waits(monkeypatch):
    """The waits before repeated tries, which are not waited for."""
    seconds = []
    monkeypatch.setattr(hub.time, "sleep", seconds.append)
    return seconds


def client(*arguments: str, home: Path, url: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that asks for a model folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE, *arguments],
        env={
            **clean,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(home),
            "HF_ENDPOINT": url,
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str, float]:
    """(exit code, folder, messages, seconds that model_folder took)"""
    out, err = process.communicate(timeout=60)
    messages, _, seconds = err.rpartition("seconds: ")
    return process.returncode, out.strip(), messages.strip(), float(seconds)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files_below(folder: Path, pattern: str = "*") -> list[Path]:
    return [path for path in folder.rglob(pattern) if path.is_file()]


def refusal(source: str = REPO, revision: str | None = None) -> str:
    """The one line that model_folder raises."""
    with pytest.raises(InputError) as caught:
        model_folder(source, revision)
    message = str(caught.value)
    assert "\n" not in message
    return message


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "minigpt2.hub"]


# Names, folders, pins


def test_importing_the_module_imports_neither_client_nor_torch():
    code = (
        "import sys, minigpt2.hub; print(sorted({'huggingface_hub', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


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


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a..b", "", "a b", "x\n"])
def test_a_revision_must_look_like_one(cache, revision):
    assert "revision" in refusal(REPO, revision)


def test_pins_are_commits_and_digests_of_the_five_public_models():
    assert set(hub.SHORT_NAMES) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
    for commit, config, weights in hub.PINS.values():
        assert re.fullmatch(
            r"[0-9a-f]{40} [0-9a-f]{64} [0-9a-f]{64}", f"{commit} {config} {weights}"
        )
    everything = [value for pin in hub.PINS.values() for value in pin]
    assert len(set(everything)) == len(everything)


def test_an_endpoint_that_is_no_address_is_refused(cache, monkeypatch):
    for endpoint in ("", "hf.co", "ftp://hf.co", "http://"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert "HF_ENDPOINT" in refusal()


# What a download gives


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


def test_a_branch_costs_one_request_while_it_has_not_moved(serve):
    server = serve()
    first = model_folder(REPO)
    asked = len(server.requests)
    assert model_folder(REPO) == first
    assert len(server.requests) == asked + 1


def test_a_branch_that_moved_is_fetched_anew(serve):
    server = serve()
    first = model_folder(REPO)
    server.repos[REPO][WEIGHTS] = b"trained further"
    server.commits[REPO] = "1" * 40
    second = model_folder(REPO)
    assert (second / WEIGHTS).read_bytes() == b"trained further"
    assert (first / WEIGHTS).read_bytes() == tiny_model()[WEIGHTS]
    assert server.count("GET", "vocab.json") == 1  # unchanged files are shared


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


def test_large_files_come_from_another_origin_which_never_sees_the_token(serve, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server = serve(cdn=True)
    assert content(model_folder(REPO)) == tiny_model()
    sent = {
        (request.path.startswith("/cdn/"), request.method, request.headers.get("authorization"))
        for request in server.requests
    }
    mine = "Bearer hf_secret"
    assert sent == {(False, "HEAD", mine), (False, "GET", mine), (True, "GET", None)}


def test_a_repository_that_was_renamed_is_followed(serve):
    server = serve()
    commit = server.commits[REPO]
    for name in ("config.json", WEIGHTS, *hub.EXTRAS):
        moved = Fault(status=307, headers={"Location": f"/{REPO}/resolve/{commit}/{name}"})
        for method in ("HEAD", "GET"):
            server.add_fault(name, moved, method=method, times=1)
    assert content(model_folder("tiny", commit)) == tiny_model()


# Pinned models


@pytest.fixture
def pinned(serve, monkeypatch):
    """gpt2 and its twin as tiny models, pinned by their digests."""
    files, commit = tiny_model(), "6" * 40
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    names = ("gpt2", "openai-community/gpt2")
    monkeypatch.setitem(hub.PINS, names[1], (commit, digests["config.json"], digests[WEIGHTS]))
    monkeypatch.setattr(hub, "TOKENIZER_DIGESTS", {"vocab.json": digests["vocab.json"]})
    return serve({name: dict(files) for name in names}, commits=dict.fromkeys(names, commit))


def test_a_pinned_model_is_asked_for_by_its_commit_without_token_and_only_once(pinned, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = model_folder("gpt2")
    assert folder.name == "6" * 40
    assert all(f"/resolve/{folder.name}/" in request.path for request in pinned.requests)
    assert not any("authorization" in request.headers for request in pinned.requests)
    asked = len(pinned.requests)
    assert model_folder("gpt2") == model_folder("openai-community/gpt2") == folder
    assert len(pinned.requests) == asked


def test_only_the_pinned_commit_is_held_to_the_pin_by_whatever_name(pinned):
    pinned.repos["gpt2"][WEIGHTS] = b"other"
    assert "expected" in refusal("gpt2", "main")
    pinned.commits["gpt2"] = "7" * 40
    assert (model_folder("gpt2", "main") / WEIGHTS).read_bytes() == b"other"


@pytest.mark.parametrize("name", [WEIGHTS, "vocab.json"])
def test_a_hub_with_other_bytes_than_the_pinned_ones_is_refused(pinned, cache, name):
    """Also where the Hub itself vouches for them: for small files it can name only a SHA-1."""
    pinned.repos["gpt2"][name] += b"!"
    assert re.search(r"[0-9a-f]{64}, expected [0-9a-f]{64}", refusal("gpt2"))
    assert not (cache / "models--gpt2" / "snapshots" / ("6" * 40) / name).exists()
    assert pinned.count("GET", WEIGHTS) == (name != WEIGHTS), "known before the download"


def test_a_cache_filled_by_another_program_costs_no_request(pinned):
    for name in tiny_model():
        hf_hub_download("gpt2", name, revision="6" * 40)
    asked = len(pinned.requests)
    model_folder("gpt2")
    assert len(pinned.requests) == asked


def test_a_cache_that_another_program_filled_in_part_is_completed(pinned):
    for name in ("config.json", WEIGHTS):
        hf_hub_download("gpt2", name, revision="6" * 40)
    assert content(model_folder("gpt2")) == tiny_model()
    assert pinned.count("GET", WEIGHTS) == pinned.count("GET", "vocab.json") == 1


def test_a_cache_that_another_program_filled_with_other_bytes_is_not_believed(pinned):
    pinned.repos["gpt2"][WEIGHTS] += b"!"
    for name in tiny_model():
        hf_hub_download("gpt2", name, revision="6" * 40)
    pinned.repos["gpt2"][WEIGHTS] = tiny_model()[WEIGHTS]
    assert content(model_folder("gpt2")) == tiny_model()


# The fault matrix, rows 79 to 94


def test_row_79_offline_and_cached_takes_no_request_and_less_than_a_second(tmp_path):
    with HubServer({REPO: tiny_model()}) as server:
        first = finish(client(REPO, home=tmp_path, url=server.url))
        assert first[0] == 0, first
        paths = {re.sub("/[^/]*$", "", request.path) for request in server.requests}
        assert all("/resolve/" in path for path in paths), "telemetry?"
        commit, asked = server.commits[REPO], len(server.requests)
        again = finish(client(REPO, commit, home=tmp_path, url=server.url))
        assert len(server.requests) == asked
    gone = finish(client(REPO, commit, home=tmp_path, url=server.url))
    for code, folder, messages, seconds in (again, gone):
        assert (code, folder, messages) == (0, first[1], "")
        assert seconds < 1


def test_row_80_no_network_and_not_cached_is_said_within_15_seconds(tmp_path):
    with HubServer({}) as server:
        url = server.url
    code, _, messages, seconds = finish(client("gpt2", home=tmp_path, url=url))
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
        code, _, messages, seconds = finish(client("gpt2", home=tmp_path, url=server.url))
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
        code, _, messages, seconds = finish(client(REPO, **offline))
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
    ("status", "code", "advice"),
    [
        (401, "RepoNotFound", "hf auth login"),
        (401, None, "hf auth login"),
        (403, "GatedRepo", "accept the terms at"),
        (403, None, "accept the terms at"),
    ],
)
def test_row_83_closed_doors_say_how_to_open_them(serve, status, code, advice):
    serve().add_fault("*", Fault(status=status, headers={"X-Error-Code": code}), method="HEAD")
    message = refusal()
    assert advice in message and "hf auth login" in message


def test_row_84_busy_servers_are_asked_again_with_a_line_each(serve, waits, caplog):
    server = serve()
    slow_down = Fault(status=429, headers={"Retry-After": "7"})
    for method in ("HEAD", "GET"):
        server.add_fault(WEIGHTS, slow_down, method=method, times=1)
        server.add_fault(WEIGHTS, Fault(status=503), method=method, times=1)
    server.add_fault("config.json", Fault(status=500), method="HEAD", times=2)
    assert content(model_folder(REPO)) == tiny_model()
    assert waits == [1, 2, 7, 2, 7, 2]
    assert warnings(caplog)[:3] == [
        "asking for config.json of ada/tiny: HTTP 500; again in 1 s (try 2 of 3)",
        "asking for config.json of ada/tiny: HTTP 500; again in 2 s (try 3 of 3)",
        "asking for model.safetensors of ada/tiny: HTTP 429; again in 7 s (try 2 of 3)",
    ]
    assert warnings(caplog)[-1].startswith("downloading model.safetensors of ada/tiny: HTTP 503;")


def test_row_84_a_server_that_stays_busy_or_asks_for_an_hour_is_given_up(serve, waits):
    server = serve()
    server.add_fault(
        "*", Fault(status=429, headers={"Retry-After": "3600"}), method="HEAD", times=1
    )
    assert "HTTP 429" in refusal()
    assert waits == []
    server.add_fault("*", Fault(status=500), method="HEAD")
    assert "HTTP 500" in refusal()
    assert waits == [1, 2]


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


def test_row_85_a_reset_of_a_question_is_asked_again(serve, waits):
    server = serve()
    server.add_fault("config.json", Fault(ending="reset"), method="HEAD", times=2)
    model_folder(REPO)
    assert waits == [1, 2]


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


def test_row_88_behind_a_log_in_page_the_cached_branch_is_used(serve, caplog):
    server = serve()
    folder = model_folder(REPO)
    server.add_fault("*", Fault(headers={"X-Repo-Commit": None}), method="HEAD")
    assert model_folder(REPO) == folder
    assert "is not a Hub" in warnings(caplog)[0]


def test_row_88_a_log_in_page_instead_of_a_file_is_recognised(serve):
    serve().add_fault(WEIGHTS, Fault(change=portal))
    assert "came as an HTML or XML page" in refusal()


@pytest.mark.parametrize("damage", [lambda data: data[:1000], flip_bit, lambda data: b""])
def test_row_89_a_cached_file_that_was_changed_is_fetched_anew(serve, monkeypatch, caplog, damage):
    server = serve()
    folder = model_folder(REPO)
    commit = server.commits[REPO]
    (folder / WEIGHTS).write_bytes(damage(tiny_model()[WEIGHTS]))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is not in the cache" in refusal(REPO, commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert content(model_folder(REPO, commit)) == tiny_model()
    assert server.count("GET", WEIGHTS) == 2 and server.count("GET", "vocab.json") == 1
    assert "is damaged" in warnings(caplog)[0]


def test_row_89_intact_files_are_read_only_once(serve, monkeypatch):
    server = serve()
    model_folder(REPO)
    monkeypatch.setattr(hub, "_digest", lambda *_: pytest.fail("read again"))
    model_folder(REPO, server.commits[REPO])


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
    serve().add_fault("config.json", Fault(headers=headers), method="HEAD")
    assert "expected" in refusal()
    assert files_below(tmp_path) == []


def test_row_90_a_hub_may_not_answer_with_another_commit_than_the_one_asked_for(serve, tmp_path):
    server = serve()
    commit = server.commits[REPO]
    server.add_fault("*", Fault(headers={"X-Repo-Commit": "e" * 40}), method="HEAD")
    assert f"expected {commit}" in refusal(REPO, commit)
    assert files_below(tmp_path) == []


def test_row_90_headers_of_the_download_itself_are_not_believed(serve, tmp_path):
    """A server may answer the question honestly and the download not."""
    server = serve()
    server.add_fault("*", Fault(headers={"ETag": '"../evil"', "X-Repo-Commit": "../evil"}))
    assert content(model_folder(REPO)) == tiny_model()
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x", "C:\\x", "a/b.safetensors", "..", "", 7]
)
def test_row_90_shards_must_be_plain_file_names(serve, tmp_path, name):
    files = tiny_model()
    del files[WEIGHTS]
    index = json.dumps({"weight_map": {"a": "good.safetensors", "b": name}}).encode()
    server = serve(
        {REPO: {**files, "good.safetensors": b"", "model.safetensors.index.json": index}}
    )
    assert "expected a plain file name" in refusal()
    assert server.count("GET", "good.safetensors") == 0


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
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: nearly_full)
    message = refusal()
    assert "3,001 bytes to come, 3,000 free" in message and "HF_HOME" in message
    assert server.count("GET", WEIGHTS) == 0
    assert not files_below(cache, "*.incomplete")


def test_row_92_a_killed_download_is_continued_by_the_next_run(tmp_path):
    files = tiny_model(3_000_017)
    with HubServer({REPO: files}) as server:
        server.add_fault(WEIGHTS, Fault(stop_after=2_000_000, ending="stall"), times=1)
        process = client(REPO, home=tmp_path, url=server.url, HF_HUB_DOWNLOAD_TIMEOUT="60")
        deadline = time.monotonic() + 20
        while sum(p.stat().st_size for p in tmp_path.rglob("*.incomplete")) < 1_000_000:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        code, folder, messages, _ = finish(client(REPO, home=tmp_path, url=server.url))
        assert (code, messages) == (0, "")
        assert content(Path(folder)) == files
        last = [r for r in server.requests if r.method == "GET" and r.path.endswith(WEIGHTS)][-1]
        assert int(last.headers["range"][6:-1]) >= 1_000_000
    assert files_below(tmp_path, "*.incomplete") == []


def test_row_92_what_older_downloads_left_is_removed_and_what_is_young_stays(serve, cache, caplog):
    caplog.set_level(logging.INFO, logger="minigpt2.hub")
    serve()
    blobs = cache / "models--ada--tiny" / "blobs"
    blobs.mkdir(parents=True)
    old, young = blobs / ("a" * 40 + ".1234abcd.incomplete"), blobs / ("b" * 64 + ".incomplete")
    for path in (old, young):
        path.write_bytes(b"part")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    model_folder(REPO)
    assert files_below(cache, "*.incomplete") == [young]
    assert warnings(caplog) == [f"removed {old}, left of a download that was broken off"]


def test_row_92_a_partial_file_that_is_wrong_or_too_long_does_no_harm(serve, cache):
    for left, size in ((b"wrong", 3001), (bytes(10_000), 3002)):
        files = tiny_model(size)
        server = serve({REPO: files})
        blobs = cache / "models--ada--tiny" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / f"{hashlib.sha256(files[WEIGHTS]).hexdigest()}.incomplete").write_bytes(left)
        assert content(model_folder(REPO, server.commits[REPO])) == files


def test_row_93_two_processes_at_once_download_each_file_once(tmp_path):
    with HubServer({REPO: tiny_model()}) as server:
        server.add_fault("*", Fault(delay=0.3), times=20)
        both = [client(REPO, home=tmp_path, url=server.url) for _ in range(2)]
        (one, two) = (finish(process) for process in both)
        assert one[:3] == two[:3] and one[0] == 0
        assert content(Path(one[1])) == tiny_model()
        assert {name: server.count("GET", name) for name in tiny_model()} == dict.fromkeys(
            tiny_model(), 1
        )


@pytest.mark.parametrize("token", ["hf_se\ncret", "hf_sécret", "hf se cret", "\udce9cret"])
@pytest.mark.parametrize("source", [REPO, "gpt2"])
def test_row_94_a_malformed_token_is_refused_and_not_shown(serve, monkeypatch, token, source):
    server = serve()
    monkeypatch.setitem(os.environ, "HF_TOKEN", token)
    message = refusal(source)
    assert message.startswith("HF_TOKEN") and "cret" not in message
    assert server.requests == []


def test_row_94_a_malformed_token_file_is_refused_and_not_shown(serve):
    serve()
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_sécret", encoding="utf-8")
    message = refusal()
    assert "hf auth login" in message and "cret" not in message


def test_a_token_is_not_sent_over_plain_http_to_another_machine(serve, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    server = serve()
    use_endpoint(monkeypatch, server.url.replace("127.0.0.1", "0.0.0.0"))
    model_folder(REPO)
    assert server.requests and not any("authorization" in r.headers for r in server.requests)
    assert "not https" in warnings(caplog)[0] and "secret" not in caplog.text


def test_a_redirect_that_leads_in_circles_is_an_error_like_others(serve, waits):
    server = serve()
    circle = {"Location": f"/{REPO}/resolve/main/config.json"}
    server.add_fault("config.json", Fault(status=302, headers=circle), method="*")
    assert "TooManyRedirects" in refusal()


def test_a_cache_for_reading_only_serves_what_it_holds(serve, monkeypatch, cache, caplog):
    server = serve()
    for name in tiny_model():
        hf_hub_download(REPO, name)

    def refuse(path: Path, _: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("write_json", "write_text"):
        monkeypatch.setattr(hub.files, name, refuse)
    caplog.set_level(logging.INFO, logger="minigpt2.hub")
    assert content(model_folder(REPO)) == tiny_model()
    assert content(model_folder(REPO, server.commits[REPO])) == tiny_model()
    assert "checked at every start" in warnings(caplog)[0]


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("MINIGPT2_NETWORK_TESTS") != "1",
    reason="needs the real Hub and 550 MB: set MINIGPT2_NETWORK_TESTS=1",
)
def test_the_real_gpt2_is_the_pinned_one_and_asked_for_once(tmp_path):
    environment = {"home": tmp_path, "url": "https://huggingface.co"}
    code, folder, messages, _ = finish(client("gpt2", **environment))
    assert code == 0, messages
    commit, _, weights = hub.PINS["openai-community/gpt2"]
    assert Path(folder).name == commit
    assert hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest() == weights
    with HubServer({}) as server:
        again = finish(client("gpt2", home=tmp_path, url=server.url))
        assert again[:2] == (0, folder) and not server.requests
