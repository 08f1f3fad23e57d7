"""Why a loss or a gradient is not finite: which module, weight and documents it comes from.

The step is run once more, as it was, and watched. Knows modules, batches and documents, nothing of
training runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from ..corpus.token_file import Document, TokenFile
from ..system.precision import own_randomness
from .batches import Batch

MOST_NAMES = 4  # in one line
IDS_SHOWN = 24
LOSS = "loss"
INDEXED_BY = {"wte.weight": "token", "wpe.weight": "position"}
Loss = Callable[[Tensor, Tensor], Tensor]
Place = tuple[int, int]
"""A row of a batch, and a position in it."""


@dataclass(frozen=True)
class Finding:
    """The first value of a step that was not finite; rows and positions count from 0."""

    where: str  # "output of h.1.mlp.c_fc", "loss", "gradient of h.3.attn.c_attn.weight"
    cause: str  # "whose weight has 1 of 784 values not finite"; may be empty
    rows: tuple[int, ...]  # of the batch, which are at fault; none if all are, or none alone
    places: tuple[Place, ...]  # where exactly; none if everywhere, or if that is unknown


@dataclass(frozen=True)
class _Seen:
    """What was seen in one micro-batch, and where in it, if known."""

    where: str
    cause: str
    places: tuple[Place, ...] = ()


def find_nonfinite(
    model: nn.Module,
    batch: Batch,
    *,
    loss_of: Loss,
    micro_batch_size: int | None = None,
    seed_row: Callable[[int], object] = lambda row: None,
) -> Finding | None:
    """Run a step on idx, targets (B, T) again and find its first value that is not finite, if any.

    `loss_of` gives the loss of a micro-batch, scaled as the step scaled it, by the modules of
    `model` (which may be compiled or recomputed, but not sharded). `seed_row` is called with the
    number of a micro-batch's first row before each pass, so that dropout is that of the step.
    Takes the memory of the step and of one more gradient. Parameters, their gradients, mode, hooks
    and random state stay as they were.
    """
    n_rows = len(batch[0])
    with _repeatable(model):
        seen = _search(model, batch, range(n_rows), loss_of, micro_batch_size or n_rows, seed_row)
        if not seen:
            return None
        # a bad embedding, as the head, spoils the loss even of rows whose modules are all well
        first = min(seen, key=lambda one: one.where == LOSS)
        places = [place for one in seen if one.where == first.where for place in one.places]
        rows = {row for row, _ in places}
        for row in () if places else range(n_rows):
            if _search(model, batch, range(row, row + 1), loss_of, 1, seed_row):
                rows.add(row)
    return Finding(
        first.where,
        first.cause,
        rows=tuple(sorted(rows)) if len(rows) < n_rows else (),
        places=tuple(places) if len(places) < batch[0].numel() else (),
    )


def finding_in_words(
    finding: Finding | None, spans: Sequence[tuple[int, int]], tokens: TokenFile
) -> str:
    """What was found, and in which documents, as a part of an error message; `spans` are those of
    the batch's rows (see `Batches.spans`).
    """
    names = _in_words([document.label for document in _documents_of(finding, spans, tokens)])
    if finding is None:
        return f"nothing was wrong when the step was repeated; the batch holds {names}"
    found = f"first not finite: {finding.where}" + f", {finding.cause}" * bool(finding.cause)
    if finding.rows:
        return f"{found}; in {len(finding.rows)} of {len(spans)} rows, from {names}"
    return f"{found}; {'from' if finding.places else 'the batch holds'} {names}"


def finding_as_json(
    finding: Finding | None,
    batch: Batch,
    spans: Sequence[tuple[int, int]],
    tokens: TokenFile,
    *,
    decode: Callable[[list[int]], str],
    **facts: object,
) -> dict[str, object]:
    """All of it for a JSON file: `facts` (the step, its loss, ...), what was found, and for every
    row its place in the token file, its documents and how it begins; where some rows are at fault,
    which, and at which positions. JSON has no NaN, so that becomes a string.
    """
    rows: list[dict[str, object]] = []
    for row, (ids, span) in enumerate(zip(batch[0].tolist(), spans)):
        documents = tokens.documents_at(_positions(tokens, span))
        labels, start = [document.label for document in documents], ids[:IDS_SHOWN]
        rows.append({"row": row, "start": span[0], "documents": labels})
        rows[-1] |= {"begins": decode(start), "ids": start}
    if finding is not None and finding.rows:
        for row, entry in enumerate(rows):
            entry["at_fault"] = row in finding.rows
    if finding is not None and finding.places:
        positions: list[list[int]] = [[] for _ in rows]
        for row, position in finding.places:
            positions[row].append(position)
        for entry, own in zip(rows, positions):
            entry["positions"] = own
    where, cause = (finding.where, finding.cause) if finding else (None, None)
    plain = {name: _for_json(value) for name, value in facts.items()}
    return {**plain, "where": where, "cause": cause, "rows": rows}


class _Watch:
    """Hooks that remember the first value, in the order of computation, that is not finite."""

    def __init__(self, first_row: int, idx: Tensor) -> None:
        self.seen: _Seen | None = None
        self._first_row, self._shape = first_row, idx.shape
        self._largest = 0.0  # of the last value that was finite

    def before(self, name: str, module: nn.Module, inputs: tuple[object, ...]) -> None:
        for value in inputs:
            if isinstance(value, Tensor) and self._is_first(value):
                where = f"input of {name or 'the model'}"
                self.seen = _Seen(where, self._earlier(), self._places(value))

    def after(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and self._is_first(output):
            weight = _bad_weight(module, name)
            cause = f"whose {weight}" if weight else self._earlier()
            where = f"output of {name or 'the model'}"
            self.seen = _Seen(where, cause, self._places(output))

    def loss(self, loss: Tensor, model: nn.Module) -> None:
        """Look at what comes after all modules: the head, which may be the embedding, and more."""
        if self._is_first(loss):
            weight = _bad_weight(model, "")
            self.seen = _Seen(LOSS, f"where {weight}" if weight else self._earlier())

    def _is_first(self, value: Tensor) -> bool:
        if self.seen is not None or not value.is_floating_point() or not value.numel():
            return False
        largest = value.detach().abs().amax().item()  # NaN if any value is
        if math.isfinite(largest):
            self._largest = largest
        return not math.isfinite(largest)

    def _earlier(self) -> str:
        return f"after values of up to {self._largest:.2g}"

    def _places(self, value: Tensor) -> tuple[Place, ...]:
        """The places where a value (B, T, C) or (1, T, C) is not finite."""
        n_rows, n_tokens = self._shape
        if value.dim() != 3 or value.shape[1] != n_tokens or value.shape[0] not in (1, n_rows):
            return ()
        bad = (~value.detach().isfinite()).any(-1).expand(n_rows, n_tokens)
        return tuple((self._first_row + row, t) for row, t in bad.nonzero().tolist())


def _search(
    model: nn.Module,
    batch: Batch,
    rows: range,
    loss_of: Loss,
    micro_batch_size: int,
    seed_row: Callable[[int], object],
) -> list[_Seen]:
    """What is wrong first in each micro-batch of these rows, or else in their gradient."""
    seen: list[_Seen] = []
    gradients: dict[str, Tensor] = {}
    for row in rows[::micro_batch_size]:
        idx, targets = (part[row : min(row + micro_batch_size, rows.stop)] for part in batch)
        seed_row(row)
        with _watching(model, row, idx) as watch:
            loss = loss_of(idx, targets)
        watch.loss(loss, model)
        if watch.seen is not None:
            seen.append(watch.seen)
        elif not seen:
            _add_gradients(gradients, loss, model)
    return seen or _bad_gradient(gradients)


@contextlib.contextmanager
def _watching(model: nn.Module, first_row: int, idx: Tensor) -> Iterator[_Watch]:
    watch, hooks = _Watch(first_row, idx), []
    try:
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(watch.before, name)))
            hooks.append(module.register_forward_hook(partial(watch.after, name)))
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _bad_weight(module: nn.Module, name: str) -> str:
    """The first parameter of a module that is not finite, in words, or nothing."""
    for own, parameter in module.named_parameters():
        bad = ~parameter.detach().isfinite()
        if n_bad := int(bad.sum()):
            words = f"{own} has {n_bad:,} of {bad.numel():,} values not finite"
            index = INDEXED_BY.get(f"{name}.{own}".lstrip("."))
            if index is None:
                return words
            indices = [str(i) for i in bad.any(-1).nonzero().flatten().tolist()]
            return f"{words} ({index}{'s' * (len(indices) > 1)} {_in_words(indices)})"
    return ""


def _add_gradients(sums: dict[str, Tensor], loss: Tensor, model: nn.Module) -> None:
    """Add a loss's gradients to `sums`, and none to the parameters' own."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, gradients):
        if gradient is not None:
            sums[name] = sums[name] + gradient if name in sums else gradient


