"""A Hub on the loopback interface that the client uses, as fixtures."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from hub_server import HubServer
from minigpt2.errors import InputError
from minigpt2.hub import patience, pins
from minigpt2.hub.folders import model_folder

ROOT = Path(__file__).parents[2]
REPO = "ada/tiny"
WEIGHTS = "model.safetensors"
PROBE = """
import logging, sys, time
logging.basicConfig(format="%(message)s")
from minigpt2.errors import InputError
from minigpt2.hub.folders import model_folder
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
def pinned(serve, monkeypatch):
    """gpt2 and its twin as tiny models, pinned by their digests."""
    files, commit = tiny_model(), "6" * 40
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    names = ("gpt2", "openai-community/gpt2")
    model = pins.PublicModel(*names, commit, digests["config.json"], digests[WEIGHTS], True)
    monkeypatch.setattr(pins, "PUBLIC_MODELS", (model, *pins.PUBLIC_MODELS[1:]))
    monkeypatch.setattr(pins, "TOKENIZER_DIGESTS", {"vocab.json": digests["vocab.json"]})
    return serve({name: dict(files) for name in names}, commits=dict.fromkeys(names, commit))


@pytest.fixture
def waits(monkeypatch):
    """The waits before repeated tries, which are not waited for."""
    seconds = []
    monkeypatch.setattr(patience.time, "sleep", seconds.append)
    return seconds


def files_below(folder: Path, pattern: str = "*") -> list[Path]:
    return [path for path in folder.rglob(pattern) if path.is_file()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("minigpt2.hub.")]


def asking(*arguments: str, home: Path, url: str, **environment: str) -> subprocess.Popen[str]:
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


def refusal(source: str = REPO, revision: str | None = None) -> str:
    """The one line that model_folder raises."""
    with pytest.raises(InputError) as caught:
        model_folder(source, revision)
    message = str(caught.value)
    assert "\n" not in message
    return message
