"""The GPU check: its arithmetic, that a broken check is a row like any other, and that the whole
runs on a CPU.
"""

import logging
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benches import loaded
from minigpt2.model import GPT2, GPT2Config
from scripts import ROOT

PATH = ROOT / "benchmarks" / "gpu_check.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu_check():
    with loaded("gpu_check") as module:
        yield module


@pytest.fixture
def bench(gpu_check, tmp_path, tmp_path_factory, monkeypatch):
    """The checks of a tiny run."""
    # one for all: the C function is built once
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return gpu_check.prepare(
        gpu_check.CheckOptions(device="cpu", preset="nano", batch_size=1, quick=True), tmp_path
    )


def rows_of(table):
    """{what: (result, bound, verdict)} of a Markdown table."""
    cells = [[cell.strip() for cell in line.split(" | ")] for line in table[2:]]
    return {what.removeprefix("| "): tuple(rest[:3]) for what, *rest in cells}


def test_a_check_that_fails_or_breaks_is_a_row_and_the_others_still_run(gpu_check):
    def breaks():
        raise ZeroDivisionError("first | line\nsecond line")

    def impossible():
        raise gpu_check.NotTriedError("no such card")

    checks = [
        ("holds", lambda: gpu_check.Outcome("1", "<= 2", True)),
        ("fails", lambda: gpu_check.Outcome("3", "<= 2", False)),
        ("breaks", breaks),
        ("impossible", impossible),
        ("measured", lambda: gpu_check.Outcome("5 tokens/s")),
    ]
    table = []
    assert gpu_check.report(checks, table.append, CPU) == 2
    assert rows_of(table) == {
        "holds": ("1", "<= 2", "pass"),
        "fails": ("3", "<= 2", "**FAIL**"),
        "breaks": (r"ZeroDivisionError: first \| line", "", "**FAIL**"),
        "impossible": ("not tried: no such card", "", ""),
        "measured": ("5 tokens/s", "", ""),
    }


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_code_says_whether_a_check_failed(gpu_check, monkeypatch, tmp_path, ok):
    checks = [("the one", lambda: gpu_check.Outcome("x", ok=ok)), ("another", lambda: 1 / 0)]
    monkeypatch.setattr(gpu_check, "checks", lambda bench: iter(checks))
    options = gpu_check.CheckOptions(
        device="cpu", preset="nano", only=("one",), out=str(tmp_path / "table.md")
    )
    assert gpu_check.main(options) == (0 if ok else 1)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert rows_of(table) == {"the one": ("x", "", "pass" if ok else "**FAIL**")}


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("Tesla T4", 65, 8.1),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A10G", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_are_those_of_this_very_card_or_unknown(gpu_check, name, half, single):
    assert gpu_check.peak_tflops(name, torch.bfloat16) == half
    assert gpu_check.peak_tflops(name, torch.float32) == single


