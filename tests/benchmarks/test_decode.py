"""The decoding benchmark: its arithmetic, that a variant that fails is a row like any other, and
that the whole runs.
"""

import json
import os
import subprocess
import sys
from itertools import groupby

import pytest

from benches import cells_of, loaded
from scripts import ROOT, tiny_folder

PATH = ROOT / "benchmarks" / "decode.py"
PROMPT, NEW = 7, 150


@pytest.fixture(scope="module")
def bench():
    with loaded("decode") as module:
        yield module


def rows_of(table):
    """{(variant, batch): {column: cell}} of a Markdown table."""
    return {(row["variant"], int(row["batch"])): row for row in cells_of(table)}


def run(*argv, stdin=""):
    return subprocess.run(
        [sys.executable, str(PATH), *map(str, argv)],
        input=stdin,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        timeout=600,
    )


class FakeProcess:
    """Takes 0.5 s for a prompt and 0.01 s for each token after the first one; without a cache,
    0.01 s for every token.
    """

    def __init__(self, name):
        self.name, self.calls = name, []

    def call(self, rows, new):
        self.calls.append((len(rows), len(rows[0]), new))
        seconds = 0.01 * new if self.name == "nanogpt" else 0.5 + 0.01 * (new - 1)
        return seconds, 1000, [[5] * new] * len(rows)


@pytest.fixture
def still(bench, monkeypatch):
    monkeypatch.setattr(bench, "SETTLE", 0)


def outcome(bench, variant, batch, rests, *, precision="float32", problem=None):
    samples = [bench.Sample(first=0.25, rest=rest, peak=3_000_000) for rest in rests]
    return bench.Outcome(variant, precision, batch, 1.5, samples, problem, 0.00002)


def test_figures_are_those_of_hand_made_samples(bench):
    outcomes = [
        outcome(bench, "nanogpt", 2, [20, 20, 20]),
        outcome(bench, "hf", 2, [8, 2, 8]),
        outcome(bench, "ctranslate2", 2, [4, 4, 4]),
        outcome(bench, "ctranslate2-int8", 2, [1, 1, 1], precision="int8"),
        outcome(bench, "llamacpp", 2, [6, 6, 6]),
        outcome(bench, "llamacpp-int8", 2, [2, 2, 2], precision="int8"),
        outcome(bench, "minigpt2", 2, [1, 4, 2]),
        outcome(bench, "minigpt2-int8", 2, [0.5, 0.5, 0.5], precision="int8"),
        outcome(bench, "hf", 3, [16, 16, 16]),
        outcome(bench, "minigpt2", 3, [2, 2, 2]),
    ]
    rows = rows_of(bench.table(outcomes, 11, 4 * 10**8))
    assert rows["minigpt2", 2] == {
        "variant": "minigpt2",
        "batch": "2",
        "tok/s": "10.0 (5.0 to 20.0)",  # 10 tokens of 2 rows after the first one, in 2 s
        "with prompt": "9.8 (5.2 to 17.6)",
        "ms/token": "200.0 (100.0 to 400.0)",
        "GB/s": "8.0",  # 1.6 GB in 0.2 s
        "first token, s": "0.250 (0.250 to 0.250)",
        "to hf": "4.00 (0.50 to 8.00)",  # the ratios are 8, 0.5 and 4
        "to ctranslate2": "2.00 (1.00 to 4.00)",
        "to llama.cpp": "3.00 (1.50 to 6.00)",
        "to nanogpt": "10.00 (5.00 to 20.00)",
        "to float32": "",
        "start, s": "1.50",
        "peak, MB": "3",
        "off by": "2.0e-05",
    }
    int8 = rows["minigpt2-int8", 2]
    assert int8["to ctranslate2"].startswith("2.00 ")  # to the one of its precision
    assert int8["to llama.cpp"].startswith("4.00 ")
    assert int8["to float32"] == "4.00 (2.00 to 8.00)"  # to the same program
    assert rows["ctranslate2-int8", 2]["to float32"].startswith("4.00 ")
    assert int8["GB/s"] == "8.0"
    assert rows["minigpt2", 3]["to hf"].startswith("8.00 ")  # to the one at its batch size
    assert rows["minigpt2", 3]["to ctranslate2"] == rows["minigpt2", 3]["to nanogpt"] == ""


