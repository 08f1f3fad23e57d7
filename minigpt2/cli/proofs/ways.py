"""Rows of the table of equivalences that write text or scores: each against its plain twin."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ...decoding import c_library
from ...decoding.c_products import CLinear
from ...decoding.drafters import ModelDrafter, NGramDrafter
from ...decoding.int8 import Int8Linear, probe, round_rows
from ...equivalences import WAYS, difference
from ...errors import OptionError
from ...evaluation.proof import (
    PASS,
    Item,
    NotHereError,
    Result,
    first_failure,
    judged,
    notices,
    within,
)
from ...generate import generate
from ...model import GPT2
from ...sampling import Drafter, SamplingConfig, row_generator
from . import walk
from .place import Place

IN_A_CACHE = ("cache", "prompt in parts", "rows of different length")
GREEDY = SamplingConfig(temperature=0)
N_NEW = 40  # tokens: past the model's window
SHAPES = [(1, 1), (1, 2), (3, 1), (3, 9)]  # of the walk's, enough for every routine that is chosen


def items(place: Place) -> list[Item]:
    """One for each row, under the row's name."""
    checks: dict[str, Callable[[str, Place], Result]] = {
        **dict.fromkeys(IN_A_CACHE, in_a_cache),
        "documents apart": documents_apart,
        **dict.fromkeys(walk.MODELS, on_the_cpu),
        **dict.fromkeys(walk.ADAPTERS, adapted),
        **dict.fromkeys(DRAFTERS, guessed),
    }
    found = [item(name, check, place) for name, check in checks.items()]
    long = {"compiled decode step", "int8 on CUDA"}
    on_cuda_only = [name for name in walk.ON_CUDA if name not in checks]
    return found + [item(name, on_cuda, place, long=name in long) for name in on_cuda_only]


def item(
    name: str, check: Callable[[str, Place], Result], place: Place, *, long: bool = False
) -> Item:
    """The item of a row."""
    return Item(
        name, f"{WAYS[name].reached} as {WAYS[name].twin}", lambda: check(name, place), long
    )


def in_a_cache(way: str, place: Place) -> Result:
    """Texts that are read in parts, or beside others."""
    model = walk.plain(place.model("tied"))
    form, plain_form = walk.FORMS[way]

    def results() -> Iterator[Result]:
        for n_rows, n_tokens in walk.SHAPES:
            idx = walk.token_ids(walk.SHAPE["vocab_size"], n_rows, walk.PROMPT + n_tokens)
            found = difference(form(model, idx), plain_form(model, idx))
            yield within(found, WAYS[way].tolerance, f"{n_rows} rows of {n_tokens} tokens")

    return first_failure(results())


@torch.no_grad()
def documents_apart(way: str, place: Place) -> Result:
    """Documents in one row, each as if it stood alone."""
    model, lengths = walk.plain(place.model("tied")), [1, 2, 3, 9]
    idx = walk.token_ids(walk.SHAPE["vocab_size"], 3, sum(lengths))
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths)).repeat(3, 1)
    found = model.head(model.hidden(idx, documents=documents))
    alone = torch.cat([model(part) for part in idx.split(lengths, dim=1)], dim=1)
    return within(difference(found, alone), WAYS[way].tolerance)


def on_the_cpu(way: str, place: Place) -> Result:
    """A model that computes in another way, however a user comes to it."""
    folder = place.model(walk.FILES_OF.get(way, ["tied"])[0])
    return _walked(way, walk.MODELS[way], folder, lambda: walk.TWINS[WAYS[way].twin](folder))


def adapted(way: str, place: Place) -> Result:
    """A model with adapters."""
    folder = place.model("peft" if way == "peft's adapter" else "LoRA")
    return _walked(way, walk.ADAPTERS[way], folder, lambda: walk.added_by_hand(folder))


def on_cuda(way: str, place: Place) -> Result:
    """A model that computes on a GPU."""
    if not torch.cuda.is_available():
        raise NotHereError("there is no CUDA device that torch can use")
    folder = place.model("tied")
    twin = walk.TWINS[WAYS[way].twin]
    return _walked(way, walk.ON_CUDA[way], folder, lambda: twin(folder), "cuda")


def _walked(
    way: str,
    makes: list[walk.Make],
    folder: Path,
    twin: Callable[[], GPT2],
    device: str = "cpu",
) -> Result:
    """The first failure of a way, in the places where users meet it."""
    if way in walk.IN_C:
        c_library.library.cache_clear()  # so that what it says is heard
    plain = twin()
    for make in makes:
        with notices("minigpt2") as heard:
            try:
                model = make(folder)
            except OptionError:  # a routine that is not to be had
                return _not_gone(way, heard)
        if not (walk.goes(model, way) or way in walk.UNMARKED):
            return _not_gone(way, heard)
        found, where = walk.worst(model, plain, device, SHAPES)
        result = within(found, WAYS[way].tolerance, where)
        if result.status != "PASS":
            return result
    return _by_all_threads() if way == "int8 in C" else PASS


def _by_all_threads() -> Result:
    """The C functions share torch's threads."""
    weight, bias, rows = probe()
    linear = Int8Linear(*round_rows(weight), bias)
    product = CLinear(linear.weight, linear.scale, bias)
    torch.set_num_threads(os.cpu_count() or 1)  # what runs an item puts it back
    tolerance = WAYS["int8 in C"].tolerance
    found = (within(difference(product(x), linear(x)), tolerance) for x in rows)
    return first_failure(found)


def _not_gone(way: str, heard: list[str]) -> Result:
    """Why a model was not laid out in a way: it is not to be had, or computes something else."""
    reason = next(iter(heard), "this torch has no such product for this processor")
    if "something else" in reason:
        return Result("FAIL", reason)
    compiler = os.environ.get("CC") or "cc"
    if way in walk.IN_C and shutil.which(compiler) is not None and os.name == "posix":
        return Result("FAIL", reason)
    raise NotHereError(reason)


def text_guesses(place: Place) -> Drafter:
    """Guesses from what was written before."""
    return NGramDrafter(shortest=1)


def draft_guesses(place: Place) -> Drafter:
    """Guesses of a smaller model."""
    small = walk.plain(place.model("draft"))
    return ModelDrafter(small, GREEDY, [row_generator(1, row) for row in range(3)])


DRAFTERS: dict[str, Callable[[Place], Drafter]] = {
    "guesses from the text": text_guesses,
    "guesses of a draft model": draft_guesses,
}


def guessed(way: str, place: Place) -> Result:
    """Greedy texts with guesses are those without."""
    model = walk.plain(place.model("tied"))
    rows = [[5], [7, 9, 200], [5, 6, 5, 6, 5]]
    found = generate(
        model, rows, max_new_tokens=N_NEW, sampling=GREEDY, drafter=DRAFTERS[way](place)
    )
    expected = generate(model, rows, max_new_tokens=N_NEW, sampling=GREEDY)
    return judged(found == expected, found, expected)
