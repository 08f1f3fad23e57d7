"""What is in a text, before hours are spent on it.

How much it is, how long, how well the tokens fit, what repeats, what is held out and whether it has
leaked.

Reads token files in blocks, so it needs little memory, and a second for 30 million tokens (measured
on one core of an AMD EPYC, Zen 3).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..system.messages import visible
from .prepared import Corpus
from .sources.left_out import LeftOut, numbers_in_words, reasons_in_words
from .token_file import TokenFile
from .tokenizing import SEPARATOR
from .vocabulary import bytes_per_token

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

RUN = 32  # tokens: a passage that training and held-out text share by chance is shorter
KEPT_BITS = 4  # one of 2^4 passages is compared, chosen by its hash, the same on both sides
BLOCK = 2**20  # tokens
MOST_EXAMPLES = 3
SAMPLE_TOKENS = 16
ENGLISH = 0.25  # tokens per character, about
UNFIT = 0.6
TELLING = 500  # tokens: what fewer are like says little of a text
SMALL = 50_000  # tokens: about a hundred pages
NOISY = 2_000
WIDTH = 100  # columns
LIMIT = 76  # columns of a sample or of a pair of names
LEAKY = 0.01


@dataclass(frozen=True)
class Survey:
    """What was found; numbers are of what is kept for training and judging."""

    files: Mapping[str, int]  # that were taken, by suffix
    left_out: tuple[LeftOut, ...]  # of the folders and globs that were named
    documents: int
    characters: int
    tokens: int
    tokens_per_character: float
    lengths: Mapping[str, int]  # tokens of the shortest, median, ... document
    held_out_documents: int
    held_out_tokens: int
    counts: Mapping[str, int]  # of duplicates, and of what cleaning changed and dropped
    special_as_text: Mapping[str, int]  # how often special tokens were read as plain text, by name
    leaked_documents: int  # held-out ones with a passage that is in the training text too
    leaked_share: float  # of the held-out text, about
    leaks: tuple[tuple[str, str], ...]  # examples: a held-out document, one to train on
    samples: tuple[str, ...]  # how texts were cut into tokens
    warnings: tuple[str, ...]
    # where the vocabulary is the text's own: of it and of GPT-2's, in both parts
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)


def survey(corpus: Corpus, tokenizer: Tokenizer, *, special_tokens: bool = False) -> Survey:
    """Look at all of a corpus; `special_tokens` says whether they were read as tokens."""
    special = tokenizer.special_in(" ".join(corpus.special))
    as_tokens = special if special_tokens else {}
    files = [file for file in (corpus.train, corpus.val) if file]
    lengths = np.concatenate([np.diff(file.documents["end"], prepend=0) for file in files])
    shares = {"shortest": 0, "25 %": 25, "median": 50, "90 %": 90, "longest": 100}
    values = np.percentile(lengths, [*shares.values()], method="lower")
    leaked, share, leaks = find_leaks(corpus.train, corpus.val) if corpus.val else (0, 0.0, ())
    found = Survey(
        files=dict(corpus.files),
        left_out=corpus.left_out,
        documents=corpus.n_documents,
        characters=corpus.n_characters,
        tokens=corpus.n_tokens,
        tokens_per_character=corpus.n_tokens / max(1, corpus.n_characters),
        lengths={name: int(value) for name, value in zip(shares, values)},
        held_out_documents=len(corpus.val.documents) if corpus.val else 0,
        held_out_tokens=len(corpus.val.tokens) if corpus.val else 0,
        counts=dict(corpus.counts),
        special_as_text={k: n for k, n in corpus.special.items() if k not in as_tokens},
        leaked_documents=leaked,
        leaked_share=share,
        leaks=leaks,
        samples=tuple(_token_samples(corpus.train, tokenizer)),
        warnings=(),
        bytes_per_token=_bytes_per_token(corpus, tokenizer),
    )
    return replace(found, warnings=(*_read_as_text(found, special), *_warnings(found)))


def report_text(found: Survey) -> str:
    """A survey for people."""
    share = found.held_out_tokens / max(1, found.tokens)
    per_token = 1 / max(1e-9, found.tokens_per_character)
    lengths = ", ".join(f"{name} {value:,}" for name, value in found.lengths.items())
    left_out = [
        f"{reason}: {_shortened(example)}"
        for reason, example in reasons_in_words(found.left_out).items()
    ]
    lines = [
        ("files", visible(numbers_in_words(found.files))),
        *(("left out" * (not n), visible(reason)) for n, reason in enumerate(left_out)),
        ("documents", f"{found.documents:,}"),
        ("characters", f"{found.characters:,}"),
        ("tokens", f"{found.tokens:,}, {per_token:.1f} characters each"),
        ("bytes per token", _vocabularies_in_words(found.bytes_per_token)),
        ("lengths in tokens", lengths if found.documents > 1 else ""),
        ("held out", f"{found.held_out_tokens:,} tokens ({share:.1%}), {_of_documents(found)}"),
        *((_count_name(name), f"{count:,}") for name, count in found.counts.items() if count),
        ("leaked", _leaks_in_words(found) if found.held_out_tokens else ""),
        *(("", _shortened(visible(" is partly in ".join(pair)))) for pair in found.leaks),
        *(("tokens look so" if not n else "", text) for n, text in enumerate(found.samples)),
    ]
    width = max(len(name) for name, text in lines if text) + 2
    rows = [f"  {name:<{width}}{text}" for name, text in lines if text]
    wrap = partial(textwrap.fill, width=WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    notes = (wrap(f"note: {warning}") for warning in found.warnings)
    return "\n".join(["the text", *rows, *notes])


def _bytes_per_token(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, float]:
    """How much text a token holds, of the corpus's own vocabulary and of GPT-2's."""
    found: dict[str, float] = {}
    parts = zip(("", "_held_out"), (corpus.train, corpus.val), corpus.in_gpt2s or ())
    for suffix, file, n_before in parts:
        if file:
            found[f"own{suffix}"] = bytes_per_token(file, tokenizer)
            found[f"gpt2{suffix}"] = bytes_per_token(file, tokenizer, n_before)
    return found


def _vocabularies_in_words(found: Mapping[str, float]) -> str:
    if not found:
        return ""
    told = f"{found['own']:.2f} of its own vocabulary, {found['gpt2']:.2f} of GPT-2's"
    if "own_held_out" not in found:
        return told
    return f"{told}; held out {found['own_held_out']:.2f} and {found['gpt2_held_out']:.2f}"


def _of_documents(found: Survey) -> str:
    if not found.held_out_tokens:
        return "so the model cannot be judged"
    if found.documents == 1:
        return "the end of the text"
    return f"in {found.held_out_documents:,} of {found.documents:,} documents"


def _count_name(name: str) -> str:
    return {"html": "taken out of HTML"}.get(name, name.replace("_", " "))


def _leaks_in_words(found: Survey) -> str:
    if not found.leaked_documents:
        return f"no held-out passage of {RUN} tokens is in the training text"
    share = f"{found.leaked_share:.1%}" if found.leaked_share >= 0.001 else "less than 0.1%"
    return f"about {share} of the held-out text, in {_held_out_documents(found.leaked_documents)}"


def _shortened(text: str) -> str:
    return text if len(text) <= LIMIT else text[: LIMIT - 3] + "..."


def _held_out_documents(number: int) -> str:
    return f"{number:,} held-out document{'s' * (number != 1)}"


def _read_as_text(found: Survey, special: Collection[str]) -> Iterator[str]:
    """What to do about special tokens that were read as plain text."""
    counts = dict(found.special_as_text)
    if n_separators := counts.pop(SEPARATOR, 0):
        times = f"{n_separators:,} time{'s' * (n_separators != 1)}"
        token = ", --special-tokens reads it as a token" * (SEPARATOR in special)
        yield (
            f"{SEPARATOR} stands in the text {times} and is read as plain text: where it ends "
            f'documents, --document-separator "{SEPARATOR}" does so{token}'
        )
    if counts:
        listed = ", ".join(f"{visible(name)} ({count:,})" for name, count in counts.items())
        yield (
            f"special tokens stand in the text and are read as plain text: {listed}; "
            "--special-tokens reads them as tokens"
        )


def _warnings(found: Survey) -> Iterator[str]:
    own = bool(found.bytes_per_token)
    if found.tokens_per_character > UNFIT and found.tokens > TELLING and not own:
        yield (
            f"GPT-2's tokens were made for English, with about {1 / ENGLISH:.0f} characters each; "
            f"here one has {1 / found.tokens_per_character:.1f}, so this text takes "
            f"{found.tokens_per_character / ENGLISH:.1f} times the tokens of an English one: a "
            "window holds less of it, and learning takes longer; a model that begins from random "
            "weights (--preset) can have a vocabulary of the text's own: --train-vocabulary"
        )
    if found.tokens < SMALL:
        few = f"{found.tokens:,} tokens are few: the model will soon know them by heart"
        if found.held_out_tokens:
            yield f"{few}; watch the held-out loss, or stop with --patience 3"
        else:
            yield f"{few}, and nothing is held out that would show it"
    if 0 < found.held_out_tokens < NOISY:
        yield f"{found.held_out_tokens:,} held-out tokens are few: their loss is a rough measure"
    if found.leaked_share >= LEAKY:
        yield (
            f"about {found.leaked_share:.0%} of the held-out text can be learned by heart from the "
            "training text, so the held-out loss will look better than it is; where documents are "
            "nearly the same, --duplicates drop-near helps"
        )
    copies = found.counts.get("duplicates", 0)
    if copies > found.counts.get("dropped_duplicates", 0) and copies > found.documents / 20:
        yield f"{copies:,} documents are copies of others: --duplicates drop leaves them out"


def find_leaks(
    train: TokenFile, val: TokenFile, *, block: int = BLOCK
) -> tuple[int, float, tuple[tuple[str, str], ...]]:
    """How many held-out documents have a run of RUN tokens that is in the training text too, about
    which share of the held-out runs that is, and some of these documents with the training
    document: (held-out label, training label).

    Of the runs one in 16 is looked at, chosen by its hash: a shared passage of RUN + 48 tokens is
    missed in 5 of 100 cases. In held-out text of 16 million tokens it is one in 32, and so on, so
    that at most a million are remembered. What is found is compared token by token, in one run of
    each document. The result does not depend on `block`.
    """
    bits = max(KEPT_BITS, (len(val.tokens) >> 20).bit_length())
    # 1. The runs of the held-out text that are looked at.
    kept = [_kept_runs(val, start, block, bits) for start in range(0, len(val.tokens), block)]
    hashes_of_runs, val_starts = (np.concatenate(column) for column in zip(*kept))
    sought, number_of_run = np.unique(hashes_of_runs, return_inverse=True)
    if not len(sought):
        return 0, 0.0, ()
    # 2. Where each is first in the training text.
    first_start = np.full(len(sought), -1)  # of each hash that is sought; -1: nowhere
    for start in range(0, len(train.tokens), block):
        hashes, starts = _kept_runs(train, start, block, bits)
        numbers = np.minimum(np.searchsorted(sought, hashes), len(sought) - 1)
        new = (sought[numbers] == hashes) & (first_start[numbers] < 0)
        first_start[numbers[new][::-1]] = starts[new][::-1]  # the first of several
    train_starts = first_start[number_of_run]
    shared = train_starts >= 0
    share = float(shared.mean())
    val_starts, train_starts = val_starts[shared], train_starts[shared]
    # 3. One run of each document token by token: hashes can be equal by chance.
    ends = np.ascontiguousarray(val.documents["end"])
    owners = np.searchsorted(ends, val_starts, side="right")
    documents, one_run = np.unique(owners, return_index=True)
    val_starts, train_starts = val_starts[one_run], train_starts[one_run]
    equal = [
        np.array_equal(val.block(start, start + RUN), train.block(other, other + RUN))
        for start, other in zip(val_starts.tolist(), train_starts.tolist())
    ]
    documents, train_starts = documents[equal], train_starts[equal]
    examples = zip(documents[:MOST_EXAMPLES].tolist(), train_starts[:MOST_EXAMPLES].tolist())
    names = tuple(_document_names(train, val, examples))
    return len(documents), share if len(documents) else 0.0, names


def _document_names(
    train: TokenFile, val: TokenFile, pairs: Iterable[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """The names of held-out documents, and of those that hold these training tokens."""
    for document, position in pairs:
        start = int(val.documents[document - 1]["end"]) if document else 0
        (held_out,), (trained,) = val.documents_at([start]), train.documents_at([position])
        yield held_out.label, trained.label


def _kept_runs(file: TokenFile, start: int, block: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the kept runs that begin in a block, and where they start."""
    ids = file.block(start, start + block + RUN - 1).astype(np.uint64)
    if len(ids) < RUN:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    ids = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    hashes = ids ^ (ids >> np.uint64(29))
    width = 1
    while width < RUN:  # a run's hash from those of its halves
        left, right = hashes[:-width], hashes[width:]
        hashes = (left * np.uint64(0xBF58476D1CE4E5B9)) ^ (right + (left >> np.uint64(31)))
        hashes ^= hashes >> np.uint64(27)
        width *= 2
    kept = np.flatnonzero((hashes * np.uint64(0x94D049BB133111EB)) >> np.uint64(64 - bits) == 0)
    return hashes[kept], kept + start


def _token_samples(file: TokenFile, tokenizer: Tokenizer) -> Iterator[str]:
    """How the first, a middle and the last document begin: pieces between bars."""
    n_documents = len(file.documents)
    for number in dict.fromkeys([0, n_documents // 2, n_documents - 1]):
        start = int(file.documents[number - 1]["end"]) if number else 0
        ids = file.tokens[start : min(start + SAMPLE_TOKENS, int(file.documents[number]["end"]))]
        text = "|".join(_shown_token(tokenizer, int(id)) for id in ids)
        yield _shortened(text)


def _shown_token(tokenizer: Tokenizer, id: int) -> str:
    """A token as it may be shown: bytes that are no whole character as <f0>."""
    text = tokenizer.token_bytes(id).decode("utf-8", "surrogateescape")
    # surrogateescape makes a byte that is no character one of these
    text = re.sub("[\udc80-\udcff]", lambda byte: f"<{ord(byte[0]) - 0xDC00:02x}>", text)
    return visible(text)


def rough_duration(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return "a second" if seconds < 1.5 else f"{seconds:.0f} seconds"
