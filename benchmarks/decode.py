"""Measures greedy decoding next to peers, in turns: python benchmarks/decode.py

Every variant is a process of its own that loads the same weights once and then waits for its turns:
one round of all variants, then the next in the opposite order, so that what else the machine does,
or does more and more, meets all alike. Prints a Markdown table. tok/s counts the new tokens of all
rows after the first one, so without the time that the prompt takes; "with prompt" all new tokens,
over all of the time. ms/token is the time from one token of a row to its next, GB/s the bytes that
the matrices have in the variant's precision, which each such step reads once, over that time.
"start" lasts from the start of the process to its first token, and "peak" is the most resident
memory of the process, Python included (on CUDA: of torch's tensors).

Ratios are those of tok/s in the same round, above 1 if the variant is faster: to a peer of its
precision (hf and nanogpt have one only), and "to float32" to the same program in float32. A cell
has the median of the rounds and in brackets its 95 % interval, by order statistics, so whatever the
spread of the ratios is. Fewer than 6 rounds have no such interval: then it is the least and the
most.

Every text that was timed is compared with its plain twin before any speed is printed: the plain
model reads the text, and at every token its best score may be above that of the token by no more
than the rounding of the variant explains. "off by" is the most that it was, as a share of the
largest score. A variant that writes another text has no speed, and the exit code is 1.

transformers, CTranslate2 and llama.cpp are peers of this benchmark, each where it is installed:
pip install transformers ctranslate2 llama-cpp-python gguf
"""

# No heavy import at the top: what a process imports counts for its start.
from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from peers import (
    PACKAGES,
    Rows,
    Run,
    Unable,
    ctranslate2,
    hugging_face,
    llama_cpp,
    written_for_ctranslate2,
    written_for_llama_cpp,
)
from turns import (
    FEWEST,
    SETTLE,
    VariantError,
    Worker,
    answer_all,
    in_one_line,
    machine,
    paired,
    peak_memory,
    seconds_of,
    spread,
    versions,
)

from minigpt2.errors import InputError

if TYPE_CHECKING:
    from minigpt2.model import GPT2, GPT2Config

FEW = 8  # tokens that are timed where each costs a pass over the whole text, and untimed to warm up
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # bytes of a weight
EVERYWHERE = {"cpu": "float32", "cuda": "float32"}
SERVE = "--serve"  # how this script starts itself
HEADER = (
    "| variant | batch | tok/s | with prompt | ms/token | GB/s | first token, s | to hf "
    "| to ctranslate2 | to llama.cpp | to nanogpt | to float32 | start, s | peak, MB | off by |"
)
# rounding of a peer, as a share of the largest score: the rows of WAYS are for ours
TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05, "int8": 0.1}

Converter = Callable[[str, str, str], str]  # a model folder, where to write, a precision -> a path
Loader = Callable[[str, str, str], Run]  # a model folder, a device, a precision


@dataclass(frozen=True)
class DecodeOptions:
    """Measure greedy decoding next to peers, and print a Markdown table."""

    model: str | None = None
    """Folder or Hub id of the model. Otherwise a 124M one with random weights is made."""
    prompt: int = 32
    """Tokens of each prompt."""
    new: int = 128
    """Tokens added to each prompt."""
    batch: tuple[int, ...] = (1, 8)
    """Prompts at once."""
    rounds: int = FEWEST
    """Measurements of each variant."""
    threads: int = 2
    """Threads of each variant."""
    device: str = "cpu"
    """cpu or cuda."""
    only: tuple[str, ...] = ()
    """Only these variants."""
    out: str | None = None
    """Also write what is printed to this file."""
    json: bool = False
    """Print every measurement as JSON instead of the table."""
    debug: bool = False
    """Show the full traceback of an error."""

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("new", 2), ("rounds", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} is {getattr(self, name)}, allowed is {least} or more")
        if not self.batch or min(self.batch) < 1:
            raise InputError(f"--batch is {self.batch}, allowed are numbers from 1")
        if self.device not in EVERYWHERE:
            raise InputError(f"--device is {self.device!r}, allowed are cpu and cuda")
        known = [name for name in VARIANTS if self.device in VARIANTS[name].precisions]
        if unknown := set(self.only).difference(known):
            raise InputError(f"--only is {min(unknown)!r}, known there are {', '.join(known)}")

    @property
    def variants(self) -> list[str]:
        """The names of those to measure, in the order of the table."""
        wanted = self.only or VARIANTS
        return [n for n in VARIANTS if n in wanted and self.device in VARIANTS[n].precisions]


