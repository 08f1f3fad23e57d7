"""The decoding loop, on token ids: a forward pass, a draw of the next token, and again.

`generate_plain` is the whole idea in a dozen lines. `decode` is the same loop as it is used: many
rows of different length, a window that may be full, rows that end, and draft tokens that are
checked several at once. It yields the new tokens of every decode step, and everything else is a
consumer of it: `generate` for ids, and in decoding/text.py `stream` for a text as it grows and
`complete` for finished texts.

Past the window. GPT-2's positions are absolute, so cached keys cannot slide: they carry their old
positions. The rule, for each row alone: a prompt longer than block_size is cut to its last
block_size tokens; and when a row's window is full and another token must be read, the row forgets
everything but the last block_size // 2 tokens it has read, prefills them from position 0, and goes
on. The memory of the text shrinks to half at that moment and grows again.

Letters: B rows, T tokens in this call, K draft tokens, C n_embd, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import id_list, id_rows, refuse, require_loaded, whole
from .cache import KVCache
from .errors import InputError, OptionError
from .model import GPT2, evaluation_mode, unknown_ids
from .sampling import (
    NOTHING,
    Drafter,
    Guess,
    SamplingConfig,
    accept,
    draw,
    probabilities,
    row_generator,
    without,
)

logger = logging.getLogger(__name__)
NEUTRAL = SamplingConfig()


@torch.no_grad()
def generate_plain(
    model: GPT2,
    ids: list[int],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
) -> list[int]:
    """Continue one row of ids and return its new ones: what `generate` does, in its shortest form.

    Raises InputError where the row grows beyond the model's window.
    """
    cache, generator, new = model.make_cache(1), row_generator(seed, 0), []
    idx = torch.tensor([ids], device=cache.keys.device)  # (1, T)
    with evaluation_mode(model):
        while len(new) < max_new_tokens:
            hidden = model.hidden(idx, cache)  # the prefill, and after it decode steps, T = 1
            logits = model.head(hidden[:, -1:])[:, 0]  # (1, V): scores of the next token
            probs = probabilities(logits, sampling, [ids + new])
            new.append(int(draw(probs, [generator])))
            idx = torch.tensor([new[-1:]], device=cache.keys.device)
    return new


class Token(NamedTuple):
    """A token that was drawn, and the natural logarithm of the model's own probability for it,
    before temperature, filters and bans. `top` are the likeliest tokens in its place by that same
    distribution, as many as `DecodeSettings.top_logprobs` says, the likeliest first.
    """

    id: int
    logprob: float
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class DecodeSettings:
    """How all rows are continued: what `generate`, `complete` and `stream` hand to `decode`.

    Raises OptionError for a value that is not allowed.
    """

    max_new_tokens: int
    sampling: SamplingConfig = NEUTRAL
    seed: int = 0
    vocab_size: int | None = None  # ids from here on, the padding of some vocabularies, never come
    unused: tuple[int, ...] = ()  # nor do these: ids below it that no token has
    banned: Callable[[list[int]], Tensor] | None = None  # a row's new ids -> (V,) bool, these, too
    drafter: Drafter | None = None
    top_logprobs: int = 0  # so many of the likeliest tokens are reported beside each new one

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_logprobs"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        n_tokens = None if self.vocab_size is None else self.vocab_size - len(self.unused)
        if n_tokens is not None and self.top_logprobs > n_tokens:
            allowed = f"from 0 to the {n_tokens} tokens that there are"
            raise refuse("top_logprobs", self.top_logprobs, allowed)
        if not isinstance(self.sampling, SamplingConfig):
            raise refuse("sampling", self.sampling, "a SamplingConfig")


@dataclass
class _Row:
    number: int
    text: list[int]  # the prompt and what was added to it
    n_prompt: int
    generator: torch.Generator

    def new(self) -> list[int]:
        return self.text[self.n_prompt :]


@torch.no_grad()  # not inference_mode: its tensors could not be trained on later
def decode(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    on_token: Callable[[int, Token], bool],
    *,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[list[Token]]]:
    """Yield the new tokens of every row, decode step after decode step: one token each, or more
    where draft tokens were accepted, and none for rows that have ended.

    `on_token(row, token)` is called with every new token and returns whether its row ends with it.
    Prompt i draws the random numbers of row numbers[i], by default i, and how many tokens are
    drafted for it depends on it alone, so it gets the same tokens alone and in any batch, up to
    rounding. Raises InputError for rows the model cannot read and for logits that are not numbers.
    The model is in evaluation mode during a forward pass, and between two steps it has the mode
    that the caller gave it.
    """
    prompts = id_rows("rows", prompts)
    numbers = range(len(prompts)) if numbers is None else numbers
    generators = [row_generator(settings.seed, number) for number in numbers]
    _check_rows(model, prompts)
    window, warned, evaluating = model.config.block_size, False, evaluation_mode(model)
    active = [
        _Row(b, [*prompt], len(prompt), generator)
        for b, (prompt, generator) in enumerate(zip(prompts, generators))
    ]
    guesses: Sequence[Guess] = [NOTHING] * len(active)
    # 1 prefill: the prompts, in one forward pass
    with evaluating:
        hidden, cache = _prefill(model, [row.text for row in active], settings.max_new_tokens)
    lengths = cache.lengths.tolist()  # of the rows in the cache, without draft tokens
    while settings.max_new_tokens:
        # 2 draw: how many draft tokens are accepted, and the token behind them
        logits = _logits(model, hidden, settings)  # (B, 1 + K, V)
        drawn = _draw(logits, active, guesses, settings)
        # 3 hand out the new tokens, and see which rows end
        new: list[list[Token]] = [[] for _ in prompts]
        staying = []
        for b, (row, tokens) in enumerate(zip(active, drawn)):
            new[row.number], ended = _add(row, tokens, settings.max_new_tokens, on_token)
            lengths[b] += len(new[row.number]) - 1  # the last one is not in the cache yet
            if not ended:
                staying.append(b)
        yield new
        if not staying:
            return  # the last token is never read, so a full window does not slide for it
        # 4 drop from the cache the draft tokens that fell, and the rows that ended
        cache.truncate(lengths)
        if len(staying) < len(active):
            active, cache = [active[b] for b in staying], cache.select(staying)
        with evaluating:
            # 5 make room in full windows
            if int(cache.lengths.max()) >= window:
                if not warned:
                    logger.warning(
                        "the model's window of %s tokens is full: it forgets all but the last %s",
                        window,
                        window // 2,
                    )
                warned = True
                _slide(model, active, cache)
            # 6 decode step: each row's newest token and its draft tokens, in one forward pass
            guesses = _guess(settings, active, cache)
            lengths = (cache.lengths + 1).tolist()
            hidden = _decode_step(model, active, guesses, cache)


def _add(
    row: _Row, tokens: list[Token], max_new_tokens: int, on_token: Callable[[int, Token], bool]
) -> tuple[list[Token], bool]:
    """Add tokens to a row until it ends: those that were added, and whether it has ended."""
    for count, token in enumerate(tokens, start=1):
        row.text.append(token.id)
        if on_token(row.number, token) or len(row.text) - row.n_prompt == max_new_tokens:
            return tokens[:count], True
    return tokens, False


def _prefill(model: GPT2, texts: list[list[int]], max_new_tokens: int) -> tuple[Tensor, KVCache]:
    """The last hidden state of every row (B, 1, C), and the cache that now holds the rows.

    Rows are padded on the right, where a causal model cannot see it; equal rows are computed once
    and copied.
    """
    window = model.config.block_size
    longest = max(len(text) for text in texts)
    if longest > window:
        logger.warning(
            "the prompt has %s tokens, the model reads %s: its first %s are dropped",
            longest,
            window,
            longest - window,
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
    return last[copies, None], cache.select(copies) if len(different) < len(texts) else cache


def _slide(model: GPT2, rows: list[_Row], cache: KVCache) -> None:
    """Let rows whose window is full start over from their last half."""
    window = model.config.block_size
    for b, row in enumerate(rows):
        if cache.lengths[b] < window:
            continue
        part = cache.row(b)
        part.truncate([0])
        kept = row.text[-1 - window // 2 : -1]
        if kept:
            model.hidden(torch.tensor([kept], device=cache.keys.device), part)


def _guess(settings: DecodeSettings, rows: list[_Row], cache: KVCache) -> Sequence[Guess]:
    """The draft tokens of each row: no more than fit behind its newest token, and can be used."""
    if settings.drafter is None:
        return [NOTHING] * len(rows)
    limits = [
        min(cache.capacity - 1 - length, settings.max_new_tokens - 1 - len(row.new()))
        for row, length in zip(rows, cache.lengths.tolist())
    ]
    numbers, texts = [row.number for row in rows], [row.text for row in rows]
    return settings.drafter.propose(numbers, texts, limits)


def _decode_step(model: GPT2, rows: list[_Row], guesses: Sequence[Guess], cache: KVCache) -> Tensor:
    """The hidden states (B, 1 + K, C) at each row's newest token and its draft tokens; where a row
    has fewer of them, what comes behind means nothing.
    """
    texts = [[row.text[-1], *guess.ids] for row, guess in zip(rows, guesses)]
    width, device = max(map(len, texts)), cache.keys.device
    if int(cache.lengths.max()) + width <= cache.capacity:
        idx = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        return model.hidden(idx.to(device), cache)
    # padding a row near the end of its window would not fit: every row by itself
    parts = [
        model.hidden(torch.tensor([text], device=device), cache.row(b))
        for b, text in enumerate(texts)
    ]
    return torch.cat([F.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])


def _logits(model: GPT2, hidden: Tensor, settings: DecodeSettings) -> Tensor:
    """Scores (B, T, V) in float32 at least, of ids below vocab_size; -inf for those without a
    token.
    """
    logits = model.head(hidden)[..., : settings.vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return without(logits, settings.unused)


def _draw(
    logits: Tensor,
    rows: list[_Row],
    guesses: Sequence[Guess],
    settings: DecodeSettings,
) -> list[list[Token]]:
    """The next tokens of every row from logits (B, 1 + K, V), with their log-probabilities."""
    total = logits.logsumexp(dim=-1)  # (B, 1 + K)
    if not total.isfinite().all():
        raise OptionError(
            f"the model's scores are not finite at new token {len(rows[0].new()) + 1}: its weights "
            "are damaged, or float16 overflowed; try dtype float32",
            "dtype",
        )
    width = logits.shape[1]
    texts = [row.text + guess.ids[:i] for row, guess in zip(rows, guesses) for i in range(width)]
    marked = None
    if settings.banned is not None:
        prompts = [row.n_prompt for row in rows for _ in range(width)]
        marked = torch.stack([settings.banned(text[n:]) for text, n in zip(texts, prompts)])
        marked = marked.to(logits.device)
    probs = probabilities(logits.flatten(0, 1), settings.sampling, texts, marked)
    drawn = accept(guesses, probs.view_as(logits), [row.generator for row in rows])
    ids = torch.tensor([new + [0] * (width - len(new)) for new in drawn])
    logprobs = logits.gather(2, ids.to(logits.device)[..., None]).squeeze(2) - total
    tops = _likeliest(logits, total, settings.top_logprobs)
    return [[Token(*token) for token in zip(*row)] for row in zip(drawn, logprobs.tolist(), tops)]


def _likeliest(logits: Tensor, total: Tensor, n: int) -> list[list[tuple[Token, ...]]]:
    """The n likeliest tokens at every place of logits (B, T, V), by B and T; of equally likely ones
    those with smaller ids, as greedy decoding chooses.
    """
    if n == 0:
        return [[()] * logits.shape[1]] * len(logits)
    found, ids = logits.sort(dim=-1, descending=True, stable=True)
    logprobs = found[..., :n] - total[..., None]
    return [
        [tuple(map(Token, *place)) for place in zip(*row)]
        for row in zip(ids[..., :n].tolist(), logprobs.tolist())
    ]


def _check_rows(model: GPT2, rows: list[list[int]]) -> None:
    if not rows:
        raise InputError("there are no rows to continue: give at least one list of token ids")
    for number, row in enumerate(rows):
        if not row:
            raise InputError(f"row {number} is empty: start it with the end-of-text id")
        if not 0 <= min(row) <= max(row) < model.config.vocab_size:
            raise InputError(unknown_ids(f"row {number}", row, model.config))


def generate(
    model: GPT2,
    rows: Sequence[Sequence[int]] | Sequence[Tensor] | Tensor,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop_ids: Sequence[int] | int = (),
    vocab_size: int | None = None,
    unused: Sequence[int] = (),
    drafter: Drafter | None = None,
) -> list[list[int]]:
    """Continue every row and return its new ids, without the stop id that may have ended it.

    Rows are lists or tensors of ids, or one tensor (B, T); they may differ in length. Row r is the
    same alone and in any batch, for the same seed and r, up to rounding: products of many rows may
    be summed in another order than those of one. Ids from vocab_size on, and the `unused` ones
    (`Tokenizer.ids_without_token`), never come.
    """
    require_loaded("model", model, "GPT2", "hidden")
    stops, rows = frozenset(id_list("stop_ids", stop_ids)), id_rows("rows", rows)
    settings = DecodeSettings(
        max_new_tokens,
        sampling,
        seed,
        vocab_size=vocab_size,
        unused=tuple(id_list("unused", unused)),
        drafter=drafter,
    )
    new: list[list[int]] = [[] for _ in rows]

    def on_token(row: int, token: Token) -> bool:
        if token.id in stops:
            return True
        new[row].append(token.id)
        return False

    for _ in decode(model, rows, settings, on_token):
        pass
    return new