def test_a_peer_that_has_one_precision_only_is_not_its_own_float32(bench):
    half = outcome(bench, "hf", 1, [2, 2], precision="float16")
    (row,) = rows_of(bench.table([half], 11, 1000)).values()
    assert row["to hf"] == "1.00" and row["to float32"] == ""


def test_a_ratio_is_that_of_the_same_round(bench):
    own, peer = outcome(bench, "a", 1, [1, 10, 3]), outcome(bench, "hf", 1, [2, 30, 12])
    # of 2, 3 and 4; that of the medians would be 12 / 3
    assert bench.ratio(own, peer) == "3.00 (2.00 to 4.00)"
    assert bench.ratio(own, None) == ""
    assert bench.ratio(own, outcome(bench, "hf", 1, [2], problem="out of memory")) == ""


def test_variants_take_turns_in_an_order_that_drift_does_not_favour(bench, still):
    class Slower(FakeProcess):
        """Everything takes longer with every turn that anyone takes."""

        precision, start, problem = "float32", 1.0, None

        def call(self, rows, new):
            clock.append(self.name)
            return 0.5 + 1e-3 * new * (1 + len(clock) / 100), None, [[5] * new] * len(rows)

        def attempt(self, job):
            return job()

    clock = []
    options = bench.DecodeOptions(prompt=PROMPT, new=NEW, rounds=8)
    rows = bench.random_rows(1, PROMPT + NEW, 300)
    names = ["minigpt2", "minigpt2-ready", "minigpt2-compiled"]
    first, _, last = bench.take_turns([Slower(name) for name in names], rows, options)
    order = [name for name, _ in groupby(clock)]  # two turns of one after the other count once
    assert order == [*names, names[1]] * 4 + [names[0]]
    pairs = zip(first.samples, last.samples)
    ratios = [theirs.rest / own.rest for own, theirs in pairs]
    assert sum(ratio > 1 for ratio in ratios) == sum(ratio < 1 for ratio in ratios) == 4


def test_the_first_token_and_the_rest_are_told_apart(bench, still):
    process = FakeProcess("minigpt2")
    rows = bench.random_rows(3, PROMPT + NEW, 300)
    sample = bench.measure(process, rows, PROMPT, NEW, warm=True)
    assert (sample.first, sample.peak) == (0.5, 1000)
    assert sample.rest == pytest.approx((NEW - 1) * 0.01)
    assert process.calls == [(3, PROMPT, 1), (3, PROMPT, NEW)]
    bench.measure(process, rows, PROMPT, NEW, warm=False)
    assert process.calls[2:] == [(3, PROMPT, bench.FEW), (3, PROMPT, 1), (3, PROMPT, NEW)]


def test_without_a_cache_tokens_in_the_middle_of_the_text_count_for_all(bench, still):
    process = FakeProcess("nanogpt")
    rows = bench.random_rows(2, PROMPT + NEW, 300)
    sample = bench.measure(process, rows, PROMPT, NEW, warm=True)
    assert sample.rest == pytest.approx((NEW - 1) * 0.01)
    read = [PROMPT + made for made in range(1, NEW)]  # the tokens that each new one would read
    _, n_tokens, new = process.calls[-1]
    timed = [n_tokens + made for made in range(new)]
    assert sum(timed) / len(timed) == pytest.approx(sum(read) / len(read), abs=0.5)


def test_a_variant_that_fails_is_a_row_and_the_others_still_run(bench, still, monkeypatch):
    class Scripted(bench.Process):
        def begin(self, folder, work, rows):
            if self.name == "ctranslate2":
                raise ModuleNotFoundError("No module named 'ctranslate2'", name="ctranslate2")
            if self.name == "hf":
                raise MemoryError("first | line\nsecond line")
            self.start = 1.0

        def call(self, rows, new):
            turns.append((self.name, len(rows), new))
            if self.name == "minigpt2" and len(rows) == 2 and new == NEW:
                raise bench.VariantError("its process ended with -9")
            return float(new), None, [[7] * new] * len(rows)

    turns = []
    monkeypatch.setattr(bench, "Process", Scripted)
    options = bench.DecodeOptions(
        prompt=PROMPT,
        new=NEW,
        batch=(1, 2),
        rounds=2,
        only=("nanogpt", "hf", "ctranslate2", "minigpt2"),
    )
    outcomes = bench.compare(options, "folder", 300, ROOT, Exact())
    rows = rows_of(bench.table(outcomes, NEW, 1000))
    reasons = {variant: row["tok/s"] for (variant, batch), row in rows.items() if batch == 2}
    assert reasons["hf"] == r"MemoryError: first \| line second line"
    assert reasons["ctranslate2"] == "skipped: ctranslate2 is not installed"
    assert reasons["minigpt2"] == "its process ended with -9"
    assert (
        rows["minigpt2", 1]["to nanogpt"].startswith("1.00 ") and rows["minigpt2", 1]["to hf"] == ""
    )
    assert reasons["nanogpt"].startswith("2.0 ")
    # round by round, every other one backwards, and not again once it has failed
    whole = [turn[:2] for turn in turns if turn[2] in (bench.FEW, NEW) and turn[1] == 1]
    assert [name for name, _ in whole] == ["nanogpt"] * 2 + ["minigpt2"] * 2 + [
        "minigpt2",
        "nanogpt",
    ]
    assert sum(turn == ("minigpt2", 2, NEW) for turn in turns) == 1


