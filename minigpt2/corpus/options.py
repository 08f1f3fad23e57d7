"""What can be set for a text: how documents are found in it and what becomes of them.

Imports nothing heavy, as every `options.py`: `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ..arguments import Preset, check_field, check_types, shown
from ..errors import InputError, OptionError

FEWEST_TOKENS, MOST_TOKENS = 257, 2**31 - 1  # of a vocabulary: the bytes and end-of-text alone
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
    csv_columns: str | None = None
    """The columns of .csv and .tsv files that are the text, one below the other, in this order:
    title,body; a name with a comma in quotes. Default: --text-field."""
    csv_delimiter: str | None = None
    """What stands between the columns of .csv and .tsv files, one character or \\t. Default: tabs
    in .tsv; in .csv the comma, semicolon, tab or | by which the header names the text."""
    csv_plain_quotes: bool = False
    """Read quotes in .csv and .tsv files as text: no field stands in quotes, and none holds a
    delimiter or a line end. Default: quotes stand around fields."""
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
        if self.csv_columns is not None:
            _names_of(self.csv_columns)
        allowed = r"one character other than a quote and a line end, or \t"
        check_field(
            self, "csv_delimiter", self.delimiter is None or _divides(self.delimiter), allowed
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in csv_columns; none where it is not given."""
        return () if self.csv_columns is None else _names_of(self.csv_columns)

    @property
    def delimiter(self) -> str | None:
        """The delimiter of tables with its escape understood."""
        return "\t" if self.csv_delimiter == r"\t" else self.csv_delimiter

    @property
    def separator(self) -> str | None:
        """The document separator with its escapes understood."""
        return self.document_separator and unescape(self.document_separator)


def _divides(delimiter: str) -> bool:
    """Whether it can stand between the columns of a table."""
    return len(delimiter) == 1 and delimiter not in '"\r\n\0'


def _names_of(csv_columns: str) -> tuple[str, ...]:
    """The names in a line of CSV; OptionError if it is none, or one of them is empty or twice."""
    try:
        (names,) = csv.reader([csv_columns], strict=True)
    except (csv.Error, ValueError) as problem:
        raise _no_names(csv_columns, f"is no line of CSV ({problem})") from problem
    if not names or "" in names:
        raise _no_names(csv_columns, "holds an empty name" if names else "names nothing")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise _no_names(csv_columns, f"names {shown(twice[0])} twice")
    return tuple(names)


def _no_names(csv_columns: str, reason: str) -> OptionError:
    return OptionError(
        f"csv_columns is {shown(csv_columns)}, which {reason}: name columns, each once, with "
        'commas between them; a name with a comma stands in quotes: "a, b"',
        "csv_columns",
    )


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
        _check_text_and_shares(self)
        check_one_source(self)

    @property
    def source(self) -> str:
        """Whose tokenizer is used: the preset's, or the model's."""
        return self.preset or self.model or "gpt2"


@dataclass(frozen=True)
class VocabularyOptions:
    """Train a vocabulary (byte-level BPE, as GPT-2's) on text, and write it as a folder that
    minigpt2 and transformers read. Training with --train-vocabulary does the same by itself.
    """

    paths: tuple[str, ...]
    """Files, folders, globs, hf://datasets/... paths, or - for stdin."""
    out: str | None = None
    """Folder to write; needed."""
    vocab_size: int = 8192
    """How many tokens, of which 256 are the bytes and one is <|endoftext|>."""
    val_data: tuple[str, ...] = ()
    """Held-out text of your own, instead of a part of PATHS."""
    val_fraction: float = 0.1
    """Share held out, on which the vocabulary is not trained; 0 holds out nothing."""
    workers: int | None = None
    """Processes that tokenize; the result is the same. Default: one per CPU core."""
    json: bool = False
    """Print the report as one JSON object."""
    debug: bool = False
    """Show the full traceback of an error."""
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        _check_text_and_shares(self)
        if not self.out:
            raise OptionError("out is missing: name the folder to write", "out")
        size = FEWEST_TOKENS <= self.vocab_size <= MOST_TOKENS
        check_field(self, "vocab_size", size, f"{FEWEST_TOKENS} to {MOST_TOKENS}")


def _check_text_and_shares(options: CorpusOptions | VocabularyOptions) -> None:
    """Raise InputError without a path, and for a share or a number of processes that none is."""
    if not options.paths:
        raise InputError("no path is given: name at least one file, folder or glob of text")
    share, workers = options.val_fraction, options.workers
    check_field(options, "val_fraction", 0 <= share < 1, "from 0 to below 1")
    check_field(options, "workers", workers is None or workers >= 1, "1 or more")


def check_one_source(options: Any) -> None:
    """Raise InputError where a preset and a model are both given."""
    if options.preset and options.model is not None:
        raise InputError(
            f"--preset {options.preset} and --model {options.model} are both given: choose one"
        )
