"""The options of all commands: which are flags, and which change nothing beside others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import fields

from ..arguments import flag
from ..corpus.options import CorpusOptions, TextConfig, VocabularyOptions
from ..decoding.options import SampleOptions
from ..errors import OptionError
from ..evaluation.options import EvaluateOptions, VerifyOptions
from ..explain.options import ExplainOptions
from ..formats.options import ConvertOptions
from ..runs.options import ReportOptions
from ..sampling import SamplingConfig
from ..training.options import TrainConfig, TrainOptions

# what the library calls otherwise than the commands
OTHER_NAMES = {"val_paths": "val_data", "rank": "lora_rank", "alpha": "lora_alpha"}

SHARED = (TrainConfig, TextConfig, SamplingConfig)  # by commands and library

COMMANDS = (TrainOptions, CorpusOptions, VocabularyOptions, SampleOptions, ConvertOptions)
COMMANDS += (ReportOptions, EvaluateOptions, VerifyOptions, ExplainOptions)

FLAGS = {option.name for options in (*SHARED, *COMMANDS) for option in fields(options)}
FLAGS -= {"text", "training", "sampling", "paths", "source", "dest", "run"}


def in_flags(problem: BaseException) -> str:
    """The text of an error in which the options that it names are flags, as they were typed."""
    text = str(problem)
    for name in problem.names if isinstance(problem, OptionError) else ():
        field = OTHER_NAMES.get(name, name)
        if field in FLAGS:
            # not in paths
            text = re.sub(rf"(?<![\w./-]){name}(?![\w/-]|\.\w)", flag(field), text)
    return text


NEUTRAL = {  # values that ask for nothing; of other fields None, False, 0 and ()
    "top_p": (1,), "num_samples": (1,), "repetition_penalty": (1,), "seed": (), "temperature": (),
    "cpu_routine": ("auto",),
}  # fmt: skip

DRAWS = ("seed", "top_k", "top_p", "min_p")

WRITES = ("stop", "ban", "guess", "draft", "compile", "cpu_routine", "temperature", *DRAWS)
WRITES += ("repetition_penalty", "no_repeat_ngram", "top_logprobs")


def without_effect(options: object, given: Collection[str]) -> Iterator[str]:
    """A line for each reason why fields that were given change nothing beside the other ones."""
    for names, reason in _idle(options):
        values = {**vars(options), **vars(getattr(options, "sampling", options))}
        values |= vars(getattr(options, "text", options))
        idle = [
            name
            for name in names
            if name in given and values[name] not in NEUTRAL.get(name, (None, False, ()))
        ]
        if idle:
            verb = "changes" if len(idle) == 1 else "change"
            yield f"{', '.join(map(flag, idle))} {verb} nothing: {reason}"


def _idle(options: object) -> Iterator[tuple[tuple[str, ...], str]]:
    """(fields, why they would change nothing) as the other fields are."""
    if isinstance(options, TrainOptions | CorpusOptions | VocabularyOptions) and options.val_data:
        yield ("val_fraction",), "--val-data is what is held out"
    if isinstance(options, EvaluateOptions) and options.task:
        names = (
            "stride",
            "document_mask",
            "workers",
            *(option.name for option in fields(TextConfig)),
        )
        yield names, "--task says how its text is read and scored"
    if not isinstance(options, SampleOptions):
        return
    if options.max_new_tokens == 0 and not options.finish_sentence:
        yield WRITES, "with --max-new-tokens 0 nothing is written but the prompt"
        return
    choice = options.sampling
    for name, value in (("temperature", 0), ("top_k", 1), ("top_p", 0), ("min_p", 1)):
        if getattr(choice, name) == value:
            names = tuple(other for other in ("temperature", *DRAWS) if other != name)
            yield names, f"with {flag(name)} {value} the likeliest token is always taken"
            yield ("num_samples",), f"with {flag(name)} {value} all samples of a prompt are equal"
            return