class Exact:
    """Twins that write whatever is compared with them."""

    def off(self, twin, samples):
        return 0.0


def test_texts_are_compared_with_the_plain_twin_and_another_text_has_no_speed(bench, tmp_path):
    from minigpt2.decoding.int8 import quantize
    from minigpt2.generate import generate
    from minigpt2.model import GPT2
    from minigpt2.sampling import SamplingConfig

    folder = str(tiny_folder(tmp_path / "model", n_positions=41))
    prompts, options = [[5, 6, 7], [9, 8, 7]], {"max_new_tokens": 20, "sampling": SamplingConfig(0)}
    twins = bench.Twins(folder)
    ours = ("minigpt2", "minigpt2-ready", "minigpt2-compiled-int8", "minigpt2-compiled-float16")
    for variant in (*ours, "ctranslate2-int8", "llamacpp"):
        twin = GPT2.from_pretrained(folder)
        if variant == "minigpt2-compiled-int8":
            quantize(twin)
        if variant == "minigpt2-compiled-float16":
            twin = twin.half().float()
        right = generate(twin, prompts, **options)
        wrong = [right[0], [*right[1][:-1], (right[1][-1] + 1) % 300]]
        for added, off in ((right, False), (wrong, True)):
            sample = bench.Sample(1.0, 2.0, 3, ((prompts, added),))
            measured = bench.Outcome(variant, "float32", 2, 1.5, [sample, sample])
            judged = bench.judged(measured, twins, "cpu")
            assert (judged.problem is not None) is off, variant
            row = rows_of(bench.table([judged], 20, 1000))[variant, 2]
            assert ("writes another text than its plain twin" in row["tok/s"]) is off
            assert (row["ms/token"] == "") is off


def test_a_folder_of_float16_is_read_as_float32_and_one_of_float32_as_it_is(bench, tmp_path):
    from minigpt2.model import GPT2, GPT2Config
    from minigpt2.tokenizer import Tokenizer

    shape = GPT2Config(vocab_size=300, block_size=16, n_embd=32, n_layer=1, n_head=1)
    whole, half, made = (tmp_path / name for name in ("whole", "half", "made"))
    bench.randomised(shape).save_pretrained(whole, tokenizer=Tokenizer.gpt2(300))
    assert bench.model_folder(str(whole), made) == (str(whole), shape) and not made.exists()
    assert bench.saved(str(whole), str(half), "float16") == str(half)
    Tokenizer.gpt2(300).save(half)
    assert bench.model_folder(str(half), made) == (str(made), shape)
    rounded = GPT2.from_pretrained(whole).half().float().state_dict()
    for name, tensor in GPT2.from_pretrained(made).state_dict().items():
        assert tensor.equal(rounded[name]), name


def test_what_a_machine_or_its_user_lacks_is_skipped_and_what_goes_wrong_is_not(bench):
    missing = ModuleNotFoundError("No module named 'llama_cpp'", name="llama_cpp")
    assert bench.one_line(missing) == "skipped: llama-cpp-python is not installed"
    unable = bench.Unable("CTranslate2 has no float16 on this cpu")
    assert bench.one_line(unable) == "skipped: CTranslate2 has no float16 on this cpu"
    missing = ModuleNotFoundError("No module named 'yaml'", name="yaml")
    assert bench.one_line(missing) == "ModuleNotFoundError: No module named 'yaml'"


