"""The benchmark of the memory forecast: a case that was not run as it says is not measured."""

import importlib.util
import sys

import pytest
import torch

from minigpt2.system.precision import ran_out_of_memory
from scripts import ROOT

PATH = ROOT / "benchmarks" / "memory.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("memory_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["memory_benchmark"]


class ShortOfMemory(torch.nn.Module):
    """A scorer that has room for so many rows at once."""

    def __init__(self, scorer, most):
        super().__init__()
        self.scorer, self.most = scorer, most

    def forward(self, idx, targets, scale):
        if len(idx) > self.most:
            raise MemoryError
        return self.scorer(idx, targets, scale)


@pytest.mark.parametrize("most", [3, 2])
def test_a_case_whose_rows_did_not_fit_is_not_measured_as_if_they_had(bench, monkeypatch, most):
    scorer = bench.Scorer
    monkeypatch.setattr(bench, "Scorer", lambda model: ShortOfMemory(scorer(model), most))
    case, cpu = bench.Case("nano", 3, 8), torch.device("cpu")
    if most == 3:
        assert bench.measure(case, cpu) > 0
        return
    with pytest.raises(MemoryError, match="2 of 3 rows fitted at once") as problem:
        bench.measure(case, cpu)
    assert ran_out_of_memory(problem.value)
