"""Prompts in, texts out: what ends a text, what must not be in it, and how it comes in pieces."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

from torch import Tensor

from ..arguments import id_list, refuse, require_loaded, shown, texts
from ..errors import InputError
from ..generate import NEUTRAL, DecodeSettings, Token, decode
from ..model import GPT2
from ..sampling import Drafter, SamplingConfig
from ..tokenizer import TextStream, Tokenizer
from .banned import BannedTexts

logger = logging.getLogger(__name__)
# a sentence ends behind its mark and the quotes that close with it, or with its line
ENDED = re.compile(r"""(?:[.!?\u2026]["'\u201d\u2019)\]]*\s*|\n)\Z""")
SENTENCE_END = re.compile(r"""[.!?\u2026]["'\u201d\u2019)\]]*(?=\s)|(?=\n)""")
SENTENCE_TOKENS = 100  # more than max_new_tokens at most, to come to the end of a sentence


FinishReason = Literal["eot", "stop", "sentence", "length"]  # length: max_new_tokens


@dataclass(frozen=True)
class Alternative:
    """One of the likeliest tokens in the place of another, `token` and `logprob` as in `Piece`."""

    id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class Piece:
    """What a decode step added to a text.

    `text` is what became certain with it, perhaps nothing: a character may be in parts yet, and
    what may begin a stop text waits. `ids` are the tokens that were drawn, one or, where drafts
    were accepted, more; `tokens` what `Tokenizer.token_text` makes of each. `logprobs` are the
    natural logarithms of the model's own probabilities for them, before temperature, filters and
    bans; `top_logprobs` are for each of them the likeliest tokens by the same probabilities, as
    many as were asked for. `finish_reason` is None but in the last piece, which brings no ids, only
    the text that had waited.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[Alternative, ...], ...]
    finish_reason: FinishReason | None


@dataclass
class Completion:
    """What was added to one prompt, and why it ended: all that its pieces hold (see `Piece`).

    `ids` are all tokens that were drawn, with the end-of-text or the stop text that ended them;
    `text` is without what ended it.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[Alternative, ...]] = field(default_factory=list)
    finish_reason: FinishReason = "length"


class _Writer:
    """Turns one row's tokens into text as they come, and notices where the text ends.

    With `sentence_from`, a text of so many tokens goes on to the end of its sentence.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] | str, sentence_from: int | None
    ) -> None:
        self._tokenizer, self._stream = tokenizer, TextStream(tokenizer, stop)
        self._sentence_from = sentence_from
        self._limit: int | None = None  # characters of the text at max_new_tokens
        self.written = Completion()
        self._fetched = (0, 0)  # characters and tokens

    def push(self, token: Token) -> bool:
        """Add the next token; whether the text ends with it."""
        written, shown = self.written, self._tokenizer.token_text
        written.ids.append(token.id)
        written.tokens.append(shown(token.id))
        written.logprobs.append(token.logprob)
        tops = (Alternative(top.id, shown(top.id), top.logprob) for top in token.top)
        written.top_logprobs.append(tuple(tops))
        if token.id == self._tokenizer.eot:
            written.finish_reason = "eot"
            return True
        self._add(self._stream.push(token.id))
        return written.finish_reason != "length"

    def finish(self) -> None:
        """Write what was held back as a possible start of a stop text or of a character."""
        if self.written.finish_reason != "sentence":
            self._add(self._stream.finish())

    def fetch(self, *, last: bool = False) -> Piece:
        """What was written since the last call."""
        written, (n_characters, n_ids) = self.written, self._fetched
        self._fetched = len(written.text), len(written.ids)
        return Piece(
            written.text[n_characters:],
            tuple(written.ids[n_ids:]),
            tuple(written.tokens[n_ids:]),
            tuple(written.logprobs[n_ids:]),
            tuple(written.top_logprobs[n_ids:]),
            written.finish_reason if last else None,
        )

    def _add(self, piece: str) -> None:
        if self._stream.stopped:
            self.written.finish_reason = "stop"
        elif self._sentence_from is not None and len(self.written.ids) >= self._sentence_from:
            piece = self._to_sentence_end(piece)
        self.written.text += piece

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
    special: bool = False,
    finish_sentence: bool = False,
    rows: Sequence[int] | None = None,
    drafter: Drafter | None = None,
    top_logprobs: int = 0,
    on_tokens: Callable[[int], object] | None = None,
) -> list[Completion]:
    """Continue every prompt until end-of-text, one of the `stop` texts (left out), or
    max_new_tokens. One text alone is one prompt.

    An empty prompt starts from end-of-text, as the start of a document. With `special`, the names
    of special tokens in a prompt are these tokens. The texts in `ban` are
    never written. With `finish_sentence`, a text that reaches max_new_tokens goes on to the end of
    its sentence, for SENTENCE_TOKENS at most. Prompt i draws the random numbers of row rows[i], by
    default i. Beside each token its `top_logprobs` likeliest alternatives are reported. `on_tokens`
    is called after every decode step with the number of new tokens.
    """
    prompts = texts("prompts", prompts)
    if rows is not None and len(rows) != len(prompts):
        raise refuse("rows", rows, f"one number for each of {len(prompts)} prompts")
    writers, steps = _start(
        model,
        tokenizer,
        prompts,
        rows,
        stop=stop,
        ban=ban,
        special=special,
        finish_sentence=finish_sentence,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        drafter=drafter,
        top_logprobs=top_logprobs,
    )
    for n_new in steps:
        if on_tokens is not None:
            on_tokens(n_new)
    return [writer.written for writer in writers]


def stream(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 200,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop: Sequence[str] | str = (),
    ban: Sequence[str] | str = (),
    special: bool = False,
    finish_sentence: bool = False,
    row: int = 0,
    drafter: Drafter | None = None,
    top_logprobs: int = 0,
) -> Iterator[Piece]:
    """Yield the continuation of a prompt, a text or its ids, as it grows: a piece for every decode
    step, and a last one that says why it ended.

    The pieces together are `complete(model, tokenizer, [prompt], rows=[row], ...)[0]`.
    """
    (writer,), steps = _start(
        model,
        tokenizer,
        [prompt],
        [row],
        stop=stop,
        ban=ban,
        special=special,
        finish_sentence=finish_sentence,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        drafter=drafter,
        top_logprobs=top_logprobs,
    )
    return _pieces(writer, steps)


def _pieces(writer: _Writer, steps: Iterator[int]) -> Iterator[Piece]:
    for _ in steps:
        yield writer.fetch()
    yield writer.fetch(last=True)


def stream_text(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 200,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop: Sequence[str] | str = (),
    ban: Sequence[str] | str = (),
    special: bool = False,
    finish_sentence: bool = False,
    row: int = 0,
    drafter: Drafter | None = None,
) -> Iterator[str]:
    """Yield the text of `stream`'s pieces: whole characters, as soon as they are known."""
    pieces = stream(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        ban=ban,
        special=special,
        finish_sentence=finish_sentence,
        row=row,
        drafter=drafter,
    )
    return (piece.text for piece in pieces)