@dataclass(frozen=True)
class Variant:
    """A way to decode, and the precision of its weights on each device that it is for."""

    load: Loader
    precisions: dict[str, str] = field(default_factory=lambda: EVERYWHERE)
    convert: Converter | None = None  # the folder into what it reads
    cached: bool = True  # otherwise it reads the whole text for every token
    ways: dict[str, str] = field(default_factory=dict)  # by device: rows of minigpt2.equivalences
    rounding: str = ""  # in TOLERANCE, where it is not that of its weights

    def twin(self, device: str) -> tuple[str, float]:
        """The row of the plain twin, and how far from it the texts of this variant may be."""
        from minigpt2.equivalences import PLAIN, WAYS

        row = WAYS.get(self.ways.get(device, ""))
        if row is None:
            return PLAIN, TOLERANCE[self.rounding or self.precisions[device]]
        # the plain twin of a file of float16 is the plain model with the numbers of that file
        twin = "float16" if self.precisions[device] == "float16" else row.twin
        # two scores may each be off by the tolerance
        return twin, 2 * max(row.tolerance, TOLERANCE["float32"])


@dataclass(frozen=True)
class Sample:
    """One round of a variant."""

    first: float  # seconds to the first token
    rest: float  # seconds for the others
    peak: int | None  # bytes
    texts: tuple[tuple[Rows, Rows], ...] = ()  # prompts and what was added to them in that time


@dataclass(frozen=True)
class Outcome:
    """All rounds of a variant at a batch size, or what went wrong."""

    variant: str
    precision: str
    batch: int
    start: float | None  # seconds
    samples: list[Sample]
    problem: str | None = None
    off: float | None = None  # from the text of its plain twin


def plain(folder: str, device: str, precision: str) -> GPT2:
    """The model as `from_pretrained` gives it."""
    from minigpt2.model import GPT2
    from minigpt2.system.precision import DTYPES

    return GPT2.from_pretrained(folder, device=device, dtype=DTYPES[precision])


def ready(folder: str, device: str, precision: str, *, compiled: bool = False) -> GPT2:
    """The model as `sample.py` makes it ready: packed on a CPU, recorded on a GPU."""
    from minigpt2.decoding.ready import load

    return load(folder, device=device, dtype=precision, compiled=compiled)


def ours(make: Callable[[str, str, str], GPT2], folder: str, device: str, precision: str) -> Run:
    """minigpt2's decoding of the model that `make` gives."""
    from minigpt2.generate import generate
    from minigpt2.sampling import SamplingConfig

    model, greedy = make(folder, device, precision), SamplingConfig(temperature=0)
    return lambda rows, new: generate(model, rows, max_new_tokens=new, sampling=greedy)


def nanogpt(folder: str, device: str, precision: str) -> Run:
    """nanoGPT's loop: the whole text is read for every token; only the last one is scored."""
    import torch

    model = plain(folder, device, precision)

    @torch.no_grad()
    def run(rows: Rows, new: int) -> Rows:
        idx = torch.tensor(rows, device=device)
        for _ in range(new):
            logits = model.head(model.hidden(idx)[:, -1:])
            idx = torch.cat((idx, logits.argmax(dim=-1)), dim=1)
        return idx[:, -new:].tolist()

    return run


def float16_file(folder: str, device: str, precision: str) -> GPT2:
    """The compiled model of a folder in float16: a CPU computes in float32 with what lies there."""
    return ready(folder, device, "float32" if device == "cpu" else precision, compiled=True)