def test_flops_are_what_torch_counts_with_half_of_the_attention(gpu_check):
    config = GPT2Config(vocab_size=300, block_size=34, n_embd=22, n_layer=3, n_head=2)
    model = GPT2(config)
    idx = torch.zeros(5, 34, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    causal_half = 6 * 3 * 22 * 34  # torch counts what the mask hides too
    counted = counter.get_total_flops() / idx.numel() - causal_half
    assert gpu_check.flops_per_token(config) == counted


@pytest.mark.parametrize(
    ("expected", "error", "ok"), [(1099, "+9.9%", True), (1101, "+10.1%", False), (850, "-15", 0)]
)
def test_a_forecast_is_judged_by_the_measured_peak(gpu_check, expected, error, ok):
    text, fits = gpu_check.compared(1000, expected)
    assert error in text and fits == ok


def test_a_compiler_that_fails_is_not_measured_as_if_it_had_worked(gpu_check, bench, monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    outcome = gpu_check.attempt(
        lambda: gpu_check.training(bench, torch.float32, lambda: None, compiled=True)
    )
    assert not outcome.ok and "no compiler here" in outcome.result


def test_the_most_sequences_that_are_said_to_fit_are_tried(gpu_check, bench, monkeypatch):
    need = gpu_check.forecast(bench, bench.config, torch.bfloat16, 5, False, True)
    monkeypatch.setattr(gpu_check, "memory_budget", lambda device: need)
    tried = []

    def train(bench, dtype, *, batch_size, n_steps):
        tried.append(batch_size)
        used = batch_size - (len(tried) > 1)
        return gpu_check.Trained([], 0, 1.0, batch_size, used, None, None)

    monkeypatch.setattr(gpu_check, "train", train)
    assert gpu_check.chosen_micro_batch(bench).ok
    assert not gpu_check.chosen_micro_batch(bench).ok  # out of memory: halved
    assert tried == [5, 5]


def test_less_memory_is_asked_of_the_current_card_and_given_back(gpu_check, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given)
    )
    with (
        pytest.raises(torch.OutOfMemoryError),
        gpu_check.memory_limit(torch.device("cuda"), 250),
    ):
        raise torch.OutOfMemoryError
    assert asked == [(0.25, 3), (1.0, 3)]


def test_greedy_texts_need_a_model_that_does_not_repeat_itself(gpu_check, bench, monkeypatch):
    # GPT-2's start, with bold scores: what it says next is what it read last
    start = GPT2(bench.config, generator=torch.Generator().manual_seed(2)).eval()
    start.wte.weight.data.mul_(20)
    monkeypatch.setattr(gpu_check, "randomised", lambda config: start)
    outcome = gpu_check.greedy_tokens(bench, "float32", compiled=False)
    assert not outcome.ok and "off by 0.0e+00" in outcome.result


def without_a_bias(load):
    """`load`, but for the bias of one matrix."""

    def loaded(*given, **options):
        model = load(*given, **options)
        model.h[1].attn.c_proj.bias.data.zero_()
        return model

    return loaded


needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
GREEDY_CASES = [("float32", False), ("bfloat16", False), ("int8", False)]


@pytest.mark.parametrize(
    ("number", "compiled"), [*GREEDY_CASES, pytest.param("int8", True, marks=needs_a_compiler)]
)
def test_greedy_texts_are_those_of_the_plain_twin(gpu_check, bench, monkeypatch, number, compiled):
    assert (number, compiled) in gpu_check.greedy_cases(bench)
    assert gpu_check.greedy_tokens(bench, number, compiled=compiled).ok
    monkeypatch.setattr(
        gpu_check, "generate", lambda model, rows, **given: [[*range(7, 39)] for _ in rows]
    )
    assert not gpu_check.greedy_tokens(bench, number, compiled=compiled).ok


def test_a_model_that_goes_on_without_what_is_checked_is_no_pass(gpu_check, bench, monkeypatch):
    load = gpu_check.load

    def noticed(*given, **options):
        logging.getLogger(gpu_check.graphs.__name__).warning("no CUDA graph: going on without")
        return load(*given, **options)

    monkeypatch.setattr(gpu_check, "load", noticed)
    for check in (
        lambda: gpu_check.greedy_tokens(bench, "float32", compiled=False),
        lambda: gpu_check.sampling(bench, torch.float32, 1),
    ):
        outcome = gpu_check.attempt(check)
        assert not outcome.ok and "no CUDA graph" in outcome.result


@pytest.mark.parametrize("wrong", [False, True])
def test_tokens_with_the_log_probabilities_of_another_model_have_no_speed(
    gpu_check, bench, monkeypatch, wrong
):
    if wrong:
        monkeypatch.setattr(gpu_check, "load", without_a_bias(gpu_check.load))
    outcome = gpu_check.sampling(bench, torch.float32, 2)
    assert outcome.ok is not wrong
    assert ("tokens/s" in outcome.result) is not wrong


def test_tokens_with_log_probabilities_that_are_no_numbers_have_no_speed(
    gpu_check, bench, monkeypatch
):
    draws = gpu_check.draws

    def nan(*given):
        for new in draws(*given):
            yield [[token._replace(logprob=float("nan")) for token in row] for row in new]

    monkeypatch.setattr(gpu_check, "draws", nan)
    outcome = gpu_check.sampling(bench, torch.float32, 1)
    assert not outcome.ok and "tokens/s" not in outcome.result


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        ([7.5, 7.2, 7.0], True),
        ([7.5, 7.2, 7.07], True),  # by 0.0093 of 7.5
        ([7.5, 7.2, 6.9], False),  # which falls further
        ([7.5, 7.4, 7.0], False),
        ([7.5, float("nan"), 7.0], False),
        ([7.5, 7.4, 7.3], False),
    ],
)
def test_training_that_has_other_losses_than_float32_has_no_speed(
    gpu_check, bench, monkeypatch, found, ok
):
    def trained(losses):
        return gpu_check.Trained(losses, 0, 1.0, 1, 1, None, None)

    monkeypatch.setattr(gpu_check, "train_without_dropout", lambda *_, **__: trained(found))
    exact = trained([7.5, 7.2, 7.0])
    outcome = gpu_check.training(bench, torch.bfloat16, lambda: exact)
    assert outcome.ok is ok
    assert ("tokens/s" in outcome.result) is ok
    assert gpu_check.training(bench, torch.float32, lambda: exact).ok


