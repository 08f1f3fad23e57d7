"""minigpt2 evaluate: the figures of the library in a table or as JSON, killed and gone on with, on
several processes, and one line for what cannot be judged.
"""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch

import warm
from decoded import random_model
from minigpt2.cli import evaluate as command
from minigpt2.decoding.ready import load
from minigpt2.evaluation import corpus_score, evaluate, windows
from minigpt2.evaluation.corpus_score import Sums
from minigpt2.lora import add_lora, save_adapter
from minigpt2.model import GPT2
from minigpt2.tokenizer import Tokenizer
from scripts import ROOT, Result, tiny_folder

LINES = [f"The {n}th lamp is lit, and the sea says {n * n}, à {n}.\n" for n in range(40)]
PROPERTIES = ("loss", "perplexity", "bits_per_byte", "bits_per_character")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with models and texts, where all is kept, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(windows, "GROUP_TOKENS", 200)
    tiny_folder(tmp_path / "one")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in LINES))
    (tmp_path / "note.txt").write_text(LINES[3])
    return tmp_path


def run(capsys, *argv):
    capsys.readouterr()
    code = command.run([str(word) for word in argv])
    return Result(code, *capsys.readouterr())


def kept(place):
    return sorted(path.name for path in place.glob("cache/evaluations/*"))


@pytest.mark.parametrize("flags", ["", "--stride 23", "--document-mask", "--dtype int8"])
def test_the_figures_are_those_of_the_library(place, capsys, flags):
    result = run(capsys, "--model", "one", "--data", "lines.jsonl", "--json", *shlex.split(flags))
    assert result.code == 0, result.err
    row = json.loads(result.out)
    how = {
        "stride": 23 if "stride" in flags else None,
        "document_mask": "document-mask" in flags,
    }
    model = load("one", dtype="int8" if "int8" in flags else "float32")
    expected = evaluate(model, Tokenizer.from_pretrained("one"), LINES, **how)
    assert row == {
        "model": "one",
        **{name: getattr(expected, name) for name in PROPERTIES},
        **vars(expected),
        "protocol": expected.protocol,
        "dtype": "int8" if "int8" in flags else "float32",
        "device": "cpu",
    }
    assert row["documents"] == 40 and row["bytes"] == sum(len(t.encode()) for t in LINES)
    assert kept(place) == []


def test_several_models_stand_in_one_table_with_the_protocol_below(place, capsys):
    tiny_folder(place / "two", n_positions=23)
    result = run(capsys, "--model", "one", "two", "--data", "lines.jsonl", "note.txt")
    head, one, two, empty, about, protocol = result.out.splitlines()
    assert head.split() == ["model", "loss", "perplexity", "bits/byte", "bits/character", "tokens"]
    assert len(head) == len(one) == len(two) and empty == ""
    score = evaluate(load("one"), Tokenizer.gpt2(300), [*LINES, LINES[3]])
    assert one.split() == [
        *("one", f"{score.loss:.4f}", "±", f"{score.standard_error:.4f}"),
        *(f"{score.perplexity:,.2f}", f"{score.bits_per_byte:.4f}"),
        *(f"{score.bits_per_character:.4f}", f"{score.tokens:,}"),
    ]
    assert one.split()[1:] == two.split()[1:]
    assert about == (
        f"41 documents, {score.bytes:,} bytes in UTF-8; on cpu in float32; ± standard error over "
        "documents"
    )
    assert protocol == score.protocol


def test_models_of_other_tokens_and_windows_are_told_apart(place, capsys):
    tiny_folder(place / "small", vocab_size=257, n_positions=11)
    result = run(capsys, "--model", "one", "small", "--data", "note.txt")
    *_, about, one, small, note = result.out.splitlines()
    assert about.startswith("1 document, ") and "±" not in result.out
    assert about.endswith("; one gives no standard error over documents")
    assert one.startswith("one: windows of 23 ") and small.startswith("small: windows of 11 ")
    assert note.endswith("compare bits per byte, not loss and perplexity")
    assert run(capsys, "--model", "one", "--data", "note.txt").out.count("different") == 0


