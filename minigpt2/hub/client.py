"""The Hub's client as this program uses it: its settings, address, proxy and token."""

import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..errors import InputError
from ..system.messages import without_secrets

logger = logging.getLogger(__name__)
CLIENT_LOG = "huggingface_hub.utils.logging"
TELEMETRY = "HF_HUB_DISABLE_TELEMETRY"  # of the client: a question of its own, and torch's version
TOKEN = re.compile(r"[!-~]*")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http", "https", "socks5", "socks5h")  # what the client can talk to


class UnreachableError(InputError):
    """Nobody answered, or nobody who is a Hub: a cached copy may serve instead."""


def prepare_client() -> None:
    """Import the client, and refuse an endpoint that cannot be one."""
    given = os.environ.get(TELEMETRY)
    # read once, at the first import: the rest of the process keeps the environment that it had
    os.environ.setdefault(TELEMETRY, "1")
    try:
        from huggingface_hub import constants
    except ValueError as problem:
        raise InputError(
            f"huggingface_hub refuses an HF_ variable: {problem}; set it anew or unset it"
        ) from problem
    finally:
        if given is None:
            os.environ.pop(TELEMETRY, None)
    if not _is_address(constants.ENDPOINT, ("http", "https")):
        example = "an address such as https://huggingface.co"
        raise InputError(f"HF_ENDPOINT is {shown_endpoint()!r}, expected {example}")


def prepare_requests() -> None:
    """Import what asks; UnreachableError for a proxy that its HTTP library would end on."""
    if CLIENT_LOG not in sys.modules:
        import_module(CLIENT_LOG)
        # its notices, some of them a server's words, go where all go
        logging.getLogger("huggingface_hub").handlers.clear()
    for kind, address in getproxies().items():
        name = f"{kind.upper()}_PROXY"
        if kind not in ("http", "https", "all"):
            continue
        address = address if "://" in address else f"http://{address}"
        if not _is_address(address, PROXIES):
            example = "an address such as http://proxy.example:3128 (set it anew or unset it)"
            raise UnreachableError(f"{name} is {without_secrets(address)!r}, expected {example}")
        if address.startswith("socks") and find_spec("socksio") is None:
            raise UnreachableError(
                f"{name} is a SOCKS proxy, which needs a package that is not installed "
                "(pip install socksio, or unset it)"
            )


def _is_address(address: str, schemes: Sequence[str]) -> bool:
    """Whether an address names a host, and a port if it does, that can be asked."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return False
    labels = host.rstrip(".").split(".")
    return (
        parts.scheme in schemes
        and address.isprintable()
        and re.fullmatch(r"[\w.:%-]+", host) is not None
        and all(0 < len(label) < 64 for label in labels)
    )


def hub_cache() -> Path:
    """The folder in which all programs that use the client keep what they downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether the user wants nobody to be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def shown_endpoint() -> str:
    """The address of the Hub as a message may show it."""
    from huggingface_hub import constants

    return without_secrets(constants.ENDPOINT)


def user_token(*, public: bool) -> str | bool:
    """The user's token if needed and safe to send, otherwise False; no message ever shows it."""
    from huggingface_hub import constants, get_token

    if not TOKEN.fullmatch(os.environ.get("HF_TOKEN", "").strip()):
        raise InputError("HF_TOKEN has a blank, line break or foreign letter in it: set it anew")
    if public or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN or not (token := get_token()):
        return False
    if not TOKEN.fullmatch(token):
        raise InputError(f"{constants.HF_TOKEN_PATH} holds no valid token: run `hf auth login`")
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme == "https" or endpoint.hostname in LOOPBACK:
        return token
    logger.warning("%s is not https: your token is not sent there", shown_endpoint())
    return False
