"""Flags, files and losses are those of the golden file; `python tests/golden.py` compares the rest
on one machine.
"""

import json
import re

import golden
import pytest

COMMITTED = json.loads(golden.GOLDEN.read_text("utf-8"))
RENEW = "python tests/golden.py --write, and say so in the commit"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A short run, and the folder that it was made in."""
    folder = tmp_path_factory.mktemp("golden")
    return golden.measure(folder), folder


def test_flags_and_their_defaults_are_the_frozen_ones():
    flags = golden.frozen_flags()
    assert flags == COMMITTED["flags"], f"a flag was added, changed or taken away: {RENEW}"


@pytest.mark.parametrize("command", golden.COMMANDS)
def test_each_command_takes_the_frozen_flags_and_no_others(command, tmp_path):
    shown = golden.python(tmp_path, *command.split(), "--help")
    usage, _, below = shown.partition("\n")
    flags = re.findall(r"^  (--[a-z-]+)", below, re.MULTILINE)
    arguments = re.findall(r"\b[A-Z]+\b", usage.partition("[FLAGS]")[0])
    assert {*flags, *arguments} == COMMITTED["flags"][command].keys()


@pytest.mark.slow
def test_a_run_folder_holds_the_files_it_always_held(measured):
    results, _ = measured
    assert results.files == COMMITTED["files"], f"the run folder holds other files: {RENEW}"


@pytest.mark.slow
def test_a_run_has_the_losses_it_always_had(measured):
    results, _ = measured
    assert len(results.losses) == len(COMMITTED["losses"]) == 21
    for line, same in zip(results.losses, COMMITTED["losses"]):
        assert line == pytest.approx(same, abs=golden.CLOSE), f"other numbers: {RENEW}"


@pytest.mark.slow
def test_hashes_do_not_see_times_memory_and_paths(measured):
    results, folder = measured
    path, info_path = folder / "run" / "metrics.jsonl", folder / "run" / "run.json"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line in lines:
        line.update({name: 3 * line[name] for name in golden.VARYING_METRICS if name in line})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    info = json.loads(info_path.read_text("utf-8"))
    info["sessions"][0] |= {"command": "elsewhere", "started": "2001-02-03T04:05:06+00:00"}
    info_path.write_text(json.dumps(info), "utf-8")
    assert golden.report_hash(folder) != results.hashes["report.html"]
    assert (
        golden.sha256(json.dumps(golden.hold_still(folder / "run")).encode())
        == (results.hashes["losses"])
    )
    assert golden.report_hash(folder) == results.hashes["report.html"]
