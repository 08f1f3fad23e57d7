"""What benchmarks share: intervals of ratios, and processes that answer or say what went wrong."""

import sys

import pytest

from benches import loaded


@pytest.fixture(scope="module")
def turns():
    with loaded("turns") as module:
        yield module


@pytest.mark.parametrize("n", [1, 2, 5, 6, 8, 9, 15, 30])
def test_the_interval_is_the_narrowest_that_misses_the_median_in_5_of_100_cases(turns, n):
    from scipy.stats import binom

    ranks = [*range(1, n + 1)]
    least, most = turns.interval([float(rank) for rank in ranks[::-1]])
    assert least + most == n + 1  # as many values are cut off above as below
    if n < turns.FEWEST:
        assert least == 1
        assert 2 * binom.cdf(0, n, 0.5) > 0.05  # even all values are no such interval
    else:  # so many of the values are below the median: a toss of n coins
        assert 2 * binom.cdf(least - 1, n, 0.5) <= 0.05 < 2 * binom.cdf(least, n, 0.5)


@pytest.fixture
def worker(turns):
    worker = turns.Worker("echo")
    code = (
        "from turns import answer_all\n"
        "def answer(request):\n"
        "    print('no reply')\n"
        "    return [request, 10 // request]\n"
        "answer_all(answer)\n"
    )
    path = f"import sys; sys.path[:0] = {[turns.__file__.rpartition('/')[0]]!r}\n"
    worker.spawn([sys.executable, "-c", path + code])
    yield worker
    worker.end()


def test_a_process_answers_one_request_after_the_other(turns, worker):
    assert worker.ask(5) == [5, 2] and worker.ask(2) == [2, 5]
    with pytest.raises(turns.VariantError, match="ZeroDivisionError: integer division"):
        worker.ask(0)
    assert worker.ask(1) == [1, 10]
    worker.popen.kill()
    with pytest.raises(turns.VariantError, match="its process ended with -9"):
        worker.ask(1)


def test_after_what_went_wrong_nothing_is_tried_again(turns, capsys):
    worker, tried = turns.Worker("one"), []
    assert worker.attempt(lambda: 3) == 3

    def fails():
        tried.append(1)
        raise MemoryError("first\nsecond")

    assert worker.attempt(fails) is None and worker.attempt(fails) is None
    assert len(tried) == 1 and worker.problem == "MemoryError: first second"
    assert capsys.readouterr().err == "one: MemoryError: first second\n"
