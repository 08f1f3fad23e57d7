"""The decoding loop: feed the text so far, draw the next token of every row, repeat.

There is one loop, `decode`. It yields rounds (the new tokens of every row) and everything else is a
consumer of it: `generate` for ids, `stream_text` for a screen, `complete` for finished texts.

Past the window. GPT-2's positions are absolute, so cached keys cannot slide: they carry their old
positions. The rule, for each row alone: a prompt longer than block_size is cut to its last
block_size tokens; and when a row's window is full and another token must be read, the row forgets
everything but the last block_size // 2 tokens it has read, re-reads them from position 0, and goes
on. The memory of the text shrinks to half at that moment and grows again.

Letters: B rows, T tokens in this call, K guesses, C n_embd, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .banned import BannedTexts
from .cache import KVCache
from .errors import InputError
from .model import GPT2, evaluation_mode
from .sampling import SamplingConfig, probabilities, row_generator
from .speculative import NOTHING, Drafter, Guess, accept
from .tokenizer import TextStream, Tokenizer

logger = logging.getLogger(__name__)
NEUTRAL = SamplingConfig()
# a sentence ends behind its mark and the quotes that close with it, or with its line
ENDED = re.compile(r"""(?:[.!?\u2026]["'\u201d\u2019)\]]*\s*|\n)\Z""")
SENTENCE_END = re.compile(r"""[.!?\u2026]["'\u201d\u2019)\]]*(?=\s)|(?=\n)""")
SENTENCE_TOKENS = 100  # more than max_new_tokens at most, to come to the end of a sentence


class Token(NamedTuple):
    """A token that was drawn, and the natural logarithm of the model's own probability for it,
    before temperature and filters.
    """

    id: int
    logprob: float


@dataclass
class _Row:
    number: int
    text: list[int]  # the prompt and what was added to it
    n_prompt: int
    generator: torch.Generator

    def new(self) -> list[int]:
        return self.text[self.n_prompt :]


@torch.no_grad()  # not inference_mode: see evaluate.py
def decode(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
    take: Callable[[int, Token], bool],
    vocab_size: int | None = None,
    banned: Callable[[list[int]], Tensor] | None = None,
    drafter: Drafter | None = None,
) -> Iterator[list[list[Token]]]:
    """Yield rounds: the new tokens of every row, one each, or more where a drafter guessed well,
    and none for rows that have ended.

    `take(row, token)` is told every new token and says whether its row ends with it. Row r draws
    from generators[r], so it gets the same tokens alone and in any batch. Ids from vocab_size on
    (the padding of some vocabularies) are never drawn, nor those that `banned`, (V,) bool, marks
    after a row's new tokens. Raises InputError for rows the model cannot read and for logits that
    are not numbers.
    """
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}, allowed is 0 or more")
    _check_rows(model, prompts)
    active = [
        _Row(number, list(prompt), len(prompt), generator)
        for number, (prompt, generator) in enumerate(zip(prompts, generators))
    ]
    guesses: Sequence[Guess] = [NOTHING] * len(active)
    window, noticed = model.config.block_size, False
    with evaluation_mode(model):
        hidden, cache = _read_prompts(model, [row.text for row in active], max_new_tokens)
        while max_new_tokens:
            read = cache.lengths - hidden.shape[1] + 1  # tokens that are certain
            logits = _logits(model, hidden, vocab_size)  # (B, 1 + K, V)
            drawn = _draw(logits, active, guesses, sampling, banned)
            taken, going = [], []
            for row, tokens in zip(active, drawn):
                tokens, ended = _take(row, tokens, max_new_tokens, take)
                taken.append(tokens)
                going.append(not ended)
            new: list[list[Token]] = [[] for _ in prompts]
            for row, tokens in zip(active, taken):
                new[row.number] = tokens
            yield new
            stay = [b for b, goes in enumerate(going) if goes]
            if not stay:
                return  # the last token is never read, so a full window does not slide for it
            cache.truncate([int(n) + len(tokens) - 1 for n, tokens in zip(read, taken)])
            if len(stay) < len(active):
                active, cache = [active[b] for b in stay], cache.select(stay)
            if int(cache.lengths.max()) >= window:
                if not noticed:
                    logger.warning(
                        "the model's window of %s tokens is full: it forgets all but the last %s",
                        window,
                        window // 2,
                    )
                noticed = True
                _slide(model, active, cache)
            guesses = _guess(drafter, active, cache, max_new_tokens)
            hidden = _read_newest(model, active, guesses, cache)


