"""The public models are the ones that were pinned, whoever sends them."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

import hub_fixtures
from hub_fixtures import REPO, WEIGHTS, asking, finish, refusal, tiny_model
from hub_server import HubServer, network
from minigpt2.arguments import Preset
from minigpt2.hub.folders import model_folder
from minigpt2.hub.pins import PUBLIC_MODELS, ids_of, public_model
from minigpt2.model import PRESETS
from minigpt2.tokenizer import Tokenizer

cache, serve, pinned = hub_fixtures.cache, hub_fixtures.serve, hub_fixtures.pinned
IDS = [id for model in PUBLIC_MODELS for id in (model.name, model.hub_id)]


def test_pins_are_commits_and_digests_of_the_five_public_models():
    for model in PUBLIC_MODELS:
        assert re.fullmatch("[0-9a-f]{40}", model.commit)
        assert len(model.digests) == 5
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in model.digests.values())
    own = [v for m in PUBLIC_MODELS for v in (m.commit, m.config_digest, m.weights_digest)]
    assert len(set(own)) == 3 * len(PUBLIC_MODELS) == 15


def test_presets_of_all_lists_are_nano_and_the_public_models():
    names = ("nano", *(model.name for model in PUBLIC_MODELS))
    assert get_args(Preset) == tuple(PRESETS) == names


def test_a_public_model_is_known_by_its_short_and_its_full_id_and_by_no_other():
    for model in PUBLIC_MODELS:
        short, full = model.name, model.hub_id
        assert full.split("/")[1] == short and public_model(short) is public_model(full) is model
        assert (ids_of(short), ids_of(full)) == ((short, full), (full, short))
    for other in (
        "",
        "gpt",
        "GPT2",
        "gpt2-",
        "gpt2-small",
        "someone/gpt2",
        "distilbert/gpt2",
        "nano",
    ):
        assert public_model(other) is None and ids_of(other) == (other,)


@pytest.mark.parametrize("name", IDS)
def test_no_public_model_needs_the_network_for_its_tokenizer(serve, monkeypatch, tmp_path, name):
    server = serve()
    monkeypatch.chdir(tmp_path)
    assert Tokenizer.from_pretrained(name).identity == Tokenizer.gpt2().identity
    assert server.requests == []


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


@dataclass(frozen=True)
class Pinned:
    """A model as the client is asked for it, and what must come."""

    asked: tuple[str, ...]
    url: str
    commit: str
    weights: str  # SHA-256


@pytest.fixture(params=["loopback", pytest.param("real", marks=[*network, pytest.mark.slow])])
def pinned_somewhere(request):
    """The real GPT-2, or a tiny model by its commit."""
    if request.param == "real":
        gpt2 = PUBLIC_MODELS[0]
        yield Pinned(("gpt2",), "https://huggingface.co", gpt2.commit, gpt2.weights_digest)
        return
    with HubServer({REPO: tiny_model()}) as server:
        commit, weights = server.commits[REPO], hashlib.sha256(tiny_model()[WEIGHTS]).hexdigest()
        yield Pinned((REPO, commit), server.url, commit, weights)


def test_a_pinned_model_is_the_one_that_was_meant_and_asked_for_once(pinned_somewhere, tmp_path):
    wanted = pinned_somewhere
    code, folder, messages, _ = finish(asking(*wanted.asked, home=tmp_path, url=wanted.url))
    assert code == 0, messages
    assert Path(folder).name == wanted.commit
    assert hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest() == wanted.weights
    with HubServer({}) as server:
        again = finish(asking(*wanted.asked, home=tmp_path, url=server.url))
        assert again[:2] == (0, folder) and not server.requests
