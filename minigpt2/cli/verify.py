"""Prove that this installation computes what it should: minigpt2 verify"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NotFoundError
from ..evaluation.options import VerifyOptions
from ..hub.folders import require_source
from .console import printable, run_script

if TYPE_CHECKING:
    from ..evaluation.proof import Outcome
    from .proofs.published import Known

STATUSES = ("PASS", "FAIL", "NOT HERE")
MOST_DETAIL = 600  # characters of what was found, in a line


def main(options: VerifyOptions) -> int:
    """Run the items, and tell of each when it is done; 1 if one of them is a FAIL."""
    if options.model != VerifyOptions.model:
        require_source(options.model)
    from .proofs.machine import machine
    from .proofs.published import Known

    if options.model != VerifyOptions.model:
        _require_here(options.model)
    with tempfile.TemporaryDirectory(prefix="minigpt2-", ignore_cleanup_errors=True) as folder:
        outcomes = []
        for outcome in proved(options, Path(folder), Known(options.model)):
            outcomes.append(outcome)
            if not options.json:
                show(line_of(outcome))
    facts, failed = machine(), [outcome.name for outcome in outcomes if outcome.status == "FAIL"]
    last = report(facts, outcomes)
    if options.json:
        listed = [asdict(outcome) for outcome in outcomes]
        values = {"ok": not failed, "items": listed, "machine": facts, "report": last}
        show(json.dumps(values, ensure_ascii=False, allow_nan=False))
    else:
        show("\n" + "\n".join(f"{name:<10}{value}" for name, value in facts.items()))
        show("\n" + last)
    return 1 if failed else 0


def proved(options: VerifyOptions, folder: Path, known: Known) -> Iterator[Outcome]:
    """How each item went that was asked for, one after the other."""
    from ..evaluation.proof import Outcome, chosen, run
    from .proofs.every import items
    from .proofs.place import Place

    every = items(Place(folder), known)
    for item in chosen(every, options.item) if options.item else every:
        if item.long and not (options.full or options.item):
            yield Outcome(item.name, item.proves, "NOT HERE", "takes longer: add --full", 0.0)
        else:
            yield run(item)


def line_of(outcome: Outcome) -> str:
    """An item in a line."""
    told = f"{outcome.status:<8}  {outcome.name}  ({outcome.seconds:.1f} s)"
    detail = outcome.detail
    if len(detail) > MOST_DETAIL:
        detail = detail[: MOST_DETAIL - 3] + "..."
    return f"{told}: {detail}" if detail else told


def report(facts: dict[str, str], outcomes: Sequence[Outcome]) -> str:
    """The last line: what to paste into a bug report."""
    counts = Counter(outcome.status for outcome in outcomes)
    told = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    failed = ", ".join(outcome.name for outcome in outcomes if outcome.status == "FAIL")
    names = ("minigpt2", "system", "python", "torch", "processor")
    known = [
        f"{name} {facts[name]}" if name in ("minigpt2", "torch") else facts[name] for name in names
    ]
    known += [] if facts["gpu"] == "none" else [facts["gpu"]]
    return " | ".join([*known, told, *([f"FAIL: {failed}"] if failed else [])])


def show(text: str) -> None:
    """A line of the result, at once."""
    print(printable(text, sys.stdout), flush=True)


def _require_here(source: str) -> None:
    """Refuse a model that was named and would have to be downloaded."""
    from ..hub.folders import cached_folder

    if cached_folder(source) is None:
        raise NotFoundError(
            f"{source} is not in the Hub's cache, and verify downloads nothing: name a folder, or "
            f"run `minigpt2 sample --model {source}` once"
        )


def run(argv: Sequence[str] | None = None) -> int:
    """The command, from its flags to its exit code."""
    return run_script(main, VerifyOptions, argv)
