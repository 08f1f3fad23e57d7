"""Pictures and pages of a run folder, made from nothing but its records.

python -m minigpt2.report RUN    writes loss.png, loss.svg, report.html and README.md anew
"""

from __future__ import annotations

import html
import io
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .card import write_card
from .checkpoint import RunFolder
from .errors import InputError
from .files import replace_file, write_text
from .record import (
    Evaluation,
    Metrics,
    Point,
    Record,
    as_dict,
    as_list,
    best_of,
    clean,
    duration,
    evaluations,
    number,
    read_record,
    series,
    shown_duration,
    shown_perplexity,
    shown_size,
    size_unit,
    spread,
    summary,
    thinned,
    untuned_of,
)

STYLE = Path(__file__).parent / "assets" / "report.css"
MOST_ROWS = 200  # of evaluations; all are in metrics.jsonl
MOST_SAMPLES = 60
MOST_CHARACTERS = 4000  # of one sample
MOST_SESSIONS = 30
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


LABELS = {
    "paths": "text",
    "val_paths": "held-out text",
    "n_train_tokens": "training tokens",
    "n_val_tokens": "held-out tokens",
    "identity": "fingerprint",
    "source": "started from",
    "n_trained": "parameters trained",
    "lora_rank": "LoRA rank",
    "n_layer": "layers",
    "n_head": "heads",
    "n_embd": "width",
    "block_size": "context",
    "n_positions": "context",
    "max_steps": "steps",
    "batch_size": "sequences per step",
    "micro_batch_size": "sequences at once",
    "learning_rate": "peak learning rate",
    "warmup_steps": "warm-up steps",
    "grad_clip": "gradient clipping",
    "eval_every": "steps between evaluations",
    "save_every": "steps between checkpoints",
}
SETTING_LABELS = {"block_size": "tokens per sequence"}
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "n_positions", "block_size", "vocab_size")


def draw_loss_curve(run: RunFolder) -> None:
    """Draw training and validation loss over steps into loss.png and loss.svg of the run folder,
    with the best step and the untuned model's level.
    """
    record = read_record(run)
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


def write_report(run: RunFolder) -> None:
    """Write report.html: one page, self-contained, that shows all a run has recorded."""
    write_text(run.path / "report.html", page(read_record(run)))


def curves(lines: Sequence[Metrics]) -> dict[str, list[Point]]:
    """From a field of metrics.jsonl to the points the page shows of it; fields without any are left
    out.
    """
    fields = ("loss", "val_loss", *SMALL)
    points = {field: thinned(series(lines, field), MOST_POINTS) for field in fields}
    return {field: found for field, found in points.items() if found}


def page(record: Record) -> str:
    """The report of a run as HTML that loads nothing and runs nothing."""
    sections = [
        _head(record),
        _problems(record),
        _curves(record),
        _evaluations(record),
        _samples(record),
        _facts(record),
        _sessions(record),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(record.name)}: training report</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{"".join(sections)}<footer>Made by minigpt2 from this folder’s metrics.jsonl, samples.jsonl and
run.json. Again: <code>python -m minigpt2.report RUN</code></footer>
</main>
</body>
</html>
"""


def _head(record: Record) -> str:
    told = summary(record.lines, pretrained=record.pretrained)
    judged = evaluations(record.lines)
    best, untuned = best_of(judged), untuned_of(judged)
    steps = max((int(step) for step, _ in series(record.lines, "loss")), default=0)
    planned = number(record.part("settings"), "max_steps")
    parameters = number(record.part("model"), "n_parameters")
    seconds = duration(record.lines)
    skipped = sum(bool(line.get("skipped")) for line in record.lines)
    start = "untuned perplexity" if record.pretrained else "perplexity at the start"
    figures = {
        "best perplexity": shown_perplexity(best.val_loss) if best else None,
        start: shown_perplexity(untuned.val_loss) if untuned else None,
        "steps": f"{steps:,}" + (f" of {planned:,.0f}" if planned and planned > steps else ""),
        "steps skipped": f"{skipped:,}" if skipped else None,
        "training time": shown_duration(seconds) if seconds else None,
        "parameters": _rounded(parameters) if parameters else None,
    }
    cells = [
        f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>\n"
        for name, value in figures.items()
        if value
    ]
    return f"""<header>
