"""GPT-2 from scratch, to be read and to be used.

The names below are loaded when they are first used, so that `import minigpt2` alone costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import InputError, NotFoundError
    from .generate import complete, generate, stream_text
    from .loading import load
    from .model import GPT2, PRESETS, GPT2Config
    from .options import TrainConfig
    from .sampling import SamplingConfig
    from .tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "GPT2",
    "PRESETS",
    "GPT2Config",
    "InputError",
    "NotFoundError",
    "SamplingConfig",
    "Tokenizer",
    "TrainConfig",
    "complete",
    "generate",
    "load",
    "stream_text",
]

_HOMES = {
    "InputError": "errors",
    "NotFoundError": "errors",
    "complete": "generate",
    "generate": "generate",
    "stream_text": "generate",
    "load": "loading",
    "PRESETS": "model",
    "GPT2": "model",
    "GPT2Config": "model",
    "SamplingConfig": "sampling",
    "TrainConfig": "options",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _Package(ModuleType):
    """Keeps `minigpt2.generate` the function: importing the submodule of that name would put the
    module there.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "generate" and isinstance(value, ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
