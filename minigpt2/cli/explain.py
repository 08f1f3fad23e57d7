"""Write a page that shows how a model reads a text: python -m minigpt2 explain --prompt TEXT"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..explain.options import ExplainOptions
from ..hub.folders import require_source
from .console import run_script
from .prompts import prompt_of, recorded_words, trained_with_special_tokens

logger = logging.getLogger(__name__)


def main(options: ExplainOptions) -> int:
    """Read one or two models and a prompt, and write the page."""
    assert options.prompt is not None
    out, prompt = Path(options.out), prompt_of(options.prompt)
    sources = [options.model, *([] if options.compare is None else [options.compare])]
    for source in sources:
        require_source(source)
    from ..explain.live import refusal
    from ..explain.page import Subject, check_place, checked_ids, write_page
    from ..model import GPT2
    from ..tokenizer import Tokenizer

    check_place(out)
    subjects, special = list[Subject](), options.special_tokens
    for source in sources:
        tokenizer = Tokenizer.from_pretrained(source)
        subjects.append(Subject(source, GPT2.from_pretrained(source), tokenizer))
        checked_ids(subjects[0], prompt, special=special)  # before a second model is read
    write_page(out, subjects, prompt, special=special)
    fixed = any(refusal(subject.model, subject.tokenizer) for subject in subjects)
    idle = special and fixed and not subjects[0].tokenizer.special_in(prompt)
    if idle and not trained_with_special_tokens(Path(options.model)):
        logger.warning("--special-tokens changes nothing: no special token is in the prompt")
    read = "read" if len(sources) > 1 else "reads"
    logger.info("%s shows how %s %s it: open it in a browser", out, " and ".join(sources), read)
    return 0


def run(argv: Sequence[str] | None = None) -> int:
    """The command, from its flags to its exit code."""
    return run_script(main, ExplainOptions, argv, recorded=recorded_words)
