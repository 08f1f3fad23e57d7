"""Committed figures of other programs, and what this one computes, held against them.

Token ids, logits, gradients, filters and greedy texts: what needs no room above this one.
`assets/verify` holds a tiny model as transformers writes it, and what transformers and torch make
of it in float64 (a script in tests wrote both). Nothing there comes from this program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..equivalences import difference
from ..formats.tensors import read_tensors
from ..generate import generate
from ..model import GPT2
from ..sampling import SamplingConfig, probabilities
from ..system.files import ASSETS, read_json
from ..tokenizer import Tokenizer
from .proof import Item, NotHereError, Result, first_failure, judged, within
from .scorer import Scorer

FOLDER = ASSETS / "verify"
EXACT = 1e-9  # float64, of which the last bits differ from machine to machine
SINGLE = 1e-4  # float32, as a share of the largest number; the smallest known mistake makes 1e-3


@functools.cache
def figures() -> dict[str, Any]:
    """What figures.json holds."""
    return read_json(FOLDER / "figures.json")


def tiny(dtype: torch.dtype = torch.float64, device: str = "cpu") -> GPT2:
    """The committed model."""
    return GPT2.from_pretrained(FOLDER / "model", dtype=dtype, device=device)


def sketch(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each tensor, its norm and its product with a wave: two numbers that any change of its
    values, or of their order, changes.
    """
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().double().cpu().flatten()
        wave = torch.arange(1, len(flat) + 1, dtype=torch.float64).mul(0.7).cos()
        found[name] = [float(flat.norm()), float(flat @ wave)]
    return found


def same_sketch(found: dict[str, list[float]], expected: dict[str, list[float]]) -> Result:
    """Whether tensors have the norms and products of others, up to rounding."""
    if found.keys() != expected.keys():
        others = sorted(found.keys() ^ expected.keys())
        return judged(False, f"{len(found)} tensors", f"{len(expected)}: see {others[0]}")
    size = max(norm for norm, _ in expected.values())
    far = {
        name: max(abs(a - b) for a, b in zip(found[name], expected[name])) / size
        for name in expected
    }
    # a difference that is no number is the largest
    worst = max(far, key=lambda name: far[name] if far[name] == far[name] else float("inf"))
    return within(far[worst], EXACT, worst)


def token_ids() -> Result:
    """Of every text, the ids, and the text again."""
    tokenizer = Tokenizer.gpt2()

    def results() -> Iterator[Result]:
        for text, ids in figures()["texts"]:
            found = tokenizer.encode(text)
            yield judged(found == ids, f"{found} for {text!r}", ids)
            yield judged(tokenizer.decode(ids) == text, repr(tokenizer.decode(ids)), repr(text))

    return first_failure(results())


def logits(dtype: torch.dtype, device: str = "cpu") -> Result:
    """The scores of every next token of two rows."""
    expected, _ = read_tensors(FOLDER / "logits.safetensors")
    with torch.no_grad():
        found = tiny(dtype, device)(expected["idx"].to(device))
    tolerance = EXACT if dtype == torch.float64 else SINGLE
    return within(difference(found, expected["logits"]), tolerance)


def logits_on_cuda() -> Result:
    """Those in float32 that a GPU computes."""
    if not torch.cuda.is_available():
        raise NotHereError("there is no CUDA device that torch can use")
    return logits(torch.float32, "cuda")


def gradients() -> Result:
    """The loss of a batch, and its gradient of every parameter."""
    model, expected = tiny().train(), figures()["gradients"]
    model.set_dropout(0)
    idx = torch.tensor(figures()["batches"][0])
    loss = Scorer(model)(idx[:, :-1], idx[:, 1:], 1 / idx[:, 1:].numel())
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters()}
    zeros = {name: torch.zeros(1) if g is None else g for name, g in found.items()}
    return first_failure(
        (
            within(abs(loss.item() - expected["loss"]), EXACT, "the loss"),
            same_sketch(sketch(zeros), expected["parameters"]),
        )
    )


def filters() -> Result:
    """The probabilities that each filter, and all together, leave of two rows of scores."""
    known = figures()["filters"]
    scores = torch.tensor(known["logits"], dtype=torch.float64)

    def results() -> Iterator[Result]:
        for settings, expected in known["cases"]:
            before = scores.clone()
            found = probabilities(before, SamplingConfig(**settings), known["texts"])
            far = float((found - torch.tensor(expected, dtype=torch.float64)).abs().max())
            yield within(far, EXACT, str(settings))
            yield judged(torch.equal(before, scores), "other scores afterwards", "the same")

    return first_failure(results())


def greedy_ids() -> Result:
    """The ids that follow prompts of different length, written together and with a cache."""
    known = figures()["greedy"]
    n_new, greedy = len(known["ids"][0]), SamplingConfig(temperature=0)
    found = generate(tiny(), known["prompts"], max_new_tokens=n_new, sampling=greedy)
    return first_failure(
        judged(row == ids, *_where_they_part(n, row, ids))
        for n, (row, ids) in enumerate(zip(found, known["ids"]))
    )


def _where_they_part(n: int, found: Sequence[int], expected: Sequence[int]) -> tuple[str, str]:
    """A few ids from the first one on that differs, in words; of equal rows none."""
    at = next((at for at, pair in enumerate(zip(found, expected)) if len({*pair}) > 1), len(found))
    some = slice(at, at + 4)
    return f"ids {[*found[some]]} at token {at} of row {n}", str([*expected[some]])


def evaluation_changes_nothing() -> Result:
    """A model that was loaded has no dropout, and the same weights after it was used."""
    model = tiny(torch.float32)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    idx = torch.tensor(figures()["batches"][0])
    with torch.no_grad():
        same = torch.equal(model(idx), model(idx))
    after = nn.utils.parameters_to_vector(model.parameters())
    return first_failure(
        (
            judged(same, "two answers to one text", "the same"),
            judged(torch.equal(before, after), "other weights afterwards", "the same"),
        )
    )


ITEMS = (
    Item("token ids", "40 hard texts have GPT-2's tokens", token_ids),
    Item("logits", "transformers' scores, in float64", lambda: logits(torch.float64)),
    Item(
        "logits float32",
        "the same within rounding, by all threads",
        lambda: logits(torch.float32),
        threads=True,
    ),
    Item("logits CUDA", "the same on the GPU", logits_on_cuda),
    Item("evaluation mode", "a loaded model answers the same twice", evaluation_changes_nothing),
    Item("gradients", "transformers' and autograd's, in float64", gradients),
    Item("sampling filters", "transformers' probabilities", filters),
    Item("greedy ids", "transformers' texts, batched and with a cache", greedy_ids),
)
