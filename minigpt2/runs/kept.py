"""Where a run keeps what was only in memory when it began: texts, and a model with its tokenizer.

The run's records name these by {out}, so that a run folder that was moved is still whole. Imports
nothing heavy.
"""

from pathlib import Path

TEXTS, BASE = "texts.jsonl", "base"  # in the run folder
OUT = "{out}"  # the run folder, in its records


def named(path: str, folder: Path) -> str:
    """A path as the records of the run in this folder name it."""
    return f"{OUT}/{Path(path).name}" if Path(path) in (folder / TEXTS, folder / BASE) else path


def found(path: str, folder: Path) -> str:
    """The path that the records of the run in this folder name so; the inverse of `named`."""
    return (
        str(folder / path[len(OUT) + 1 :]) if path in (f"{OUT}/{TEXTS}", f"{OUT}/{BASE}") else path
    )
