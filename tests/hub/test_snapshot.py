"""The Hub's cache: what is there and intact is used, the rest is not believed."""

import json
import logging
import os
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

import hub_fixtures
from hub_fixtures import REPO, WEIGHTS, content, files_below, refusal, tiny_model, warnings
from hub_server import flip_bit
from minigpt2.hub import snapshot
from minigpt2.hub.folders import model_folder

cache, serve, pinned = hub_fixtures.cache, hub_fixtures.serve, hub_fixtures.pinned


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
    monkeypatch.setattr(snapshot, "digest_of", lambda *_: pytest.fail("read again"))
    model_folder(REPO, server.commits[REPO])


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


def test_a_cache_for_reading_only_serves_what_it_holds(serve, monkeypatch, cache, caplog):
    server = serve()
    for name in tiny_model():
        hf_hub_download(REPO, name)

    def refuse(path: Path, _: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("write_json", "write_text"):
        monkeypatch.setattr(snapshot.files, name, refuse)
    caplog.set_level(logging.INFO, logger="minigpt2.hub")
    assert content(model_folder(REPO)) == tiny_model()
    assert content(model_folder(REPO, server.commits[REPO])) == tiny_model()
    assert "checked at every start" in warnings(caplog)[0]


@pytest.mark.parametrize("spoiled", [None, [], [3001], [3001, 5, 7], ["3001", 5], [3001, 5.0]])
def test_a_file_whose_record_is_spoiled_is_read_again(serve, cache, monkeypatch, spoiled):
    server = serve()
    folder = model_folder(REPO)
    (record,) = cache.rglob(".minigpt2/*.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {WEIGHTS: spoiled}))
    commit = server.commits[REPO]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(REPO, commit) == folder
    assert json.loads(record.read_text())[WEIGHTS][0] == 3001

    record.write_text(json.dumps(json.loads(record.read_text()) | {WEIGHTS: spoiled}))
    (folder / WEIGHTS).write_bytes(flip_bit(tiny_model()[WEIGHTS]))
    assert "is not in the cache" in refusal(REPO, commit)
