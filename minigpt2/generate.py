"""The decoding loop: feed the text so far, draw the next token of every row, repeat.

There is one loop, `decode`. It yields columns (one token per row) and everything else is a consumer
of it: `generate` for ids, `stream_text` for a screen, `complete` for finished texts.

Past the window. GPT-2's positions are absolute, so cached keys cannot slide: they carry their old
positions. The rule, for each row alone: a prompt longer than block_size is cut to its last
block_size tokens; and when a row's window is full and another token must be read, the row forgets
everything but the last block_size // 2 tokens it has read, re-reads them from position 0, and goes
on. The memory of the text shrinks to half at that moment and grows again.

Letters: B rows, T tokens in this call, C n_embd, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .cache import KVCache
from .errors import InputError
from .model import GPT2, evaluation_mode
from .options import SamplingConfig
from .sampling import draw, probabilities, row_generator
from .tokenizer import TextStream, Tokenizer

logger = logging.getLogger(__name__)
NEUTRAL = SamplingConfig()


@torch.no_grad()  # not inference_mode: see evaluate.py
def decode(
    model: GPT2,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
    ends: Callable[[int, int], bool],
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield columns of new tokens: one id per row, None for rows that have ended.

    `ends(row, token)` is asked once for every new token, after its column was taken, and says
    whether that row ends with it. Row r draws from generators[r], so it gets the same tokens alone
    and in any batch. Ids from vocab_size on (the padding of some vocabularies) are never drawn.
    Raises InputError for rows the model cannot read and for logits that are not numbers.
    """
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}, allowed is 0 or more")
    _check_rows(model, rows)
    texts = [list(row) for row in rows]
    active = list(range(len(rows)))
    seen = _seen(texts, model) if sampling.repetition_penalty != 1 else None
    with evaluation_mode(model):
        last, cache = _read_prompts(model, texts, max_new_tokens)  # (B, C)
        for n_new in range(1, max_new_tokens + 1):
            probs = probabilities(_logits(model, last, vocab_size, n_new), sampling, seen)
            tokens = draw(probs, [generators[row] for row in active])
            column: list[int | None] = [None] * len(rows)
            for row, token in zip(active, tokens.tolist()):
                column[row] = token
                texts[row].append(token)
            yield column
            stay = [i for i, row in enumerate(active) if not ends(row, texts[row][-1])]
            if not stay or n_new == max_new_tokens:
                return  # the last token is never read, so a full window does not slide for it
            if seen is not None:
                seen = seen.scatter(1, tokens[:, None], True)[stay]
            if len(stay) < len(active):
                active, cache = [active[i] for i in stay], cache.select(stay)
            last = _read_newest(model, [texts[row] for row in active], cache)


def _read_prompts(
    model: GPT2, texts: list[list[int]], max_new_tokens: int
) -> tuple[Tensor, KVCache]:
    """The last hidden state of every row (B, C), and the cache that now holds the rows.

    Rows are padded on the right, where a causal model cannot see it; equal rows are read once and
    copied.
    """
    window = model.config.block_size
    longest = max(len(text) for text in texts)
    if longest > window:
        logger.warning(
            "the prompt has %s tokens, the model reads %s: its start is dropped", longest, window
        )
    different = list(dict.fromkeys(tuple(text[-window:]) for text in texts))
    lengths = [len(text) for text in different]
    idx = torch.zeros(len(different), max(lengths), dtype=torch.int64)
    for row, text in enumerate(different):
        idx[row, : len(text)] = torch.tensor(text)
    cache = model.make_cache(len(different), capacity=longest + max_new_tokens)
    hidden = model.hidden(idx.to(cache.keys.device), cache)  # (B, T, C)
    cache.truncate(lengths)
    last = hidden[torch.arange(len(different)), torch.tensor(lengths) - 1]
    copies = [different.index(tuple(text[-window:])) for text in texts]
    return last[copies], cache.select(copies) if len(different) < len(texts) else cache


