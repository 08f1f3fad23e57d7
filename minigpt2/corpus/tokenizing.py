"""Documents to token ids on disk, in order, by as many processes as one likes.

What comes out depends on the text and the tokenizer alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, groupby, islice
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import InputError, OptionError
from ..formats.chat import ChatTemplate, unshielded
from ..tokenizer import LONGEST_PIECE, kind_of_character, split_long_runs
from .cleaning import Cleaner
from .options import TextConfig
from .sources.documents import read_documents
from .sources.files import Source
from .sources.rows import Chunk
from .token_file import DOCUMENT, SPAN, dtype_for

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 2**20  # that a process tokenizes at once
ENOUGH_FOR_PROCESSES = 8 * 2**20  # bytes: less is tokenized sooner than processes are started
NOTICE_SECONDS = 10
# Ctrl-C and the end of the terminal; none where signals cannot be blocked, on Windows
TERMINAL_SIGNALS = [signal.SIGINT, signal.SIGHUP] if hasattr(signal, "pthread_sigmask") else []

SEPARATOR = "<|endoftext|>"  # what people type between documents

# from a source to its documents, in chunks
Read = Callable[[Source, TextConfig, ChatTemplate], Iterator[Chunk]]

TOKENIZED = np.dtype(
    [
        *((name, DOCUMENT[name]) for name in ("end", "row", "source")),
        ("characters", "<i8"),
        ("key", "V16"),  # the first bytes of its text's SHA-256
    ]
)
TOKENIZED_STRUCT = struct.Struct("<qqiq16s")  # a TOKENIZED record
SPAN_STRUCT = struct.Struct("<qq")
assert TOKENIZED_STRUCT.size == TOKENIZED.itemsize and SPAN_STRUCT.size == SPAN.itemsize


class TextTokenizer(Protocol):
    """What a corpus needs of a tokenizer; to work in several processes it must be picklable."""

    @property
    def eot(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def identity(self) -> str: ...
    @property
    def uncut(self) -> tuple[str, ...]:
        """Texts behind which whitespace may belong to the same token."""
        ...

    @property
    def added_names(self) -> tuple[str, ...]:
        """Texts that are tokens wherever they stand."""
        ...

    @property
    def cut_before(self) -> str:
        """The whitespace before which a text may be cut elsewhere."""
        ...

    @property
    def chat(self) -> ChatTemplate:
        """How chats become a text."""
        ...

    def encode_array(
        self, text: str, /, *, special: bool = False, shielded: bool = False
    ) -> np.ndarray: ...
    def special_in(self, text: str, /) -> dict[str, int]: ...


def default_workers() -> int:
    """As many processes as this one may use CPU cores."""
    usable = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(usable(0)) if usable else os.cpu_count() or 1


@dataclass(frozen=True)
class Tokenized:
    """What is known of a file of ids."""

    documents: np.ndarray  # TOKENIZED records: where each ends, and what it was
    prompts: np.ndarray  # SPAN records: where prompts stand, in their order
    counts: dict[str, int]  # of the documents that each step of cleaning changed, and of chats
    special: dict[str, int]  # how often the name of each special token is in the text


def tokenize(
    path: Path,
    sources: Sequence[Source],
    text: TextConfig,
    tokenizer: TextTokenizer,
    workers: int,
    *,
    read: Read | None = None,
) -> Tokenized:
    """Write the ids of all documents, each with its end-of-text, to a file of
    `dtype_for(vocab_size)`. Empty documents are left out; `read` is by default `read_documents`.
    """
    cleaner, named = Cleaner(text), Counter[str]()
    reader = _DocumentReader(sources, text, cleaner, tokenizer, read or read_documents)
    tokenized, prompts, count = bytearray(), bytearray(), 0
    begun: int | None = None  # where a prompt began that may go on
    total, encoding = sum(source.size for source in sources), (tokenizer, text.special_tokens)
    with path.open("wb") as file, _encoder(encoding, workers, total) as encode:
        for pieces, (ids, counts, found) in encode(_batches(reader)):
            file.write(ids)
            named.update(found)
            for piece, n_ids in zip(pieces, counts):
                if piece.prompt and begun is None:
                    begun = count
                elif not piece.prompt and begun is not None:
                    prompts += SPAN_STRUCT.pack(begun, count)
                    begun = None
                count += n_ids
                if piece.is_last:
                    if begun is not None:
                        prompts += SPAN_STRUCT.pack(begun, count - 1)  # end-of-text is no prompt
                        begun = None
                    tokenized += TOKENIZED_STRUCT.pack(count, *reader.finished.popleft())
    return Tokenized(
        np.frombuffer(tokenized, TOKENIZED),
        np.frombuffer(prompts, SPAN),
        {**cleaner.counts, **reader.counts, **reader.chats},
        dict(named),
    )


class LastCut(NamedTuple):
    """The text up to the last place where it can be cut, and how many characters decide of one."""

    pattern: re.Pattern[str]
    context: int = 1
    names: tuple[str, ...] = (SEPARATOR,)  # where one stands, there is no other place
    elsewhere: bool = True  # where no whitespace is

    @property
    def margin(self) -> int:
        """How many characters at an end may be the beginning of a name."""
        return max(map(len, self.names), default=1)


# No piece of GPT-2's pattern has whitespace after anything else, so a text can be cut there.
LAST_CUT = LastCut(re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL))


def last_cut(tokenizer: TextTokenizer) -> LastCut:
    """Where this tokenizer's texts can be cut: where GPT-2's can, but in no word that was added."""
    behind = "".join(f"(?<!{re.escape(text)})" for text in tokenizer.uncut)
    pattern = re.compile(rf".*\S{behind}(?=[{tokenizer.cut_before}])", re.DOTALL)
    names = tuple({SEPARATOR, *tokenizer.added_names} - {""})
    context = max([1, *map(len, tokenizer.uncut)])
    return LastCut(pattern, context, names, tokenizer.cut_before != " ")


def cut_at_words(
    chunks: Iterable[str],
    size: int = BATCH_CHARACTERS,
    *,
    last: LastCut = LAST_CUT,
    longest: int = LONGEST_PIECE,
    counts: Counter[str] | None = None,
) -> Iterator[str]:
    """A text, in chunks cut anywhere, as parts whose ids put together are the ids of the whole.

    A part has about `size` characters, or more where the text has no word border; where that would
    be more than 2 * `longest`, it is cut between letters and other signs, and where all are letters
    (or all are no letters), after `longest` of them, as the tokenizer does (`split_long_runs`).
    """
    least = 2 * longest + last.margin
    held, n_held, enough = list[str](), 0, least  # what has no place to cut
    slices = (chunk[at : at + size] for chunk in chunks for at in range(0, len(chunk), size))
    begun = list(islice(slices, 2))
    if len(begun) == 1:  # as most rows: no need to cut
        yield begun[0]
        return
    for part in chain(begun, slices):
        before = "".join(held[-last.context :])[-last.context :]
        seen = before + part
        # Sought from behind in vain, it would take ten times the time.
        cut = last.pattern.match(seen) if any(map(seen.__contains__, " \t\r\n")) else None
        if cut and cut.end() >= len(before):  # what is held was looked at, with more before it
            end = cut.end() - len(before)
            yield "".join([*held, part[:end]])
            held, n_held, enough = [part[end:]], len(part) - end, least
            continue
        held.append(part)
        n_held += len(part)
        if n_held > enough and last.elsewhere:
            *parts, rest = _cut_elsewhere("".join(held), last, longest)
            yield from parts
            held, n_held = [rest], len(rest)
            enough = max(least, 2 * n_held)
    if held:
        yield "".join(held)


def _cut_elsewhere(text: str, last: LastCut, longest: int) -> list[str]:
    """A text without a word border, which goes on, in parts."""
    if any(name in text for name in last.names):
        return [text]
    *parts, rest = split_long_runs(text, longest)
    while parts and len(rest) < last.margin:
        rest = parts.pop() + rest
    if parts:
        return [*parts, rest]
    # No piece has anything after letters, or after numbers, but more of them.
    kinds = [kind_of_character(text[-last.margin])]
    for at in range(len(text) - last.margin, 0, -1):
        kinds.append(kind_of_character(text[at - 1]))
        if kinds[-1] in "LN" and kinds[-1] != kinds[-2]:
            return [text[:at], text[at:]]
    return [text]


class _Piece(NamedTuple):
    """Part of a document, to be tokenized by itself."""

    text: str
    prompt: bool
    shielded: bool  # it is of a chat, in which what a template wrote is told from what was said
    is_last: bool  # its document ends, and end-of-text follows


class _ReadDocument(NamedTuple):
    """What is known of a document when it has been read."""

    row: int
    source: int
    characters: int
    key: bytes


class _DocumentReader:
    """The pieces of all documents in their order, and what is known of each when it has ended."""

    def __init__(
        self,
        sources: Sequence[Source],
        text: TextConfig,
        cleaner: Cleaner,
        tokenizer: TextTokenizer,
        read: Read,
    ) -> None:
        self._sources, self._text, self._cleaner = sources, text, cleaner
        self._last, self._chat, self._read = last_cut(tokenizer), tokenizer.chat, read
        self.finished: deque[_ReadDocument] = deque()
        self.chats, self.counts = Counter[str](), Counter[str]()
        self._done = 0  # bytes of the files before this one
        self._began, self._notice_at = time.monotonic(), time.monotonic() + NOTICE_SECONDS

    def __iter__(self) -> Iterator[_Piece]:
        for number, source in enumerate(self._sources):
            chunks = iter(self._read(source, self._text, self._chat))
            for first in chunks:
                rest = () if first.is_last else _until_end(chunks)
                yield from self._document(number, first, chain([first], rest))
            self._done += source.size

    def _document(self, source: int, first: Chunk, chunks: Iterator[Chunk]) -> Iterator[_Piece]:
        digest, characters, last, n_answers, answered = hashlib.sha256(), 0, None, 0, False
        for prompt, part in groupby(chunks, key=lambda chunk: chunk.prompt):
            texts = self._texts(part)
            clean = self._cleaner.clean(texts) if self._cleaner.active else texts
            before = ""
            for text in cut_at_words(clean, last=self._last):
                self.counts["cut_long_pieces"] += _long_pieces_cut(before, text)
                before = text[-1]
                if last:
                    yield last
                digest.update(text.encode())
                characters += len(unshielded(text) if first.shielded else text)
                last = _Piece(text, prompt, first.shielded, False)
            n_answers += not prompt
            answered |= last is not None and not last.prompt
        if last:
            if first.shielded:
                self.chats.update(
                    chats=1,
                    chats_of_several_answers=int(n_answers > 1),
                    chats_without_answer=int(not answered),
                )
            key = digest.digest()[:16]
            self.finished.append(_ReadDocument(first.row, source, characters, key))
            yield last._replace(is_last=True)
        elif first.row:
            self.counts["empty_rows"] += 1

    def _texts(self, chunks: Iterable[Chunk]) -> Iterator[str]:
        for chunk in chunks:
            self._notice(chunk.position)
            yield chunk.text

    def _notice(self, position: int) -> None:
        """Say now and then how far the work is."""
        if (now := time.monotonic()) < self._notice_at:
            return
        self._notice_at = now + NOTICE_SECONDS
        total = sum(source.size for source in self._sources)
        done, seconds = self._done + position, now - self._began
        left = seconds * (total - done) / max(1, done)
        rate = done / seconds / 1e6
        logger.info(f"read {done / total:.0%} of the files, {rate:.1f} MB/s, {left:.0f} s to go")


def _long_pieces_cut(before: str, text: str) -> int:
    """In how many places a piece of GPT-2's was cut: in a part of a text, and before it, where
    `before` is the last character of another.
    """
    within = sum(1 for _ in split_long_runs(text, LONGEST_PIECE)) - 1
    kinds = [(kind_of_character(one), one.isspace()) for one in (*before, text[0])]
    return within + (len(kinds) == 2 and kinds[0] == kinds[1])


def _until_end(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        if chunk.is_last:
            return


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ids of several pieces; how many of each; how often the name of each special token was in them
Encoded = tuple[bytes, list[int], dict[str, int]]
Encoding = tuple[TextTokenizer, bool]  # and whether special tokens are read as tokens


def _encode(encoding: Encoding, pieces: Sequence[_Piece]) -> Encoded:
    tokenizer, special = encoding
    dtype, end = dtype_for(tokenizer.vocab_size), np.array([tokenizer.eot])
    arrays, named = [], Counter[str]()
    for piece in pieces:
        how = {"shielded": True} if piece.shielded else {"special": True} if special else {}
        ids = tokenizer.encode_array(piece.text, **how)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            bad = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
            size = tokenizer.vocab_size
            raise InputError(f"the tokenizer made the id {bad}, its vocab_size is {size}")
        arrays.append(np.concatenate([ids, end]) if piece.is_last else ids)
        if not piece.shielded:  # in a chat all are what they are meant to be
            separators = {SEPARATOR: n} if (n := piece.text.count(SEPARATOR)) else {}
            named.update({**separators, **tokenizer.special_in(piece.text)})
    joined = np.concatenate(arrays).astype(dtype).tobytes()
    return joined, [len(ids) for ids in arrays], dict(named)


@contextlib.contextmanager
def _encoder(
    encoding: Encoding, workers: int, n_bytes: int
) -> Iterator[Callable[[Iterable[list[_Piece]]], Iterator[tuple[list[_Piece], Encoded]]]]:
    """A function from batches to batches with their ids, in order, here or in other processes."""
    several = workers > 1 and n_bytes >= ENOUGH_FOR_PROCESSES
    if not several or _came_from_stdin(sys.modules["__main__"]):
        if several:
            logger.info("tokenizing in one process: others cannot import a program from stdin")
        yield lambda batches: ((batch, _encode(encoding, batch)) for batch in batches)
        return
    # a fork would copy the threads' locks of torch, and Windows and macOS have none
    context = multiprocessing.get_context("spawn")
    with _signals_blocked():  # starts multiprocessing's resource tracker
        pool = ProcessPoolExecutor(workers, context, _start_worker, (encoding,))
    try:
        _require_main_guard(context)
        yield lambda batches: _in_order(pool, batches, ahead=2 * workers)
    except BrokenProcessPool as problem:
        raise OptionError(
            "a process that tokenizes was killed, perhaps for lack of memory: use fewer workers",
            "workers",
        ) from problem
    finally:
        pool.shutdown(cancel_futures=True)


PROBE = "minigpt2 imports the program"  # a process's name
UNGUARDED = 87  # its exit code where it comes to the call that started it


def end_probe() -> None:
    """End this process if it was started to import a program whose main guard is missing.

    Whatever may come to tokenize calls this before it reads, locks or writes anything.
    """
    if multiprocessing.current_process().name == PROBE:
        raise SystemExit(UNGUARDED)


def _require_main_guard(context: SpawnContext) -> None:
    """Raise OptionError unless a new process can import the program, as each that tokenizes does.

    Seen in a process that is sent nothing: one that ends before it has read its tokenizer leaves
    its parent writing to it for ever.
    """
    process = context.Process(target=int, name=PROBE, daemon=True)
    with _signals_blocked():
        process.start()
    process.join()
    if process.exitcode == UNGUARDED:
        raise OptionError(
            "with workers above 1 each process imports the program that starts it: use workers=1, "
            'or put the call below if __name__ == "__main__":',
            "workers",
        )
    if process.exitcode:
        raise OptionError(
            "a process that tokenizes could not import the program that starts it: its own message "
            "says why; with workers=1 none is needed",
            "workers",
        )


def _came_from_stdin(program: ModuleType) -> bool:
    """Whether the program has no file that a process could import; that of a session or a notebook
    names none, and none is imported.
    """
    path = getattr(program, "__file__", None)
    return path is not None and program.__spec__ is None and not Path(path).is_file()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Inside `with`, the signals that a terminal sends to all processes wait; a process that is
    started there begins with them blocked.

    So a worker is not interrupted in its imports, before it can ignore them, and the resource
    tracker, which ignores SIGINT but not SIGHUP, lives until its parent has given back all.
    """
    if not TERMINAL_SIGNALS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: dict[str, Encoding] = {}  # of a process that tokenizes: set once, when it starts


def _start_worker(encoding: Encoding) -> None:
    for number in TERMINAL_SIGNALS or [signal.SIGINT]:
        signal.signal(number, signal.SIG_IGN)  # they are the parent's to handle
    if TERMINAL_SIGNALS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINAL_SIGNALS)
    _worker["encoding"] = encoding
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Nobody else would end a worker whose parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(pieces: list[_Piece]) -> Encoded:
    return _encode(_worker["encoding"], pieces)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterable[list[_Piece]], ahead: int
) -> Iterator[tuple[list[_Piece], Encoded]]:
    waiting: deque[tuple[list[_Piece], Future[Encoded]]] = deque()
    for batch in batches:
        with _signals_blocked():  # starts a worker if all are busy
            waiting.append((batch, pool.submit(_encode_in_worker, batch)))
        while len(waiting) > ahead or (waiting and waiting[0][1].done()):
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()