def saved(folder: str, into: str, precision: str) -> str:
    """Write a model folder in another precision."""
    plain(folder, "cpu", precision).save_pretrained(into)
    return into


compiled = partial(ready, compiled=True)
# One of ours is a name, a function like `plain`, and, unless they are float32, its precisions.
VARIANTS = {
    "nanogpt": Variant(nanogpt, cached=False),
    "hf": Variant(hugging_face, {"cpu": "float32", "cuda": "float16"}),
    "ctranslate2": Variant(ctranslate2, convert=written_for_ctranslate2),
    "ctranslate2-int8": Variant(
        ctranslate2, {"cpu": "int8", "cuda": "int8"}, convert=written_for_ctranslate2
    ),
    "ctranslate2-float16": Variant(
        ctranslate2, {"cpu": "float16", "cuda": "float16"}, convert=written_for_ctranslate2
    ),
    "llamacpp": Variant(  # which rounds to 16 bits inside
        llama_cpp, {"cpu": "float32"}, convert=written_for_llama_cpp, rounding="float16"
    ),
    "llamacpp-int8": Variant(llama_cpp, {"cpu": "int8"}, convert=written_for_llama_cpp),
    "llamacpp-float16": Variant(llama_cpp, {"cpu": "float16"}, convert=written_for_llama_cpp),
    "minigpt2": Variant(partial(ours, plain)),
    "minigpt2-ready": Variant(
        partial(ours, ready), ways={"cpu": "packed float32", "cuda": "CUDA graph"}
    ),
    "minigpt2-compiled": Variant(
        partial(ours, compiled), ways={"cpu": "float32 in C", "cuda": "compiled decode step"}
    ),
    "minigpt2-ready-int8": Variant(
        partial(ours, ready),
        {"cpu": "int8", "cuda": "int8"},
        ways={"cpu": "packed int8", "cuda": "int8 on CUDA"},
    ),
    "minigpt2-compiled-int8": Variant(
        partial(ours, compiled),
        {"cpu": "int8", "cuda": "int8"},
        ways={"cpu": "int8 in C", "cuda": "int8 on CUDA"},
    ),
    "minigpt2-float16": Variant(partial(ours, plain), {"cuda": "float16"}),
    "minigpt2-ready-float16": Variant(partial(ours, ready), {"cuda": "float16"}),
    "minigpt2-ready-bfloat16": Variant(partial(ours, ready), {"cuda": "bfloat16"}),
    "minigpt2-compiled-float16": Variant(
        partial(ours, float16_file),
        {"cpu": "float16", "cuda": "float16"},
        convert=saved,
        ways={"cpu": "float16 in C"},
    ),
}


def main(options: DecodeOptions) -> int:
    """Measure, print the table and perhaps write it; 1 when a variant failed."""
    # for the processes, and before torch reads it here; how threads wait is the same for all
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        os.environ.pop(name, None)
    from minigpt2.system.precision import pick_device

    pick_device(options.device)  # which says so where it is missing
    with tempfile.TemporaryDirectory() as work:
        folder, config = model_folder(options.model, Path(work) / "model")
        if options.prompt + options.new > config.block_size:
            raise InputError(
                f"--prompt {options.prompt} and --new {options.new} are together more than the "
                f"{config.block_size} positions of the model"
            )
        about = header(options)
        outcomes = compare(options, folder, config.vocab_size, Path(work), Twins(folder))
    if options.json:
        found = {"about": about, "outcomes": [*map(measured, outcomes)]}
        text = json.dumps(found, indent=1, allow_nan=False)
    else:
        text = "\n".join([*about, "", *table(outcomes, options.new, n_weights(config))])
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    return int(any(o.problem and not o.problem.startswith("skipped") for o in outcomes))


