"""Figures that others published for the four GPT-2, with who measured them and how.

The paper is Radford et al., Language Models are Unsupervised Multitask Learners (2019), Table 3; it
does not give its code. PR and issue numbers are of the projects named.
"""

from __future__ import annotations

from typing import NamedTuple

from ...model import PRESETS, GPT2Config
from .records import Published

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PAPER = "the paper"
HARNESS = "lm-evaluation-harness"
QUOTED = f"{HARNESS}, as build-nanogpt quotes it"
REWEIGHED = "per word of the original text; its detokenizers are not published"
DETOKENIZED = "as here, but its detokenizer is not published"


class _Line(NamedTuple):
    tasks: tuple[str, ...]
    metric: str
    values: tuple[float | None, ...]  # by SIZES
    who: str
    protocol: str


_WIKITEXT = ("wikitext2", "wikitext103")
_WHOLE_WORD = "all tokens of the last word"
_LINES = (
    _Line(("wikitext2",), "word_perplexity", (29.41, 22.76, 19.93, 18.34), PAPER, REWEIGHED),
    _Line(("wikitext103",), "word_perplexity", (37.50, 26.37, 22.05, 17.48), PAPER, REWEIGHED),
    _Line(_WIKITEXT, "word_perplexity", (37.37, None, None, None), HARNESS, "as here"),
    _Line(
        _WIKITEXT,
        "token_perplexity",
        (29.94, None, None, None),
        "transformers, issue 13761",
        "as here",
    ),
    _Line(
        _WIKITEXT,
        "token_perplexity",
        (None, None, 19.44, None),
        "transformers, its page on perplexity",
        "as here",
    ),
    _Line(("ptb",), "word_perplexity", (65.85, 47.33, 40.31, 35.76), PAPER, REWEIGHED),
    _Line(
        ("lambada_openai",),
        "perplexity",
        (35.13, 15.60, 10.87, 8.63),
        PAPER,
        "how is not said",
    ),
    _Line(
        ("lambada_openai",),
        "perplexity",
        (40.06, None, None, 10.63),
        f"{HARNESS}, issues 2159 and 911",
        "as here",
    ),
    _Line(
        ("lambada_openai",),
        "accuracy",
        (0.3256, None, None, None),
        f"{HARNESS}, issue 2159",
        "as here",
    ),
    _Line(
        ("lambada_openai",),
        "last_token_accuracy",
        (0.4599, 0.5548, 0.6012, 0.6324),
        PAPER,
        "how is not said; as here, others found",
    ),
    _Line(
        ("lambada_openai",),
        "last_token_accuracy",
        (0.4667, None, None, None),
        "transformers, issue 13761",
        "as here",
    ),
    _Line(("hellaswag",), "accuracy", (0.2892, None, None, 0.4004), QUOTED, "as here"),
    _Line(("hellaswag",), "normalized_accuracy", (0.3114, None, None, 0.5089), QUOTED, "as here"),
    _Line(
        ("hellaswag",),
        "accuracy",
        (0.2859, None, None, 0.3842),
        "build-nanogpt",
        "text as it is in the file",
    ),
    _Line(
        ("hellaswag",),
        "normalized_accuracy",
        (0.294463, 0.375224, 0.431986, 0.488946),
        "llm.c",
        "text as it is in the file, per token",
    ),
    _Line(("cbt_cn",), "accuracy", (0.8765, 0.9235, 0.9345, 0.9330), PAPER, DETOKENIZED),
    _Line(("cbt_ne",), "accuracy", (0.834, 0.871, 0.880, 0.8905), PAPER, DETOKENIZED),
)


def size_of(config: GPT2Config) -> str | None:
    """The GPT-2 that has this shape, if any."""
    for name in SIZES:
        if all(_shape(config)[n] == value for n, value in enumerate(_shape(PRESETS[name]))):
            return name
    return None


def published(task: str, metric: str, size: str | None) -> tuple[Published, ...]:
    """What was published for a GPT-2 of this size, first what was measured as here."""
    found = []
    for line in _LINES:
        value = line.values[SIZES.index(size)] if size else None
        if task in line.tasks and metric == line.metric and value is not None:
            found.append(Published(value, line.who, line.protocol))
    return tuple(sorted(found, key=lambda other: other.protocol != "as here"))


def _shape(config: GPT2Config) -> tuple[int, ...]:
    return config.n_layer, config.n_embd, config.block_size, config.vocab_size
