"""What can be set for a text: how documents are found in it and what becomes of them.

Imports nothing heavy, as every `options.py`: `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ..arguments import Preset, check_field, check_types
from ..errors import InputError, OptionError

ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def unescape(text: str) -> str:
    """Text with \\n, \\r, \\t and \\\\ understood."""
    return re.sub(r"\\([nrt\\])", lambda found: ESCAPES[found[1]], text)


@dataclass(frozen=True)
class TextConfig:
    """How documents are found in files, and what is changed in them: by default, nothing."""

    text_field: str = "text"
    """The field or column that holds the text, or the messages of a chat, in .jsonl, .json, .csv,
    .tsv and .parquet."""
    document_separator: str | None = None
    """Where one document ends and the next begins inside a text file; \\n, \\t, \\r and \\\\ are
    understood. Default: a file is one document."""
    special_tokens: bool = False
    """Read special tokens that stand in the text, such as <|endoftext|>, as tokens. Default: as
    plain text, with a notice."""
    normalize_unicode: bool = False
    """Compose characters (Unicode NFC), so that the same letter is the same bytes."""
    normalize_newlines: bool = False
    """Turn the line endings of Windows and of old Macs into \\n."""
    remove_control_characters: bool = False
    """Remove control characters other than newline, tab and carriage return."""
    duplicates: Literal["keep", "drop", "drop-near"] = "keep"
    """What to do with documents that are there already: drop leaves out exact copies, drop-near
    also those that are nearly the same (needs pip install datasketch)."""
    min_characters: int = 0
    """Leave out documents shorter than this; 0 keeps all."""

    def __post_init__(self) -> None:
        check_types(self)
        check_field(self, "min_characters", self.min_characters >= 0, "0 (off) or more")
        if self.document_separator == "":
            name = "document_separator"
            raise OptionError(f"{name} is empty: give the text between documents", name)
        if self.text_field == "":
            raise OptionError("text_field is empty: name the field that holds it", "text_field")

    @property
    def separator(self) -> str | None:
        """The document separator with its escapes understood."""
        return self.document_separator and unescape(self.document_separator)


@dataclass(frozen=True)
class CorpusOptions:
    """Prepare text for training and report what is in it: how much, how long, how well GPT-2's
    tokens fit, what repeats, what is held out. Training does the same by itself.
    """

    paths: tuple[str, ...]
    """Files, folders, globs, hf://datasets/... paths, or - for stdin."""
    val_data: tuple[str, ...] = ()
    """Held-out text of your own, instead of a part of PATHS."""
    val_fraction: float = 0.1
    """Share held out to judge the model; 0 holds out nothing."""
    model: str | None = None
    """Whose tokenizer to use: a Hub id, a Hugging Face folder or a run folder. Default: gpt2,
    unless --preset is given."""
    preset: Preset | None = None
    """Use the tokenizer of this preset instead."""
    workers: int | None = None
    """Processes that tokenize; the result is the same. Default: one per CPU core."""
    json: bool = False
    """Print the report as one JSON object."""
    debug: bool = False
    """Show the full traceback of an error."""
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("no path is given: name at least one file, folder or glob of text")
        check_field(self, "val_fraction", 0 <= self.val_fraction < 1, "from 0 to below 1")
        check_field(self, "workers", self.workers is None or self.workers >= 1, "1 or more")
        check_one_source(self)

    @property
    def source(self) -> str:
        """Whose tokenizer is used: the preset's, or the model's."""
        return self.preset or self.model or "gpt2"


def check_one_source(options: Any) -> None:
    if options.preset and options.model is not None:
        raise InputError(
            f"--preset {options.preset} and --model {options.model} are both given: choose one"
        )
