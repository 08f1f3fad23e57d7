"""The Hub's client: its settings, and that no token or password goes or shows elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import hub_fixtures
from hub_fixtures import REPO, ROOT, content, refusal, tiny_model, use_endpoint, warnings
from hub_server import Fault, HubServer
from minigpt2.hub import client
from minigpt2.hub.folders import model_folder

cache, serve, waits = hub_fixtures.cache, hub_fixtures.serve, hub_fixtures.waits


SETTINGS = """
import os
before = dict(os.environ)
from minigpt2.hub.client import prepare_client
prepare_client()
from huggingface_hub import constants
print(os.environ == before, constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_DISABLE_XET)
"""


SECRET = "hunter2"


USER = f"me:{SECRET}@"


def everything_said(caplog: pytest.LogCaptureFixture, message: str) -> str:
    return "\n".join([message, *warnings(caplog)])


def test_importing_the_module_imports_neither_client_nor_torch():
    code = "import sys, minigpt2.hub.folders; "
    code += "print(sorted({'huggingface_hub', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_endpoint_that_is_no_address_is_refused(cache, monkeypatch):
    for endpoint in ("", "hf.co", "ftp://hf.co", "http://", "http://a:b", "http://a:70000", "http://a..b",
                     "http://a/\x1b", "http://[::1", "http://me:pa/ss@a"):  # fmt: skip
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert "HF_ENDPOINT" in refusal()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=401),
        Fault(status=403),
        Fault(status=404, headers={"X-Error-Code": "RepoNotFound"}),
        Fault(status=404, headers={"X-Error-Code": "RevisionNotFound"}),
        Fault(status=418),
        Fault(status=503),
        Fault(headers={"ETag": '"x"'}),
        Fault(headers={"X-Repo-Commit": "x"}),
        Fault(headers={"X-Repo-Commit": None}),
        Fault(ending="reset"),
    ],
    ids=str,
)
def test_a_password_in_the_endpoint_is_used_and_never_shown(
    serve, waits, monkeypatch, caplog, fault
):
    server = serve()
    use_endpoint(monkeypatch, server.url.replace("//", f"//{USER}"))
    server.add_fault("config.json", fault, method="HEAD")
    said = everything_said(caplog, refusal())
    assert SECRET not in said and "me:" not in said
    assert server.requests[0].headers["authorization"].startswith("Basic ")


def test_a_password_in_the_endpoint_is_not_shown_where_nobody_answers(
    serve, waits, monkeypatch, caplog
):
    for place in ("127.0.0.1:9", "127.0.0.1:x", "a/b", "[::1"):
        use_endpoint(monkeypatch, f"http://{USER}{place}")
        said = everything_said(caplog, refusal())
        assert SECRET not in said and "http://***@" in said


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("proxy", "says"),
    [
        (f"http://{USER}127.0.0.1:9", "cannot get config.json"),
        (f"{USER}127.0.0.1:9", "cannot get config.json"),
        (f"http://{USER}127.0.0.1:9x", "expected an address such as"),
        ("http://me:hun/ter2@127.0.0.1:9", "expected an address such as"),
        (f"xyz://{USER}127.0.0.1:9", "expected an address such as"),
        (f"http://{USER}[::1", "expected an address such as"),
        (f"socks5://{USER}127.0.0.1:9", "is a SOCKS proxy, which needs a package"),
    ],
)
def test_a_password_in_a_proxys_address_is_never_shown(
    cache, waits, monkeypatch, caplog, name, proxy, says
):
    for other in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, proxy)
    monkeypatch.setattr(client, "find_spec", lambda package: None)
    scheme = "https" if "https" in name else "http"
    use_endpoint(monkeypatch, f"{scheme}://hub.example")
    said = everything_said(caplog, refusal())
    assert says in said and "run once with network" in said
    assert not re.search("hun|ter2|me:", said)


def test_a_broken_proxy_is_no_matter_where_nobody_is_asked(serve, monkeypatch):
    server = serve()
    folder = model_folder(REPO)
    monkeypatch.setenv("ALL_PROXY", "socks9://nowhere")
    assert model_folder(REPO, server.commits[REPO]) == folder
    assert model_folder(REPO) == folder  # as it was when it was last asked for


def test_the_clients_own_notices_go_where_all_go(tmp_path):
    """Some are a server's words; the client would write them to stderr by itself."""
    with HubServer({REPO: tiny_model()}) as server:
        warning = Fault(headers={"X-HF-Warning": "x; \x9b2J beware"})
        server.add_fault("*", warning, method="*")
        code = "import sys\nfrom minigpt2.cli.console import run_script\n"
        code += "from minigpt2.decoding.options import SampleOptions\n"
        code += "from minigpt2.hub.folders import model_folder\n"
        code += "run_script(lambda _: print(model_folder(sys.argv[1])) or 0, "
        code += "SampleOptions, ['--prompt', 'x'])"
        done = subprocess.run(
            [sys.executable, "-c", code, REPO],
            env={**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url},
            capture_output=True,
            check=True,
        )
    assert done.stderr.decode().count("beware") == 1 and "\\x9b2J beware" in done.stderr.decode()


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


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "True True False"),
        ({client.TELEMETRY: "0"}, "True False False"),
        ({"HF_HUB_DISABLE_XET": "1"}, "True True True"),
    ],
)
def test_the_client_sends_no_telemetry_and_the_environment_stays_the_callers(environment, expected):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == expected, done.stderr


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