def _bad_gradient(gradients: dict[str, Tensor]) -> list[_Seen]:
    """The first in the order of the backward pass; if there is none, perhaps their norm."""
    for name, gradient in reversed(gradients.items()):
        if n_bad := int((~gradient.isfinite()).sum()):
            cause = f"in {n_bad:,} of {gradient.numel():,} values"
            return [_Seen(f"gradient of {name}", cause)]
    norm = nn.utils.get_total_norm(gradients.values())
    if norm.isfinite():
        return []
    largest = {name: gradient.abs().amax().item() for name, gradient in gradients.items()}
    name = max(largest, key=largest.__getitem__)
    cause = f"of which {name} has values of up to {largest[name]:.2g}"
    return [_Seen("norm of all gradients", cause)]


@contextlib.contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Nothing compiled, as that would skip the hooks, and the random state as before afterwards."""
    device = next(model.parameters()).device
    with own_randomness(device), torch.compiler.set_stance("force_eager"):
        yield


def _documents_of(
    finding: Finding | None, spans: Sequence[tuple[int, int]], tokens: TokenFile
) -> list[Document]:
    """Those at fault, or all of the batch where none stands out."""
    if finding is not None and finding.places:
        asked = [(spans[row][0] + t) % len(tokens.tokens) for row, t in finding.places]
        return tokens.documents_at(asked)
    rows = finding.rows if finding is not None and finding.rows else range(len(spans))
    positions = [position for row in rows for position in _positions(tokens, spans[row])]
    return tokens.documents_at(positions)


def _positions(tokens: TokenFile, span: tuple[int, int]) -> list[int]:
    start, length = span
    return [position % len(tokens.tokens) for position in range(start, start + length)]


def _in_words(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMES + 1:
        return f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES:,} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _for_json(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
