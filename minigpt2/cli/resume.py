"""The command line of a run that is resumed: what its folder keeps, as words beside those typed.

Knows flags, nothing of weights and checkpoints: a mistyped flag is answered before torch is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arguments import flag
from ..finetuning.recorded import recorded
from ..training.options import DEFAULT_MODEL, default_out
from .flags import Given


def recorded_words(given: Given) -> list[str]:
    """The words of a command line that the run to be resumed was started with, but for what is
    given now. Raises what `recorded` raises.
    """
    if given.get("resume", ("", ()))[0] != "--resume":
        return []
    folder = _folder(given)
    if folder is None or ("data" in given and not folder.is_dir()):
        return []  # what is wrong is said where all flags are seen
    return _words(recorded(folder, given))


def _folder(given: Given) -> Path | None:
    """The run folder that the given flags name, if they do."""
    if "out" in given:
        return Path(given["out"][1][0])
    if not given.get("data", ("", ()))[1]:
        return None
    sources = [given[name][1][0] for name in ("preset", "model") if name in given]
    return Path(default_out(given["data"][1][0], [*sources, DEFAULT_MODEL][0]))


def _words(values: Mapping[str, Any]) -> list[str]:
    """Fields and their values as flags are typed."""
    words = []
    for name, value in ((flag(name), value) for name, value in values.items()):
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            # what begins with a dash would be taken for a flag
            paths = [f"./{path}" if path[:1] == "-" != path else path for path in map(str, value)]
            words += [name, *(value if name == "--add-tokens" else paths)] if value else []
        elif value is not None:
            words.append(f"{name}={value}")
    return words