def test_a_lora_run_is_judged_with_its_adapters(place, capsys):
    model = GPT2.from_pretrained("one")
    add_lora(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
    save_adapter(model, place / "adapted", base_model=str(place / "one"))
    result = run(capsys, "--model", "adapted", "one", "--data", "note.txt", "--json")
    adapted, one = map(json.loads, result.out.splitlines())
    expected = evaluate(GPT2.from_pretrained("adapted"), Tokenizer.gpt2(300), [LINES[3]])
    assert adapted["loss"] == pytest.approx(expected.loss, rel=1e-6) != one["loss"]


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, "{root}")
from minigpt2.cli.evaluate import run
from minigpt2.evaluation import kept_sums, windows
from minigpt2.evaluation.corpus_score import Sums

windows.GROUP_TOKENS, kept_sums.SECONDS = 200, 0
owner, name, calls = {owner}, "{name}", 0
plain = getattr(owner, name)

def counted(self, *given):
    global calls
    if "{where}" in str(self) or owner is Sums:
        calls += 1
        if calls == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *given)

setattr(owner, name, counted)
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("owner", "name", "at", "groups"),
    [
        ("Sums", "plus", 1, 0),
        ("Sums", "plus", 9, 8),
        ("pathlib.Path", "replace", 5, 4),  # a new state is written, and not in its place
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_and_started_again_it_gives_the_same_figure_bit_for_bit(
    place, capsys, owner, name, at, groups
):
    argv = ["--model", "one", "--data", "lines.jsonl", "--document-mask", "--json"]
    expected = run(capsys, *argv)
    driver = place / "driver.py"
    driver.write_text(KILLED.format(root=ROOT, owner=owner, name=name, at=at, where="evaluations"))
    killed = subprocess.run(
        [*warm.python(), str(driver), *argv], capture_output=True, timeout=120, check=False
    )
    assert killed.returncode == -signal.SIGKILL and killed.stdout == b""
    (state,) = [name for name in kept(place) if not name.startswith(".")] or [None]
    if groups:
        values = json.loads((place / "cache/evaluations" / state).read_text())
        assert Sums.from_json(values).groups == groups
    again = run(capsys, *argv)
    assert again.out == expected.out and again.code == 0
    assert ("one: going on after " in again.err) == (groups > 0)
    assert kept(place) == []


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt, 130), (RuntimeError, None)], ids=["Ctrl-C", "bug"]
)
def test_whatever_ends_it_keeps_what_was_done_of_every_model(
    place, capsys, monkeypatch, stop, code
):
    tiny_folder(place / "two", n_positions=17)
    argv = ["--model", "one", "two", "--data", "lines.jsonl", "--json"]
    expected, plus = run(capsys, *argv), Sums.plus

    def plus_until(self, parts):
        if self.groups == 12 and len(kept(place)) == 1:  # of the second model
            raise stop
        return plus(self, parts)

    monkeypatch.setattr(Sums, "plus", plus_until)
    if code is None:
        with pytest.raises(stop):
            run(capsys, *argv)
    else:
        assert run(capsys, *argv).code == code
    monkeypatch.setattr(Sums, "plus", plus)
    assert len(kept(place)) == 2
    again = run(capsys, *argv)
    assert again.out == expected.out and again.err.count("going on after") == 2
    assert kept(place) == []


