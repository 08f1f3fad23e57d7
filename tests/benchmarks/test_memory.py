"""The benchmark of the memory forecast: a case that was not run as it says is not measured."""

import pytest
import torch

from benches import loaded
from minigpt2.system.precision import ran_out_of_memory


@pytest.fixture(scope="module")
def bench():
    with loaded("memory") as module:
        yield module


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
