"""The options of a run that is resumed, as its folder keeps them.

run.json holds under "options" the flags that were given, with their values, and under "settings"
what was decided then; runs of earlier versions have only the settings, and the rest in other
places. Knows options and JSON, nothing of weights and checkpoints: a mistyped flag is answered
before torch is there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..arguments import flag, texts
from ..errors import InputError, NotFoundError
from ..runs import kept
from ..runs.record import JsonObject, RunInfo
from ..runs.state import Facts
from ..system.files import read_json
from ..training.options import TrainOptions, options_from, paths

OWN = ("out", "resume", "workers", "debug")  # of a start, not of the run
DECIDED = ("max_steps", "batch_size", "block_size", "learning_rate", "warmup_steps")
DECIDED += ("weight_decay", "grad_clip", "eval_every", "save_every", "patience", "seed")
TEXTS = {"data": "paths", "val-data": "val_paths"}  # from a flag to what run.json calls it
RIVALS = {  # given now, they take the place of what the run had
    "epochs": ("max_steps",),
    "model": ("preset", "train_vocabulary", "vocab_size"),
    "preset": ("model",),
    "val_data": ("val_fraction",),
}


def described(options: TrainOptions) -> dict[str, object]:
    """The flags of a run that are not as by default."""
    own = _flat(options)
    default = _flat(TrainOptions(data=("",)))
    if options.out:
        folder = Path(options.out)
        own["data"] = tuple(kept.named(path, folder) for path in options.data)
        own["model"] = options.model and kept.named(options.model, folder)
    return {
        flag(name): list(value) if isinstance(value, tuple) else value
        for name, value in own.items()
        if name not in OWN and value != default[name]
    }


def recorded(folder: Path, given: Collection[str]) -> dict[str, Any]:
    """From field to value: the options that the run in a folder was started with, but for those
    that are given now and what these take the place of.

    Raises NotFoundError when there is no such run, and InputError when its run.json is damaged,
    unless the text is given: then the options given may be all there are.
    """
    if not folder.is_dir():
        raise NotFoundError(f"--resume: there is no folder {folder}: check --out")
    try:
        info = RunInfo.from_json(read_json(folder / "run.json", with_names=True))
        flags = _earlier(info, folder) if info.options is None else info.options
        flags = {**flags, **{flag(name): _known(info.settings, name) for name in DECIDED}}
        flags.pop("--epochs", None)  # it was made --max-steps
        if info.settings.way:  # what --compile has become, perhaps for want of a compiler
            flags.pop("--compile", None)
        had = {name[2:].replace("-", "_"): value for name, value in flags.items()}
        for name in had.keys() & {"data", "val_data"}:
            had[name] = tuple(kept.found(path, folder) for path in paths(name, had[name]))
        if "add_tokens" in had:
            had["add_tokens"] = texts("add_tokens", had["add_tokens"])
        if had.get("model") is not None:
            had["model"] = kept.found(had["model"], folder)
        options_from(had)  # raises for what no run has
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        if "data" in given:
            return {}
        raise InputError(
            f"--resume: {folder / 'run.json'} does not say how the run was started ({problem}): "
            "give --data and the other flags of the run"
        ) from problem
    if os.environ.get("WORLD_SIZE", "1") == "1":
        had.pop("fsdp", None)  # one process may go on with what several began
    for name in given:
        for replaced in (name, *RIVALS.get(name, ())):
            had.pop(replaced, None)
    here = [*had.get("data", ()), *had.get("val_data", ())]
    if had.get("lora_rank") and info.model.source_kind == "folder" and "model" in had:
        here.append(had["model"])
    _require_here(here, folder / "run.json")
    return had


def _flat(options: TrainOptions) -> dict[str, Any]:
    values = asdict(options)
    return {**values.pop("text"), **values.pop("training"), **values}


def _known(part: JsonObject, name: str) -> Any:
    """A field of a part of run.json; KeyError where the run did not record it."""
    value = getattr(part, name)
    if value is None:
        raise KeyError(name)
    return value


def _earlier(info: RunInfo, folder: Path) -> dict[str, Any]:
    """The flags of a run whose run.json has no "options": from what it says of text and model, and
    from its newest checkpoint.
    """
    model, data = info.model, info.data
    states = sorted((folder / "checkpoints").glob("step-*/state.json"), reverse=True)
    facts = Facts.from_json(read_json(states[0])["facts"]) if states else Facts()
    flags = {f"--{name}": list(_known(data, field)) for name, field in TEXTS.items()}
    flags |= data.flags
    flags["--model" if _known(model, "pretrained") else "--preset"] = _known(model, "source")
    flags |= {f"--{name}": _known(info.settings, name) for name in ("dtype", "dropout")}
    if not data.val_paths and facts.val_fraction is not None:
        flags["--val-fraction"] = facts.val_fraction
    if model.lora_rank:
        flags |= {"--lora-rank": model.lora_rank, "--lora-alpha": facts.lora_alpha}
    return flags


def _require_here(paths: Sequence[object], record: Path) -> None:
    """Raise NotFoundError for a text or a base that was found from another folder."""
    for path in map(str, paths):
        somewhere = path == "-" or "://" in path or any(wild in path for wild in "*?[")
        if not somewhere and not Path(path).exists():
            raise NotFoundError(
                f"{record} names {path}, which is not here: start where the run was begun, or give "
                "--data or --model as they are here"
            )
