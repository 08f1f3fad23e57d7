"""Continue a prompt with GPT-2 or a model you trained: python sample.py --prompt "One day" """

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..corpus.options import unescape
from ..decoding.options import SampleOptions
from ..errors import InputError
from ..hub.folders import require_source
from ..system.signals import raise_on_signals
from .console import explain, printable, run_script
from .prompts import asked, read_prompts, recorded_words, trained_with_special_tokens

if TYPE_CHECKING:
    from ..decoding.chat import Conversation
    from ..decoding.drafters import DrafterFactory
    from ..decoding.text import Completion
    from ..model import GPT2
    from ..tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def main(options: SampleOptions) -> int:
    """Load model and tokenizer, and write continuations to stdout."""
    prompts = read_prompts(options)
    for source in filter(None, (options.model, options.draft)):
        require_source(source)
    # with all that is heavy, before signals are raised
    from ..decoding.drafters import DrafterFactory
    from ..decoding.ready import load_with_tokenizer
    from ..system.precision import pick_device

    raise_on_signals()
    device = pick_device(options.device).type
    in_c = device == "cpu" and options.dtype in ("auto", "float32", "int8")
    if options.compile and device != "cuda" and not in_c:
        widths = "only --dtype float32 and int8 have something"
        parts = widths if device == "cpu" else "there is nothing"
        logger.warning(f"--compile changes nothing: on {device} {parts} to compile")
    model, tokenizer = load_with_tokenizer(
        options.model,
        device=options.device,
        dtype=options.dtype,
        compiled=options.compile,
        cpu_routine=options.cpu_routine,
    )
    tell_idle_special_tokens(options, tokenizer, prompts)
    drafters = DrafterFactory(options, tokenizer, model)
    if options.interactive:
        converse(model, tokenizer, options, drafters)
    elif options.json or len(prompts) * options.num_samples > 1:
        write_samples(model, tokenizer, prompts, options, drafters)
    else:
        write_stream(model, tokenizer, prompts[0], options, drafters)
    if drafters.forward_passes:
        per_pass = drafters.tokens / drafters.forward_passes
        logger.info("tokens per forward pass: %.2f", per_pass)
    return 0


def tell_idle_special_tokens(
    options: SampleOptions, tokenizer: Tokenizer, prompts: list[str]
) -> None:
    """Say so where --special-tokens was given, and no prompt has one."""
    chat = options.interactive and tokenizer.has_chat_template  # what is said is plain text
    found = any(map(tokenizer.special_in, prompts)) or not (prompts or chat)
    idle = options.special_tokens and not found
    if idle and not trained_with_special_tokens(Path(options.model)):
        reason = (
            "in a chat what is asked is plain text" if chat else "no special token is in a prompt"
        )
        logger.warning("--special-tokens changes nothing: %s", reason)


def decoding(options: SampleOptions) -> dict[str, Any]:
    """The flags that `complete` and `stream_text` both take."""
    names = ("max_new_tokens", "sampling", "seed", "finish_sentence")
    texts = {"stop": options.stop, "ban": options.ban}
    return {
        "special": options.special_tokens,
        **{name: getattr(options, name) for name in names},
        **{name: [unescape(text) for text in given] for name, given in texts.items()},
    }


def write_stream(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    options: SampleOptions,
    drafters: DrafterFactory,
    row: int = 0,
    conversation: Conversation | None = None,
) -> None:
    """Write the prompt and its continuation as it grows; after Ctrl-C what was written stays, and
    the line ends. In a conversation the answer alone is written, and remembered.
    """
    from ..decoding.text import stream_text

    how = {**decoding(options), "row": row, "drafter": drafters.of(row)}
    asked_for = conversation.ask(prompt) if conversation else prompt
    if conversation is None:
        write(prompt)
    elif end := tokenizer.chat.end_of_answer:
        how["stop"] = [*how["stop"], end]
    answer = ""
    try:
        for piece in stream_text(model, tokenizer, asked_for, **how):
            answer += piece
            write(piece)
    finally:
        if conversation:
            conversation.answered(answer)
        write("\n")


def write_samples(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: list[str],
    options: SampleOptions,
    drafters: DrafterFactory,
) -> None:
    """Write --num-samples continuations of every prompt in order, as text under a heading each or
    as one JSON object each. Sample k of a prompt does not depend on what else is sampled: it is
    drawn with the random numbers of row k, whichever prompt it is of, so equal prompts get equal
    texts.
    """
    from ..decoding.text import complete
    from .progress import TokenBar

    rows = ((p, k) for p in range(len(prompts)) for k in range(options.num_samples))
    with TokenBar(len(prompts) * options.num_samples, options.max_new_tokens) as bar:
        while batch := list(islice(rows, drafters.rows_at_once)):
            completions = complete(
                model,
                tokenizer,
                [prompts[p] for p, _ in batch],
                rows=[k for _, k in batch],
                drafter=drafters.of(batch[0][1]),
                top_logprobs=options.top_logprobs,
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
        row = {"prompt": prompts[p], "sample": k + 1, **asdict(completion)}
        if not options.top_logprobs:
            del row["top_logprobs"]
        print(json.dumps(row, allow_nan=False), flush=True)
        return
    which = f"prompt {p + 1} of {len(prompts)}, " if len(prompts) > 1 else ""
    write(f"--- {which}sample {k + 1} of {options.num_samples} ---\n")
    write(f"{prompts[p]}{completion.text}\n")


def converse(
    model: GPT2, tokenizer: Tokenizer, options: SampleOptions, drafters: DrafterFactory
) -> None:
    """Ask for a prompt, continue it, and so on until Ctrl-D; Ctrl-C ends an answer only. The same
    prompt gets another answer when it is asked again. A model with a chat template remembers what
    was said.
    """
    from ..decoding.chat import Conversation

    conversation = None
    if tokenizer.has_chat_template:
        sizes = {"block_size": model.config.block_size, "max_new_tokens": options.max_new_tokens}
        conversation = Conversation(tokenizer, **sizes)
        logger.info("%s was trained on chats: what is asked is remembered", options.model)
    for number, prompt in zip(count(), asked()):
        try:
            write_stream(
                model, tokenizer, prompt, options, drafters, row=number, conversation=conversation
            )
        except KeyboardInterrupt:
            continue
        except InputError as problem:
            print(f"error: {explain(problem)}", file=sys.stderr)


def write(text: str) -> None:
    """Text to stdout at once, without what could take over a terminal."""
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()


def run(argv: Sequence[str] | None = None) -> int:
    """The command, from its flags to its exit code."""
    return run_script(main, SampleOptions, argv, recorded=recorded_words)
