"""Measures guessing ahead next to plain decoding: python benchmarks/guess.py MODEL FILE...

From each file a beginning is taken as the prompt, and the model goes on from there, greedily and
with temperature 0.8: plainly, and with draft tokens guessed from what was written before, in turns.
With --draft a smaller model drafts, too. Prints a Markdown table: new tokens per forward pass that
checked draft tokens, and how many times as fast as plain decoding the same number of tokens came.

Every text that was timed is compared with the plain model before its row is printed: the
log-probabilities that decoding reported, which come from forward passes over several tokens, must
be those that the plain model gives the same tokens, and a greedy text must be the plain model's, up
to the rounding of the precision. "off by" is the most that either was, as a share of the largest
score. A row whose text is another has no speed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from minigpt2.decoding.drafters import CountingDrafter, ModelDrafter, NGramDrafter
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.ready import load
from minigpt2.equivalences import ROUNDED, WAYS, way_of_loaded
from minigpt2.evaluation.agreement import logprob_error, shortfall
from minigpt2.generate import DecodeSettings, Token, decode
from minigpt2.hub.folders import model_folder
from minigpt2.model import GPT2
from minigpt2.sampling import Drafter, SamplingConfig, row_generator
from minigpt2.tokenizer import Tokenizer

HEADER = (
    "| text | temperature | guesses | tokens per forward pass | next to plain | off by |",
    "| --- | ---: | --- | ---: | ---: | ---: |",
)
TEMPERATURES = (0.0, 0.8)
MakeDrafter = Callable[[SamplingConfig], Drafter]


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    model: GPT2
    twin: GPT2  # the plain model
    tolerance: float  # how far from the twin a text may be
    vocab_size: int
    n_new: int
    n_rounds: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a text is not what the plain model writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a Hub id or a folder")
    parser.add_argument("files", nargs="+", type=Path, help="texts to go on from")
    parser.add_argument("--draft", help="a smaller model with the same tokens")
    parser.add_argument("--dtype", default="auto", help="as for sample.py")
    parser.add_argument("--device", default="auto", help="as for sample.py")
    parser.add_argument("--prompt", type=int, default=400, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens added to it")
    parser.add_argument("--guesses", type=int, nargs="+", default=[4, 8], help="at once")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if min(options.prompt, options.rounds, *options.guesses) < 1 or options.new < 2:
        parser.error("--prompt, --guesses and --rounds are 1 or more, --new is 2 or more")
    options.model = model_folder(options.model)
    tokenizer = Tokenizer.from_pretrained(options.model)
    bench = prepared(options, tokenizer.vocab_size)
    print("\n".join(HEADER))
    guessers, n_wrong = drafters(options, tokenizer.vocab_size), 0
    for path in options.files:
        prompt = tokenizer.encode(path.read_text("utf-8"))[: options.prompt]
        for temperature in TEMPERATURES:
            sampling = SamplingConfig(temperature=temperature)
            for name, make in guessers.items():
                cells, right = measured(bench, prompt, sampling, make(sampling))
                n_wrong += not right
                print(f"| {path.name} | {temperature} | {name} | {cells} |", flush=True)
    return 1 if n_wrong else 0


def prepared(options: argparse.Namespace, vocab_size: int) -> Bench:
    """The model as sample.py loads it, and its plain twin."""
    model = load(options.model, device=options.device, dtype=options.dtype)
    weight = model.ln_f.weight
    dtype = "int8" if options.dtype == "int8" else str(weight.dtype).removeprefix("torch.")
    row = WAYS[way_of_loaded(weight.device.type, dtype)]
    twin = GPT2.from_pretrained(options.model)
    if row.twin == "int8":
        quantize(twin)
    # two scores may each be off by the tolerance
    tolerance = 2 * max(row.tolerance, ROUNDED)
    return Bench(model, twin, tolerance, vocab_size, options.new, options.rounds)


def drafters(options: argparse.Namespace, vocab_size: int) -> dict[str, MakeDrafter]:
    """Who guesses, by name."""
    made: dict[str, MakeDrafter] = {
        f"from the text, {n}": lambda _, n=n: NGramDrafter(n) for n in options.guesses
    }
    if options.draft:
        small = load(options.draft, device=options.device, dtype=options.dtype)
        made[options.draft] = lambda sampling: ModelDrafter(
            small, sampling, [row_generator(-1, 0)], vocab_size=vocab_size
        )
    return made


def measured(
    bench: Bench, prompt: list[int], sampling: SamplingConfig, drafter: Drafter
) -> tuple[str, bool]:
    """A row from its fourth column, and whether all texts that were timed are the plain model's."""
    counting, ratios, off = CountingDrafter(drafter), [], []
    for _ in range(bench.n_rounds):
        plain, plain_text = timed(bench, prompt, sampling, None)
        guessed, text = timed(bench, prompt, sampling, counting)
        ratios.append(plain / guessed)
        off += [distance(bench, prompt, tokens, sampling) for tokens in (plain_text, text)]
    per_pass = f"{counting.tokens / max(1, counting.forward_passes):.2f}"
    if wrong := [value for value in off if not value <= bench.tolerance]:  # NaN is wrong, too
        return f"writes another text than the plain model | | {max(wrong):.1e}", False
    speed = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{per_pass} | {speed} | {max(off):.1e}", True


def timed(
    bench: Bench, prompt: list[int], sampling: SamplingConfig, drafter: Drafter | None
) -> tuple[float, list[Token]]:
    """How long the new tokens take without the prefill, and the tokens."""
    write = partial(written, bench, prompt, sampling)
    began = time.perf_counter()
    write(1, None)
    first = time.perf_counter() - began
    began = time.perf_counter()
    tokens = write(bench.n_new, drafter)
    return time.perf_counter() - began - first, tokens


def written(
    bench: Bench, prompt: list[int], sampling: SamplingConfig, n_new: int, drafter: Drafter | None
) -> list[Token]:
    """The new tokens, with the log-probabilities that decoding reports."""
    tokens: list[Token] = []
    for (new,) in decode(
        bench.model,
        [prompt],
        DecodeSettings(n_new, sampling, vocab_size=bench.vocab_size, drafter=drafter),
        lambda row, token: False,
    ):
        tokens += new
    return tokens


def distance(
    bench: Bench, prompt: list[int], tokens: list[Token], sampling: SamplingConfig
) -> float:
    """How far a text is from what the plain model writes, as a share of the largest score."""
    if len(tokens) != bench.n_new:
        return float("inf")
    ids, logprobs = [token.id for token in tokens], [token.logprob for token in tokens]
    off = logprob_error(bench.twin, prompt, ids, logprobs, vocab_size=bench.vocab_size)
    if sampling.temperature > 0 or off != off:
        return off
    return max(off, shortfall(bench.twin, prompt, ids, vocab_size=bench.vocab_size))


if __name__ == "__main__":
    sys.exit(main())
