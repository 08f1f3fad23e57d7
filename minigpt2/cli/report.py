"""Write the pictures and pages of a run anew: python -m minigpt2 report RUN"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..runs.options import ReportOptions
from .console import run_script


def main(options: ReportOptions) -> int:
    """Write all pictures and pages of a run folder anew."""
    folder = Path(options.run)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the folder of a run")
    from ..runs.folder import RunFolder

    run = RunFolder(folder)
    if not run.holds_a_run():
        raise InputError(f"{folder} holds no run, and nothing is written there: name another one")
    from ..runs.card import write_card
    from ..runs.curves import draw_loss_curve
    from ..runs.page import write_report

    for write in (draw_loss_curve, write_report, write_card):
        write(run)
    return 0


def run(argv: Sequence[str] | None = None) -> int:
    """The command, from its arguments to its exit code."""
    return run_script(main, ReportOptions, argv, positional=True)
