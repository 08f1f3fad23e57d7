"""The report of a run: one page, self-contained, made from nothing but the run's records."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from datetime import datetime

from ..system.files import ASSETS, write_text
from .curves import SMALL, curves, loss_figure, small_figure
from .folder import RunFolder
from .record import (
    Evaluation,
    Record,
    Session,
    best_of,
    evaluations,
    number,
    seconds_trained,
    series,
    spread,
    untuned_of,
)
from .wording import (
    BITS,
    clean,
    shown_bits,
    shown_duration,
    shown_perplexity,
    shown_size,
    summary,
)

STYLE = ASSETS / "report.css"
MOST_ROWS = 200  # of evaluations; all are in metrics.jsonl
MOST_SAMPLES = 60
MOST_CHARACTERS = 4000  # of one sample
MOST_SESSIONS = 30
LABELS = {
    "paths": "text",
    "val_paths": "held-out text",
    "n_train_tokens": "training tokens",
    "n_val_tokens": "held-out tokens",
    "identity": "fingerprint",
    "source": "started from",
    "source_kind": "kind of source",
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


def write_report(run: RunFolder) -> None:
    """Write report.html: one page, self-contained, that shows all a run has recorded."""
    write_text(run.path / "report.html", page(run.read_record()))


def page(record: Record) -> str:
    """The report of a run as HTML that loads nothing and runs nothing."""
    sections = [
        _head(record),
        _problems(record),
        _curves(record),
        _evaluations(record),
        _samples(record),
        _details(record),
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
run.json. Again: <code>python -m minigpt2 report RUN</code></footer>
</main>
</body>
</html>
"""


