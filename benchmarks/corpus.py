"""Measures data preparation next to tiktoken's own batch encoding: python benchmarks/corpus.py

Preparation is the whole of it (reading, hashing, cutting, tokenizing, writing, checking); tiktoken
encodes the same text, already in memory, with as many threads, and its ids are thrown away. Both
take turns, so that what else the machine does meets both alike. The text is the bundled play's
lines in random order. With --memory the peak memory of `python -m minigpt2.corpus` is measured too:
resident bytes of it and of the processes it starts, added up ten times a second, and the same with
pages that are shared counted once (Linux).

All ids that were prepared are compared with tiktoken's for the same text before a rate is printed.
Where they differ there is none, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import tiktoken

from minigpt2.corpus.prepared import prepare
from minigpt2.corpus.token_file import TokenFile
from minigpt2.corpus.tokenizing import default_workers
from minigpt2.tokenizer import Tokenizer

PLAY = Path(__file__).parent.parent / "data" / "sallow-point.txt"
DOCUMENT_CHARACTERS = 4000  # as tiktoken is given them: about an article each
PART_CHARACTERS = 2**20  # as tiktoken is given them to compare: any number is the same tokens


class AnotherTextError(Exception):
    """What was prepared is not the text, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table; 1 when other ids were prepared than tiktoken's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=100, help="of text to time")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turns")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--memory", type=int, metavar="MEGABYTES", help="also measure memory")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        try:
            measure(Path(name), options)
        except AnotherTextError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
    return 0


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Time, and measure memory if that is asked for; raises AnotherTextError."""
    workers = options.workers
    if options.rounds:
        text = folder / "text.txt"
        write_text(text, options.megabytes)
        timed(text, folder, workers, options.rounds)
    if options.memory:
        text = folder / "large.txt"
        write_text(text, options.memory)
        resident, proportional, seconds = memory_of(text, folder, workers)
        print(
            f"\n{options.memory} MB in {seconds:.0f} s: at most {resident / 1e6:.0f} MB "
            f"resident in {workers + 1} processes together ({proportional / 1e6:.0f} MB with "
            "shared pages counted once)"
        )


def write_text(path: Path, megabytes: int) -> None:
    """The play's lines in random order, again and again."""
    lines = PLAY.read_text("utf-8").splitlines(keepends=True)
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            draw.shuffle(lines)
            file.writelines(lines)


def timed(text: Path, folder: Path, workers: int, rounds: int) -> None:
    """Time both in turns, and print their rates and ratios; raises AnotherTextError."""
    content, tokenizer = text.read_text("utf-8"), Tokenizer.gpt2()
    size = text.stat().st_size / 1e6
    step = DOCUMENT_CHARACTERS
    documents = [content[at : at + step] for at in range(0, len(content), step)]
    theirs = their_encoding(tokenizer)
    print("| | prepare, MB/s | tiktoken, MB/s | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
    ratios = []
    for number in range(rounds):
        began = time.perf_counter()
        corpus = prepare(
            [text], tokenizer, val_fraction=0, workers=workers, cache_dir=folder / f"cache-{number}"
        )
        ours = size / (time.perf_counter() - began)
        require_equal(corpus.train.tokens, text, tokenizer)
        began = time.perf_counter()
        theirs.encode_ordinary_batch(documents, num_threads=workers)
        rate = size / (time.perf_counter() - began)
        ratios.append(ours / rate)
        print(f"| {number + 1} | {ours:.1f} | {rate:.1f} | {ours / rate:.2f} |", flush=True)
    print(f"| median | | | {median(ratios):.2f} |")


def their_encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """GPT-2 as tiktoken defines it, but for the download of its tokens."""
    ranks = {tokenizer.token_bytes(id): id for id in range(tokenizer.eot)}
    pieces = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("gpt2", pat_str=pieces, mergeable_ranks=ranks, special_tokens={})


def require_equal(ids: np.ndarray, text: Path, tokenizer: Tokenizer) -> None:
    """Raise AnotherTextError unless ids are tiktoken's for a text, and end-of-text after them."""
    theirs, at = their_encoding(tokenizer), 0
    for part in parts_of(text):
        expected = theirs.encode_to_numpy(part, disallowed_special=())
        found = ids[at : at + len(expected)]
        if not np.array_equal(found, expected):
            raise AnotherTextError(f"the ids from {at:,} on are not tiktoken's: no rate")
        at += len(expected)
    if ids[at:].tolist() != [tokenizer.eot]:
        raise AnotherTextError(f"{len(ids) - at} ids follow the text, not one end-of-text: no rate")


def parts_of(path: Path) -> Iterator[str]:
    """A text in parts whose tokens are those of the whole: each ends with a single newline, as a
    run of white space is cut into pieces by what follows it.
    """
    left = ""
    with path.open(encoding="utf-8", newline="") as file:
        while block := file.read(PART_CHARACTERS):
            left += block
            if cut := last_cut(left):
                yield left[:cut]
                left = left[cut:]
    if left:
        yield left


def last_cut(text: str) -> int:
    """Where the last line begins that no white space stands around; 0 for none."""
    at = len(text)
    while (at := text.rfind("\n", 1, at)) > 0:
        around = text[at - 1], text[at + 1 : at + 2]
        if all(character and not character.isspace() for character in around):
            return at + 1
    return 0


def memory_of(text: Path, folder: Path, workers: int) -> tuple[int, int, float]:
    """Peak bytes of a process that prepares a text, with its children: resident, proportional; and
    its seconds. Raises AnotherTextError.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "minigpt2.corpus", str(text), "--workers", str(workers)]
    command += ["--val-fraction", "0"]
    environment = {**os.environ, "MINIGPT2_CACHE": str(folder / "cache")}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    resident = proportional = 0
    while run.poll() is None:
        tree = list(family(run.pid))
        resident = max(resident, sum(field_of(pid, "Rss:") for pid in tree))
        proportional = max(proportional, sum(field_of(pid, "Pss:") for pid in tree))
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    assert run.returncode == 0
    (prepared,) = (folder / "cache").glob("**/train.bin")
    require_equal(TokenFile.open(prepared).tokens, text, Tokenizer.gpt2())
    return resident, proportional, seconds


def family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def field_of(pid: int, name: str) -> int:
    """Bytes that Linux counts for a process; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
