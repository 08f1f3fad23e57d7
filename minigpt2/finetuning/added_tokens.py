"""Words that become tokens before training: a model's tokenizer and its rows grow by them.

The grown model is kept in the run folder, as one that was only in memory, and the run begins there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from ..corpus.options import unescape
from ..decoding.text import check_fits
from ..model import GPT2
from ..runs import kept
from ..tokenizer import Tokenizer
from ..training.options import TrainOptions
from .inputs import InMemory

if TYPE_CHECKING:
    from ..runs.folder import RunFolder


def grown(model: GPT2, tokenizer: Tokenizer, words: Sequence[str]) -> tuple[GPT2, Tokenizer]:
    """A copy of a model, and its tokenizer, in which each of these words is a token with a row.

    New rows, and those that no token had, begin as the mean of the others: far-off ones would make
    new words likelier than all others at first (Hewitt 2021,
    nlp.stanford.edu/~johnhew/vocab-expansion.html). Raises InputError for a word that is a token
    already.
    """
    check_fits(tokenizer, model)
    without_row = tokenizer.words_from(model.config.vocab_size)
    larger = tokenizer.with_words([word for word in words if word not in without_row])
    known = tokenizer.ids_below(model.config.vocab_size)
    model = copy.deepcopy(model)
    n_rows = max(model.config.vocab_size, larger.vocab_size)
    for part in (model.wte, getattr(model, "lm_head", None)):
        if part is not None:
            part.weight = nn.Parameter(_grown_rows(part.weight.detach(), known, n_rows))
    model.wte.num_embeddings = n_rows
    if not model.config.tie_word_embeddings:
        model.lm_head.out_features = n_rows
    model.config = replace(model.config, vocab_size=n_rows)
    return model, larger


def _grown_rows(weight: torch.Tensor, known: Sequence[int], n_rows: int) -> torch.Tensor:
    """weight (V, C) -> (n_rows, C), whose rows but the known ones are the mean of those."""
    found = weight[list(known)]
    rows = found.float().mean(dim=0).to(weight.dtype).repeat(n_rows, 1)
    rows[list(known)] = found
    return rows


def kept_grown(
    options: TrainOptions, load: Callable[[], tuple[GPT2, Tokenizer]]
) -> tuple[TrainOptions, Callable[[RunFolder], None]]:
    """Options of the same run that begins with the grown model, and what writes that into the run
    folder; `load` gives the model and the tokenizer to grow.
    """
    folder = Path(options.folder)

    def keep(run: RunFolder) -> None:
        model, tokenizer = grown(*load(), [unescape(word) for word in options.add_tokens])
        InMemory(model=model, tokenizer=tokenizer).write(run)

    return replace(options, model=str(folder / kept.BASE), out=str(folder)), keep


def loaded(source: str) -> tuple[GPT2, Tokenizer]:
    """The model and the tokenizer of a Hub id or a folder."""
    return GPT2.from_pretrained(source), Tokenizer.from_pretrained(source)
