"""Prepare text, or train a vocabulary on it, and report on it: python -m minigpt2.corpus PATHS"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..corpus.options import CorpusOptions, VocabularyOptions
from ..hub.pins import public_model
from ..system.signals import raise_on_signals
from ..training.options import TrainConfig
from .console import run_script

if TYPE_CHECKING:
    from ..corpus.prepared import Corpus
    from ..tokenizer import Tokenizer

logger = logging.getLogger("corpus")
VOCABULARY = "vocabulary"


def run(argv: Sequence[str] | None = None) -> int:
    """The command, from its flags to its exit code; a file called vocabulary is ./vocabulary."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [VOCABULARY]:
        return run_script(
            train, VocabularyOptions, argv[1:], positional=True, subcommand=VOCABULARY
        )
    return run_script(main, CorpusOptions, argv, positional=True)


def main(options: CorpusOptions) -> int:
    """Prepare a text and print what is in it: python -m minigpt2.corpus PATHS"""
    from ..corpus.sources.find import require_local
    from ..corpus.survey import report_text, survey

    raise_on_signals()
    require_local([*options.paths, *options.val_data], options.text)
    tokenizer = _tokenizer_of(options)
    corpus = _prepared(options, tokenizer)
    found = survey(corpus, tokenizer, special_tokens=options.text.special_tokens)
    steps, sentence = _training_ahead(options, len(corpus.train.tokens))
    report = {**asdict(found), **steps}
    shown = "\n".join(filter(None, [report_text(found), sentence]))
    print(_json_line(report) if options.json else shown)
    return 0


def train(options: VocabularyOptions) -> int:
    """Train a vocabulary on a text, write it, and print what is in the text with it."""
    from ..corpus.sources.find import require_local
    from ..corpus.survey import report_text, survey
    from ..corpus.tokenizing import default_workers
    from ..corpus.vocabulary import (
        in_own_vocabulary,
        own_vocabulary,
        require_empty,
        require_trainer,
        write_folder,
    )
    from ..tokenizer import Tokenizer

    raise_on_signals()
    assert options.out is not None, "the options want it"
    out = Path(options.out)
    require_trainer()
    require_empty(out)
    require_local([*options.paths, *options.val_data], options.text)
    in_gpt2s = _prepared(options, Tokenizer.gpt2())
    tokenizer = own_vocabulary(in_gpt2s, options.vocab_size)
    corpus = in_own_vocabulary(in_gpt2s, tokenizer, workers=options.workers or default_workers())
    found = survey(corpus, tokenizer, special_tokens=options.text.special_tokens)
    write_folder(tokenizer, out)
    logger.info("%s: a vocabulary of %s tokens", out, f"{tokenizer.vocab_size:,}")
    report = {**asdict(found), "vocab_size": tokenizer.vocab_size}
    print(_json_line(report) if options.json else report_text(found))
    return 0


def _prepared(options: CorpusOptions | VocabularyOptions, tokenizer: Tokenizer) -> Corpus:
    from ..corpus.prepared import prepare
    from ..corpus.tokenizing import default_workers

    return prepare(
        options.paths,
        tokenizer,
        val_paths=options.val_data,
        val_fraction=options.val_fraction,
        text=options.text,
        workers=options.workers or default_workers(),
    )


def _json_line(value: object) -> str:
    """JSON in which letters are letters, and what is not seen as it is an escape of JSON's own."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() else json.dumps(c, allow_nan=False)[1:-1] for c in text)


def _tokenizer_of(options: CorpusOptions) -> Tokenizer:
    from ..tokenizer import Tokenizer

    if not options.preset:
        return Tokenizer.from_pretrained(options.source)
    from ..model import PRESETS

    return Tokenizer.gpt2(PRESETS[options.preset].vocab_size)


def _training_ahead(options: CorpusOptions, n_tokens: int) -> tuple[dict[str, float], str]:
    """Steps and seconds of a run with the default settings, and a sentence on them; nothing for a
    model whose size is not known by its name.

    torch is imported here and not before: it takes 200 MB that preparing a text does without.
    """
    from ..corpus.survey import rough_duration
    from ..model import PRESETS
    from ..system.precision import pick_device, pick_dtype
    from ..training.forecast import estimate_seconds, measured_speed
    from ..training.plan import make_plan, recipe_for

    preset, model = options.preset, options.source
    public = None if Path(model).is_dir() else public_model(model)
    name = preset or (public.name if public else None)
    if name not in PRESETS:
        return {}, ""
    recipe = recipe_for(preset, lora=False)
    plan = make_plan(TrainConfig(), PRESETS[name], recipe, n_tokens=n_tokens)
    device = pick_device("auto")
    speed = measured_speed(device, pick_dtype("auto", device, training=True))
    n_learned = plan.max_steps * plan.batch_size * plan.block_size
    seconds = estimate_seconds(_count_parameters(name), n_learned, speed)
    per_epoch = math.ceil(n_tokens / plan.block_size / plan.batch_size)
    steps = {"steps": plan.max_steps, "steps_per_epoch": per_epoch, "seconds": seconds}
    return steps, (
        f"training {name} with the default settings: {plan.max_steps:,} "
        f"step{'s' * (plan.max_steps != 1)} of "
        f"{plan.batch_size} x {plan.block_size:,} tokens, {per_epoch:,} an epoch;\n"
        f"about {rough_duration(seconds)} on this machine, evaluations not counted"
    )


def _count_parameters(name: str) -> int:
    import torch

    from ..model import GPT2, PRESETS

    with torch.device("meta"):
        return sum(p.numel() for p in GPT2(PRESETS[name]).parameters())
