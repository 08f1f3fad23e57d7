"""Text becomes token files."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .prepared import Corpus, prepare

__all__ = ["Corpus", "prepare"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import prepared  # not before: flags are read without NumPy

    return getattr(prepared, name)
