"""Measures guessing ahead next to plain decoding: python benchmarks/guess.py MODEL FILE...

From each file a beginning is taken as the prompt, and the model goes on from there, greedily and
with temperature 0.8: plainly, and with guesses from what was written before, in turns. With --draft
a smaller model guesses, too. Prints a Markdown table: tokens that each reading brought
with its guesses, and how many times as fast as plain decoding the same number of tokens came.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from minigpt2.generate import generate
from minigpt2.loading import load
from minigpt2.model import GPT2
from minigpt2.sampling import SamplingConfig, row_generator
from minigpt2.speculative import Drafter, ModelDrafter, NGramDrafter, Tally
from minigpt2.tokenizer import Tokenizer

MakeDrafter = Callable[[SamplingConfig], Drafter]


def main() -> int:
    """Print the table; always 0."""
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
    options = parser.parse_args()
    model = load(options.model, device=options.device, dtype=options.dtype)
    tokenizer = Tokenizer.from_pretrained(options.model)
    drafters: dict[str, MakeDrafter] = {
        f"from the text, {n}": lambda _, n=n: NGramDrafter(n) for n in options.guesses
    }
    if options.draft:
        small = load(options.draft, device=options.device, dtype=options.dtype)
        drafters[options.draft] = lambda sampling: ModelDrafter(
            small, sampling, [row_generator(-1, 0)], vocab_size=tokenizer.vocab_size
        )
    print("| text | temperature | guesses | tokens a reading | next to plain |")
    print("| --- | ---: | --- | ---: | ---: |")
    for path in options.files:
        prompt = tokenizer.encode(path.read_text("utf-8"))[: options.prompt]
        for temperature in (0.0, 0.8):
            sampling = SamplingConfig(temperature=temperature)
            for name, make in drafters.items():
                tally = Tally(make(sampling))
                ratios = [
                    seconds(model, prompt, options.new, sampling, None)
                    / seconds(model, prompt, options.new, sampling, tally)
                    for _ in range(options.rounds)
                ]
                brought = f"{tally.tokens / max(1, tally.readings):.2f}"
                speed = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"| {path.name} | {temperature} | {name} | {brought} | {speed} |", flush=True)
    return 0


def seconds(
    model: GPT2, prompt: list[int], n_new: int, sampling: SamplingConfig, drafter: Drafter | None
) -> float:
    """How long so many new tokens take, without the reading of the prompt."""
    began = time.perf_counter()
    generate(model, [prompt], max_new_tokens=1, sampling=sampling)
    first = time.perf_counter() - began
    began = time.perf_counter()
    generate(model, [prompt], max_new_tokens=n_new, sampling=sampling, drafter=drafter)
    return time.perf_counter() - began - first


if __name__ == "__main__":
    sys.exit(main())