def model_folder(source: str | None, made: Path) -> tuple[str, GPT2Config]:
    """The folder of the model, `made` unless the source is one in float32, and its shape."""
    import torch

    from minigpt2.formats.hugging_face import read_config, stored_dtypes
    from minigpt2.hub.folders import model_folder
    from minigpt2.model import GPT2, PRESETS, GPT2Config
    from minigpt2.tokenizer import Tokenizer

    if source is None:
        randomised(PRESETS["gpt2"]).save_pretrained(made, tokenizer=Tokenizer.gpt2())
        folder = made
    elif {*stored_dtypes(folder := model_folder(source)).values()} != {torch.float32}:
        # otherwise a file of float16 would be read as it lies, and called float32
        tokenizer = Tokenizer.of_model(source, folder)
        GPT2.from_pretrained(folder, dtype=torch.float32).save_pretrained(made, tokenizer=tokenizer)
        folder = made
    return str(folder), GPT2Config.from_hf(read_config(folder))


def randomised(config: GPT2Config) -> GPT2:
    """A model in which every parameter matters, so that a mistake in any changes the text: GPT-2's
    start has biases of 0, and says next what it has read last.
    """
    import torch

    from minigpt2.model import GPT2

    random = torch.Generator().manual_seed(2)
    model = GPT2(config, generator=random)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.04 * torch.randn(parameter.shape, generator=random))
    return model


def n_weights(config: GPT2Config) -> int:
    """Of the matrices that a token multiplies with."""
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    return config.n_layer * (4 * width**2 + 2 * width * inner) + config.vocab_size * width


def header(options: DecodeOptions) -> list[str]:
    """What was measured on what, with what."""
    hardware, bandwidth = describe(options.device)
    lines = [
        f"{hardware}; {versions('torch', *PACKAGES)}.",
        f"{options.threads} threads, prompt {options.prompt}, new {options.new}, rounds "
        f"{options.rounds}: medians, and the least and the most. {bandwidth}.",
        "Ratios are of the same round: medians, and "
        + (
            "95 % intervals by order statistics."
            if options.rounds >= FEWEST
            else f"the least and the most, as an interval takes {FEWEST} rounds."
        ),
    ]
    if "nanogpt" in options.variants and options.new > FEW:
        lines.append(f"nanogpt was timed for {FEW} tokens in the middle of the text.")
    return lines


def describe(device: str) -> tuple[str, str]:
    """The processor or the GPU, and the most bytes that it reads or copies in a second."""
    import torch

    hardware, block = machine(), torch.ones(2**28, device=device)  # 1 GiB
    if device == "cpu":
        rate = block.nbytes / min(seconds_of(block.sum, device) for _ in range(9)) / 1e9
        return hardware, f"Summing a GiB reads {rate:.1f} GB/s"
    copy = partial(torch.empty_like(block).copy_, block)
    rate = 2 * block.nbytes / min(seconds_of(copy, device) for _ in range(9)) / 1e9
    return f"{torch.cuda.get_device_name()}; {hardware}", f"Copying a GiB moves {rate:.0f} GB/s"


class Twins:
    """The plain models that texts are compared with, on the CPU."""

    def __init__(self, folder: str) -> None:
        self._folder, self._models = folder, {}

    def off(self, twin: str, samples: list[Sample]) -> float:
        """How far the texts of the samples are from those of a plain model (see `shortfall`)."""
        from minigpt2.evaluation.agreement import shortfall

        if twin not in self._models:
            self._models[twin] = self._load(twin)
        different = {
            (tuple(prompt), tuple(added))
            for sample in samples
            for prompts, texts in sample.texts
            for prompt, added in zip(prompts, texts)
        }
        return max(shortfall(self._models[twin], *text) for text in different)

    def _load(self, twin: str) -> GPT2:
        from minigpt2.decoding.int8 import quantize
        from minigpt2.equivalences import PLAIN

        assert twin in (PLAIN, "int8", "float16"), twin
        if twin == "float16":
            return plain(self._folder, "cpu", "float16").float()
        model = plain(self._folder, "cpu", "float32")
        if twin == "int8":
            quantize(model)
        return model


