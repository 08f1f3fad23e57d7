"""The benchmarks as modules: they are scripts, which no package has."""

import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

from scripts import ROOT

FOLDER = ROOT / "benchmarks"


@contextmanager
def loaded(script: str) -> Iterator[ModuleType]:
    """benchmarks/<script>.py, run as a module of another name than any of ours, with the modules
    beside it at hand.
    """
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    name = f"{script}_benchmark"
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def cells_of(table: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a Markdown table, each by the names of its columns."""
    lines = [line for line in table if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return [dict(zip(cells[0], row)) for row in cells[2:]]
