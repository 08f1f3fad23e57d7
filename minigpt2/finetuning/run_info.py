"""What run.json says of a run: how it was started, from what, and with which settings.

`resume` takes the flags from it, card and report what they tell of the run.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch

from .. import __version__
from ..arguments import flag
from ..corpus.options import TextConfig
from ..model import GPT2
from ..runs import kept
from ..runs.record import DataInfo, ModelInfo, RunInfo, Session
from ..system.precision import describe_device
from ..training.build import Built, parameter_counts
from ..training.loop import settings_of
from ..training.options import TrainOptions
from .recorded import described

SWITCHES = ("document_mask", "mask_prompt", "train_vocabulary")


def write_run_info(options: TrainOptions, built: Built, command: str) -> None:
    """Write run.json, in which every start of the run is a session, begun with `command`."""
    run = built.job.run
    before = run.read_info() if built.start else None
    sessions = before.sessions if before else ()
    info = RunInfo(
        sessions=(*sessions, _session(built, command)),
        model=_model_info(options, built.job.model),
        data=_data_info(options, built),
        options=described(options),
        settings=settings_of(built.job),
        memory={**asdict(built.need), "total": built.need.total},
    )
    run.write_info(info)


def _session(built: Built, command: str) -> Session:
    """This start of the run: when, where, and what the numbers depend on besides the settings."""
    job = built.job
    return Session(
        command=command,
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        from_step=built.start.state.step if built.start else 0,
        device=describe_device(job.precision.device),
        dtype=str(job.precision.dtype).removeprefix("torch."),
        world_size=job.world.size,
        versions={
            "minigpt2": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        },
    )


def _model_info(options: TrainOptions, model: GPT2) -> ModelInfo:
    n_parameters, n_trained = parameter_counts(model)
    return ModelInfo(
        source=kept.named(options.source, Path(options.folder)),
        source_kind=_source_kind(options),
        pretrained=not options.preset,
        n_parameters=n_parameters,
        n_trained=n_trained,
        lora_rank=options.lora_rank or None,
        config=asdict(model.config),
    )


def _data_info(options: TrainOptions, built: Built) -> DataInfo:
    corpus = built.job.corpus
    return DataInfo(
        paths=tuple(kept.named(path, Path(options.folder)) for path in options.data),
        val_paths=tuple(options.val_data),
        n_documents=corpus.n_documents,
        n_characters=corpus.n_characters,
        n_tokens=corpus.n_tokens,
        n_train_tokens=len(corpus.train.tokens),
        n_val_tokens=len(corpus.val.tokens) if corpus.val else 0,
        identity=corpus.identity,
        more={
            **{name: count for name, count in corpus.counts.items() if count},
            **_changed_settings(options.text),
            **{flag(name): True for name in SWITCHES if getattr(options, name)},
        },
    )


def _source_kind(options: TrainOptions) -> str:
    """What the run's source names: a preset, a folder, or a model of the Hub."""
    if options.preset:
        return "preset"
    return "folder" if Path(options.source).is_dir() else "hub"


def _changed_settings(text: TextConfig) -> dict[str, object]:
    """What was set otherwise than by default."""
    default = asdict(type(text)())
    return {flag(name): value for name, value in asdict(text).items() if value != default[name]}
