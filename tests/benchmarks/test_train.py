"""The training benchmark: its arithmetic, that what learns something else has no speed, and that
every variant that is there takes the same steps.
"""

import subprocess
import sys
import threading

import pytest
import torch

from benches import cells_of, loaded
from minigpt2.model import GPT2, GPT2Config
from scripts import ROOT

PATH = ROOT / "benchmarks" / "train.py"


@pytest.fixture(scope="module")
def bench():
    with loaded("train") as module:
        yield module


def rows_of(table):
    """{(case, dropout, variant): {column: cell}} of a Markdown table."""
    return {(row["case"], row["dropout"], row["variant"]): row for row in cells_of(table)}


def outcome(bench, variant, seconds, *, losses=(5.0, 4.0), rate=0.0, problem=None):
    turns = [bench.Turn(value, [*losses], 3_000_000) for value in seconds]
    return bench.Outcome("124M 4x256", rate, variant, turns, problem)


def test_figures_are_those_of_hand_made_turns(bench):
    outcomes = [
        outcome(bench, "products", [2, 1, 2]),
        outcome(bench, "nanogpt", [8, 8, 8]),
        outcome(bench, "hf-trainer", [4, 16, 16]),
        outcome(bench, "minigpt2", [4, 2, 8]),
        outcome(bench, "minigpt2", [1, 1, 1], rate=0.1),
    ]
    rows = rows_of(bench.table(bench.compared(outcomes[:4], "float32")))
    assert ("124M 4x256", "0", "products") not in rows
    assert rows["124M 4x256", "0", "minigpt2"] == {
        "case": "124M 4x256",
        "dropout": "0",
        "variant": "minigpt2",
        "tok/s": "512 (256 to 1024)",  # 1,024 tokens in half of 4 s
        "s/step": "2.000 (1.000 to 4.000)",
        "of peak": "0.50 (0.25 to 0.50)",  # of 2 / 4, 1 / 2 and 2 / 8
        "to nanogpt": "2.00 (1.00 to 4.00)",
        "to hf-trainer": "2.00 (1.00 to 8.00)",  # of 1, 8 and 2
        "peak, MB": "3",
        "loss": "4.0000",
        "off by": "0.0e+00",
    }
    rows = rows_of(bench.table(outcomes))
    assert rows["124M 4x256", "0.1", "minigpt2"]["to nanogpt"] == ""  # of its own dropout only


def test_what_learns_something_else_has_no_speed(bench):
    known, other = outcome(bench, "nanogpt", [8]), outcome(bench, "minigpt2", [1], losses=(5, 4.1))
    _, judged = bench.compared([known, other], "float32")
    (cell,) = {row["tok/s"] for row in rows_of(bench.table([judged])).values()}
    assert cell == "learns something else: its losses are off by 0.025, allowed 0.001"
    not_a_number = outcome(bench, "minigpt2", [1], losses=(float("nan"), 4))
    assert bench.compared([known, not_a_number], "float32")[1].problem
    # other masks are other losses
    known, other = (bench.replace(found, dropout=0.1) for found in (known, other))
    assert bench.compared([known, other], "float32")[1].problem is None


def test_the_products_of_a_step_are_those_that_it_makes(bench):
    config = GPT2Config(vocab_size=23, block_size=7, n_embd=6, n_layer=3, n_head=2)
    counted = count_products(GPT2(config).eval(), torch.zeros(5, 7, dtype=torch.int64))
    flops = sum(2 * m * k * n * count for (m, k, n), count in bench.products(config, 5 * 7).items())
    assert flops == counted


def count_products(model, idx):
    """The operations of the products of a step, without those of attention."""
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False) as counter:
        logits = model(idx)
        F.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(n for operation, n in by_operation.items() if "mm" in str(operation))


def test_the_products_of_adapters_alone_lack_the_gradients_of_weights(bench):
    config = GPT2Config(vocab_size=23, block_size=7, n_embd=6, n_layer=3, n_head=2)
    whole, part = (bench.products(config, 35, all_trained=trained) for trained in (True, False))
    of_weights = {shape: n for shape, n in whole.items() if shape[1] == 35}  # summed over tokens
    assert part == {shape: n for shape, n in whole.items() if shape not in of_weights}


