"""GPT-2 from scratch, to be read and to be used.

The names below are loaded when they are first used, so that `import minigpt2` alone costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import KVCache
    from .decoding.drafters import ModelDrafter, NGramDrafter
    from .decoding.ready import load
    from .decoding.text import Alternative, Completion, Piece, complete, stream, stream_text
    from .errors import InputError, NotFoundError, OptionError
    from .evaluation.score import Scores, score
    from .finetuning.finetune import finetune
    from .finetuning.run import Run
    from .generate import generate
    from .lora import LoRAConfig, LoRALinear, add_lora, load_adapter, save_adapter
    from .model import GPT2, PRESETS, GPT2Config
    from .runs.record import Metrics, Sample
    from .sampling import Drafter, Guess, SamplingConfig
    from .tokenizer import Tokenizer
    from .training.options import TrainConfig

__version__ = "0.1.0"
__all__ = [
    "GPT2",
    "PRESETS",
    "Alternative",
    "Completion",
    "Drafter",
    "GPT2Config",
    "Guess",
    "InputError",
    "KVCache",
    "LoRAConfig",
    "LoRALinear",
    "Metrics",
    "ModelDrafter",
    "NGramDrafter",
    "NotFoundError",
    "OptionError",
    "Piece",
    "Run",
    "Sample",
    "SamplingConfig",
    "Scores",
    "Tokenizer",
    "TrainConfig",
    "add_lora",
    "complete",
    "finetune",
    "generate",
    "load",
    "load_adapter",
    "save_adapter",
    "score",
    "stream",
    "stream_text",
]

_HOMES = {
    "KVCache": "cache",
    **dict.fromkeys(("InputError", "NotFoundError", "OptionError"), "errors"),
    **dict.fromkeys(("ModelDrafter", "NGramDrafter"), "decoding.drafters"),
    "load": "decoding.ready",
    **dict.fromkeys(
        ("Alternative", "Completion", "Piece", "complete", "stream", "stream_text"), "decoding.text"
    ),
    **dict.fromkeys(("Scores", "score"), "evaluation.score"),
    "finetune": "finetuning.finetune",
    "Run": "finetuning.run",
    "generate": "generate",
    **dict.fromkeys(
        ("LoRAConfig", "LoRALinear", "add_lora", "load_adapter", "save_adapter"), "lora"
    ),
    **dict.fromkeys(("PRESETS", "GPT2", "GPT2Config"), "model"),
    **dict.fromkeys(("Metrics", "Sample"), "runs.record"),
    **dict.fromkeys(("Drafter", "Guess", "SamplingConfig"), "sampling"),
    "TrainConfig": "training.options",
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
