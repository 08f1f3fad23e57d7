"""Fine-tune a model on texts from Python: `minigpt2.finetune`, which is train.py as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import refuse
from ..corpus.tokenizing import end_probe
from ..decoding.text import check_fits
from ..errors import OptionError
from ..model import GPT2
from ..runs import kept
from ..runs.folder import RunFolder
from ..runs.record import Metrics
from ..tokenizer import Tokenizer
from ..training.options import (
    DEFAULT_MODEL,
    SETTINGS,
    default_out,
    options_from,
    paths,
    require_settings,
)
from .added_tokens import kept_grown, loaded
from .inputs import InMemory, require_inputs
from .run import MODULE, Run, in_arguments, spelled, trained
from .session import Starter

LONGEST_NAME = 255  # of a file


@in_arguments()
def finetune(
    model_or_folder: GPT2 | str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    data: str | Path | Iterable[str | Path] = (),
    *,
    texts: Iterable[str] | None = None,
    out: str | Path | None = None,
    progress: bool | Callable[[Metrics], None] = True,
    **settings: Any,
) -> Run:
    """Train a model on text, as train.py with the same settings does: the weights are the same bit
    for bit.

    `model_or_folder` is a Hub id, a folder, or a model in memory, whose weights are where training
    starts and which stays as it is: it is saved in OUT/base with its tokenizer, which has to be
    given, and the run trains a copy. Without one it is gpt2, or random weights of the `preset`.

    The text is `data` (files, folders, globs, hf://datasets/... paths) or `texts`, each a document,
    which are read once, from a generator too, and kept in OUT/texts.jsonl. So a run needs its
    folder `out` alone to be resumed, and `data` where that lies. By default `out` is
    runs/<name of the data>-<model>.

    `settings` are the flags of train.py with _ for - (max_steps, batch_size, learning_rate,
    lora_rank, ...). More than 8 MB of text is tokenized by several processes: then call this below
    `if __name__ == "__main__"`, or with workers=1.

    `progress` shows notices and a bar on stderr, False nothing but warnings; a function gets the
    Metrics of every step instead, in the thread that trains. Nothing is printed on stdout, and no
    signal handler is touched.

    An interrupt (Ctrl-C, a notebook's stop button) lets the step end, saves it, and is raised as
    KeyboardInterrupt then, so that a notebook does not go on with its next cell;
    `Run.open(out).resume()` goes on. Raises InputError, a ValueError, for what cannot be used, and
    NotFoundError, a FileNotFoundError, for what is not there.
    """
    end_probe()
    require_settings(settings, SETTINGS)
    if not (isinstance(progress, bool) or callable(progress)):
        raise refuse("progress", progress, "True, False or a function of Metrics")
    found = paths("data", data)
    for path in found:
        if _is_text(path):
            raise refuse("data", path, "paths: a text itself is given as texts")
    if not (out is None or isinstance(out, (str, Path))):
        raise refuse("out", out, "a folder")
    if bool(found) == (texts is not None):
        given = "both given: choose one" if found else "both missing: give one of them"
        raise OptionError(f"data and texts are {given}", "data", "texts")
    preset = settings.get("preset")
    model, source = _model_in_memory(model_or_folder, tokenizer, preset)
    name = source or ("model" if model else preset or DEFAULT_MODEL)
    folder = Path(out or default_out(found[0] if found else "texts", name))
    values = {
        **settings,
        "data": found or (str(folder / kept.TEXTS),),
        "model": str(folder / kept.BASE) if model else source,
        "out": str(folder),
    }
    options = options_from(values)
    memory, keeps = InMemory(texts, options.text.text_field, model, tokenizer), []
    require_inputs(options, [str(folder / name) for name in memory.names])
    call = _call(model_or_folder, tokenizer, found, {"out": str(folder), **settings})
    if options.add_tokens:
        memory = replace(memory, model=None)
        beginning = (model, tokenizer) if model and tokenizer else None
        given = options.source
        options, keep = kept_grown(options, lambda: beginning or loaded(given))
        keeps.append(keep)

    def write(run: RunFolder) -> None:
        for keep in (memory.write, *keeps):
            keep(run)

    return trained(options, Starter(call, progress, write, has_signals=False))


def _is_text(path: str) -> bool:
    """Whether what was given as a path can be none, or has lines and is none."""
    if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in Path(path).parts):
        return True
    return "\n" in path and not Path(path).exists()


def _model_in_memory(
    given: GPT2 | str | Path | None, tokenizer: Tokenizer | None, preset: str | None
) -> tuple[GPT2 | None, str | None]:
    """(the model to keep in the run folder, where else it comes from): one of them, or neither."""
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise refuse("tokenizer", tokenizer, "a Tokenizer")
    if isinstance(given, GPT2):
        if tokenizer is None:
            raise OptionError(
                "tokenizer is missing: a model in memory comes without one", "tokenizer"
            )
        if preset:
            raise OptionError(f"preset {preset} and a model are both given: choose one", "preset")
    elif given is not None and not isinstance(given, (str, Path)):
        raise refuse("model_or_folder", given, "a GPT2, a folder or a Hub id")
    elif tokenizer is None:
        return None, None if given is None else str(given)
    elif preset:
        raise OptionError("tokenizer is given with preset, which has its own: choose one", "preset")
    model = given if isinstance(given, GPT2) else GPT2.from_pretrained(given or DEFAULT_MODEL)
    check_fits(tokenizer, model, training=True)
    return model, None


def _call(model: object, tokenizer: object, data: tuple[str, ...], more: dict[str, object]) -> str:
    """The call as it can be read in run.json, with names for what is in memory."""
    first = [] if model is None else ["model" if isinstance(model, GPT2) else repr(str(model))]
    named = ["tokenizer=tokenizer"] * (tokenizer is not None)
    named += [f"data={list(data)!r}" if data else "texts=texts"]
    return f"{MODULE}.finetune({', '.join([*first, *named, spelled(more)])})"
