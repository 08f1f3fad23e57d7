"""The benchmark of judging a text: no speed for another figure."""

import pytest

from benches import loaded

SIZES = ["--preset", "nano", "--tokens", "300", "--rounds", "1"]


@pytest.fixture(scope="module")
def bench():
    with loaded("evaluate") as module:
        yield module


def rows(capsys):
    lines = capsys.readouterr().out.splitlines()[2:]
    return {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in lines)}


def test_ways_to_the_same_figure_have_a_speed(bench, capsys):
    assert bench.main(SIZES) == 0
    found = rows(capsys)
    assert list(found) == [bench.TRAINING, bench.OURS, bench.PACKED]
    assert all(" to " in cells[0] and " to " in cells[1] for cells in found.values())


def test_a_way_to_another_figure_has_none(bench, capsys, monkeypatch):
    plain = bench.ways_for

    def with_another(*given):
        ways = plain(*given)
        return {**ways, bench.OURS: lambda: 1.01 * ways[bench.OURS]()}

    monkeypatch.setattr(bench, "ways_for", with_another)
    assert bench.main(SIZES) == 1
    assert "another loss" in rows(capsys)[bench.OURS][0]
