"""Every task is read from its files and from the Hub, and refuses what is not of it."""

import json
from pathlib import Path
from typing import get_args

import pyarrow
import pytest
from pyarrow import parquet as parquet_files

import hub_fixtures
from judged import TOKENIZER, judge
from minigpt2.errors import InputError, NotFoundError
from minigpt2.evaluation.options import TaskName
from minigpt2.evaluation.tasks.table import TASKS, read_items, run_task, score_items

cache, serve = hub_fixtures.cache, hub_fixtures.serve

DATA = Path(__file__).parents[3] / "data" / "tasks"
FILES = {
    "wikitext2": "wiki.test.tokens",
    "wikitext103": "wiki.test.tokens",
    "ptb": "ptb.test.txt",
    "lambada_openai": "lambada_openai.jsonl",
    "lambada_standard": "lambada_standard.txt",
    "hellaswag": "hellaswag.jsonl",
    "cbt_cn": "cbt_cn.txt",
    "cbt_ne": "cbt_ne.txt",
}


def hub_rows(name):
    """The rows of a miniature as the Hub has them."""
    text = (DATA / FILES[name]).read_text("utf-8")
    lines = text.splitlines(keepends=True)
    if name.startswith("wikitext"):
        return [{"text": "" if line.isspace() else line} for line in lines]
    if name == "ptb":
        return [{"sentence": line.strip()} for line in lines]
    if name == "lambada_standard":
        return [{"text": line.rstrip("\n"), "domain": None} for line in lines]
    if not name.startswith("cbt"):
        return [{**row, "more": 1} for row in map(json.loads, lines)]
    rows = []
    for part in text.strip().split("\n\n"):
        *context, last = (line.partition(" ")[2] for line in part.split("\n"))
        question, answer, _, options = last.split("\t")
        rows.append(
            {
                "sentences": context,
                "question": question,
                "answer": answer,
                "options": options.split("|"),
            }
        )
    return rows


def parquet(rows, path):
    parquet_files.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def jsonl(rows, path):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def array(rows, path):
    path.write_text(json.dumps(rows))
    return path


WRITERS = {".parquet": parquet, ".jsonl": jsonl, ".json": array}


def test_the_flag_has_the_tasks_of_the_table():
    assert get_args(TaskName) == tuple(TASKS) == tuple(FILES)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_from_its_own_file_and_from_rows_of_any_format(name, tmp_path):
    items = read_items(name, [DATA / FILES[name]])
    assert len(items) >= 3
    for suffix, write in WRITERS.items():
        assert read_items(name, [write(hub_rows(name), tmp_path / f"rows{suffix}")]) == items
    found = judge(block_size=64)
    score = score_items(found.model, TOKENIZER, name, items)
    assert score == run_task(found.model, TOKENIZER, name, hub_rows(name))
    assert score.n_items == len(items) and score.task == name and score.published_for is None
    with pytest.raises(KeyError, match="none"):
        score["none"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_comes_from_the_hub(name, serve, tmp_path):
    repo, _, path = TASKS[name].source.removeprefix("hf://").partition("@refs%2Fconvert%2Fparquet/")
    branches = {}
    if path:
        served, branches = "converted", {repo: {"refs/convert/parquet": "converted"}}
    else:
        parts = repo.split("/")
        repo, path = "/".join(parts[:3]), "/".join(parts[3:])
        served = repo
    file = WRITERS[Path(path).suffix](hub_rows(name), tmp_path / "rows")
    repos = {repo: {"README.md": b"about"}, served: {path: file.read_bytes()}}
    serve(repos, branches=branches)
    assert read_items(name) == read_items(name, [DATA / FILES[name]])


@pytest.mark.parametrize("name", TASKS)
def test_a_file_that_is_not_of_the_task_is_refused_with_the_fields_it_has(name, tmp_path):
    rows = [{"other": "a", "options": ["b"]}]
    for suffix, write in WRITERS.items():
        path = write(rows, tmp_path / f"rows{suffix}")
        with pytest.raises(InputError) as refused:
            read_items(name, [path])
        message = str(refused.value)
        assert message.startswith(f"{path}:row 1 has the fields other, options; the fields wanted")
        assert all(field in message for group in TASKS[name].fields for field in group)
    (tmp_path / "page.html").write_text("<p>no</p>")
    with pytest.raises(InputError, match=rf"page\.html is not of {name}: it has rows"):
        read_items(name, [tmp_path / "page.html"])
    (tmp_path / "rows.jsonl").write_text('"a"\n')
    with pytest.raises(InputError, match="row 1 is no object; the fields wanted"):
        read_items(name, [tmp_path / "rows.jsonl"])
    (tmp_path / "blank.jsonl").write_text("\n")
    with pytest.raises(InputError, match=rf"blank\.jsonl holds nothing of {name}: it has rows"):
        read_items(name, [tmp_path / "blank.jsonl"])


def test_what_is_no_task_no_file_and_no_row_is_refused():
    with pytest.raises(InputError, match=r"no task 'hellaswak' \(did you mean hellaswag\?\): kn"):
        read_items("hellaswak")
    with pytest.raises(NotFoundError, match=r"none\.txt does not exist"):
        read_items("ptb", ["none.txt"])
    with pytest.raises(InputError, match="not from stdin"):
        read_items("ptb", ["-"])
    model = judge().model
    with pytest.raises(InputError, match="row 2 is not of ptb: it has rows"):
        run_task(model, TOKENIZER, "ptb", [{"sentence": "a b"}, {"page": "a"}])
    with pytest.raises(InputError, match="nothing of ptb to score"):
        run_task(model, TOKENIZER, "ptb", [])