<p class="eyebrow">Training run</p>
<h1><bdi>{_text(record.name)}</bdi></h1>
<p class="told">{_text(told[:1].upper() + told[1:])}.</p>
<dl class="figures">
{"".join(cells)}</dl>
</header>
"""


def _problems(record: Record) -> str:
    return "".join(f'<p class="problem" dir="auto">{_text(text)}</p>\n' for text in record.problems)


def _curves(record: Record) -> str:
    points = curves(record.lines)
    if not points:
        return ""
    parts = ['<section>\n<h2>Curves</h2>\n<p class="note">Over optimizer steps.</p>\n']
    if "loss" in points or "val_loss" in points:
        parts.append(_loss_figure(record, points))
    small = [field for field in SMALL if field in points]
    if small:
        parts.append('<div class="pair">\n')
        parts += [_small_figure(field, points[field]) for field in small]
        parts.append("</div>\n")
    return "".join(parts) + "</section>\n"


def _evaluations(record: Record) -> str:
    judged = evaluations(record.lines)
    if not judged:
        return ""
    best = best_of(judged)
    kept = {id(e): e for e in [*spread(judged, MOST_ROWS), *([best] if best else [])]}
    rows = []
    for evaluation in sorted(kept.values(), key=lambda e: e.step):
        cells = ["not a number", "", ""]
        if evaluation.finite:
            loss = evaluation.val_loss
            cells = [f"{loss:.4f}", shown_perplexity(loss), f"{loss / math.log(2):.3f}"]
        marked = ' class="best"' if evaluation is best else ""
        data = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr{marked}><th scope="row">{evaluation.step:,}</th>{data}</tr>\n')
    note = f"{len(kept):,} of {len(judged):,}, evenly spaced. " if len(kept) < len(judged) else ""
    return f"""<section>
<h2>Evaluations</h2>
<p class="note">{note}On all of the held-out text; the best step’s weights are the ones in this
folder.</p>
<div class="scroll"><table>
<thead><tr><th scope="col">step</th><th scope="col">loss (nats)</th><th scope="col">perplexity</th>
<th scope="col">bits per token</th></tr></thead>
<tbody>
{"".join(rows)}</tbody>
</table></div>
</section>
"""


def _samples(record: Record) -> str:
    if not record.samples:
        return ""
    parts = []
    for place, sample in enumerate(reversed(spread(record.samples, MOST_SAMPLES))):
        step = number(sample, "step")
        prompt, text = (
            _text(str(sample.get(name, ""))[:MOST_CHARACTERS]) for name in ("prompt", "text")
        )
        parts.append(
            f"<details{' open' if place == 0 else ''}>"
            f"<summary>{'step unknown' if step is None else f'step {int(step):,}'}</summary>"
            f'<pre class="sample" dir="auto">\n<span class="prompt">{prompt}</span>{text}</pre>'
            "</details>\n"
        )
    left_out = len(record.samples) - len(parts)
    note = f" {left_out:,} more are in samples.jsonl." if left_out else ""
    return f"""<section>
<h2>What it wrote</h2>
<p class="note">The beginning, in grey, is given; the rest is the model’s. Newest first.{note}</p>
{"".join(parts)}</section>
"""


def _facts(record: Record) -> str:
    """Data, model, settings and memory, side by side."""
    model = dict(record.part("model"))
    config = model.pop("config", None)
    model |= {k: v for k, v in as_dict(config).items() if k in ARCHITECTURE}
    data = dict(record.part("data"))
    if isinstance(data.get("identity"), str):
        data["identity"] = data["identity"][:12]
    groups = {
        "Data": _shown_facts(data),
        "Model": _shown_facts(model),
        "Settings": _shown_facts(record.part("settings"), SETTING_LABELS),
        "Memory": _memory_facts(record),
    }
    parts = [
        f"<section>\n<h2>{title}</h2>\n<dl>\n"
        + "".join(
            f'<div><dt>{_text(name)}</dt><dd dir="auto">{_text(value)}</dd></div>\n'
            for name, value in facts.items()
        )
        + "</dl>\n</section>\n"
        for title, facts in groups.items()
        if facts
    ]
    return f'<div class="pair facts">\n{"".join(parts)}</div>\n' if parts else ""


def _memory_facts(record: Record) -> dict[str, str]:
    """The forecast by its parts, and the peak that was measured."""
    forecast = record.part("memory")
    sizes = {name: size for name in forecast if (size := number(forecast, name)) is not None}
    facts = {_label(name): shown_size(size) for name, size in sizes.items() if name != "total"}
    if "total" in sizes:
        facts["forecast in all"] = shown_size(sizes["total"])
    peak = max((size for _, size in series(record.lines, "memory")), default=None)
    if peak is not None:
        facts["measured peak"] = shown_size(peak)
    return facts


def _sessions(record: Record) -> str:
    sessions = [as_dict(session) for session in as_list(record.info.get("sessions"))]
    if not any(sessions):
        return ""
    parts = []
    for session in sessions[-MOST_SESSIONS:]:
        versions = as_dict(session.get("versions"))
        made = " · ".join(f"{name} {_shown(version)}" for name, version in versions.items())
        about = [
            _date(session.get("started")),
            f"from step {_shown(session['from_step'])}" if "from_step" in session else "",
            _shown(session.get("device", "")),
            _shown(session.get("dtype", "")),
            _processes(session.get("world_size")),
        ]
        parts.append(
            f'<li>\n<p dir="auto">{_text(" · ".join(filter(None, about)))}</p>\n'
            f"<pre>{_text(str(session.get('command', ''))[:MOST_CHARACTERS])}</pre>\n"
            f'<p class="note" dir="auto">{_text(made)}</p>\n</li>\n'
        )
    return f"""<section>