def test_another_state_is_another_file_and_a_damaged_one_begins_anew(place, capsys, monkeypatch):
    argv = ["--data", "lines.jsonl", "--json"]
    expected = run(capsys, "--model", "one", *argv)
    removed = []
    monkeypatch.setattr(
        "minigpt2.evaluation.kept_sums.KeptSums.remove", lambda self: removed.append(self)
    )
    run(capsys, "--model", "one", *argv)
    (first,) = kept(place)
    for other in (["--stride", "3"], ["--document-mask"], ["--dtype", "int8"]):
        assert "going on" not in run(capsys, "--model", "one", *argv, *other).err
    assert len(kept(place)) == 4
    random_model(vocab_size=300, block_size=23).save_pretrained(place / "one")
    assert "going on" not in run(capsys, "--model", "one", *argv).err
    tiny_folder(place / "one")
    assert "going on after" in run(capsys, "--model", "one", *argv).err
    for damage in ("", "{}", '{"groups": 1.5}', '{"groups": 3, "nats": "x"}'):
        (place / "cache/evaluations" / first).write_text(damage)
        assert run(capsys, "--model", "one", *argv).out == expected.out


def test_a_state_that_cannot_be_kept_is_told_once_and_stops_nothing(place, capsys):
    argv = ["--model", "one", "--data", "note.txt", "--json"]
    expected = run(capsys, *argv)
    folder = place / "cache/evaluations"
    folder.rmdir()
    folder.write_text("no folder")
    result = run(capsys, *argv)
    assert result.out == expected.out and result.code == 0
    assert result.err.count("cannot be written") == 1


def test_two_processes_have_the_figure_of_one_and_one_of_them_speaks(place):
    rows = (json.dumps({"text": f"{n}: {line}"}) for n in range(30) for line in LINES)
    (place / "long.jsonl").write_text("\n".join(rows))  # some 60,000 tokens, in four groups
    argv = ["-m", "minigpt2", "evaluate", "--model", "one", "--data", "long.jsonl", "--json"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    lines = []
    for words in ([*several, *argv], argv):  # otherwise one would go on after the other
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines += done.stdout.splitlines()
        assert kept(place) == []
    found, expected = map(json.loads, lines)
    assert found.keys() == expected.keys() and found["tokens"] > 3 * 2**14
    for name, value in expected.items():
        close = isinstance(value, float)
        assert found[name] == (pytest.approx(value, rel=1e-12, abs=0) if close else value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--model one", "--data is missing: name at least one file"),
        ("--model one --data none.txt", "none.txt"),
        ("--model one --data empty.txt", "empty.txt: 0 tokens, there is no text"),
        ("--model one --data short.txt", "the text has 1 token, needs 2 to be judged"),
        ("--model ./none --data note.txt", "there is no folder './none'"),
        ("--model texts --data note.txt", "config.json does not exist: is texts a complete model"),
        ("--model one one --data note.txt", "--model names one twice"),
        ("--model one --data note.txt --stride 0", "--stride is 0, allowed is 1 or more"),
        ("--model one --data note.txt --stride 24", "--stride is 24, allowed is from 1 to the"),
        ("--model misfit --data note.txt", "the tokenizer has 1024 ids, the model 300"),
        ("--model one --data note.txt --device cuda", "device is cuda"),
        ("--model one small --data -", "--data - with several kinds of tokens: save the text"),
    ],
)
def test_what_cannot_be_judged_is_told_in_a_line(place, capsys, words, told):
    (place / "empty.txt").write_text("")
    (place / "short.txt").write_text("a")
    (place / "texts").mkdir()
    tiny_folder(place / "small", vocab_size=257)
    Tokenizer.gpt2(1024).save(tiny_folder(place / "misfit"))
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    result = run(capsys, *words.split())
    assert result.code == 2 and result.out == ""
    assert told in result.last_line and result.err.count("\n") == 1


def test_text_comes_from_stdin_too(place, capsys, monkeypatch):
    expected = run(capsys, "--model", "one", "--data", "note.txt", "--json").out
    with (place / "note.txt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run(capsys, "--model", "one", "--data", "-", "--json").out == expected


def test_a_figure_that_json_has_not_is_null():
    score = corpus_score.Score(5e3, 5, 6, 6, 1, None, 1, 1, False)
    row = command.Judged("one", score, "", "float32", "cpu").to_json()
    assert row["perplexity"] is None and json.dumps(row, allow_nan=False)
