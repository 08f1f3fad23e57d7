"""minigpt2 evaluate --task: its tables, its JSON, and what it refuses."""

import json

import pytest

from minigpt2.cli import evaluate
from minigpt2.cli.tasks import Judged, report
from minigpt2.evaluation.tasks.published import published
from minigpt2.evaluation.tasks.records import Metric, TaskScore
from minigpt2.evaluation.tasks.table import TASKS, read_items, score_items
from minigpt2.model import GPT2
from minigpt2.tokenizer import Tokenizer
from scripts import ROOT, Result, tiny_folder

DATA = ROOT / "data" / "tasks"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny_folder(folder / name)) for name in ("one", "two")]


def run(capsys, *argv):
    capsys.readouterr()
    code = evaluate.run([str(argument) for argument in argv])
    return Result(code, *capsys.readouterr())


def test_json_has_the_figures_that_the_library_finds(capsys, models):
    data = DATA / "lambada_openai.jsonl"
    words = ["--task", "lambada_openai", "--data", data, "--json", "--device", "cpu"]
    result = run(capsys, "--model", *models, *words)
    assert result.code == 0, result.err
    first, second = map(json.loads, result.out.splitlines())
    assert [first["model"], second["model"]] == models
    assert {**first, "model": None} == {**second, "model": None}
    model, tokenizer = GPT2.from_pretrained(models[0]), Tokenizer.from_pretrained(models[0])
    items = read_items("lambada_openai", [data])
    score = score_items(model, tokenizer, "lambada_openai", items)
    assert first["metrics"].keys() == {metric.name for metric in score.metrics}
    for metric in score.metrics:
        shown = first["metrics"][metric.name]
        assert shown["value"] == pytest.approx(metric.value, rel=1e-3)  # another way to compute
        assert shown["published"] == []
    assert first["items"] == 12 and first["protocol"] == TASKS["lambada_openai"].protocol


def test_a_table_names_every_model_and_the_protocol(capsys, models):
    words = ["--task", "cbt_ne", "--data", DATA / "cbt_ne.txt", "--stride", 3]
    result = run(capsys, "--model", *models, *words)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "cbt_ne: names missing in children's books (CBT)"
    assert [line.split()[:2] for line in lines[3:5]] == [[model, "accuracy"] for model in models]
    assert lines[-1] == TASKS["cbt_ne"].protocol
    assert "no figure is published for models of this shape" in lines
    assert "--stride changes nothing: --task says how its text is read and scored" in result.err


def test_a_figure_stands_beside_those_that_were_published():
    figures = (("accuracy", 0.3261, 0.0065), ("perplexity", 1040.06, None), ("bits", 3e7, 2.0))
    metrics = (Metric(*f, published("lambada_openai", f[0], "gpt2")) for f in figures)
    score = TaskScore("lambada_openai", tuple(metrics), 5153, "how it is done", "gpt2")
    lines = report([Judged("my gpt2", score, "float32", "cpu")]).splitlines()
    cells = [line.split() for line in lines[2:]]
    assert cells[0] == ["model", "metric", "figure", "published", "gap", "published", "by"]
    assert cells[1][:8] == ["my", "gpt2", "accuracy", "0.3261", "±", "0.0065", "0.3256", "+0.0005"]
    assert cells[2][:5] == [
        "perplexity",
        "1,040.06",
        "40.06",
        "+1,000.00",
        "lm-evaluation-harness,",
    ]
    assert cells[3][:4] == ["35.13", "+1,004.93", "the", "paper:"]
    assert lines[-2] == "5,153 items; on cpu in float32; ± standard error over items"
    assert lines[-1] == "how it is done"


def test_errors_are_explained_where_there_are_some():
    score = TaskScore("ptb", (Metric("word_perplexity", 2.0, None),), 12, "how it is done", None)
    assert "±" not in report([Judged("one", score, "float32", "cpu")])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--task", "hellaswag", "--data", DATA / "cbt_cn.txt"], "not of hellaswag: it has rows"),
        (["--task", "hellaswag", "ptb", "--data", "x"], "error: --data is given beside several of"),
        (["--task", "ptb", "ptb"], "error: --task names one twice"),
        (["--task", "ptb", "--data", "none.txt"], "none.txt does not exist"),
        (["--task", "ptb", "--data", "-"], "come from files, not from stdin"),
        (["--task", "penn"], "--task is 'penn', allowed is wikitext2"),
        ([], "--data is missing"),
    ],
    ids=["other file", "data of two", "twice", "no file", "stdin", "no task", "nothing"],
)
def test_bad_input_is_one_line(capsys, models, words, line):
    result = run(capsys, "--model", models[0], *words)
    assert result.code == 2 and line in result.last_line and not result.out
