"""The benchmark of the loss: no time for what is another loss, or has other gradients."""

import re

import pytest

from benches import loaded

SIZES = ["--tokens", "31", "--vocabulary", "293", "--width", "17", "--rounds", "2"]


@pytest.fixture(scope="module")
def bench():
    with loaded("loss") as module:
        yield module


def run(bench, capsys):
    """The exit code, and the second to fourth cell of every row."""
    code = bench.main(SIZES)
    lines = capsys.readouterr().out.splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return code, {name: rest for name, *rest in rows}


def a_time(row):
    spread = r"\d+\.\d+ \(\d+\.\d+ to \d+\.\d+\)"
    return bool(re.fullmatch(spread, row[0]) and re.fullmatch(spread, row[1]))


def test_every_way_to_the_same_loss_has_a_time(bench, capsys):
    code, rows = run(bench, capsys)
    assert code == 0 and list(rows) == list(bench.LOSSES) and len(rows) >= 2
    for row in rows.values():
        assert a_time(row) and float(row[2]) < 1e-5


def another_loss(bench):
    return lambda x, weight, targets: bench.at_once(x, weight, targets) + 0.1


def another_gradient_of_x(bench):
    return lambda x, weight, targets: (
        bench.at_once(x, weight, targets) + 0.01 * (x.sum() - x.detach().sum())
    )


def another_gradient_of_the_matrix(bench):
    return lambda x, weight, targets: (
        bench.at_once(x, weight, targets) + 0.01 * (weight.sum() - weight.detach().sum())
    )


def no_number(bench):
    return lambda x, weight, targets: bench.at_once(x, weight, targets) * float("nan")


def another_from_the_second_time_on(bench):
    calls = []

    def loss(x, weight, targets):
        calls.append(x)
        return bench.at_once(x, weight, targets) * (1 if len(calls) == 1 else 1.1)

    return loss


@pytest.mark.parametrize(
    "wrong",
    [
        another_loss,
        another_gradient_of_x,
        another_gradient_of_the_matrix,
        no_number,
        another_from_the_second_time_on,
    ],
)
@pytest.mark.parametrize("name", ["OURS", "another"])
def test_another_loss_or_gradient_has_no_time(bench, monkeypatch, capsys, wrong, name):
    name = getattr(bench, name, name)
    monkeypatch.setattr(bench, "LOSSES", {**bench.LOSSES, name: wrong(bench)})
    code, rows = run(bench, capsys)
    assert code == 1
    assert rows[name][:2] == ["another loss", ""]
    assert [key for key in rows if not re.match(r"\d", rows[key][0])] == [name]
    assert [key for key in rows if a_time(rows[key])] == (
        [] if name == bench.OURS else [key for key in rows if key != name]
    )


def test_sizes_that_cannot_be_measured_are_refused(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main([*SIZES, "--rounds", "0"])
    assert "--rounds are 1 or more" in capsys.readouterr().err
