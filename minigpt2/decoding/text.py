"""Prompts in, texts out: what ends a text, what must not be in it, and how it comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from ..arguments import refuse, texts
from ..errors import InputError
from ..generate import NEUTRAL, DecodeSettings, Token, decode
from ..model import GPT2
from ..sampling import Drafter, SamplingConfig
from ..tokenizer import TextStream, Tokenizer
from .banned import BannedTexts

# a sentence ends behind its mark and the quotes that close with it, or with its line
ENDED = re.compile(r"""(?:[.!?\u2026]["'\u201d\u2019)\]]*\s*|\n)\Z""")
SENTENCE_END = re.compile(r"""[.!?\u2026]["'\u201d\u2019)\]]*(?=\s)|(?=\n)""")
SENTENCE_TOKENS = 100  # more than max_new_tokens at most, to come to the end of a sentence


@dataclass
class Completion:
    """What was added to one prompt, and why it ended.

    `ids` are all tokens that were drawn, with the end-of-text or the stop text that ended them, and
    `logprobs` the natural logarithms of the model's own probabilities for them, before temperature
    and filters; `text` is without what ended it.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["eot", "stop", "sentence", "length"] = "length"  # max_new_tokens


class _Writer:
    """Turns one row's tokens into text as they come, and notices where the text ends.

    With `sentence_from`, a text of so many tokens goes on to the end of its sentence.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] | str, sentence_from: int | None
    ) -> None:
        self._eot, self._stream = tokenizer.eot, TextStream(tokenizer, stop)
        self._sentence_from = sentence_from
        self._limit: int | None = None  # characters of the text at max_new_tokens
        self.written, self.unread = Completion(), ""  # unread: text that nobody has fetched yet

    @property
    def may_go_on(self) -> bool:
        """Whether a text may become longer than max_new_tokens."""
        return self._sentence_from is not None

    def push(self, token: Token) -> bool:
        """Add the next token; whether the text ends with it."""
        written = self.written
        written.ids.append(token.id)
        written.logprobs.append(token.logprob)
        if token.id == self._eot:
            written.finish_reason = "eot"
            return True
        self._add(self._stream.push(token.id))
        return written.finish_reason != "length"

    def finish(self) -> None:
        """Write what was held back as a possible start of a stop text or of a character."""
        if self.written.finish_reason != "sentence":
            self._add(self._stream.finish())

    def fetch(self) -> str:
        """The text that became certain since the last call."""
        piece, self.unread = self.unread, ""
        return piece

    def _add(self, piece: str) -> None:
        if self._stream.stopped:
            self.written.finish_reason = "stop"
        elif self._sentence_from is not None and len(self.written.ids) >= self._sentence_from:
            piece = self._to_sentence_end(piece)
        self.written.text += piece
        self.unread += piece

    def _to_sentence_end(self, piece: str) -> str:
        before, text = len(self.written.text), self.written.text + piece
        end = None
        if self._limit is None:
            self._limit = len(text)
            end = len(text) if ENDED.search(text) else None
        else:
            found = SENTENCE_END.finditer(text, max(0, before - 4))  # 4: a mark and what closes it
            end = next((match.end() for match in found if match.end() >= self._limit), None)
        if end is None:
            return piece
        self.written.finish_reason = "sentence"
        return piece[: max(0, end - before)]


def complete(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | str,
    *,
    max_new_tokens: int = 200,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop: Sequence[str] | str = (),
    ban: Sequence[str] | str = (),
    finish_sentence: bool = False,
    rows: Sequence[int] | None = None,
    drafter: Drafter | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> list[Completion]:
    """Continue every prompt until end-of-text, one of the `stop` texts (left out), or
    max_new_tokens. One text alone is one prompt.

    An empty prompt starts from end-of-text, as the start of a document. The texts in `ban` are
    never written. With `finish_sentence`, a text that reaches max_new_tokens goes on to the end of
    its sentence, for SENTENCE_TOKENS at most. Prompt i draws the random numbers of row rows[i], by
    default i. `on_tokens` is called after every decode step with the number of new tokens.
    """
    prompts = texts("prompts", prompts)
    if rows is not None and len(rows) != len(prompts):
        raise refuse("rows", rows, f"one number for each of {len(prompts)} prompts")
    settings = DecodeSettings(
        max_new_tokens, sampling, seed, tokenizer.vocab_size, _banned(ban, tokenizer), drafter
    )
    sentence_from = settings.max_new_tokens if finish_sentence else None
    writers = [_Writer(tokenizer, stop, sentence_from) for _ in prompts]
    for n_new in _write(model, tokenizer, prompts, writers, settings, rows):
        if on_tokens is not None:
            on_tokens(n_new)
    return [writer.written for writer in writers]


def stream_text(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop: Sequence[str] | str = (),
    ban: Sequence[str] | str = (),
    finish_sentence: bool = False,
    row: int = 0,
    drafter: Drafter | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, as soon as whole characters are known.

    The pieces together are `complete(model, tokenizer, [prompt], rows=[row], ...)[0].text`.
    """
    settings = DecodeSettings(
        max_new_tokens, sampling, seed, tokenizer.vocab_size, _banned(ban, tokenizer), drafter
    )
    writer = _Writer(tokenizer, stop, settings.max_new_tokens if finish_sentence else None)
    for _ in _write(model, tokenizer, [prompt], [writer], settings, [row]):
        yield writer.fetch()


def _write(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    writers: Sequence[_Writer],
    settings: DecodeSettings,
    rows: Sequence[int] | None,
) -> Iterator[int]:
    """Let the writers write; yields after every decode step, and at the end, how many tokens are
    new.
    """
    if settings.max_new_tokens and any(writer.may_go_on for writer in writers):
        settings = replace(settings, max_new_tokens=settings.max_new_tokens + SENTENCE_TOKENS)
    ids = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts]
    for new in decode(
        model, ids, settings, lambda row, token: writers[row].push(token), numbers=rows
    ):
        yield sum(map(len, new))
    for writer in writers:
        writer.finish()
    yield 0


def _banned(ban: Sequence[str] | str, tokenizer: Tokenizer) -> Callable[[list[int]], Tensor] | None:
    """Which tokens (V,) bool would complete one of the texts after a row's new tokens."""
    ban = texts("ban", ban)
    if not ban:
        return None
    token_bytes = tokenizer.written_bytes()
    banned = BannedTexts(token_bytes, ban)
    longest = max(len(text.encode()) for text in ban)

    def mask(new: list[int]) -> Tensor:
        tail = b"".join(token_bytes[id] for id in new[-longest:])  # a byte each at least
        return banned.mask(tail)

    return mask


def check_fits(tokenizer: Tokenizer, model: GPT2) -> None:
    """Raise InputError when the tokenizer makes ids that the model has no row for.

    A model with more rows than the tokenizer has ids is fine: its vocabulary was padded.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: "
            "use the tokenizer that belongs to it"
        )
