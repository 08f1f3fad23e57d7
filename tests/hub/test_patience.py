"""A Hub that does not answer well is asked again as long as that helps, and then it is said why."""

import importlib

import pytest

import hub_fixtures
from hub_fixtures import REPO, WEIGHTS, content, refusal, tiny_model, warnings
from hub_server import Fault
from minigpt2.errors import InputError
from minigpt2.hub import patience
from minigpt2.hub.folders import model_folder

cache, serve, waits = hub_fixtures.cache, hub_fixtures.serve, hub_fixtures.waits


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
@pytest.mark.parametrize("first", [True, False])
def test_the_http_librarys_error_is_found_wherever_it_stands_among_the_bases(library, first):
    base = type("HTTPError", (Exception,), {"__module__": f"{library}._exceptions"})
    status = type("HTTPStatusError", (base,), {"__module__": f"{library}._exceptions"})
    other = type("HTTPError", (OSError,), {"__module__": "requests.exceptions"})
    bases = (status, other) if first else (other, status)
    own = type("HTTPError", bases, {"__module__": "huggingface_hub.errors"})
    assert patience._http_base(own) is base


def test_the_http_librarys_error_covers_what_the_library_raises():
    base = patience.http_error()
    library = importlib.import_module(base.__module__.partition(".")[0])
    for name in ("ConnectError", "ReadTimeout", "TooManyRedirects", "HTTPStatusError"):
        assert issubclass(getattr(library, name), base)
    assert not issubclass(OSError, base) and not issubclass(base, InputError)


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


def test_row_85_a_reset_of_a_question_is_asked_again(serve, waits):
    server = serve()
    server.add_fault("config.json", Fault(ending="reset"), method="HEAD", times=2)
    model_folder(REPO)
    assert waits == [1, 2]


def test_a_redirect_that_leads_in_circles_is_an_error_like_others(serve, waits):
    server = serve()
    circle = {"Location": f"/{REPO}/resolve/main/config.json"}
    server.add_fault("config.json", Fault(status=302, headers=circle), method="*")
    assert "TooManyRedirects" in refusal()
