"""The table of fast ways to compute and their plain twins, and `swap`, which puts one in place.

The plain way is `model.py` as it reads: a GPT2 in float32 with contiguous weights, the whole text
in one call, and for training its loss by cross-entropy, one process, one micro-batch. Whatever is
packed, rounded, compiled, recorded, recomputed, sharded or guessed, to be faster or to fit, is a
row of WAYS with its plain twin, and the tests walk the rows: each is reached as a user reaches it,
for 1, 2, 3 and 9 tokens and 1 and 3 rows, and compared with its twin.

`swap` is the only way to replace a part of a model. It takes the name of a row and leaves a note on
the model, and a part that is neither a plain model's nor what the note says fails the tests.

Imports nothing: models and tensors are known by what they can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

PLAIN = "plain"


@dataclass(frozen=True)
class Way:
    """A way to compute, how a user reaches it, and its plain twin.

    `tolerance` is the largest difference, as a share of the twin's largest magnitude, of the logits
    (`kind` "forward"), of the losses of a short run (`kind` "training"); 0 is bit for bit. Ways of
    `kind` "text" write the same greedy text.
    """

    reached: str  # a command and its flags, or a call
    twin: str = PLAIN
    tolerance: float = 0.0
    kind: Literal["forward", "text", "training"] = "forward"
    device: Literal["any", "cuda"] = "any"

    def agrees(self, found: Any, expected: Any) -> bool:
        """Whether a tensor is that of the twin, within the tolerance."""
        return difference(found, expected) <= self.tolerance


ROUNDED = 1e-5  # sums in another order, in float32: the 24 bits of a number and some growth
WAYS: dict[str, Way] = {
    # one token after the other, or several texts at once
    "cache": Way("model(idx, model.make_cache(1))", tolerance=ROUNDED),
    "prompt in parts": Way("model(part, cache) for every part of idx", tolerance=ROUNDED),
    "rows of different length": Way("generate(model, rows)", tolerance=ROUNDED),
    "documents apart": Way("train.py --document-mask", tolerance=ROUNDED),
    # weights that lie in another place or another order
    "deferred weights": Way("GPT2.from_pretrained(folder, deferred=True)", tolerance=ROUNDED),
    "plain float32": Way("sample.py --cpu-routine plain", tolerance=ROUNDED),
    "packed float32": Way("sample.py --cpu-routine packed", tolerance=ROUNDED),
    "sliced float32": Way("sample.py --cpu-routine slices", tolerance=ROUNDED),
    "float32 by rows": Way("sample.py --cpu-routine by-rows", tolerance=ROUNDED),
    "decode step in torch": Way("sample.py --cpu-routine plain", tolerance=ROUNDED),
    "float32 in C": Way("sample.py --dtype float32 --compile", tolerance=ROUNDED),
    "float16 in C": Way("sample.py --model FLOAT16_FOLDER --compile", tolerance=ROUNDED),
    "decode step in C": Way("sample.py --compile", tolerance=ROUNDED),
    # weights of fewer bits: a row of a matrix is off by 1/254 of its largest value at most
    "int8": Way("quantize(GPT2.from_pretrained(folder))", tolerance=0.1),
    # activations are rounded to 14 bits, see decoding/cpu_layout.py, and to 16, see assets/decode.c
    "packed int8": Way("sample.py --dtype int8", twin="int8", tolerance=2e-3),
    "int8 in C": Way("sample.py --dtype int8 --compile", twin="int8", tolerance=1e-3),
    "bfloat16": Way("sample.py --dtype bfloat16", tolerance=0.05),  # 8 bits
    "float16": Way("sample.py --dtype float16", tolerance=0.01),  # 11 bits
    # new tokens in fixed shapes, which a GPU records
    "fixed shapes": Way("fix_shapes(model)", tolerance=ROUNDED),
    "CUDA graph": Way("sample.py --device cuda --dtype float32", tolerance=1e-4, device="cuda"),
    "compiled decode step": Way(
        "sample.py --device cuda --dtype float32 --compile", tolerance=1e-4, device="cuda"
    ),
    "int8 on CUDA": Way(
        "sample.py --device cuda --dtype int8 --compile", twin="int8", tolerance=0.05, device="cuda"
    ),
    # adapters
    "LoRA beside": Way("train.py --lora-rank 3 --resume", tolerance=ROUNDED),
    "LoRA folded": Way("sample.py --model ADAPTER_FOLDER", tolerance=ROUNDED),
    "peft's adapter": Way("sample.py --model PEFT_FOLDER", tolerance=ROUNDED),
    # guesses that are checked in one forward pass
    "guesses from the text": Way("sample.py --guess 8", kind="text"),
    "guesses of a draft model": Way("sample.py --draft DRAFT_FOLDER", kind="text"),
    # training
    "loss in chunks": Way("train.py", kind="training", tolerance=ROUNDED),
    "micro-batches": Way("train.py --micro-batch-size 1", kind="training", tolerance=1e-4),
    "training in C": Way("train.py --compile", kind="training", tolerance=1e-4),
    "compiled blocks": Way("train.py --compile", kind="training", tolerance=1e-4),
    "16-bit dropout": Way("train.py --dropout 0.1", kind="training", tolerance=1e-4),
    "recomputed blocks": Way("train.py --activation-checkpointing", kind="training"),
    "bfloat16 autocast": Way("train.py --dtype bfloat16", kind="training", tolerance=0.01),
    "float16 autocast": Way(
        "train.py --device cuda --dtype float16", kind="training", tolerance=0.02, device="cuda"
    ),
    "DDP": Way("torchrun --nproc-per-node=2 train.py", kind="training", tolerance=1e-4),
    "FSDP": Way("torchrun --nproc-per-node=2 train.py --fsdp", kind="training", tolerance=1e-4),
    "resume": Way("train.py --resume", kind="training"),
}


# laid out for one device and one dtype by `load`, and where parts are read from a file
FIXED_WAYS = {"packed float32", "packed int8", "deferred weights", "int8 on CUDA"}
FIXED_WAYS |= {"plain float32", "sliced float32", "float32 by rows", "decode step in torch"}
FIXED_WAYS |= {"fixed shapes", "CUDA graph", "compiled decode step"}
FIXED_WAYS |= {"float32 in C", "float16 in C", "int8 in C", "decode step in C"}


def way_of_loaded(device: str, dtype: str, *, compiled: bool = False) -> str:
    """The row that says most of the model that `load` of decoding/ready.py gives on "cpu" or
    "cuda", where dtype is "int8" or one of system/precision.py's: for 16 bits on CUDA their
    rounding, not the recording; for float32 on the CPU the plain routine, whose twin and tolerance
    are those of every other that may be chosen.
    """
    if dtype in ("bfloat16", "float16"):
        return dtype
    if device == "cpu" and dtype == "int8":
        return "int8 in C" if compiled else "packed int8"
    if device == "cpu":
        return "float32 in C" if compiled else "plain float32"
    if dtype == "int8":
        return "int8 on CUDA"
    return "compiled decode step" if compiled else "CUDA graph"


def swap(root: Any, path: str, make: Callable[[Any], Any], way: str) -> Any:
    """Replace the part of a model called `path` by make(part), note the way, and return the model.

    `path` names a submodule, a parameter or a method ("h.0.attn.c_attn", "h.0.forward"); where
    there is none, as with the head of a tied model, make gets None. "" is the model itself, and
    what make gives for it is returned.
    """
    assert way in WAYS, f"{way!r} is no row of the table of equivalences"
    if not path:
        root = part = make(root)
    else:
        *parents, leaf = path.split(".")
        owner = _part(root, parents)
        part = make(getattr(owner, leaf, None))
        setattr(owner, leaf, part)
    notes = vars(root).setdefault("_ways", {})
    for name in [name for name in notes if path and name.startswith(f"{path}.")]:
        del notes[name]  # of parts that are gone with the whole
    earlier = notes[path].ways if path in notes else ()
    notes[path] = Note((*(other for other in earlier if other != way), way), part)
    return root


class Note(NamedTuple):
    """The ways of a part, the last one last, and what was put there last."""

    ways: tuple[str, ...]
    part: Any


def restore(root: Any, path: str) -> None:
    """Let a method that was swapped be the class's own again."""
    *parents, leaf = path.split(".")
    del vars(_part(root, parents))[leaf], vars(root)["_ways"][path]


def ways_of(root: Any) -> dict[str, tuple[str, ...]]:
    """The parts of a model that were swapped, and the ways of each, the last one last."""
    return {path: note.ways for path, note in vars(root).get("_ways", {}).items()}


def put_by_hand(root: Any) -> list[str]:
    """The parts that were swapped and then replaced once more without a note."""
    notes = vars(root).get("_ways", {})
    return [path for path in notes if not _is_there(root, path, notes[path].part)]


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two tensors, as a share of the largest magnitude of the second; NaN
    where one of them is not finite.
    """
    found, expected = (value.detach().cpu().double() for value in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def _is_there(root: Any, path: str, part: Any) -> bool:
    try:
        return _part(root, path.split(".")) is part
    except AttributeError:
        return False


def _part(root: Any, path: list[str]) -> Any:
    for name in filter(None, path):
        root = getattr(root, name)
    return root