def _head(record: Record) -> str:
    sentence = summary(record.metrics, pretrained=record.pretrained)
    judged = evaluations(record.metrics)
    best, untuned = best_of(judged), untuned_of(judged)
    steps = max((int(step) for step, _ in series(record.metrics, "step")), default=0)
    planned = number(record.info.settings.max_steps)
    parameters = number(record.info.model.n_parameters)
    seconds = seconds_trained(record.metrics)
    skipped = sum(bool(line.skipped) for line in record.metrics)
    start = "untuned {}" if record.pretrained else "{} at the start"
    figures = {
        **_judgement("best {}", best),
        **_judgement(start, untuned),
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
<p class="told">{_text(sentence[:1].upper() + sentence[1:])}.</p>
<dl class="figures">
{"".join(cells)}</dl>
</header>
"""


def _judgement(label: str, evaluation: Evaluation | None) -> dict[str, str]:
    """What an evaluation found, by what it is called there."""
    if evaluation is None:
        return {}
    found = {label.format("perplexity"): shown_perplexity(evaluation.val_loss)}
    bits = evaluation.bits_per_byte
    return found if bits is None else {**found, label.format("bits per byte"): shown_bits(bits)}


def _problems(record: Record) -> str:
    return "".join(f'<p class="problem" dir="auto">{_text(text)}</p>\n' for text in record.problems)


def _curves(record: Record) -> str:
    points = curves(record.metrics)
    if not points:
        return ""
    parts = ['<section>\n<h2>Curves</h2>\n<p class="note">Over optimizer steps.</p>\n']
    if "loss" in points or "val_loss" in points:
        parts.append(loss_figure(record, points))
    small = [field for field in SMALL if field in points]
    if small:
        parts.append('<div class="pair">\n')
        parts += [small_figure(field, points[field]) for field in small]
        parts.append("</div>\n")
    return "".join(parts) + "</section>\n"


def _evaluations(record: Record) -> str:
    judged = evaluations(record.metrics)
    if not judged:
        return ""
    best, untuned = best_of(judged), untuned_of(judged)
    start = "untuned" if record.pretrained else "random weights"
    has_bits = any(evaluation.bits_per_byte is not None for evaluation in judged)
    kept = {id(e): e for e in [*spread(judged, MOST_ROWS), *([best] if best else [])]}
    rows = []
    for evaluation in sorted(kept.values(), key=lambda e: e.step):
        cells = ["not a number", "", "", *([""] * has_bits)]
        if evaluation.finite:
            loss, bits = evaluation.val_loss, evaluation.bits_per_byte
            cells = [f"{loss:.4f}", shown_perplexity(loss), f"{loss / math.log(2):.3f}"]
            cells += ["" if bits is None else shown_bits(bits)] * has_bits
        marked = ' class="best"' if evaluation is best else ""
        step = f"{evaluation.step:,}" + f" <small>{start}</small>" * (evaluation is untuned)
        data = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr{marked}><th scope="row">{step}</th>{data}</tr>\n')
    note = f"{len(kept):,} of {len(judged):,}, evenly spaced. " if len(kept) < len(judged) else ""
    column = '\n<th scope="col">bits per byte</th>'
    return f"""<section>
<h2>Evaluations</h2>
<p class="note">{note}On all of the held-out text; the best step’s weights are the ones in this
folder.{f" {BITS}" * has_bits}</p>
<div class="scroll"><table>
<thead><tr><th scope="col">step</th><th scope="col">loss (nats)</th><th scope="col">perplexity</th>
<th scope="col">bits per token</th>{column * has_bits}</tr></thead>
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
        prompt, text = (
            _text(written[:MOST_CHARACTERS]) for written in (sample.prompt, sample.text)
        )
        parts.append(
            f"<details{' open' if place == 0 else ''}>"
            f"<summary>step {sample.step:,}</summary>"
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


def _details(record: Record) -> str:
    """Data, model, settings and memory, side by side."""
    model, config = record.info.model.to_json(), record.info.model.config or {}
    del model["config"]
    model |= {name: value for name, value in config.items() if name in ARCHITECTURE}
    data, identity = record.info.data.to_json(), record.info.data.identity
    data["identity"] = identity and identity[:12]
    groups = {
        "Data": _labelled(data),
        "Model": _labelled(model),
        "Settings": _labelled(record.info.settings.to_json(), SETTING_LABELS),
        "Memory": _memory_details(record),
    }
    parts = [
        f"<section>\n<h2>{title}</h2>\n<dl>\n"
        + "".join(
            f'<div><dt>{_text(name)}</dt><dd dir="auto">{_text(value)}</dd></div>\n'
            for name, value in details.items()
        )
        + "</dl>\n</section>\n"
        for title, details in groups.items()
        if details
    ]
    return f'<div class="pair facts">\n{"".join(parts)}</div>\n' if parts else ""


def _memory_details(record: Record) -> dict[str, str]:
    """The forecast by its parts, and the peak that was measured."""
    forecast = record.info.memory or {}
    sizes = {name: size for name in forecast if (size := number(forecast[name])) is not None}
    details = {_label(name): shown_size(size) for name, size in sizes.items() if name != "total"}
    if "total" in sizes:
        details["forecast in all"] = shown_size(sizes["total"])
    peak = max((size for _, size in series(record.metrics, "memory")), default=None)
    if peak is not None:
        details["measured peak"] = shown_size(peak)
    return details


def _sessions(record: Record) -> str:
    sessions = record.info.sessions
    if all(session == Session() for session in sessions):
        return ""
    parts = []
    for session in sessions[-MOST_SESSIONS:]:
        versions = session.versions or {}
        made = " · ".join(f"{name} {_shown(version)}" for name, version in versions.items())
        about = [
            _date(session.started),
            "" if session.from_step is None else f"from step {session.from_step:,}",
            _shown(session.device),
            _shown(session.dtype),
            _processes(session.world_size),
        ]
        parts.append(
            f'<li>\n<p dir="auto">{_text(" · ".join(filter(None, about)))}</p>\n'
            f"<pre>{_text(_command(session))}</pre>\n"
            f'<p class="note" dir="auto">{_text(made)}</p>\n</li>\n'
        )
    return f"""<section>
<h2>How it was run</h2>
<ol class="sessions">
{"".join(parts)}</ol>
</section>
"""


def _command(session: Session) -> str:
    """What was typed; an ellipsis shows that it is cut, and cannot be pasted."""
    typed = session.command or ""
    return typed if len(typed) <= MOST_CHARACTERS else typed[:MOST_CHARACTERS] + " …"


def _labelled(values: Mapping[str, object], labels: Mapping[str, str] = LABELS) -> dict[str, str]:
    """Values as text, by what a page calls them; those that are not there are left out."""
    named = {
        labels.get(name) or _label(name): _seed(value) if name == "seed" else _shown(value)
        for name, value in values.items()
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


def _seed(value: object) -> str:
    """Without the commas of a number that counts something."""
    return "" if value is None else str(value)


def _processes(world_size: int | None) -> str:
    return f"{world_size:,} processes" if world_size not in (None, 1) else ""


def _date(started: str | None) -> str:
    try:
        moment = datetime.fromisoformat(started or "")
    except ValueError:
        return _shown(started)
    return f"{moment.day} {moment:%B %Y, %H:%M}"


def _text(value: object) -> str:
    """Anything as text of the page, whatever it holds."""
    return html.escape(clean(value))
