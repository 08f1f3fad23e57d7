"""Weights are judged by text."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .corpus_score import Score, evaluate

__all__ = ["Score", "evaluate"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import corpus_score  # not before: flags are read without torch

    return getattr(corpus_score, name)
