"""Which model the adapters in a folder lie on: found by name, without its weights being read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from ..arguments import shown
from ..errors import InputError
from ..hub.folders import model_folder
from ..system.files import read_json

CONFIG, MODEL_WEIGHTS = "adapter_config.json", "model.safetensors"
MOST_ADAPTERS = 9  # that may lie on one another
ADVICE = "write the Hub id or the full path of its base into base_model_name_or_path"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model."""
    return (folder / CONFIG).is_file() and not (folder / MODEL_WEIGHTS).exists()


def base_name(folder: Path) -> str:
    """The Hub id or folder that the adapters in a folder name as their base; InputError where they
    name none.
    """
    return _named(folder)[0]


def base_folder(folder: Path, *, with_weights: bool = True) -> Path:
    """The folder of the model that a folder's adapters were trained on, downloaded if need be, with
    or without its weights. It may hold adapters itself, which lie on another base.

    Raises InputError when the adapter names none, or one that is not there, and for adapters that
    lie on no model but on each other, or on more than MOST_ADAPTERS.
    """
    found = _named_base(folder, with_weights=with_weights)
    passed, here = [folder], found
    while is_adapter(here):
        if len(passed) > MOST_ADAPTERS or any(here.resolve() == f.resolve() for f in passed):
            lying = ", ".join(f"{a} on {b}" for a, b in pairwise([*passed[-2:], here]))
            raise InputError(f"these adapters never come to a model: {lying}; {ADVICE}")
        passed.append(here)
        here = _named_base(here, with_weights=False)
    return found


def _named_base(folder: Path, *, with_weights: bool) -> Path:
    """The folder that the adapters in a folder name as their base, whatever it holds."""
    path, (base, revision) = folder / CONFIG, _named(folder)
    try:
        found = model_folder(base, revision, with_weights=with_weights)
    except (InputError, OSError) as problem:  # of a name that is too long for a path
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(f"{path} names the base {shown(base)}: {reason}; {ADVICE}") from problem
    if is_adapter(found) and found.resolve() == folder.resolve():
        raise InputError(f"{path} names its own folder {found} as the base: {ADVICE}")
    return found


def _named(folder: Path) -> tuple[str, str | None]:
    """The base that adapters name, and its revision."""
    values = read_json(folder / CONFIG)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not base or not isinstance(base, str) or not isinstance(revision, (str, type(None))):
        raise InputError(f"{folder / CONFIG} names no base model: {ADVICE}")
    return base, revision
