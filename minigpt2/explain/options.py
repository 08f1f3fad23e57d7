"""What can be set for a page that explains a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError


@dataclass(frozen=True)
class ExplainOptions:
    """Write a page that shows, step by step, how a model reads a text: one file that opens in any
    browser and loads nothing. Of small models the page reads what is typed there, too.
    """

    prompt: str | None = None
    """The text, of 128 tokens at most; \\n, \\t, \\r and \\\\ are understood. - reads it from
    stdin, as it is."""
    special_tokens: bool = False
    """Read special tokens that stand in a prompt, such as <|endoftext|>, as tokens. Default: as
    plain text, with a notice, unless --model is a run that was trained with it."""
    model: str = "gpt2"
    """A Hub id, a Hugging Face folder or a run folder."""
    compare: str | None = None
    """A second model of the same shape, such as the first before it was fine-tuned, to be shown
    beside it."""
    out: str = "explain.html"
    """The file to write; another page of this kind is replaced."""
    debug: bool = False
    """Show the full traceback of an error."""

    def __post_init__(self) -> None:
        if self.prompt is None:
            raise OptionError("prompt is missing: give the text that the page is to show", "prompt")
        if not self.prompt:
            raise OptionError("prompt is empty: give it at least one word", "prompt")
