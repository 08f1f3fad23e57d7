"""Measures data preparation next to tiktoken's own batch encoding: python benchmarks/corpus.py

Preparation is the whole of it (reading, hashing, cutting, tokenizing, writing, checking); tiktoken
encodes the same text, already in memory, with as many threads, and its ids are thrown away. Both
take turns, so that what else the machine does meets both alike. The text is the bundled play's
lines in random order; with --format jsonl each line is a row, and a document. Megabytes are those
of the text, whatever is written around it. With --memory the peak memory of
`python -m minigpt2.corpus` is measured too: resident bytes of it and of the processes it starts,
added up ten times a second, and the same with pages that are shared counted once (Linux).

With --against another checkout of this project takes tiktoken's place: both prepare the same file
in turns, each time in a fresh process, and who begins changes with every round. The interval is
from the lowest to the highest ratio, which holds the median of all possible rounds with the
probability that is printed.

All ids that were prepared are compared with tiktoken's for the same text before a rate is printed.
Where they differ there is none, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
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

ROOT = Path(__file__).resolve().parent.parent
PLAY = ROOT / "data" / "sallow-point.txt"
DOCUMENT_CHARACTERS = 4000  # as tiktoken is given them: about an article each
PART_CHARACTERS = 2**20  # as tiktoken is given them to compare: any number is the same tokens
PART_ROWS = 10_000  # the same of rows
PREPARE = """  # in a process of its own: seconds, and whose code it was; the ids go to a file
import sys, time
from pathlib import Path
import numpy
import minigpt2
from minigpt2.corpus.prepared import prepare
from minigpt2.tokenizer import Tokenizer
text, workers, cache, ids = sys.argv[1:]
tokenizer = Tokenizer.gpt2()
began = time.perf_counter()
corpus = prepare([text], tokenizer, val_fraction=0, workers=int(workers), cache_dir=cache)
seconds = time.perf_counter() - began
numpy.save(ids, corpus.train.tokens)
print(seconds, Path(minigpt2.__file__).resolve().parent.parent)
"""


class NoRateError(Exception):
    """Why there is no rate, in one line: what was prepared is not the text, or nothing was."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table; 1 when other ids were prepared than tiktoken's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=100, help="of text to time")
    parser.add_argument("--format", choices=["text", "jsonl"], default="text", help="of the file")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turns")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--memory", type=int, metavar="MEGABYTES", help="also measure memory")
    parser.add_argument(
        "--against", metavar="CHECKOUT", type=Path, help="another checkout, in tiktoken's place"
    )
    options = parser.parse_args(argv)
    if options.against and not options.rounds:
        parser.error("--against compares nothing in 0 --rounds")
    if options.against and not (options.against / "minigpt2/corpus/prepared.py").is_file():
        parser.error(f"{options.against} is no checkout: minigpt2/corpus/prepared.py is not in it")
    with tempfile.TemporaryDirectory() as name:
        try:
            measure(Path(name), options)
        except NoRateError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
    return 0


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Time, and measure memory if that is asked for; raises NoRateError."""
    workers, suffix = options.workers, {"text": ".txt", "jsonl": ".jsonl"}[options.format]
    if options.rounds:
        text = folder / f"text{suffix}"
        write_text(text, options.megabytes)
        if options.against:
            compared(text, folder, workers, options.rounds, options.against.resolve())
        else:
            timed(text, folder, workers, options.rounds)
    if options.memory:
        text = folder / f"large{suffix}"
        write_text(text, options.memory)
        resident, proportional, seconds = memory_of(text, folder, workers)
        print(
            f"\n{options.memory} MB in {seconds:.0f} s: at most {resident / 1e6:.0f} MB "
            f"resident in {workers + 1} processes together ({proportional / 1e6:.0f} MB with "
            "shared pages counted once)"
        )


def write_text(path: Path, megabytes: float) -> None:
    """The play's lines in random order, again and again; in .jsonl each is a row."""
    lines = PLAY.read_text("utf-8").splitlines(keepends=True)
    draw, size = random.Random(1), 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while size < megabytes * 1e6:
            draw.shuffle(lines)
            file.writelines(map(_row, lines) if path.suffix == ".jsonl" else lines)
            size += sum(len(line.encode()) for line in lines)


def _row(line: str) -> str:
    return json.dumps({"text": line}, ensure_ascii=False, allow_nan=False) + "\n"