def compare(
    options: DecodeOptions, folder: str, vocab_size: int, work: Path, twins: Twins
) -> list[Outcome]:
    """Start every variant, measure all in turns, and compare what they wrote."""
    with contextlib.ExitStack() as stack:
        processes = [Process(name, options.device) for name in options.variants]
        rows = random_rows(1, options.prompt, vocab_size)
        for process in processes:
            stack.callback(process.end)
            process.attempt(partial(process.begin, folder, work, rows))
        outcomes = []
        for batch in options.batch:
            rows = random_rows(batch, options.prompt + options.new, vocab_size)
            timed = take_turns(processes, rows, options)
            outcomes += [judged(outcome, twins, options.device) for outcome in timed]
        return outcomes


def judged(outcome: Outcome, twins: Twins, device: str) -> Outcome:
    """The outcome with how far its texts are off, and no speed if they are those of no twin."""
    if outcome.problem:
        return outcome
    twin, most = VARIANTS[outcome.variant].twin(device)
    off = twins.off(twin, outcome.samples)
    if off <= most:
        return replace(outcome, off=off)
    problem = f"writes another text than its plain twin: off by {off:.2g}, allowed is {most:.2g}"
    print(f"{outcome.variant}: {problem}", file=sys.stderr)
    return replace(outcome, problem=problem, off=off)


def random_rows(n_rows: int, n_tokens: int, vocab_size: int) -> Rows:
    """Texts, the same for every variant, without the last id: it ends a text."""
    draw = random.Random(n_rows)
    return [[draw.randrange(vocab_size - 1) for _ in range(n_tokens)] for _ in range(n_rows)]


def take_turns(processes: list[Process], rows: Rows, options: DecodeOptions) -> list[Outcome]:
    """All rounds at a batch size, every other one backwards."""
    samples: list[list[Sample]] = [[] for _ in processes]
    for number in range(options.rounds):
        turns = [*zip(processes, samples)]
        for process, own in turns[::-1] if number % 2 else turns:
            turn = partial(measure, process, rows, options.prompt, options.new, warm=number > 0)
            sample = process.attempt(turn)
            own += [] if sample is None else [sample]
    return [
        Outcome(process.name, process.precision, len(rows), process.start, own, process.problem)
        for process, own in zip(processes, samples)
    ]


def measure(process: Process, rows: Rows, prompt: int, new: int, *, warm: bool) -> Sample:
    """One turn of a variant; what it does only once at a batch size, it does before."""
    time.sleep(SETTLE)
    prompts = [row[:prompt] for row in rows]
    if not warm:
        process.call(prompts, min(FEW, new))
    first, _, one = process.call(prompts, 1)
    if VARIANTS[process.name].cached or new <= FEW:
        texts = prompts
        seconds, peak, added = process.call(prompts, new)
        rest = seconds - first
    else:
        middle = prompt + (new - FEW + 1) // 2
        texts = [row[:middle] for row in rows]
        seconds, peak, added = process.call(texts, FEW)
        rest = seconds / FEW * (new - 1)
    if rest <= 0:
        raise VariantError(f"{new} new tokens are too few to be timed")
    return Sample(first, rest, peak, ((prompts, one), (texts, added)))


class Process(Worker):
    """A variant's process."""

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name)
        self.device, self.precision = device, VARIANTS[name].precisions[device]
        self.start: float | None = None  # seconds

    def begin(self, folder: str, work: Path, rows: Rows) -> None:
        """Start, and wait for the first token."""
        if convert := VARIANTS[self.name].convert:
            folder = convert(folder, str(work / self.name), self.precision)
        began = time.perf_counter()
        self.spawn([sys.executable, __file__, SERVE, self.name, folder, self.device])
        self.call(rows, 1)
        self.start = time.perf_counter() - began

    def call(self, rows: Rows, new: int) -> tuple[float, int | None, Rows]:
        """Seconds of an addition of so many tokens, peak memory, and the tokens; raises
        VariantError.
        """
        seconds, peak, added = self.ask([rows, new])
        return seconds, peak, added

    def explain(self, problem: Exception) -> str:
        """What went wrong, as a cell of the table."""
        return one_line(problem)


