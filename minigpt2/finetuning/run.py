"""A run as an object: what came out of it, and how to go on with it."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..arguments import refuse
from ..corpus.tokenizing import end_probe
from ..errors import InputError, NotFoundError
from ..model import GPT2
from ..runs.folder import RunFolder
from ..runs.record import Metrics, Sample
from ..runs.wording import summary
from ..system.messages import notices_on_stderr
from ..system.precision import pick_device
from ..system.processes import world_from
from ..system.signals import Stopped
from ..tokenizer import Tokenizer
from ..training.options import SETTINGS, TrainOptions, options_from, require_settings
from .recorded import recorded
from .session import Starter, train

RESUMED = ("data", "model", *SETTINGS)  # what a run that goes on may be given anew
MODULE = "minigpt2"  # whose notices are shown

FLAG = re.compile(r"(?<![\w./-])--([a-z]+(?:-[a-z]+)*)")
CALLS = {"add --resume": "go on with Run.open(out).resume()"}  # what a command is told, in Python


@contextmanager
def in_arguments() -> Iterator[None]:
    """Errors raised inside name the arguments of a call where a command has flags."""
    try:
        yield
    except InputError as problem:
        text = str(problem)
        for command, call in CALLS.items():
            text = text.replace(command, call)
        problem.args = (FLAG.sub(lambda found: found[1].replace("-", "_"), text),)
        raise


@dataclass(frozen=True)
class Run:
    """A training run in its folder, which is all there is of it: whoever has the folder can open
    it, in any process.
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder, of `finetune` or of train.py, ended or not.

        Raises NotFoundError where there is none.
        """
        if not isinstance(folder, (str, Path)):
            raise refuse("folder", folder, "the folder of a run")
        run = RunFolder(Path(folder))
        if not run.path.is_dir():
            raise NotFoundError(f"there is no folder {run.path}: name the folder of a run")
        if not run.holds_a_run():
            raise NotFoundError(
                f"{run.path} holds no run: name what finetune or train.py had as out"
            )
        return cls(run.path)

    @cached_property
    def model(self) -> GPT2:
        """The best weights so far (without held-out text the newest), which are those that
        sample.py loads; in evaluation mode, on the fastest device. Loaded when first asked for.
        """
        return GPT2.from_pretrained(self.folder, device=pick_device("auto")).eval()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return Tokenizer.from_pretrained(self.folder)

    @property
    def metrics(self) -> list[Metrics]:
        """What every step measured, as it is in the folder now: losses in nats per token."""
        return RunFolder(self.folder).read_metrics()

    @property
    def samples(self) -> list[Sample]:
        """What the model wrote at each evaluation."""
        return RunFolder(self.folder).read_samples()

    @property
    def report(self) -> Path:
        """The page that shows all of it, drawn anew at evaluations."""
        return self.folder / "report.html"

    @in_arguments()
    def resume(self, *, progress: bool | Callable[[Metrics], None] = True, **changes: Any) -> Run:
        """Go on from the newest checkpoint, as `train.py --resume` does: the run that was never
        stopped, bit for bit where `changes` is empty and the machine is the same.

        `changes` are settings, data or model that take the place of those that the run had, such as
        max_steps. Raises InputError for those that would make it another run; for `progress`, and
        for what an interrupt does, see `finetune`.
        """
        end_probe()
        require_settings(changes, RESUMED)
        values = {**recorded(self.folder, changes), **changes}
        options = options_from({**values, "out": str(self.folder), "resume": True})
        call = f"{MODULE}.Run.open({str(self.folder)!r}).resume({spelled(changes)})"
        run = trained(options, Starter(call, progress, has_signals=False))
        self.__dict__.pop("model", None)  # another one lies in the folder now
        return run

    def _repr_html_(self) -> str:
        """How the run went, its curve and its report, as a notebook shows them."""
        record = RunFolder(self.folder).read_record()
        told = html.escape(summary(record.metrics, pretrained=record.pretrained))
        parts = [f"<p><b>{html.escape(str(self.folder))}</b>: {told}.</p>"]
        if (curve := self.folder / "loss.png").exists():
            data = base64.b64encode(curve.read_bytes()).decode()
            parts.append(
                f'<img alt="loss over steps" width="560" src="data:image/png;base64,{data}">'
            )
        if self.report.exists():
            page = html.escape(self.report.read_text(encoding="utf-8"))
            frame = f'<iframe srcdoc="{page}" width="100%" height="600"></iframe>'
            parts.append(f"<details><summary>report</summary>{frame}</details>")
        return "\n".join(parts)


def trained(options: TrainOptions, starter: Starter) -> Run:
    """Train as the library does: without signals, without stdout, and with notices on stderr if
    they are wanted.
    """
    world = world_from(os.environ)
    shows = starter.progress is True and world.is_main
    with notices_on_stderr(MODULE) if shows else nullcontext():
        try:
            train(options, world, starter)
        except Stopped:
            again = f"{MODULE}.Run.open({options.folder!r}).resume() goes on"
            raise KeyboardInterrupt(f"everything is saved: {again}") from None
    return Run(Path(options.folder))


def spelled(arguments: Mapping[str, object]) -> str:
    """Arguments as they stand in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