def documents_of(path: Path) -> list[str]:
    """The text as tiktoken is given it: rows, or pieces of about an article each."""
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line)["text"] for line in file]
        content, step = file.read(), DOCUMENT_CHARACTERS
        return [content[at : at + step] for at in range(0, len(content), step)]


def timed(text: Path, folder: Path, workers: int, rounds: int) -> None:
    """Time both in turns, and print their rates and ratios; raises NoRateError."""
    documents, tokenizer = documents_of(text), Tokenizer.gpt2()
    size = megabytes_of(documents)
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


def megabytes_of(documents: Sequence[str]) -> float:
    return sum(len(document.encode()) for document in documents) / 1e6


def compared(text: Path, folder: Path, workers: int, rounds: int, other: Path) -> None:
    """Time this checkout and another one in turns, and print rates and their ratios, above 1 where
    this one is faster; raises NoRateError.
    """
    size, tokenizer = megabytes_of(documents_of(text)), Tokenizer.gpt2()
    turns = [("this", ROOT), ("other", other)]
    print("| | this, MB/s | other, MB/s | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
    ratios, right = [], b""
    for number in range(rounds):
        rates = {}
        for name, checkout in turns[:: -1 if number % 2 else 1]:
            seconds, ids = prepared_by(checkout, text, folder, workers)
            if (digest := hashlib.sha256(ids.tobytes()).digest()) != right:
                require_equal(ids, text, tokenizer)
                right = digest
            rates[name] = size / seconds
        ours, theirs = rates["this"], rates["other"]
        ratios.append(ours / theirs)
        print(f"| {number + 1} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.3f} |", flush=True)
    print(f"| median | | | {median(ratios):.3f} |")
    print(
        f"\nlowest to highest ratio: {min(ratios):.3f} to {max(ratios):.3f}, where the median of "
        f"all possible rounds lies with a probability of {1 - 2 ** (1 - rounds):.0%}"
    )


def prepared_by(checkout: Path, text: Path, folder: Path, workers: int) -> tuple[float, np.ndarray]:
    """The seconds in which the code of a checkout prepares a text, without those to import it, and
    the ids; raises NoRateError.
    """
    cache, ids = folder / "cache", folder / "ids.npy"
    command = [sys.executable, "-c", PREPARE, *map(str, (text, workers, cache, ids))]
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    # Python looks for modules where it is first, before it looks into PYTHONPATH.
    run = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip() or "it did not say why").splitlines()[-1]
        raise NoRateError(f"{checkout} prepared nothing ({reason}): no rate")
    seconds, home = run.stdout.splitlines()[-1].split(maxsplit=1)
    if Path(home) != checkout:
        raise NoRateError(f"the code of {home} was run, not that of {checkout}: no rate")
    shutil.rmtree(cache)
    return float(seconds), np.load(ids)


def their_encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """GPT-2 as tiktoken defines it, but for the download of its tokens."""
    ranks = {tokenizer.token_bytes(id): id for id in range(tokenizer.eot)}
    pieces = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("gpt2", pat_str=pieces, mergeable_ranks=ranks, special_tokens={})


def require_equal(ids: np.ndarray, text: Path, tokenizer: Tokenizer) -> None:
    """Raise NoRateError unless ids are tiktoken's for a text or rows, with end-of-text after it or
    each of them.
    """
    at = 0
    for expected in expected_ids(text, tokenizer):
        found = ids[at : at + len(expected)]
        if not np.array_equal(found, expected):
            raise NoRateError(f"the ids from {at:,} on are not tiktoken's: no rate")
        at += len(expected)
    if at != len(ids):
        raise NoRateError(f"{len(ids) - at} more ids follow the text: no rate")


def expected_ids(path: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of a text or of rows, part by part, as tiktoken has them."""
    theirs, end = their_encoding(tokenizer), tokenizer.eot
    if path.suffix == ".jsonl":
        documents = documents_of(path)
        for at in range(0, len(documents), PART_ROWS):
            rows = theirs.encode_ordinary_batch(documents[at : at + PART_ROWS])
            yield np.array([id for row in rows for id in (*row, end)])
        return
    for part in parts_of(path):
        yield theirs.encode_to_numpy(part, disallowed_special=())
    yield np.array([end])


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
    its seconds. Raises NoRateError.
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
