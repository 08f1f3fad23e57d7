"""Continue a prompt with GPT-2 or a model you trained: python sample.py --prompt "One day" """

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from minigpt2.console import explain, printable, run_script
from minigpt2.errors import InputError
from minigpt2.options import SampleOptions, unescape
from minigpt2.prompts import asked, read_prompts

if TYPE_CHECKING:
    from minigpt2.generate import Completion
    from minigpt2.model import GPT2
    from minigpt2.speculative import Tally
    from minigpt2.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
AT_ONCE = 8  # rows that are decoded together


def main(options: SampleOptions) -> int:
    """Load model and tokenizer, and write continuations to stdout."""
    prompts = read_prompts(options)
    from minigpt2.generate import check_fits
    from minigpt2.loading import load
    from minigpt2.tokenizer import Tokenizer

    model = load(
        options.model, device=options.device, dtype=options.dtype, compiled=options.compile
    )
    tokenizer = Tokenizer.from_pretrained(options.model)
    check_fits(tokenizer, model)
    drafters = Drafters(options, tokenizer)
    if options.interactive:
        converse(model, tokenizer, options, drafters)
    elif options.json or len(prompts) * options.num_samples > 1:
        write_samples(model, tokenizer, prompts, options, drafters)
    else:
        write_stream(model, tokenizer, prompts[0], options, drafters)
    if drafters.readings:
        logger.info("tokens per reading: %.2f", drafters.tokens / drafters.readings)
    return 0


class Drafters:
    """Whoever guesses ahead, one for each text: what a sample is does not depend on others."""

    def __init__(self, options: SampleOptions, tokenizer: Tokenizer) -> None:
        """Loads the model of --draft. Raises InputError when it has other tokens."""
        self._options, self._vocab_size = options, tokenizer.vocab_size
        self._small: GPT2 | None = None
        self._made: list[Tally] = []
        if options.draft is None:
            return
        from minigpt2.loading import load
        from minigpt2.tokenizer import Tokenizer

        if not Tokenizer.from_pretrained(options.draft).same_tokens(tokenizer):
            raise InputError(
                f"--draft {options.draft} has other tokens than --model {options.model}: "
                "use a model with the same tokenizer"
            )
        self._small = load(
            options.draft, device=options.device, dtype=options.dtype, compiled=options.compile
        )

    @property
    def at_once(self) -> int:
        """How many texts to decode together: how far one is guessed would depend on the others."""
        return 1 if self._small or self._options.guess else AT_ONCE

    @property
    def readings(self) -> int:
        """In which the model checked guesses."""
        return sum(tally.readings for tally in self._made)

    @property
    def tokens(self) -> int:
        """That these readings brought."""
        return sum(tally.tokens for tally in self._made)

    def of(self, row: int) -> Tally | None:
        """A drafter for a text with the random numbers of this row; None without --guess and
        --draft.
        """
        from minigpt2.sampling import row_generator
        from minigpt2.speculative import DRAFT_GUESSES, Drafter, ModelDrafter, NGramDrafter, Tally

        options = self._options
        if self._small is not None:
            # a stream of its own: guesses must not be drawn with the numbers that check them
            drafter: Drafter = ModelDrafter(
                self._small,
                options.sampling,
                [row_generator(~options.seed, row)],
                n_guesses=options.guess or DRAFT_GUESSES,
                vocab_size=self._vocab_size,
            )
        elif options.guess:
            drafter = NGramDrafter(options.guess)
        else:
            return None
        self._made.append(Tally(drafter))
        return self._made[-1]


def decoding(options: SampleOptions) -> dict[str, Any]:
    """The flags that `complete` and `stream_text` share."""
    names = ("max_new_tokens", "sampling", "seed", "finish_sentence")
    texts = {"stop": options.stop, "ban": options.ban}
    return {
        **{name: getattr(options, name) for name in names},
        **{name: [unescape(text) for text in given] for name, given in texts.items()},
    }


def write_stream(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    options: SampleOptions,
    drafters: Drafters,
    row: int = 0,
) -> None:
    """Write the prompt and its continuation as it grows; after Ctrl-C what was written stays, and
    the line ends.
    """
    from minigpt2.generate import stream_text

    how = {**decoding(options), "row": row, "drafter": drafters.of(row)}
    write(prompt)
    try:
        for piece in stream_text(model, tokenizer, prompt, **how):
            write(piece)
    finally:
        write("\n")


def write_samples(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: list[str],
    options: SampleOptions,
    drafters: Drafters,
) -> None:
    """Write --num-samples continuations of every prompt in order, as text under a heading each or
    as one JSON object each. Sample k of a prompt does not depend on what else is sampled.
    """
    from minigpt2.generate import complete
    from minigpt2.progress import TokenBar

    rows = ((p, k) for p in range(len(prompts)) for k in range(options.num_samples))
    with TokenBar(len(prompts) * options.num_samples, options.max_new_tokens) as bar:
        while batch := list(islice(rows, drafters.at_once)):
            completions = complete(
                model,
                tokenizer,
                [prompts[p] for p, _ in batch],
                rows=[k for _, k in batch],
                drafter=drafters.of(batch[0][1]),
                on_tokens=bar.update,
                **decoding(options),
            )
            bar.finish_rows(len(batch))
            for (p, k), completion in zip(batch, completions):
                write_sample(prompts, p, k, completion, options)


def write_sample(
    prompts: list[str], p: int, k: int, completion: Completion, options: SampleOptions
) -> None:
    """Write sample k of prompt p."""
    if options.json:
        print(json.dumps({"prompt": prompts[p], "sample": k + 1, **asdict(completion)}), flush=True)
        return
    which = f"prompt {p + 1} of {len(prompts)}, " if len(prompts) > 1 else ""
    write(f"--- {which}sample {k + 1} of {options.num_samples} ---\n")
    write(f"{prompts[p]}{completion.text}\n")


def converse(model: GPT2, tokenizer: Tokenizer, options: SampleOptions, drafters: Drafters) -> None:
    """Ask for a prompt, continue it, and so on until Ctrl-D; Ctrl-C ends an answer only. The same
    prompt gets another answer when it is asked again.
    """
    for number, prompt in zip(count(), asked()):
        try:
            write_stream(model, tokenizer, prompt, options, drafters, row=number)
        except KeyboardInterrupt:
            continue
        except InputError as problem:
            print(f"error: {explain(problem)}", file=sys.stderr)


def write(text: str) -> None:
    """Text to stdout at once, without what could take over a terminal."""
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_script(main, SampleOptions))