def _start(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    rows: Sequence[int] | None,
    *,
    stop: Sequence[str] | str,
    ban: Sequence[str] | str,
    special: bool,
    finish_sentence: bool,
    **how: Any,
) -> tuple[list[_Writer], Iterator[int]]:
    """A writer for each prompt, and the decode steps that let them write; `how` are the other
    fields of DecodeSettings.
    """
    require_loaded("model", model, "GPT2", "hidden")
    require_loaded("tokenizer", tokenizer, "Tokenizer", "eot")
    possible = drawable(tokenizer, model)
    banned = _banned(ban, tokenizer, possible["vocab_size"])
    settings = DecodeSettings(**possible, banned=banned, **how)
    sentence_from = settings.max_new_tokens if finish_sentence else None
    if sentence_from:
        settings = replace(settings, max_new_tokens=sentence_from + SENTENCE_TOKENS)
    writers = [_Writer(tokenizer, stop, sentence_from) for _ in prompts]
    encoded = [
        tokenizer.encode(prompt, special=special)
        if isinstance(prompt, str)
        else id_list("prompt", prompt)
        for prompt in prompts
    ]
    ids = [row or [tokenizer.eot] for row in encoded]
    return writers, _write(model, ids, writers, settings, rows)


def _write(
    model: GPT2,
    ids: Sequence[Sequence[int]],
    writers: Sequence[_Writer],
    settings: DecodeSettings,
    rows: Sequence[int] | None,
) -> Iterator[int]:
    """Let the writers write; yields after every decode step how many tokens are new."""
    for new in decode(
        model, ids, settings, lambda row, token: writers[row].push(token), numbers=rows
    ):
        yield sum(map(len, new))
    for writer in writers:
        writer.finish()


def _banned(
    ban: Sequence[str] | str, tokenizer: Tokenizer, n_ids: int
) -> Callable[[list[int]], Tensor] | None:
    """Which tokens (V,) bool would complete one of the texts after a row's new tokens."""
    ban = texts("ban", ban)
    if not ban:
        return None
    token_bytes = tokenizer.written_bytes(n_ids)
    banned = BannedTexts(token_bytes, ban)
    longest = max(len(text.encode()) for text in ban)

    def mask(new: list[int]) -> Tensor:
        tail = b"".join(token_bytes[id] for id in new[-longest:])  # a byte each at least
        return banned.mask(tail)

    return mask


class Drawable(TypedDict):
    """Which ids may be drawn: those below vocab_size but for the unused ones."""

    vocab_size: int
    unused: tuple[int, ...]


def drawable(tokenizer: Tokenizer, model: GPT2 | None) -> Drawable:
    """The ids that a tokenizer has a token for, and a model a row."""
    n_ids = tokenizer.vocab_size
    if model is not None:
        n_ids = min(n_ids, model.config.vocab_size)
    return {"vocab_size": n_ids, "unused": tuple(tokenizer.ids_without_token(n_ids))}


def check_fits(tokenizer: Tokenizer, model: GPT2, *, training: bool = False) -> None:
    """Raise InputError when the tokenizer makes ids of plain text that the model has no row for,
    or of end-of-text, where it is learned.

    A model with more rows than the tokenizer has ids is fine: its vocabulary was padded. So are
    added words without a row, as long as no text has them.
    """
    n_rows = model.config.vocab_size
    if tokenizer.merged_size > n_rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {n_rows}: use the tokenizer "
            "that belongs to it"
        )
    if tokenizer.eot >= n_rows:
        name = shown(tokenizer.token_text(tokenizer.eot))
        lacking = f"the model has {n_rows} rows, none for end-of-text {name}, id {tokenizer.eot}"
        if training:
            raise InputError(f"{lacking}: --add-tokens {name} gives it one")
        logger.warning("%s: no text ends with it", lacking)
