"""What a run begins with: it is where the options say, or it is in memory and the run keeps it.

Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..arguments import Preset, refuse, shown
from ..corpus.sources.find import require_local
from ..errors import OptionError
from ..hub.folders import require_source
from ..hub.pins import public_model
from ..runs import kept
from ..system.files import replace_file
from ..training.options import TrainOptions

if TYPE_CHECKING:
    from ..model import GPT2
    from ..runs.folder import RunFolder
    from ..tokenizer import Tokenizer


def require_inputs(options: TrainOptions, but: Collection[str] = ()) -> None:
    """Raise what reading the text and finding the model of a new run will raise, as far as that is
    seen before anything heavy is imported, downloaded or asked; `but` names paths that are still to
    be written.
    """
    if not options.resume:
        given = (*options.data, *options.val_data)
        require_local([path for path in given if path not in but], options.text)
        name = options.model or ""
        if name in get_args(Preset) and not (public_model(name) or Path(name).is_dir()):
            raise OptionError(
                f"model is {name}, which is a preset: give it as preset", "model", "preset"
            )
        if not options.preset and options.source not in but:
            require_source(options.source)


@dataclass(frozen=True)
class InMemory:
    """What of a run is nowhere but in memory: either may be missing."""

    texts: Iterable[str] | None = None
    text_field: str = "text"
    model: GPT2 | None = None
    tokenizer: Tokenizer | None = None  # of the model

    @property
    def names(self) -> list[str]:
        """What is going to be in the run folder."""
        there = {kept.TEXTS: self.texts, kept.BASE: self.model}
        return [name for name, value in there.items() if value is not None]

    def write(self, run: RunFolder) -> None:
        """Write it into the run folder, from which it is read as any file is."""
        texts = self.texts
        if self.model is not None:
            with run.writing("the model to start from"):
                self.model.save_pretrained(run.own_place(kept.BASE), self.tokenizer)
        if texts is not None:
            place = run.own_place(kept.TEXTS)
            replace_file(place, lambda path: write_rows(path, texts, self.text_field))


def write_rows(path: Path, texts: Iterable[str], text_field: str) -> None:
    """Write texts as rows of JSON, one a document; they may come one after the other.

    Raises OptionError for what is no text, and where there is none.
    """
    if not isinstance(texts, Iterable):
        raise refuse("texts", texts, "texts, one or many")
    given, empty = False, True
    with path.open("w", encoding="utf-8") as file:
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise OptionError(f"texts holds {shown(text)}, allowed are texts", "texts")
            file.write(json.dumps({text_field: text}, allow_nan=False) + "\n")
            given, empty = True, empty and not text
    if empty:
        is_so = "holds empty texts alone: give another" if given else "is empty: give at least one"
        raise OptionError(f"texts {is_so} text", "texts")
