"""Every command and every Python block of the documents is run, with a tiny model in gpt2's
place.
"""

import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import tree

import warm
from minigpt2.formats.chat import TEMPLATE
from scripts import ROOT, later_wins, run_here, tiny_folder

DOCUMENTS = [ROOT / "README.md", ROOT / "data" / "README.md", ROOT / "CONTRIBUTING.md"]
# what .ci/run runs literally
INSTALLS = ("pip install ", "pytest", "ruff ", "pyright")
GOLDEN = "python tests/golden.py"  # run by test_golden.py
# what makes a documented command short
SHORTER = {
    "train": ["--max-steps", "1", "--batch-size", "1", "--block-size", "16"],
    "sample": ["--max-new-tokens", "3"],
    "convert_weights": [],
    "verify": ["--item", "logits"],
}


def blocks(language):
    for path in DOCUMENTS:
        yield from re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


def commands():
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and line != GOLDEN]


def script_commands():
    return [line for line in commands() if line.startswith(("python ", "torchrun ", "cat "))]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files that the documents speak of."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    text = "A lamp, a wall, a boat with a hole, and two men in it.\n" * 40
    for name in (
        "my.txt",
        "opening.txt",
        "code.py",
        "notes/a.md",
        "letters/1/b.txt",
        "letters/c.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}: {text}")
    (tmp_path / "poems.csv").write_text("poem\n" + "A lamp and a wall.\n" * 40)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "A lamp", "completion": " a wall"}\n' * 40)
    row = {"question": "What burns?", "answer": "The lamp."}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    for folder in (
        "gpt2",
        "distilgpt2",
        "gpt2-large",
        "gpt2-xl",
        "runs/first",
        "runs/my-gpt2",
        "runs/chat",
        "SOURCE",
    ):
        tiny_folder(tmp_path / folder)
    (tmp_path / "runs" / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_line_of_the_documents_is_a_command_that_some_test_runs():
    for line in commands():
        assert (
            line.startswith(("python ", "torchrun ", "cat ", *INSTALLS))
            or "pytest -m network" in line
        ), line
    assert len(script_commands()) >= 8


def test_ci_installs_and_tests_as_the_readme_says():
    steps = (ROOT / ".ci" / "run").read_text("utf-8").replace("pip install -q", "pip install")
    for line in commands():
        if line.startswith(INSTALLS) and " -m " not in line:
            assert line in steps


def one_answer():
    """A stdin with one line."""
    answers = ["The lamp"]

    def answer():
        if not answers:
            raise EOFError
        return answers.pop()

    return answer


@pytest.mark.parametrize("line", sorted(set(script_commands())))
def test_the_documented_commands_work(line, workplace, capsys, monkeypatch):
    if "|" in line or " -m minigpt2" in line:
        in_a_shell(line)
        return
    launcher, *argv = shlex.split(line)
    if launcher == "torchrun":
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", *argv]
        at = argv.index("train.py")
        short = ["--out", "runs/new", *SHORTER["train"], "--batch-size", "2"]
        argv[at:] = [str(ROOT / "train.py"), *later_wins(*argv[at + 1 :], *short)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return
    script, *argv = argv
    script = script.removesuffix(".py")
    argv = later_wins(*argv, *SHORTER[script], *["--out", "runs/new"] * (script == "train"))
    if "--resume" in argv:
        first = [flag for flag in argv if flag != "--resume"]
        assert run_here(capsys, script, "--data", "my.txt", *first).code == 0
    monkeypatch.setattr("minigpt2.cli.prompts._line", one_answer())
    result = run_here(capsys, script, *argv)
    assert result.code == 0, result.err


def in_a_shell(line):
    """Run a pipe, or a module, as it is typed."""
    line = line.replace("train.py", shlex.quote(str(ROOT / "train.py")))
    line = line.replace("python ", f"{shlex.join(warm.python())} ")
    if "train.py" in line:
        line += " " + shlex.join(SHORTER["train"])
    if line.endswith(" verify"):
        line += " " + shlex.join(SHORTER["verify"])
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_the_json_that_is_shown_has_the_fields_that_its_command_writes(workplace, capsys):
    (shown,) = map(json.loads, blocks("json"))
    (line,) = (line for line in commands() if "--top-logprobs" in line)
    result = run_here(capsys, "sample", *shlex.split(line)[2:])
    (row,) = map(json.loads, result.out.splitlines())
    assert list(shown) == list(row) and shown["prompt"] == row["prompt"]
    for found in (shown, row):
        n_new = len(found["ids"])
        assert n_new == len(found["tokens"]) == len(found["logprobs"]) == len(found["top_logprobs"])
        assert all(list(top) == ["id", "token", "logprob"] for top in found["top_logprobs"][0])
    assert "".join(shown["tokens"]) == shown["text"]


def test_the_python_blocks_run(workplace, tmp_path, capsys):
    for number, block in enumerate(blocks("python")):
        path = tmp_path / f"block{number}.py"
        path.write_text(block)
        runpy.run_path(str(path))
        assert capsys.readouterr().out


def test_the_public_names_are_there_and_generate_is_the_function():
    import minigpt2.generate

    for name in minigpt2.__all__:
        assert getattr(minigpt2, name) is not None
    assert callable(minigpt2.generate)
    assert set(minigpt2.__all__) <= set(dir(minigpt2))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = minigpt2.nothing


def test_the_tree_of_files_is_what_the_modules_say_of_themselves():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text == tree.in_readme(text), "python tests/tree.py --write renews it"
    assert all(len(line) <= 120 for line in tree.tree().splitlines())
    assert len(tree.tree().splitlines()) > 60


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, ROOT / "docs" / "benchmarks.md"], ids=lambda p: p.name
)
def test_the_files_that_the_documents_name_are_there(path):
    text = path.read_text("utf-8")
    named = re.findall(r"`((?:minigpt2|tests|benchmarks|docs)/[\w./]+)`", text)
    linked = re.findall(r"\]\(([\w./-]+)[)#]", text)
    for name in [*named, *linked]:
        assert (path.parent / name).exists() or (ROOT / name).exists(), name
