"""Pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .checkpoint import RunFolder
from .files import replace_file


def draw_loss_curve(run: RunFolder) -> None:
    """Draw training and validation loss over steps into loss.png and loss.svg of the run folder."""
    lines = run.read_metrics()
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=run.path.name)
    if train:
        axes.plot(*zip(*train), label="training", linewidth=1, alpha=0.8)
    if val:
        axes.plot(*zip(*val), label="held-out", marker="o", markersize=4)
    if train or val:
        axes.legend()
    axes.grid(alpha=0.3)
    for suffix in ("png", "svg"):
        replace_file(
            run.path / f"loss.{suffix}",
            lambda path, suffix=suffix: figure.savefig(path, format=suffix),
        )