def test_training_is_compared_on_the_batches_of_float32_and_without_dropout(gpu_check, bench):
    exact = gpu_check.train_without_dropout(bench, torch.float32)
    assert bench.without_dropout.attn_pdrop == bench.without_dropout.resid_pdrop == 0
    for compiled_or_recomputed in ({}, {"recomputed": True}):
        outcome = gpu_check.training(bench, torch.bfloat16, lambda: exact, **compiled_or_recomputed)
        assert "off by" in outcome.result and "tokens/s" in outcome.result, outcome


class AnotherStep:
    """A plain step that learns something else after its first loss."""

    def __init__(self, step, change):
        self.step, self.change, self.n_taken = step, change, 0

    def __call__(self, batch):
        self.n_taken += 1
        return self.step(batch) + self.change * (self.n_taken > 1)


@pytest.mark.parametrize(("change", "ok"), [(0.0, True), (0.05, False), (float("nan"), False)])
def test_a_plain_step_with_other_losses_at_last_has_no_speed(
    gpu_check, bench, monkeypatch, change, ok
):
    plain = gpu_check.PlainStep
    monkeypatch.setattr(gpu_check, "PlainStep", lambda *given: AnotherStep(plain(*given), change))
    outcome = gpu_check.next_to_a_plain_step(bench)
    assert outcome.ok is ok
    assert ("times as fast" in outcome.result) is ok


def test_the_documentation_explains_every_row(gpu_check, bench):
    documented = (ROOT / "docs" / "benchmarks.md").read_text()
    explained = [line[2:].split(" | ")[0] for line in documented.splitlines() if line[:2] == "| "]
    for what, _ in gpu_check.checks(bench):
        kind, *details = what.split(", ")
        numbers = ("float", "bfloat", "int8")
        last = [detail for detail in details if not detail.startswith(numbers)]
        assert any(row.startswith(kind) for row in explained), what
        if kind in ("training", "greedy tokens") and last:
            assert f"{kind}, {last[-1]}" in explained, what


@pytest.mark.slow
def test_every_row_works_on_the_cpu(tmp_path):
    out = tmp_path / "table.md"
    flags = ["--device", "cpu", "--preset", "nano", "--quick", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(PATH), *flags, "--batch-size", "2"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        timeout=900,  # many rows, on a machine that may be busy
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == out.read_text()
    rows = rows_of(done.stdout.splitlines())
    assert len(rows) == 28
    verdicts = {verdict for _, _, verdict in rows.values()}
    assert verdicts == {"pass", ""}
    assert rows["resume"][1:] == ("0", "pass")