def _take(
    row: _Row, tokens: list[Token], max_new_tokens: int, take: Callable[[int, Token], bool]
) -> tuple[list[Token], bool]:
    """Add tokens to a row until it ends: those that were added, and whether it has ended."""
    for count, token in enumerate(tokens, start=1):
        row.text.append(token.id)
        if take(row.number, token) or len(row.text) - row.n_prompt == max_new_tokens:
            return tokens[:count], True
    return tokens, False


def _read_prompts(
    model: GPT2, texts: list[list[int]], max_new_tokens: int
) -> tuple[Tensor, KVCache]:
    """The last hidden state of every row (B, 1, C), and the cache that now holds the rows.

    Rows are padded on the right, where a causal model cannot see it; equal rows are read once and
    copied.
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


def _guess(
    drafter: Drafter | None, rows: list[_Row], cache: KVCache, max_new_tokens: int
) -> Sequence[Guess]:
    """What may follow each row: no more than fits behind the newest token, and can be used."""
    if drafter is None:
        return [NOTHING] * len(rows)
    room = cache.capacity - 1 - int(cache.lengths.max())
    limit = min(room, max_new_tokens - 1 - min(len(row.new()) for row in rows))
    return drafter.propose([row.number for row in rows], [row.text for row in rows], max(0, limit))


def _read_newest(model: GPT2, rows: list[_Row], guesses: Sequence[Guess], cache: KVCache) -> Tensor:
    """The hidden states (B, 1 + K, C) at each row's newest token and its guesses, padded with token
    0.
    """
    n_guesses = max(len(guess.ids) for guess in guesses)
    padded = [guess.ids + [0] * (n_guesses - len(guess.ids)) for guess in guesses]
    idx = torch.tensor([[row.text[-1], *ids] for row, ids in zip(rows, padded)])
    return model.hidden(idx.to(cache.keys.device), cache)


def _logits(model: GPT2, hidden: Tensor, vocab_size: int | None) -> Tensor:
    logits = model.head(hidden)  # (B, T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if vocab_size is not None and vocab_size < logits.shape[-1]:
        logits[..., vocab_size:] = float("-inf")
    return logits


def _draw(
    logits: Tensor,
    rows: list[_Row],
    guesses: Sequence[Guess],
    sampling: SamplingConfig,
    banned: Callable[[list[int]], Tensor] | None,
) -> list[list[Token]]:
    """The next tokens of every row from logits (B, 1 + K, V), with their log-probabilities."""
    total = logits.logsumexp(dim=-1)  # (B, 1 + K)
    if not total.isfinite().all():
        raise InputError(
            f"the model's scores are not finite at new token {len(rows[0].new()) + 1}: its weights "
            "are damaged, or float16 overflowed; try --dtype float32"
        )
    width = logits.shape[1]
    texts = [row.text + guess.ids[:i] for row, guess in zip(rows, guesses) for i in range(width)]
    marked = None
    if banned is not None:
        prompts = [row.n_prompt for row in rows for _ in range(width)]
        marked = torch.stack([banned(text[n:]) for text, n in zip(texts, prompts)])
        marked = marked.to(logits.device)
    probs = probabilities(logits.flatten(0, 1), sampling, texts, marked)
    drawn = accept(guesses, probs.view_as(logits), [row.generator for row in rows])
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, new in enumerate(drawn):
        ids[b, : len(new)] = torch.tensor(new)
    logprobs = logits.gather(2, ids.to(logits.device)[..., None]).squeeze(2) - total
    return [[Token(*pair) for pair in zip(new, row)] for new, row in zip(drawn, logprobs.tolist())]


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
    drafter: Drafter | None = None,
) -> list[list[int]]:
    """Continue every row and return its new ids, without the stop id that may have ended it.

    Rows may differ in length. Row r is the same alone and in any batch, for the same seed and r.
    """
    stops = frozenset(stop_ids)
    new: list[list[int]] = [[] for _ in rows]

    def take(row: int, token: Token) -> bool:
        if token.id in stops:
            return True
        new[row].append(token.id)
        return False

    rounds = decode(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        generators=[row_generator(seed, row) for row in range(len(rows))],
        take=take,
        vocab_size=vocab_size,
        drafter=drafter,
    )
    for _ in rounds:
        pass
    return new


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
        self, tokenizer: Tokenizer, stop: Sequence[str], sentence_from: int | None
    ) -> None:
        self._eot, self._stream = tokenizer.eot, TextStream(tokenizer, stop)
        self._sentence_from = sentence_from
        self._full: int | None = None  # characters there were when max_new_tokens were
        self.written, self.unread = Completion(), ""  # unread: text that nobody has fetched yet

    @property
    def may_go_on(self) -> bool:
        """Whether a text may become longer than max_new_tokens."""
        return self._sentence_from is not None

    def take(self, token: Token) -> bool:
        """Take the next token; says whether the text ends with it."""
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
        if self._full is None:
            self._full = len(text)
            end = len(text) if ENDED.search(text) else None
        else:
            found = SENTENCE_END.finditer(text, max(0, before - 4))  # 4: a mark and what closes it
            end = next((match.end() for match in found if match.end() >= self._full), None)
        if end is None:
            return piece
        self.written.finish_reason = "sentence"
        return piece[: max(0, end - before)]


def complete(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 200,
    sampling: SamplingConfig = NEUTRAL,
    seed: int = 0,
    stop: Sequence[str] = (),
    ban: Sequence[str] = (),
    finish_sentence: bool = False,
    rows: Sequence[int] | None = None,
    drafter: Drafter | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> list[Completion]:
    """Continue every prompt until end-of-text, one of the `stop` texts (left out), or
    max_new_tokens.

    An empty prompt starts from end-of-text, as the start of a document. The texts in `ban` are
    never written. With `finish_sentence`, a text that reaches max_new_tokens goes on to the end of
    its sentence, for SENTENCE_TOKENS at most. Prompt i draws the random numbers of row rows[i], by
    default i. `on_tokens` is told after every round how many tokens are new.
    """
    writers = [
        _Writer(tokenizer, stop, max_new_tokens if finish_sentence else None) for _ in prompts
    ]
    numbers = range(len(prompts)) if rows is None else rows
    generators = [row_generator(seed, number) for number in numbers]
    for new in _write(
        model, tokenizer, prompts, writers, max_new_tokens, sampling, generators, ban, drafter
    ):
        if on_tokens is not None:
            on_tokens(new)
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
    ban: Sequence[str] = (),
    finish_sentence: bool = False,
    row: int = 0,
    drafter: Drafter | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, as soon as whole characters are known.

    The pieces together are `complete(model, tokenizer, [prompt], rows=[row], ...)[0].text`.
    """
    writer = _Writer(tokenizer, stop, max_new_tokens if finish_sentence else None)
    generators = [row_generator(seed, row)]
    for _ in _write(
        model, tokenizer, [prompt], [writer], max_new_tokens, sampling, generators, ban, drafter
    ):
        yield writer.fetch()


