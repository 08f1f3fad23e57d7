"""Continue a prompt with GPT-2 or a model you trained: python sample.py --prompt "One day" """

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt2.console import printable, run_script
from minigpt2.errors import InputError, NotFoundError
from minigpt2.options import SampleOptions

if TYPE_CHECKING:
    from minigpt2.model import GPT2
    from minigpt2.tokenizer import Tokenizer


def main(options: SampleOptions) -> int:
    """Load model and tokenizer, and write continuations to stdout."""
    prompt = read_prompt(options)
    from minigpt2.generate import check_fits
    from minigpt2.model import GPT2
    from minigpt2.precision import pick_device, pick_dtype
    from minigpt2.tokenizer import Tokenizer

    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device, training=False)
    model = GPT2.from_pretrained(options.model, device=device, dtype=dtype)
    tokenizer = Tokenizer.from_pretrained(options.model)
    check_fits(tokenizer, model)
    if prompt is None:
        converse(model, tokenizer, options)
    elif options.json or options.num_samples > 1:
        write_samples(model, tokenizer, prompt, options)
    else:
        write_stream(model, tokenizer, prompt, options)
    return 0


def read_prompt(options: SampleOptions) -> str | None:
    """The prompt of the flags, a file or stdin; None when it is to be asked for."""
    if options.interactive:
        return None
    if options.prompt == "-":
        return decode_prompt(sys.stdin.buffer.read(), "stdin")
    if options.prompt_file is None:
        return options.prompt
    path = Path(options.prompt_file)
    if not path.is_file():
        raise NotFoundError(f"--prompt-file {path} does not exist or is no file")
    return decode_prompt(path.read_bytes(), str(path))


def decode_prompt(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a leading BOM."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise InputError(
            f"{where} is not UTF-8 at byte {problem.start}: convert it with iconv"
        ) from problem


def write_stream(model: GPT2, tokenizer: Tokenizer, prompt: str, options: SampleOptions) -> None:
    """Write the prompt and its continuation as it grows; after Ctrl-C what was written stays, and
    the line ends.
    """
    from minigpt2.generate import stream_text

    write(prompt)
    try:
        for piece in stream_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            seed=options.seed,
            stop=options.stop,
        ):
            write(piece)
    finally:
        write("\n")


def write_samples(model: GPT2, tokenizer: Tokenizer, prompt: str, options: SampleOptions) -> None:
    """Write --num-samples continuations, as text under a heading each or as one JSON object
    each.
    """
    from minigpt2.generate import complete

    completions = complete(
        model,
        tokenizer,
        [prompt] * options.num_samples,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        seed=options.seed,
        stop=options.stop,
    )
    for number, completion in enumerate(completions, start=1):
        if options.json:
            row = {
                "prompt": prompt,
                "text": completion.text,
                "ids": completion.ids,
                "finish_reason": completion.finish_reason,
            }
            print(json.dumps(row))
        else:
            write(f"--- sample {number} of {len(completions)} ---\n{prompt}{completion.text}\n")


def converse(model: GPT2, tokenizer: Tokenizer, options: SampleOptions) -> None:
    """Ask for a prompt, continue it, and so on until Ctrl-D; Ctrl-C ends an answer only."""
    with_history()
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            write("\n")
            return
        try:
            write_stream(model, tokenizer, prompt, options)
        except KeyboardInterrupt:
            continue


def with_history() -> None:
    """Line editing and history at the prompt, where Python has them."""
    try:
        import readline  # noqa: F401 - importing it is what changes input()
    except ImportError:
        return


def write(text: str) -> None:
    """Text to stdout at once, without what could take over a terminal."""
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_script(main, SampleOptions))