def serve(name: str, folder: str, device: str) -> None:
    """The process of a variant: for rows and a number of new tokens, the seconds they took, the
    peak memory and the tokens.
    """
    run: Run | None = None

    def answer(request: tuple[Rows, int]) -> tuple[float, int | None, Rows]:
        nonlocal run
        run = run or VARIANTS[name].load(folder, device, VARIANTS[name].precisions[device])
        seconds, added = timed(run, *request, device)
        return seconds, peak_memory(device), added

    answer_all(answer, one_line)


def timed(run: Run, rows: Rows, new: int, device: str) -> tuple[float, Rows]:
    """Seconds of a call, and what it added; raises VariantError for too few tokens, or too many."""
    added: Rows = []
    seconds = seconds_of(lambda: added.extend(run(rows, new)), device)
    if [len(row) for row in added] != [new] * len(rows):
        raise VariantError(f"added {[len(row) for row in added]} tokens instead of {new} to each")
    return seconds, added


def one_line(problem: Exception) -> str:
    """What went wrong, as a cell of the table."""
    installed_as = {module: package for package, module in PACKAGES.items()}
    if isinstance(problem, ModuleNotFoundError) and problem.name in installed_as:
        return f"skipped: {installed_as[problem.name]} is not installed"
    if isinstance(problem, Unable):
        return f"skipped: {problem}"
    return in_one_line(problem)


def measured(outcome: Outcome) -> dict:
    """An outcome for JSON, without the texts."""
    return asdict(replace(outcome, samples=[replace(s, texts=()) for s in outcome.samples]))


def table(outcomes: list[Outcome], new: int, weights: int) -> list[str]:
    """A Markdown table with a row for each outcome; so many weights are read for each token."""
    n_columns = HEADER.count("|") - 1
    lines = [HEADER, "| --- |" + " ---: |" * (n_columns - 1)]
    for outcome in outcomes:
        if outcome.problem:
            content = [outcome.problem.replace("|", r"\|")] + [""] * (n_columns - 3)
        else:
            peers = {other.variant: other for other in outcomes if other.batch == outcome.batch}
            content = figures(outcome, peers, new, weights * SIZES[outcome.precision])
        lines.append(f"| {' | '.join([outcome.variant, str(outcome.batch), *content])} |")
    return lines


def figures(outcome: Outcome, peers: dict[str, Outcome], new: int, size: int) -> list[str]:
    """A row from its third column; each step reads `size` bytes of weights."""
    batch, samples = outcome.batch, outcome.samples
    steps = [sample.rest / (new - 1) for sample in samples]
    peaks = [sample.peak for sample in samples if sample.peak is not None]
    own = "" if outcome.precision == "float32" else f"-{outcome.precision}"
    program = outcome.variant.removesuffix(own)
    compared = ("hf", f"ctranslate2{own}", f"llamacpp{own}", "nanogpt")
    return [
        spread([batch / step for step in steps]),
        spread([batch * new / (sample.first + sample.rest) for sample in samples]),
        spread([1000 * step for step in steps]),
        f"{size / median(steps) / 1e9:.1f}",
        spread([sample.first for sample in samples], 3),
        *(ratio(outcome, peers.get(name)) for name in compared),
        "" if program == outcome.variant else ratio(outcome, peers.get(program)),
        "" if outcome.start is None else f"{outcome.start:.2f}",
        f"{max(peaks) / 1e6:.0f}" if peaks else "",
        "" if outcome.off is None else f"{outcome.off:.1e}",
    ]


def ratio(outcome: Outcome, peer: Outcome | None) -> str:
    """How many times as fast as the peer, after the first token: the median of the rounds, and its
    interval.
    """
    if peer is None or peer.problem:
        return ""
    if peer is outcome:
        return "1.00"
    pairs = zip(outcome.samples, peer.samples)
    return paired([theirs.rest / own.rest for own, theirs in pairs])


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(*sys.argv[2:])
    else:
        from minigpt2.cli.console import run_script

        sys.exit(run_script(main, DecodeOptions))
