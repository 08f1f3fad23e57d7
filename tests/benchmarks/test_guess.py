"""The benchmark of guessing ahead: it measures texts that are the plain model's, and no others."""

import re
import sys

import pytest

from benches import loaded
from minigpt2.generate import decode
from minigpt2.sampling import Guess
from scripts import tiny_folder

LOOP = sys.modules[decode.__module__]  # minigpt2.generate is the function
SIZES = ["--prompt", 11, "--new", 40, "--guesses", 3, "--rounds", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def bench():
    with loaded("guess") as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("guess") / "model")


@pytest.fixture
def run(bench, folder, tmp_path, capsys):
    """A function from more flags to the exit code and the rows of the table."""
    (tmp_path / "table.txt").write_text("one lamp, two lamps; one lamp, two lamps; " * 9)

    def run(*flags):
        argv = [folder, tmp_path / "table.txt", *SIZES, *flags]
        code = bench.main([str(word) for word in argv])
        header, _, *lines = capsys.readouterr().out.splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in [header, *lines]]
        return code, [dict(zip(cells[0], row)) for row in cells[1:]]

    return run


def a_speed(row):
    return re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", row["next to plain"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_texts_of_the_plain_model_have_a_speed_also_past_its_window(run, dtype):
    code, rows = run("--dtype", dtype)
    assert code == 0
    assert [row["temperature"] for row in rows] == ["0.0", "0.8"]
    for row in rows:
        assert a_speed(row) and float(row["tokens per forward pass"]) >= 1
        assert float(row["off by"]) < (0.1 if dtype == "bfloat16" else 1e-3)


def test_a_draft_model_is_a_row_of_its_own(run, folder):
    code, rows = run("--draft", folder)
    assert code == 0
    assert [row["guesses"] for row in rows] == ["from the text, 3", str(folder)] * 2
    assert all(map(a_speed, rows))
    assert float(rows[1]["tokens per forward pass"]) > 3  # it guesses what the model itself writes


class BadGuesses:
    """Guesses the same tokens after every text."""

    def propose(self, rows, texts, limits):
        return [Guess([7, 8, 9][:limit]) for limit in limits]


def takes_every_guess(guesses, probs, generators):
    return [[*guess.ids, int(p[len(guess.ids)].argmax())] for guess, p in zip(guesses, probs)]


@pytest.mark.parametrize("accepted", [False, True])
def test_wrong_guesses_that_are_accepted_have_no_speed(bench, run, monkeypatch, accepted):
    monkeypatch.setattr(bench, "NGramDrafter", lambda n: BadGuesses())
    if accepted:
        monkeypatch.setattr(LOOP, "accept", takes_every_guess)
    code, (greedy, _) = run()
    assert code == int(accepted)
    assert bool(a_speed(greedy)) is not accepted
    assert (
        greedy["tokens per forward pass"] == "writes another text than the plain model"
    ) is accepted
    assert (float(greedy["off by"]) > 0.01) is accepted


def test_log_probabilities_of_another_place_have_no_speed(run, monkeypatch):
    reads = LOOP._decode_step

    def reads_backwards(model, rows, guesses, cache):
        hidden = reads(model, rows, guesses, cache)
        return hidden.flip(1) if hidden.shape[1] > 1 else hidden

    monkeypatch.setattr(LOOP, "_decode_step", reads_backwards)
    code, rows = run()
    assert code == 1 and not any(map(a_speed, rows))


@pytest.mark.parametrize("n_new", [39, 0])
def test_a_text_that_is_too_short_has_no_speed(bench, run, monkeypatch, n_new):
    written = bench.written
    monkeypatch.setattr(bench, "written", lambda *given: written(*given)[:n_new])
    code, rows = run()
    assert code == 1 and not any(map(a_speed, rows))


def test_log_probabilities_that_are_no_numbers_have_no_speed(bench, run, monkeypatch):
    written = bench.written

    def nan(*given):
        return [token._replace(logprob=float("nan")) for token in written(*given)]

    monkeypatch.setattr(bench, "written", nan)
    code, rows = run()
    assert code == 1 and not any(map(a_speed, rows))


@pytest.mark.parametrize("flags", [["--new", 1], ["--rounds", 0], ["--guesses", 4, 0]])
def test_sizes_that_cannot_be_measured_are_refused(run, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*flags)
    assert "--new is 2 or more" in capsys.readouterr().err
