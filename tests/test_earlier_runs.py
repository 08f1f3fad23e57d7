"""Runs begun with an earlier version go on as if nothing had changed."""

import json
import re
import shutil
from pathlib import Path

import pytest

from minigpt2.model import GPT2
from minigpt2.runs.folder import RunFolder
from scripts import run_here

RUNS = sorted(path for path in (Path(__file__).parent / "earlier_runs").iterdir() if path.is_dir())
# as they were begun: `command` in their run.json
FLAGS = ["--data", "text.txt", "--model", "base", "--max-steps", 12, "--batch-size", 4]
FLAGS += ["--micro-batch-size", 2, "--learning-rate", 0.01, "--dropout", 0.1]
FLAGS += ["--eval-every", 4, "--save-every", 3]
KINDS = {"full": [], "lora": ["--lora-rank", 3]}
CLOSE = 1e-3  # processors round differently


def test_there_is_a_run_to_go_on_with():
    assert [path.name for path in RUNS] == ["f07b90e"]


@pytest.mark.parametrize("alone", [False, True], ids=["with its flags", "alone"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("earlier", RUNS, ids=lambda path: path.name)
def test_an_earlier_run_goes_on_to_the_losses_it_would_have_had(
    earlier, kind, alone, tmp_path, monkeypatch, capsys
):
    shutil.copytree(earlier, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    flags = [] if alone else [*FLAGS, *KINDS[kind]]
    result = run_here(capsys, "train", *flags, "--out", kind, "--resume")
    assert result.code == 0, result.err
    expected = json.loads(Path(f"{kind}-losses.json").read_text())
    lines = RunFolder(Path(kind)).read_metrics()
    assert [line.step for line in lines] == list(range(13))
    for line, same in zip(lines, expected):
        found = {name: getattr(line, name) for name in same}
        assert found == pytest.approx(same, abs=CLOSE)
    # masks that it did not have would be other losses, too
    assert RunFolder(Path(kind)).checkpoints()[0].name == "step-000012"
    assert RunFolder(Path(kind)).newest().settings.way is None
    assert GPT2.from_pretrained(kind).config.block_size == 23
    # the earlier version did not count bytes, and judged the same text
    assert [line.step for line in lines if line.bits_per_byte is not None] == [8, 12]
    figures = r"[\d,.]+, bits per byte \d\.\d{3} \(untuned [\d,.]+ and \d\.\d{3}\)"
    assert re.search(f"best at step 12: val perplexity {figures}", result.err)
