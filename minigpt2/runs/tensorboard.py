"""What a run measures, written where TensorBoard looks for it."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .record import Metrics, Sample, number


class TensorBoardLog:
    """Writes the metrics it is called with where TensorBoard looks for them.

    `done` is the number of steps a resumed run has behind it: what an earlier session logged beyond
    is dropped. Raises InputError when the package tensorboard is missing.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as problem:
            raise InputError(
                "--tensorboard needs a package that is not installed: pip install tensorboard, "
                "or leave out --tensorboard"
            ) from problem
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def __call__(self, metrics: Metrics) -> None:
        """Log every number but the step itself."""
        for name, value in metrics.to_json().items():
            value = number(value)
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, metrics.step)

    def sample(self, sample: Sample) -> None:
        """Log what the model wrote."""
        self._writer.add_text("sample", sample.prompt + sample.text, sample.step)

    def close(self) -> None:
        """Write out what is still in memory."""
        self._writer.close()
