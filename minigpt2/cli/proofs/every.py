"""Every item of the proof of an installation, in the order in which they are run."""

from __future__ import annotations

from ...evaluation import figures
from ...evaluation.proof import Item
from . import published, resume, training, ways
from .place import Place


def items(place: Place, known: published.Known) -> list[Item]:
    """What is computed at once first, then what takes longer. Nothing is made yet."""
    return [
        *figures.ITEMS,
        *ways.items(place),
        *training.items(place),
        *resume.items(place),
        *published.items(known),
    ]
