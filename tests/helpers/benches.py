"""The benchmarks as modules: they are scripts, which no package has."""

import importlib.util
import sys
from collections.abc import Iterator
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
