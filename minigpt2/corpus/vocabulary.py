"""A vocabulary of a text's own: byte-level BPE with GPT-2's pieces, trained by tokenizers.

Its tokens are learned from the text to train on alone, so held-out text judges them too: the text
is tokenized by GPT-2's vocabulary first, which decides what is held out, and then by its own. What
comes out depends on the training text and the size alone, not on processes and threads.

Every piece (a word, mostly) that differs from the others is in memory, with how often it is there;
the text is not.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, OptionError
from ..formats.vocabulary import BYTE_OF, END_OF_TEXT
from ..system.files import sync
from ..system.signals import answered
from ..tokenizer import Tokenizer
from .cached import default_cache_dir, hash_of, made_once, set_aside, writable
from .prepared import Corpus, hashes_of, retokenize
from .retokenizing import texts_of
from .token_file import TokenFile

logger = logging.getLogger(__name__)
FORMAT = 1  # raise it when the same text would give another vocabulary
LONGEST = 128  # bytes of a token, as in GPT-2: a rule of dashes would be one
OFTEN = 2  # a pair that stands in a text once is nothing to learn from
BLOCK = 2**20  # ids
PART = 2**14  # characters that are handed over at once: 256 such parts wait


def own_vocabulary(
    corpus: Corpus,
    vocab_size: int,
    *,
    cache_dir: str | Path | None = None,
) -> Tokenizer:
    """A vocabulary of (at most) vocab_size tokens for a corpus that was prepared by
    `Tokenizer.gpt2()`, trained on its training part, or found where this was done before.

    Says how many tokens there are, where the text has no more. Raises OptionError without
    tokenizers.
    """
    cache = Path(cache_dir or default_cache_dir())
    parts = texts_of(corpus.train, Tokenizer.gpt2(), size=PART)
    with writable(cache):
        tokenizer, _ = made_once(
            cache / f"vocabulary-{hash_of([FORMAT, vocab_size, *hashes_of(corpus.train)])}",
            _saved,
            lambda folder: train_vocabulary(parts, vocab_size).save(folder),
        )
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "the vocabulary has %s tokens, not %s: the training text has no more pairs of tokens "
            "that stand in it twice",
            f"{tokenizer.vocab_size:,}",
            f"{vocab_size:,}",
        )
    return tokenizer


def in_own_vocabulary(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """A corpus that was prepared by `Tokenizer.gpt2()`, tokenized again by its own vocabulary: the
    same documents to train on and held out. Knows how many tokens it had before.
    """
    again = retokenize(
        corpus,
        Tokenizer.gpt2(),
        tokenizer,
        workers=workers,
        cache_dir=cache_dir,
    )
    counts = (len(corpus.train.tokens), len(corpus.val.tokens) if corpus.val else 0)
    return replace(again, in_gpt2s=counts)


def train_vocabulary(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most vocab_size tokens, learned from these texts, in GPT-2's layout: the
    256 bytes, what is merged from them in the order of merging, and <|endoftext|>.

    Raises OptionError without tokenizers. A signal is answered meanwhile.
    """
    library, abandoned = require_trainer(), threading.Event()

    def fed() -> Iterator[str]:
        for text in texts:
            if abandoned.is_set():
                raise InterruptedError
            yield text

    # GPT-2's pieces are what its regular expression finds (use_regex), as in tokenizer.py
    bytewise = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = bytewise
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # without end-of-text
        min_frequency=OFTEN,
        max_token_length=LONGEST + 1,  # it takes shorter ones only
        initial_alphabet=[*BYTE_OF],
        special_tokens=[],
        show_progress=False,
    )
    try:
        answered(lambda: bpe.train_from_iterator(fed(), trainer=trainer))
    except BaseException:
        abandoned.set()
        raise
    tokens = {char: bytes([byte]) for char, byte in BYTE_OF.items()}
    for pair in json.loads(bpe.to_str())["model"]["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        tokens[left + right] = tokens[left] + tokens[right]
    n = len(tokens)
    return Tokenizer([*tokens.values()], range(n), {END_OF_TEXT: n}, END_OF_TEXT)


def require_trainer() -> Any:
    """The library tokenizers; OptionError where it is missing."""
    try:
        import tokenizers
    except ImportError as problem:
        raise OptionError(
            "train_vocabulary needs tokenizers: pip install tokenizers", "train_vocabulary"
        ) from problem
    return tokenizers


def bytes_per_token(file: TokenFile, tokenizer: Tokenizer, n_tokens: int | None = None) -> float:
    """How much text a token of a token file holds, end-of-text not counted; with `n_tokens`, of
    another one that has the same documents in so many tokens.
    """
    lengths, _ = tokenizer.written_sizes()
    n_bytes, n_ends = 0, 0
    for start in range(0, len(file.tokens), BLOCK):
        ids = file.block(start, start + BLOCK)
        n_bytes += int(lengths[ids].sum())
        n_ends += int((ids == tokenizer.eot).sum())
    return n_bytes / max(1, (len(file.tokens) if n_tokens is None else n_tokens) - n_ends)


def require_empty(folder: Path) -> None:
    """Raise OptionError for a path where a vocabulary would take the place of something."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"out {folder} is a file: name a folder", "out")
    if folder.is_dir() and any(folder.iterdir()):
        raise OptionError(f"out {folder} is not empty: name another folder", "out")


def write_folder(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's files into a folder that is empty or not there, all or none of them.

    Raises InputError where they cannot be written.
    """
    require_empty(folder)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        tokenizer.save(temporary)
        if folder.exists():  # whoever is in it stays in it
            for path in temporary.iterdir():
                path.replace(folder / path.name)
        else:
            temporary.rename(folder)
        sync(folder)
    except OSError as problem:
        raise OptionError(f"out {folder} cannot be written: {problem.strerror}", "out") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _saved(folder: Path) -> Tokenizer | None:
    """The vocabulary that was trained before; None, with a notice, if it is damaged."""
    if not folder.exists():
        return None
    try:
        return Tokenizer.from_folder(folder)
    except InputError as problem:
        logger.warning("%s: training it again", problem)
    set_aside(folder)
    return None
