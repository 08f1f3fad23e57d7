"""A page that explains a model by one text: one file that loads nothing.

It shows what the library measured.
"""

from __future__ import annotations

import html
import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError
from ..model import GPT2
from ..runs.wording import clean
from ..system.files import ASSETS, write_text
from ..tokenizer import Tokenizer
from .compared import differences
from .costs import cached_numbers, multiplications
from .inside import Reading, inside
from .live import live_model, live_tokenizer, refusal, rounding, spelled
from .packing import packed, script_json
from .sections import Code, Section, sections_of, shown_code

PARTS = ASSETS / "explain"
ENGINE = ("packing.js", "sampling.js", "live.js", "measures.js", "reader.js")  # for a worker, too
MOST_TOKENS = 128
LONGEST_SHOWN = 40  # bytes of a piece whose merges are shown
MOVED = 12  # tensors that moved furthest
MARK = '<meta name="generator" content="minigpt2 explain">'
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "worker-src blob:; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Subject:
    """A model that a page is about, by the name that it has there."""

    name: str
    model: GPT2
    tokenizer: Tokenizer


def checked_ids(subject: Subject, prompt: str, *, special: bool = False) -> list[int]:
    """The ids of a prompt that a page can show. Raises InputError for none, and for too many."""
    ids = subject.tokenizer.encode(prompt, special=special)
    limit = min(MOST_TOKENS, subject.model.config.block_size)
    if not ids:
        raise InputError("the prompt is empty: give it at least one word")
    if len(ids) > limit:
        whose = "a page shows" if limit == MOST_TOKENS else f"{subject.name} reads"
        raise InputError(
            f"the prompt has {len(ids):,} tokens, {whose} {limit} at most: give a shorter one"
        )
    return ids


def page(subjects: Sequence[Subject], prompt: str, *, special: bool = False) -> str:
    """The page of one model, or of two that are compared, as HTML. With `special` the names of
    special tokens, in the prompt and in what is typed, are these tokens.

    Raises InputError for a prompt of no token or too many, for models of different shape or with
    different tokens, and for weights that are damaged.
    """
    first = subjects[0]
    ids = checked_ids(first, prompt, special=special)
    for other in subjects[1:]:
        if not first.tokenizer.same_tokens(other.tokenizer):
            raise InputError(
                f"{first.name} and {other.name} have different tokens, so one prompt is two texts "
                "to them: compare models with the same tokenizer"
            )
    readings = [Reading.of(s.model, s.tokenizer, ids) for s in subjects]
    return _html(subjects, script_json(_data(subjects, readings, prompt, special)))


def write_page(
    path: Path, subjects: Sequence[Subject], prompt: str, *, special: bool = False
) -> None:
    """Write `page` to a file. Raises InputError for a file that is something else."""
    check_place(path)
    write_text(path, page(subjects, prompt, special=special))


