"""What a change that is not about numbers, flags or files must leave as it is.

    python tests/golden.py            one line a result of a short run: its name and its SHA-256
    python tests/golden.py --write    also writes golden.json

Processors round differently, so hashes are compared on one machine: save what is printed before a
change, and `diff` it with what is printed after. What any machine can check is in golden.json:
every flag, the files of a run folder, and losses that count as equal within CLOSE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # of several checkouts, the one that this file is in

from minigpt2.corpus.options import CorpusOptions, VocabularyOptions  # noqa: E402
from minigpt2.decoding.options import SampleOptions  # noqa: E402
from minigpt2.evaluation.options import EvaluateOptions, VerifyOptions  # noqa: E402
from minigpt2.explain.options import ExplainOptions  # noqa: E402
from minigpt2.formats.options import ConvertOptions  # noqa: E402
from minigpt2.runs.options import ReportOptions  # noqa: E402
from minigpt2.training.options import TrainOptions  # noqa: E402

GOLDEN = Path(__file__).with_name("golden.json")
CLOSE = 1e-3  # nats: processors round differently
COMMANDS = {  # the words after python, and what their flags are made of
    "train.py": TrainOptions,
    "sample.py": SampleOptions,
    "convert_weights.py": ConvertOptions,
    "-m minigpt2.corpus": CorpusOptions,
    "-m minigpt2.corpus vocabulary": VocabularyOptions,
    "-m minigpt2 report": ReportOptions,
    "-m minigpt2 evaluate": EvaluateOptions,
    "-m minigpt2 verify": VerifyOptions,
    "-m minigpt2 explain": ExplainOptions,
}
POSITIONAL = (
    ConvertOptions,
    CorpusOptions,
    VocabularyOptions,
    ReportOptions,
)  # whose required fields take no flag

# whatever would follow the machine's memory or cores is given
TRAIN = "--data data/sallow-point.txt --preset nano --max-steps 20 --eval-every 10 --save-every 5"
TRAIN += " --micro-batch-size 8 --workers 1 --device cpu --dtype float32"
SAMPLE = "--prompt ISOBEL: --max-new-tokens 64 --json --device cpu --dtype float32"
DECODING = {
    "greedy ids": "--temperature 0",
    "sampled ids": "--temperature 0.9 --top-k 200 --top-p 0.98 --repetition-penalty 1.1 --seed 7",
}
LOSSES = ("step", "loss", "val_loss")
# what differs between two equal runs, and what stands in its place before anything is hashed
VARYING_METRICS = {"seconds": 1.0, "tokens_per_second": 1.0, "memory": 2**20}
VARYING_SESSION = {"command": "python train.py", "started": "2000-01-01T00:00:00+00:00"}


@dataclass(frozen=True)
class Results:
    """What a short run gave: what is equal on one machine, and what is on all."""

    hashes: dict[str, str]
    files: list[str]  # of the run folder, relative
    losses: list[dict[str, float]]  # in nats, by step


def measure(folder: Path) -> Results:
    """Train, sample and draw in an empty folder, as a user does."""
    run = folder / "run"
    python(folder, "train.py", *TRAIN.split(), "--out", str(run))
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    hashes = {
        name: sha256((run / name).read_bytes()) for name in ("model.safetensors", "README.md")
    }
    for name, how in DECODING.items():
        words = [*SAMPLE.split(), *how.split(), "--model", str(run)]
        ids = json.loads(python(folder, "sample.py", *words))["ids"]
        assert len(ids) == 64, f"{name}: the text ended after {len(ids)} tokens: choose other flags"
        hashes[name] = sha256(json.dumps(ids).encode())
    metrics = hold_still(run)
    hashes["losses"] = sha256(json.dumps(metrics).encode())
    hashes["report.html"] = report_hash(folder)
    losses = [{name: line[name] for name in LOSSES if name in line} for line in metrics]
    return Results(hashes, files, losses)


def hold_still(run: Path) -> list[dict[str, Any]]:
    """Take out of a run's records what differs between two equal runs: times, memory, paths. Gives
    the metrics as they are now.
    """
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line in lines:
        line.update({name: value for name, value in VARYING_METRICS.items() if name in line})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    info = json.loads((run / "run.json").read_text("utf-8"))
    for session in info["sessions"]:
        assert session.keys() >= VARYING_SESSION.keys()
        session.update(VARYING_SESSION)
    (run / "run.json").write_text(json.dumps(info), "utf-8")
    return lines


def report_hash(folder: Path) -> str:
    """Of the report, drawn anew from the records."""
    python(folder, "-m", "minigpt2", "report", str(folder / "run"))
    return sha256((folder / "run" / "report.html").read_bytes())


def python(folder: Path, *words: str) -> str:
    """What a command of this checkout writes to stdout; it keeps nothing outside the folder."""
    environment = {**os.environ, "MINIGPT2_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, timeout=300
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr.decode(errors='replace')}")
    return done.stdout.decode("utf-8")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def frozen_flags() -> dict[str, dict[str, str]]:
    """Of each command, every flag with its type or choices and its default."""
    return {
        command: dict(flags_of(options, positional=options in POSITIONAL))
        for command, options in COMMANDS.items()
    }


def flags_of(
    options: type, *, positional: bool, values: object = None
) -> Iterator[tuple[str, str]]:
    """(flag, its type and default) of each field; the defaults are those of `values` where there
    are any.
    """
    hints = get_type_hints(options)
    for field in fields(options):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if is_dataclass(hint := hints[field.name]):
            assert isinstance(hint, type)
            yield from flags_of(hint, positional=positional, values=default)
            continue
        default = getattr(values, field.name, default)
        name = "--" + field.name.replace("_", "-")
        if default is MISSING:
            yield field.name.upper() if positional else name, f"{spelled(hint)}, required"
        else:
            yield name, f"{spelled(hint)} = {default!r}"


def spelled(hint: Any) -> str:
    """An annotation in words that are the same in every version of Python."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, parts))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(spelled, parts))
    if get_origin(hint) is tuple:
        return f"{spelled(parts[0])}..."
    return "None" if hint is type(None) else hint.__name__


def main() -> None:
    """Print the hashes; with --write, renew what is committed."""
    parser = argparse.ArgumentParser(description="Hashes of a short run, to compare with diff.")
    parser.add_argument("--write", action="store_true", help="write golden.json too")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    for name, digest in results.hashes.items():
        print(f"{name:<18} {digest}")
    if write:
        rounded = [{k: round(v, 6) for k, v in line.items()} for line in results.losses]
        golden = {"flags": frozen_flags(), "files": results.files, "losses": rounded}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
