"""What of a model is not as `model.py` reads, and was not said to be otherwise."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn

from minigpt2.equivalences import put_by_hand, ways_of
from minigpt2.evaluation.scorer import Scorer
from minigpt2.model import GPT2, GPT2Config

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARTLY = ("FSDP",)  # ways that wrap a module and leave those inside as they are


def unregistered(model: GPT2, config: GPT2Config) -> list[str]:
    """Submodules of another class than a plain model's, methods and hooks that were put on them,
    settings with other values and parameters that lie otherwise in memory, unless `swap` left a
    note on them, and what is not what the note says; in words.
    """
    with torch.device("meta"):
        plain = dict(GPT2(config).named_modules())
    notes = ways_of(model)
    found = [f"{path} is not what was put there" for path in put_by_hand(model)]
    for name, module in model.named_modules():
        if _inside(name, notes):
            continue
        if name not in plain:
            found.append(f"{name} is no part of a plain model")
            continue
        if type(module) is not type(plain[name]) and name not in notes:
            found.append(f"{name or 'the model'} is a {type(module).__name__}")
        found += [
            f"{name}.{part}".lstrip(".") + " was put there"
            for part in _added(module, plain[name], notes)
            if f"{name}.{part}".lstrip(".") not in notes
        ]
    there = {name for name, _ in model.named_modules()}
    found += [f"{name} is gone" for name in plain if name not in there and not _inside(name, notes)]
    return found


def unregistered_wrapper(scorer: nn.Module) -> list[str]:
    """What is around a model that is trained, but for the Scorer that belongs there."""
    noted = type(scorer) is Scorer or ways_of(scorer).get("")
    return [] if noted else [f"the scorer is a {type(scorer).__name__}"]


@contextlib.contextmanager
def every_model() -> Iterator[list[GPT2]]:
    """All models that are made inside; nobody lets go of them."""
    made, init = [], GPT2.__init__

    def remembered(self, *args, **options):
        init(self, *args, **options)
        made.append(self)

    GPT2.__init__ = remembered
    try:
        yield made
    finally:
        GPT2.__init__ = init


def _inside(name: str, notes: dict[str, tuple[str, ...]]) -> bool:
    """Whether a module, or one that it is in, was replaced as a whole."""
    whole = [path for path, ways in notes.items() if path and ways[-1] not in PARTLY]
    return any(name == path or name.startswith(f"{path}.") for path in whole)


def _is_setting(own: object, plain: object) -> bool:
    """Whether a plain value, such as a number, differs."""
    kinds = (bool, int, float, str, tuple, type(None))
    return isinstance(own, kinds) and isinstance(plain, kinds) and own != plain


def _added(module: nn.Module, plain: nn.Module, notes: dict[str, tuple[str, ...]]) -> list[str]:
    own, theirs = vars(module), vars(plain)
    added = [key for key, value in own.items() if callable(value) and theirs.get(key) is not value]
    sharded = any(ways[-1] in PARTLY for ways in notes.values())
    settings = (
        theirs.keys() if sharded else {**theirs, **own}.keys()
    )  # FSDP leaves marks of its own
    added += [
        key for key in settings if key != "training" and _is_setting(own.get(key), theirs.get(key))
    ]
    if not sharded:
        added += [hooks for hooks in HOOKS if own[hooks]]
        added += [
            key
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.stride() != plain.get_parameter(key).stride()
        ]
    return added