def test_only_what_has_adapters_trains_them(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(bench.CASES, "tiny", bench.Case("nano", 2, 17, 2, lora_rank=3))
    bench.write_model(bench.CASES["tiny"], str(tmp_path))
    options = bench.TrainBenchOptions(rounds=1, only=("nanogpt", "minigpt2"))
    found = bench.compared(bench.measure(options, "tiny", 0.0, str(tmp_path)), "float32")
    problems = {one.variant: one.problem for one in found}
    assert problems == {"nanogpt": "skipped: has no adapters", "products": None, "minigpt2": None}
    row = rows_of(bench.table(found))["tiny", "0", "minigpt2"]
    assert row["to nanogpt"] == "" and row["off by"] == "0.0e+00" and row["of peak"]


def test_every_routine_multiplies(bench):
    a, b = torch.randn(6, 5), torch.randn(5, 7)
    for job in bench.routines(a, b):
        assert torch.allclose(job(), a @ b, atol=1e-5)


def begun(bench, train):
    steps = bench.Steps()
    threading.Thread(target=steps.run, args=[train], daemon=True).start()
    return steps


def test_steps_are_taken_only_when_they_are_asked_for(bench):
    taken = []

    def train(told):
        for number in range(3):
            taken.append(number)
            told(float(number))

    steps = begun(bench, train)
    assert steps.take(1) == [0.0] and steps.take(2) == [1.0, 2.0]
    for _ in range(2):
        with pytest.raises(bench.VariantError, match="its training has ended"):
            steps.take(1)
    assert taken == [0, 1, 2]


def test_training_that_nobody_asks_for_anymore_ends(bench):
    steps, taken = bench.Steps(), []

    def train(told):
        while True:
            taken.append(len(taken))
            told(1.0)

    thread = threading.Thread(target=steps.run, args=[train], daemon=True)
    thread.start()
    steps.take(2)
    steps.end()
    thread.join(60)
    assert not thread.is_alive() and taken == [0, 1]


def test_what_goes_wrong_is_said_and_a_peer_that_is_not_there_is_skipped(bench):
    def train(told):
        raise MemoryError("no more")

    with pytest.raises(MemoryError):
        begun(bench, train).take(1)
    missing = ImportError("Using the `Trainer` requires `accelerate`", name="accelerate")
    assert bench.explained(missing) == "skipped: accelerate is not installed"
    assert bench.explained(MemoryError("no more")) == "MemoryError: no more"


def run(*argv):
    command = [sys.executable, str(PATH), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "minigpt3"], "--only is 'minigpt3', known are nanogpt, hf-trainer"),
        (["--case", "355M 8x1024"], "--case is '355M 8x1024', known are 124M 4x256"),
        (["--dropout", "1"], "--dropout is (1.0,), allowed are rates from 0 to below 1"),
        (["--dtype", "int8"], "--dtype is 'int8', allowed are float32 and bfloat16"),
        (["--rounds", "0"], "--rounds is 0, allowed is 1 or more"),
    ],
)
def test_flags_that_cannot_be_measured_are_named(flags, message):
    done = run(*flags)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_every_variant_takes_the_same_steps(bench, tmp_path):
    names, out = ["nanogpt", "hf-trainer", "minigpt2"], tmp_path / "table.md"
    flags = ["--case", "nano 16x128", "--rounds", 1, "--steps", 2, "--threads", 1]
    done = run(*flags, "--only", *names, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == out.read_text()
    rows = rows_of(done.stdout.splitlines())
    assert list(rows) == [("nano 16x128", rate, name) for rate in ("0", "0.1") for name in names]
    for (_, rate, _), row in rows.items():
        assert float(row["off by"]) < (1e-4 if rate == "0" else 0.05)
        assert float(row["s/step"].split()[0]) > 0 and 0 < float(row["of peak"].split()[0]) < 1.1