def check_place(path: Path) -> None:
    """Raise InputError where the page cannot be written without loss."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, such as {path / 'explain.html'}")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make it first, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} cannot be written to: name a file in another folder")
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(1000):
                raise InputError(f"{path} is there and is no page of this kind: name another file")


def _data(
    subjects: Sequence[Subject], readings: Sequence[Reading], prompt: str, special: bool
) -> dict[str, object]:
    """All that the scripts read."""
    first, ids = subjects[0], readings[0].ids
    refused = [why for s in subjects if (why := refusal(s.model, s.tokenizer))]
    live = not refused
    records = [inside(reading) for reading in readings]
    named = sorted(set().union(*(named for _, named in records)))
    return {
        "prompt": prompt,
        "ids": ids,
        "pieces": _pieces(first.tokenizer, prompt, special),
        "special": first.tokenizer.vocabulary.eot if special else None,
        "names": {id: spelled(first.tokenizer.token_bytes(id)) for id in named},
        "models": [
            {
                "name": _seen(subject.name),
                "nHead": subject.model.config.n_head,
                "nLayer": subject.model.config.n_layer,
                "inside": record,
                "costs": _costs(subject.model, len(ids)),
                "live": live_model(subject.model, subject.tokenizer) if live else None,
                "rounding": rounding(subject.model, ids) if live else None,
            }
            for subject, (record, _) in zip(subjects, records)
        ],
        "tokenizer": live_tokenizer(first.tokenizer, special=special) if live else None,
        "limit": min(MOST_TOKENS, *(s.model.config.block_size for s in subjects)),
        "fixed": refused[0] if refused else None,
        "differences": _differences(subjects, ids) if len(subjects) > 1 else None,
    }


def _pieces(tokenizer: Tokenizer, prompt: str, special: bool) -> list[dict[str, object]]:
    """Each piece as its merges: the parts after each, as vocab.json spells them."""
    found: list[dict[str, object]] = []
    for piece in tokenizer.pieces(prompt, special=special):
        if isinstance(piece, int):
            found.append({"steps": [spelled(tokenizer.token_bytes(piece))]})
            continue
        steps = tokenizer.merge_steps(piece)
        if len(steps[0]) > LONGEST_SHOWN:
            steps = steps[-1:]
        found.append({"steps": [" ".join(map(spelled, parts)) for parts in steps]})
    return found


def _costs(model: GPT2, n_tokens: int) -> dict[str, object]:
    """What the next token costs, by part: all tokens again, or with a cache of the others."""
    again = multiplications(model.config, n_tokens + 1)
    cached = multiplications(model.config, 1, n_tokens)
    return {
        "parts": [[name, again[name], cached[name]] for name in again],
        "numbers": cached_numbers(model.config, n_tokens),
    }


def _differences(subjects: Sequence[Subject], ids: list[int]) -> dict[str, object]:
    a, b = subjects
    found = differences(a.model, b.model, torch.tensor([ids]))
    # 0 / 0 where a tensor is 0 in both, and infinite where it was 0 in the first
    moved = {name: 0.0 if math.isnan(x) else x for name, x in found.weights.items()}
    furthest = sorted(moved.items(), key=lambda item: -item[1])[:MOVED]
    return {
        "divergence": packed(found.divergence),
        "streams": packed(found.streams),
        "weights": [[name, x if math.isfinite(x) else None] for name, x in furthest],
        "unmoved": sum(x == 0 for x in moved.values()),
        "tensors": len(moved),
    }


def _html(subjects: Sequence[Subject], data: str) -> str:
    sections = sections_of(len(subjects))
    names = " and ".join(_text(subject.name) for subject in subjects)
    pieces = shown_code(sections)
    engine = "\n".join((PARTS / name).read_text(encoding="utf-8") for name in ENGINE)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{names}: see inside</title>
<style>
{(PARTS / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{_head(subjects)}
<noscript><p class="problem">This page draws with JavaScript, which is off here. It loads nothing
from anywhere.</p></noscript>
{"".join(map(_section, sections))}<section id="code">
<h2>The code</h2>
<p class="told">What this page shows is done by these lines of minigpt2, as they are installed
where the page was made.</p>
{"".join(map(_code, pieces))}</section>
<footer>Made by minigpt2. Another prompt, or your own model:
<code>python -m minigpt2 explain --model DIR --prompt TEXT</code></footer>
</main>
<script type="application/json" id="data">{data}</script>
<script id="engine">
"use strict";
{engine}</script>
<script>
"use strict";
{(PARTS / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _head(subjects: Sequence[Subject]) -> str:
    config = subjects[0].model.config
    facts = {
        "parameters": f"{config.n_parameters:,}",
        "layers": config.n_layer,
        "heads a layer": config.n_head,
        "width": f"{config.n_embd:,}",
        "tokens it knows": f"{config.vocab_size:,}",
        "tokens it reads": f"{config.block_size:,}",
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    names = "<br>".join(f"<bdi>{_text(subject.name)}</bdi>" for subject in subjects)
    return f"""<header>
<p class="eyebrow">See inside</p>
<h1>{names}</h1>
<p class="told">How this model reads a text and says what comes next, from the first byte to the
probabilities. Every number is measured on the model itself.</p>
<dl class="figures">{cells}</dl>
<div id="prompt"></div>
</header>
<nav id="place" aria-label="Where to look"></nav>"""


def _section(section: Section) -> str:
    links = ", ".join(
        f'<a href="#{code.id}"><code>{_text(code.file)}: {_text(code.name)}</code></a>'
        for code in map(Code.of, section.code)
    )
    return f"""<section id="{section.name}" aria-labelledby="{section.name}-title">
<h2 id="{section.name}-title">{_text(section.title)}</h2>
<p class="told">{_text(section.text)}</p>
<p class="note">In the code: {links}</p>
<div class="view"></div>
</section>
"""


def _code(code: Code) -> str:
    return f"""<details id="{code.id}">
<summary><code>{_text(code.file)}: {_text(code.name)}</code>, line {code.line}</summary>
<pre tabindex="0" aria-label="{_text(code.name)}"><code>{_text(code.text)}</code></pre>
</details>
"""


def _text(value: object) -> str:
    """Anything as text of the page, whatever it holds."""
    return html.escape(_seen(value))


def _seen(value: object) -> str:
    """Text in which what turns the direction of others, or cannot be seen, is escaped."""
    return "".join(
        f"\\u{{{ord(c):04x}}}" if unicodedata.category(c) == "Cf" else c for c in clean(value)
    )