<h2>How it was run</h2>
<ol class="sessions">
{"".join(parts)}</ol>
</section>
"""


def _draw_loss(axes: Axes, record: Record, colours: Mapping[str, str]) -> None:
    """Training and held-out loss, the untuned level as a dashed line, the best step ringed."""
    points = curves(record.lines)
    best, untuned = _landmarks(record)
    if untuned:
        axes.axhline(
            untuned.val_loss,
            color=colours["ink"],
            linewidth=0.8,
            dashes=(4, 3),
            label=_start(record),
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
    judged = evaluations(record.lines)
    return (best_of(judged), untuned_of(judged)) if len(judged) > 1 else (None, None)


def _start(record: Record) -> str:
    return "untuned" if record.pretrained else "at the start"


def _calm(axes: Axes, colours: Mapping[str, str]) -> None:
    """A few round numbers and faint lines, no frame."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=colours["ink"])
    axes.grid(axis="y", color=colours["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    steps = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=steps, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _loss_figure(record: Record, points: Mapping[str, object]) -> str:
    best, untuned = _landmarks(record)
    keys = {
        "train": "training" if "loss" in points else None,
        "val": "held-out" if "val_loss" in points else None,
        "ring": f"best, step {best.step:,}" if best else None,
        "dashed": _start(record) if untuned else None,
    }
    legend = " ".join(
        f'<span class="key {key}">{text}</span>' for key, text in keys.items() if text
    )
    figure, axes = _canvas(500, 250)
    _draw_loss(axes, record, STANDING_IN)
    picture = _inline_svg(figure, "loss", "Training and held-out loss over steps")
    caption = f"<span>Loss, nats per token</span> {legend}"
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{picture}\n</figure>\n"


def _small_figure(field: str, points: Sequence[Point]) -> str:
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


def _shown_facts(facts: Mapping[str, object], labels: Mapping[str, str] = LABELS) -> dict[str, str]:
    named = {
        labels.get(name) or _label(name): str(value) if name == "seed" else _shown(value)
        for name, value in facts.items()
    }
    return {name: value for name, value in named.items() if value}


def _label(name: str) -> str:
    return LABELS.get(name) or name.removeprefix("n_").replace("_", " ")


def _shown(value: object) -> str:
    """A value of run.json as text; nothing for what is not there."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        more = f" and {len(value) - 10:,} more" if len(value) > 10 else ""
        return ", ".join(_shown(item) for item in value[:10]) + more
    text = str(value)
    return text if len(text) <= 300 else text[:300] + "…"


def _rounded(count: float) -> str:
    for power, unit in ((1e9, "B"), (1e6, "M")):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:,.0f}"


def _processes(world_size: object) -> str:
    return f"{_shown(world_size)} processes" if world_size not in (None, 1) else ""


def _date(started: object) -> str:
    try:
        moment = datetime.fromisoformat(str(started))
    except ValueError:
        return _shown(started)
    return f"{moment.day} {moment:%B %Y, %H:%M}"


def _text(value: object) -> str:
    """Anything as text of the page, whatever it holds."""
    return html.escape(clean(value))


class TensorBoardLog:
    """Writes each metrics dict it is called with where TensorBoard looks for it.

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

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Log every number but the step itself."""
        for name in metrics:
            value = number(metrics, name)
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, metrics["step"])

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Log what the model wrote."""
        self._writer.add_text("sample", prompt + text, step)

    def close(self) -> None:
        """Write out what is still in memory."""
        self._writer.close()


def main(arguments: Sequence[str]) -> int:
    """Write all pictures and pages of a run folder anew; returns the exit code."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python -m minigpt2.report RUN", file=sys.stderr)
        return 2
    run = RunFolder(Path(arguments[0]))
    if not run.path.is_dir():
        print(f"error: {run.path} is no folder: name a run folder of train.py", file=sys.stderr)
        return 2
    for write in (draw_loss_curve, write_report, write_card):
        write(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
