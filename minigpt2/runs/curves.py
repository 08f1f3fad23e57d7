"""The curves of a run, drawn as pictures of their own and as elements of its page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator

from ..system.files import replace_file
from .folder import RunFolder
from .record import (
    Evaluation,
    Metrics,
    Point,
    Record,
    best_of,
    evaluations,
    series,
    thinned,
    untuned_of,
)
from .wording import clean, size_unit

MOST_POINTS = 1000  # of one curve: more than a screen is wide
PRINTED = {
    "train": "#8aa4c4",
    "val": "#b4451f",
    "ink": "#444444",
    "faint": "#dddddd",
}
# matplotlib wants colours and the page variables, which differ by day and night: these stand in
STANDING_IN = {name: f"#0a00{i:02}" for i, name in enumerate(PRINTED)}
SMALL = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second",
    "memory": "Peak memory so far",
}
MOST_DIGITS = 15  # more than three, or behind the point: what a float holds


def draw_loss_curve(run: RunFolder) -> None:
    """Draw training and validation loss over steps into loss.png and loss.svg of the run folder,
    with the best step and the untuned model's level.
    """
    record = run.read_record()
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(clean(record.name), parse_math=False)
    _draw_loss(axes, record, PRINTED)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    with warnings.catch_warnings():
        # a name in a script that matplotlib's font lacks is drawn as boxes, and that is all
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        for suffix in ("png", "svg"):
            replace_file(
                run.path / f"loss.{suffix}",
                lambda path, suffix=suffix: figure.savefig(path, format=suffix),
            )


def curves(metrics: Sequence[Metrics]) -> dict[str, list[Point]]:
    """From a field of the metrics to the points the page shows of it; fields without any are left
    out.
    """
    fields = ("loss", "val_loss", *SMALL)
    points = {field: thinned(series(metrics, field), MOST_POINTS) for field in fields}
    return {field: found for field, found in points.items() if found}


def loss_figure(record: Record, points: Mapping[str, object]) -> str:
    best, untuned = _landmarks(record)
    keys = {
        "train": "training" if "loss" in points else None,
        "val": "held-out" if "val_loss" in points else None,
        "ring": f"best, step {best.step:,}" if best else None,
        "dashed": _start_label(record) if untuned else None,
    }
    legend = " ".join(
        f'<span class="key {key}">{text}</span>' for key, text in keys.items() if text
    )
    figure, axes = _canvas(500, 250)
    _draw_loss(axes, record, STANDING_IN)
    picture = _inline_svg(figure, "loss", "Training and held-out loss over steps")
    caption = f"<span>Loss, nats per token</span> {legend}"
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{picture}\n</figure>\n"


def small_figure(field: str, points: Sequence[Point]) -> str:
    title, unit = SMALL[field], ""
    if field == "memory":
        name, power = size_unit(max(value for _, value in points))
        points, unit = [(step, value / power) for step, value in points], f", {name}"
    figure, axes = _canvas(300, 160)
    colour = STANDING_IN["train"]
    marker = "o" if len(points) == 1 else None
    axes.plot(*zip(*points), color=colour, linewidth=1.2, marker=marker, markersize=3)
    axes.set_ylim(bottom=min(0, *(value for _, value in points)))
    _calm(axes, STANDING_IN)
    picture = _inline_svg(figure, field, f"{title} over steps")
    return f"<figure>\n<figcaption>{title}{unit}</figcaption>\n{picture}\n</figure>\n"


def _draw_loss(axes: Axes, record: Record, colours: Mapping[str, str]) -> None:
    """Training and held-out loss, the untuned level as a dashed line, the best step ringed."""
    points = curves(record.metrics)
    best, untuned = _landmarks(record)
    if untuned:
        axes.axhline(
            untuned.val_loss,
            color=colours["ink"],
            linewidth=0.8,
            dashes=(4, 3),
            label=_start_label(record),
        )
    for field, colour, label in (("loss", "train", "training"), ("val_loss", "val", "held-out")):
        if field in points:
            few = len(points[field]) == 1 or (field == "val_loss" and len(points[field]) <= 60)
            axes.plot(
                *zip(*points[field]),
                color=colours[colour],
                label=label,
                linewidth=1.1 if field == "loss" else 1.8,
                marker="o" if few else None,
                markersize=3,
            )
    if best:
        axes.plot(
            *(best.step, best.val_loss),
            color=colours["val"],
            label=f"best, step {best.step:,}",
            linestyle="none",
            marker="o",
            markersize=9,
            markerfacecolor="none",
        )
    _calm(axes, colours)


def _landmarks(record: Record) -> tuple[Evaluation | None, Evaluation | None]:
    """The best evaluation and the one before training, where there is something to compare."""
    judged = evaluations(record.metrics)
    return (best_of(judged), untuned_of(judged)) if len(judged) > 1 else (None, None)


def _start_label(record: Record) -> str:
    return "untuned" if record.pretrained else "at the start"


def _calm(axes: Axes, colours: Mapping[str, str]) -> None:
    """A few round numbers and faint lines, no frame."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=colours["ink"])
    axes.grid(axis="y", color=colours["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    steps = [1, 2, 2.5, 5, 10]
    whole = MaxNLocator(nbins=5, steps=steps, integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(whole)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=steps))
    axes.xaxis.set_major_formatter(_Numbers())
    axes.yaxis.set_major_formatter(_Numbers())


class _Numbers(Formatter):
    """Numbers beside an axis, as short as they may be while no two are alike."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        return _tick(value, 0)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        more = 0
        while more < MOST_DIGITS and len({_tick(v, more) for v in values}) < len({*values}):
            more += 1
        return [_tick(value, more) for value in values]


def _tick(value: float, more: int) -> str:
    """A number with three digits, and some more."""
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.{more}f}"
    return f"{value:.{3 + more}g}"


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A picture of so many points, with fixed room for the numbers beside the axes."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    FigureCanvasSVG(figure)
    left, right, top, bottom = 44, 8, 12, 22
    room = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(room, facecolor="none")
    axes.margins(x=0.02)
    return figure, axes


def _inline_svg(figure: Figure, name: str, label: str) -> str:
    """The picture as an element of the page: its text in the page's font, its colours the page's
    variables, its ids unlike another picture's, and no address of anything outside.
    """
    for line in figure.axes[0].lines:
        line.get_path().should_simplify = False  # every point as it was measured
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}),
        io.StringIO() as file,
    ):
        figure.savefig(file, format="svg")
        svg = file.getvalue()
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    svg = svg[svg.index("<g ") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r"font-(size|family): [^;\"]*;? ?", "", svg)
    for variable, colour in STANDING_IN.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"\n\s*", "\n", svg)
    return (
        f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">\n'
        f"{svg.strip()}"
    )