def _write(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    writers: Sequence[_Writer],
    max_new_tokens: int,
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
    ban: Sequence[str],
    drafter: Drafter | None,
) -> Iterator[int]:
    """Let the writers write; yields after every round, and at the end, how many tokens are new."""
    goes_on = any(writer.may_go_on for writer in writers) and max_new_tokens > 0
    for new in decode(
        model,
        [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts],
        max_new_tokens=max_new_tokens + SENTENCE_TOKENS * goes_on,
        sampling=sampling,
        generators=generators,
        take=lambda row, token: writers[row].take(token),
        vocab_size=tokenizer.vocab_size,
        banned=_banned(ban, tokenizer, model) if ban else None,
        drafter=drafter,
    ):
        yield sum(map(len, new))
    for writer in writers:
        writer.finish()
    yield 0


def _banned(
    texts: Sequence[str], tokenizer: Tokenizer, model: GPT2
) -> Callable[[list[int]], Tensor]:
    """Which tokens (V,) bool would complete one of the texts after a row's new tokens."""
    token_bytes = tokenizer.written_bytes()
    banned = BannedTexts(token_bytes, texts)
    longest = max(len(text.encode()) for text in texts)
    padding = model.config.vocab_size - tokenizer.vocab_size

    def mask(new: list[int]) -> Tensor:
        tail = b"".join(token_bytes[id] for id in new[-longest:])  # a byte each at least
        return F.pad(banned.mask(tail), (0, padding))

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
