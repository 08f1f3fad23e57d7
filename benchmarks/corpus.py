"""Measures data preparation next to tiktoken's own batch encoding: python benchmarks/corpus.py

Preparation is the whole of it (reading, hashing, cutting, tokenizing, writing, checking); tiktoken
encodes the same text, already in memory, with as many threads, and its ids are thrown away. Both
take turns, so that what else the machine does meets both alike. The text is the bundled play's
lines in random order. With --memory the peak memory of `python -m minigpt2.corpus` is measured too:
resident bytes of it and of the processes it starts, added up ten times a second, and the same with
pages that are shared counted once (Linux).
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import tiktoken

from minigpt2.corpus import prepare
from minigpt2.encoding import default_workers
from minigpt2.tokenizer import Tokenizer

PLAY = Path(__file__).parent.parent / "data" / "sallow-point.txt"
DOCUMENT_CHARACTERS = 4000  # as tiktoken is given them: about an article each


def main() -> int:
    """Print a Markdown table; always 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=100, help="of text to time")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turns")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--memory", type=int, metavar="MEGABYTES", help="also measure memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, workers = Path(name), options.workers
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
    return 0


def write_text(path: Path, megabytes: int) -> None:
    """The play's lines in random order, again and again."""
    lines = PLAY.read_text("utf-8").splitlines(keepends=True)
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            draw.shuffle(lines)
            file.writelines(lines)


def timed(text: Path, folder: Path, workers: int, rounds: int) -> None:
    """Time both in turns, and print their rates and ratios."""
    content, tokenizer = text.read_text("utf-8"), Tokenizer.gpt2()
    size = text.stat().st_size / 1e6
    step = DOCUMENT_CHARACTERS
    documents = [content[at : at + step] for at in range(0, len(content), step)]
    theirs = their_encoding(tokenizer)
    print("| | prepare, MB/s | tiktoken, MB/s | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
    ratios = []
    for number in range(rounds):
        began = time.perf_counter()
        prepare([text], tokenizer, workers=workers, cache_dir=folder / f"cache-{number}")
        ours = size / (time.perf_counter() - began)
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


def memory_of(text: Path, folder: Path, workers: int) -> tuple[int, int, float]:
    """Peak bytes of a process that prepares a text, with its children: resident, proportional; and
    its seconds.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "minigpt2.corpus", str(text), "--workers", str(workers)]
    environment = {**os.environ, "MINIGPT2_CACHE": str(folder / "cache")}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    resident = proportional = 0
    while run.poll() is None:
        tree = list(family(run.pid))
        resident = max(resident, sum(field_of(pid, "Rss:") for pid in tree))
        proportional = max(proportional, sum(field_of(pid, "Pss:") for pid in tree))
        time.sleep(0.1)
    assert run.returncode == 0
    return resident, proportional, time.perf_counter() - began


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
