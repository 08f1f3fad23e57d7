"""A run that is killed and goes on: the weights and losses of the one that was never stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...equivalences import WAYS
from ...evaluation.proof import Item, NotHereError, Result, first_failure, judged
from ...finetuning.finetune import finetune
from ...finetuning.run import Run
from ...runs.folder import RunFolder
from ...system.files import file_sha256
from .place import Place
from .training import environment, short_flags, short_settings

STEPS, TRIALS = 8, 5
SECONDS = 120  # until the first checkpoint
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "save_every": 1, "eval_every": STEPS}


def items(place: Place) -> list[Item]:
    """The row "resume"."""
    proves = f"{WAYS['resume'].reached} after a kill ends as the run that was never stopped"
    return [Item("resume", proves, lambda: killed_and_resumed(place))]


def killed_and_resumed(place: Place) -> Result:
    """A process is killed while the other run goes through here, and then its run goes on."""
    os.environ["MINIGPT2_CACHE"] = str(place.cache)  # what runs an item puts it back
    with tempfile.TemporaryDirectory(dir=place.folder) as folder:
        killed, whole = Path(folder) / "killed", Path(folder) / "whole"
        start = short_flags(place, killed, **SETTINGS)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(killed_on_its_way, start, killed, environment(place))
            finetune(
                place.model("draft"), data=place.text(), out=whole, progress=False,
                **short_settings(), **SETTINGS,
            )  # fmt: skip
            step = waiting.result()
        Run.open(killed).resume(progress=False)
        results = [
            judged(found == expected, f"other {what} after a kill at step {step}", "the same")
            for what, found, expected in (
                ("losses", losses_of(killed), losses_of(whole)),
                ("weights", weights_of(killed), weights_of(whole)),
            )
        ]
    return first_failure(results)


def killed_on_its_way(flags: list[str], run: Path, environment: dict[str, str]) -> int:
    """The step after which a run was killed: none that was over before, which a busy machine makes
    of a few. Raises NotHereError where every one was.
    """
    for _ in range(TRIALS):
        step = kill_after_a_checkpoint(flags, run, environment)
        if step < STEPS:
            return step
        shutil.rmtree(run)
    raise NotHereError("every run was over before it could be killed: this machine is too busy")


def kill_after_a_checkpoint(flags: list[str], run: Path, environment: dict[str, str]) -> int:
    """Start `train`, kill it when a step is in a checkpoint, and give the newest one's; on
    Windows, where there is no such signal, the process is terminated.
    """
    words = [sys.executable, "-m", "minigpt2", "train", *flags]
    log = run.with_name("log")
    with log.open("wb") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file)
    try:
        ends = time.monotonic() + SECONDS
        # at step 0 AdamW has nothing to remember
        while max(checkpoints(run), default=0) < 1 and process.poll() is None:
            if time.monotonic() > ends:
                break
            time.sleep(0.005)
    finally:
        process.kill()
        code = process.wait()
    if not checkpoints(run):
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(f"train ended with {code}: {''.join(lines[-1:])}")
    return checkpoints(run)[-1]


def checkpoints(run: Path) -> list[int]:
    """The steps of which a run has a whole checkpoint."""
    found = run.glob("checkpoints/step-*/manifest.json")
    return sorted(int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdigit())


def weights_of(run: Path) -> list[str]:
    """The digests of the weights, and of what AdamW remembers, after the last step."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    return [file_sha256(last / f"{name}.safetensors") for name in ("model", "optimizer")]


def losses_of(run: Path) -> list[tuple[int, float | None, float | None]]:
    """What every step measured, but for times."""
    return [(line.step, line.loss, line.val_loss) for line in RunFolder(run).read_metrics()]
