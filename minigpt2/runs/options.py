"""What can be set for the pages of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportOptions:
    """Write loss.png, loss.svg, report.html and README.md of a run anew, from its records."""

    run: str
    """The run folder."""
    debug: bool = False
    """Show the full traceback of an error."""
