"""What runs leave in their folders, as tests of cards and pages want it."""

import json

from minigpt2.runs.folder import RunFolder
from minigpt2.runs.record import Metrics

LINES = [
    {"step": 0, "val_loss": 6.9},
    {"step": 1, "loss": 6.8},
    {"step": 2, "loss": 6.0, "val_loss": 6.1},
]


def metrics_of(lines):
    """Lines of metrics.jsonl as they are read."""
    return [Metrics.from_json(line) for line in lines]


def full_lines(n_steps):
    """Lines of metrics.jsonl as a run of n_steps writes them, judged every 5 steps."""
    lines = [{"step": 0, "val_loss": 3.5, "bits_per_byte": 1.75}]
    for step in range(1, n_steps + 1):
        line = {
            "step": step,
            "loss": 3.0 + 1 / step + 0.01 * (step % 7),
            "lr": 1e-4 * step / n_steps,
            "grad_norm": None if step == 3 else 0.5 + 0.1 * (step % 3),
            "tokens_per_second": 1000.0 + 13 * (step % 5),
            "memory": 10_000_000 + 1_000 * step,
            "seconds": 0.25 * step,
        }
        if step == 3:
            line["skipped"] = True
        if step % 5 == 0:
            line["val_loss"] = 3.2 + 0.002 * abs(step - 10)
            line["bits_per_byte"] = line["val_loss"] / 2
        lines.append(line)
    return lines


INFO = {
    "sessions": [
        {
            "command": "python train.py --data 'a b.txt' --out x",
            "started": "2025-03-10T14:03:21+01:00",
            "from_step": 0,
            "device": "cpu",
            "dtype": "float32",
            "world_size": 3,
            "versions": {"minigpt2": "0.1.0", "torch": "2.13.0"},
        }
    ],
    "model": {"source": "nano", "pretrained": False, "n_parameters": 1_234_567, "lora_rank": None},
    "data": {"paths": ["a b.txt"], "val_paths": [], "n_documents": 2, "n_tokens": 71_230},
    "settings": {"max_steps": 40, "learning_rate": 0.0005, "seed": 1337, "grad_clip": 1.0},
    "memory": {"weights": 5 << 20, "total": 7 << 20},
}
SAMPLES = [
    {"step": 0, "prompt": "Once", "text": " upon a time"},
    {"step": 20, "prompt": "Once", "text": " a lamp"},
]


def run_folder(path, lines=(), samples=(), info=None):
    run = RunFolder(path)
    for name, values in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        text = "".join(json.dumps(value) + "\n" for value in values)
        (path / name).write_text(text, encoding="utf-8")
    if info is not None:
        (path / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return run