def test_the_header_says_with_what_the_processor_multiplies_and_how_ratios_are_made(
    bench, monkeypatch
):
    monkeypatch.setattr("turns.processor_name", lambda: "Xeon")
    monkeypatch.setattr("turns.instruction_sets", lambda: ["avx2", "f16c"])
    monkeypatch.setenv("CC", "no-such-compiler")
    assert bench.machine().startswith("Xeon (avx2 f16c), ")
    assert bench.machine().endswith(" cores; no C compiler")
    monkeypatch.setattr(bench, "describe", lambda device: (bench.machine(), "Fast"))
    said = "\n".join(bench.header(bench.DecodeOptions(rounds=6)))
    assert bench.machine() in said and "95 % intervals by order statistics" in said
    said = "\n".join(bench.header(bench.DecodeOptions(rounds=5)))
    assert "the least and the most, as an interval takes 6 rounds" in said


def test_what_was_timed_is_what_is_compared(bench, still):
    process = FakeProcess("minigpt2")
    rows = bench.random_rows(3, PROMPT + NEW, 300)
    sample = bench.measure(process, rows, PROMPT, NEW, warm=True)
    prompts = [row[:PROMPT] for row in rows]
    assert sample.texts == ((prompts, [[5]] * 3), (prompts, [[5] * NEW] * 3))
    uncached = bench.measure(FakeProcess("nanogpt"), rows, PROMPT, NEW, warm=True).texts[1]
    assert [len(row) for row in uncached[0]] == [PROMPT + (NEW - bench.FEW + 1) // 2] * 3
    assert uncached[1] == [[5] * bench.FEW] * 3


def test_the_model_that_is_made_writes_a_text_in_which_mistakes_show(bench):
    from minigpt2.generate import generate
    from minigpt2.model import GPT2Config
    from minigpt2.sampling import SamplingConfig

    model = bench.randomised(GPT2Config(vocab_size=300, n_embd=64, n_layer=4, n_head=4)).eval()
    assert all(parameter.detach().std() > 0.01 for parameter in model.parameters())
    (ids,) = generate(model, [[5]], max_new_tokens=40, sampling=SamplingConfig(temperature=0))
    assert len(set(ids)) > 5


def test_the_process_of_a_variant_says_in_one_line_why_it_fails(tmp_path):
    request = json.dumps([[[1, 2]], 3])
    done = run("--serve", "minigpt2", tmp_path, "cpu", stdin=f"{request}\n")
    (reply,) = done.stdout.splitlines()
    assert str(tmp_path) in json.loads(reply) and "Error: " in json.loads(reply)


@pytest.mark.parametrize("lengths", [[3, 2], [3, 4], [3]])
def test_a_variant_that_adds_another_number_of_tokens_is_not_measured(bench, lengths):
    added = [[5] * length for length in lengths]
    with pytest.raises(bench.VariantError, match="instead of 3 to each"):
        bench.timed(lambda rows, new: added, [[1], [2]], 3, "cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "minigpt3"], "--only is 'minigpt3', known there are nanogpt, hf"),
        (["--new", 1], "--new is 1, allowed is 2 or more"),
        (["--batch", 0], "--batch is (0,), allowed are numbers from 1"),
    ],
)
def test_flags_that_cannot_be_measured_are_named(flags, message):
    done = run(*flags)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_every_variant_of_ours_works_on_the_cpu(bench, tmp_path):
    folder, out = tiny_folder(tmp_path / "model", n_positions=PROMPT + NEW), tmp_path / "table.md"
    names = [name for name, variant in bench.VARIANTS.items() if "cpu" in variant.precisions]
    names = [name for name in names if name.startswith(("nanogpt", "minigpt2"))]
    sizes = ["--prompt", PROMPT, "--new", NEW, "--batch", 1, 3, "--rounds", 1, "--threads", 1]
    done = run("--model", folder, *sizes, "--out", out, "--only", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == out.read_text()
    assert f"prompt {PROMPT}, new {NEW}" in done.stdout
    rows = rows_of(done.stdout.splitlines())
    assert list(rows) == [(name, batch) for batch in (1, 3) for name in names]
    for row in rows.values():
        assert float(row["to nanogpt"].split()[0]) > 0 and float(row["start, s"]) > 0
        assert row["to hf"] == row["to ctranslate2"] == ""
        assert float(row["off by"]) < 0.01