def _read_newest(model: GPT2, texts: list[list[int]], cache: KVCache) -> Tensor:
    """The hidden state (B, C) after reading each row's newest token; full rows first start over
    from their half.
    """
    window, device = model.config.block_size, cache.keys.device
    for b, text in enumerate(texts):
        if cache.lengths[b] < window:
            continue
        row = cache.row(b)
        row.truncate([0])
        kept = text[-1 - window // 2 : -1]
        if kept:
            model.hidden(torch.tensor([kept], device=device), row)
    newest = torch.tensor([[text[-1]] for text in texts], device=device)
    return model.hidden(newest, cache)[:, -1]


def _logits(model: GPT2, last: Tensor, vocab_size: int | None, n_new: int) -> Tensor:
    logits = model.head(last)  # (B, V)
    if not logits.isfinite().all():
        raise InputError(
            f"the model's scores are not finite at new token {n_new}: its weights are damaged, "
            "or float16 overflowed; try --dtype float32"
        )
    if vocab_size is not None and vocab_size < logits.shape[1]:
        logits[:, vocab_size:] = float("-inf")
    return logits


def _seen(texts: list[list[int]], model: GPT2) -> Tensor:
    """Which tokens occur in each row, (B, V) bool."""
    seen = torch.zeros(len(texts), model.config.vocab_size, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, text] = True
    return seen.to(model.wte.weight.device)


def _check_rows(model: GPT2, rows: Sequence[Sequence[int]]) -> None:
    if not rows:
        raise InputError("there are no rows to continue: give at least one list of token ids")
    for number, row in enumerate(rows):
        if not row:
            raise InputError(f"row {number} is empty: start it with the end-of-text id")
        if not 0 <= min(row) <= max(row) < model.config.vocab_size:
            raise InputError(
                f"row {number} holds ids from {min(row)} to {max(row)}, the model knows 0 to "
                f"{model.config.vocab_size - 1}: use the tokenizer that belongs to it"
            )


def generate(
    model: GPT2,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continue every row and return its new ids, without the stop id that may have ended it.

    Rows may differ in length. Row r is the same alone and in any batch, for the same seed and r.
    """
    stops = frozenset(stop_ids)
    columns = decode(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        generators=[row_generator(seed, row) for row in range(len(rows))],
        ends=lambda row, token: token in stops,
        vocab_size=vocab_size,
    )
    new: list[list[int]] = [[] for _ in rows]
    for column in columns:
        for ids, token in zip(new, column):
            if token is not None and token not in stops:
                ids.append(token)
    return new


@dataclass
class Completion:
    """What was added to one prompt, and why it ended.

    `ids` are all tokens that were drawn, with the end-of-text or the stop text that ended them;
    `text` is without.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: Literal["eot", "stop", "length"] = "length"  # length: max_new_tokens


class _Writer:
    """Turns one row's tokens into text as they come, and notices where the text ends."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._eot, self._stream = tokenizer.eot, TextStream(tokenizer, stop)
        self.written = Completion()

    def write(self, token: int) -> str:
        """Take the next token; returns the text that is now certain."""
        self.written.ids.append(token)
        if token == self._eot:
            self.written.finish_reason = "eot"
            return ""
        piece = self._stream.push(token)
        if self._stream.stopped:
            self.written.finish_reason = "stop"
        self.written.text += piece
        return piece

    def finish(self) -> str:
        """The text that was held back as a possible start of a stop text or of a character."""
        rest = self._stream.finish()
        if self._stream.stopped:
            self.written.finish_reason = "stop"
        self.written.text += rest
        return rest


def complete(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 200,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[Completion]:
    """Continue every prompt until end-of-text, one of the `stop` texts (left out), or
    max_new_tokens.

    An empty prompt starts from end-of-text, as the start of a document.
    """
    writers = [_Writer(tokenizer, stop) for _ in prompts]
    for column in _columns(model, tokenizer, prompts, writers, max_new_tokens, sampling, seed):
        for writer, token in zip(writers, column):
            if token is not None:
                writer.write(token)
    for writer in writers:
        writer.finish()
    return [writer.written for writer in writers]


def stream_text(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, as soon as whole characters are known.

    The pieces together are `complete(model, tokenizer, [prompt], ...)[0].text`.
    """
    writer = _Writer(tokenizer, stop)
    for (token,) in _columns(model, tokenizer, [prompt], [writer], max_new_tokens, sampling, seed):
        assert token is not None
        yield writer.write(token)
    yield writer.finish()


def _columns(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    writers: Sequence[_Writer],
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int,
) -> Iterator[list[int | None]]:
    return decode(
        model,
        [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        generators=[row_generator(seed, row) for row in range(len(prompts))],
        ends=lambda row, token: writers[row].written.finish_reason != "length",
        vocab_size=tokenizer.vocab_size,
    )


def check_fits(tokenizer: Tokenizer, model: GPT2) -> None:
    """Raise InputError when the tokenizer makes ids that the model has no row for.

    A model with more rows than the tokenizer has ids is fine: its vocabulary was padded.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: "
            "use the tokenizer that belongs to it"
        )
