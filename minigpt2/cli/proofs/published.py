"""What OpenAI's GPT-2 124M is known to give, by others' programs, held against this one.

The weights are looked for in the Hub's cache, or taken from a folder; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...errors import InputError
from ...evaluation.figures import FOLDER
from ...evaluation.proof import Item, NotHereError, Result, first_failure, judged, within
from ...evaluation.scorer import Scorer
from ...generate import generate
from ...hub.folders import cached_folder
from ...model import GPT2
from ...sampling import SamplingConfig
from ...system.precision import Precision
from ...tokenizer import Tokenizer
from ...training.step import train_step

SOURCE = "gpt2"
HELLO_TOLERANCE, STEPS_TOLERANCE = 4e-5, 1e-2  # TransformerLens' and llm.c's own
BATCH, LENGTH = 4, 64  # of llm.c's steps


@dataclass(frozen=True)
class Figures:
    """What a model is known to give, from elsewhere."""

    n_parameters: int
    first: tuple[int, ...]  # "The dog"
    greedy: tuple[int, ...]  # and how it goes on, 20 ids in all
    hello: float  # the loss of "Hello world!" after end-of-text
    steps: tuple[float, ...]  # losses of training on one batch


PUBLISHED = Figures(
    n_parameters=124_439_808,
    # transformers' own tests of its GPT-2 (tests/models/gpt2)
    first=(464, 3290),
    greedy=(
        *(464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688),
        *(27262, 13, 198, 198, 464, 3290),
    ),
    hello=5.331855773925781,  # TransformerLens, tests/acceptance
    # llm.c, test_gpt2.c: ten steps on the first 4 x 64 tokens of tiny_shakespeare_val
    steps=(
        *(5.270007133483887, 4.059706687927246, 3.3751230239868164, 2.8007826805114746),
        *(2.315382242202759, 1.8490285873413086, 1.3946564197540283, 0.9991465210914612),
        *(0.6240804195404053, 0.37651097774505615),
    ),
)


class Known:
    """A model about which something is published, loaded when it is first asked for."""

    def __init__(self, source: str | Path, figures: Figures = PUBLISHED) -> None:
        self.source, self.figures = source, figures

    @cached_property
    def folder(self) -> Path:
        """Where it lies; NotHereError where it is not."""
        found = cached_folder(self.source)
        if found is None:
            raise NotHereError(
                f"{self.source} is not in the Hub's cache: `minigpt2 sample --model {self.source} "
                '--prompt "The dog"` downloads it once, or name a folder with --model'
            )
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return Tokenizer.of_model(str(self.source), self.folder)

    @cached_property
    def model(self) -> GPT2:
        """Its weights, in float32."""
        return self.load()

    def load(self) -> GPT2:
        """A copy to be changed. Raises InputError for a model of another size."""
        model = GPT2.from_pretrained(self.folder)
        n_parameters = sum(p.numel() for p in model.parameters())
        if n_parameters != self.figures.n_parameters:
            raise InputError(
                f"{self.source} has {n_parameters:,} parameters, and the published figures are of "
                f"one with {self.figures.n_parameters:,}"
            )
        return model


def items(known: Known) -> list[Item]:
    """One for each published figure."""
    return [
        Item("published text", "transformers' greedy ids of GPT-2 124M", lambda: greedy(known)),
        Item("published loss", "TransformerLens' loss of GPT-2 124M", lambda: hello(known)),
        Item("published steps", "llm.c's ten losses of GPT-2 124M", lambda: steps(known), True),
    ]


def greedy(known: Known) -> Result:
    """How "The dog" goes on."""
    figures = known.figures
    found = known.tokenizer.encode("The dog")
    n_new = len(figures.greedy) - len(figures.first)
    sampling = SamplingConfig(temperature=0)
    (new,) = generate(known.model, [found], max_new_tokens=n_new, sampling=sampling)
    return first_failure(
        (
            judged(found == [*figures.first], found, [*figures.first]),
            judged([*found, *new] == [*figures.greedy], [*found, *new], [*figures.greedy]),
        )
    )


def hello(known: Known) -> Result:
    """What "Hello world!" costs."""
    tokenizer = known.tokenizer
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode("Hello world!")]])
    with torch.no_grad():
        loss = Scorer(known.model)(ids[:, :-1], ids[:, 1:]).item() / (ids.shape[1] - 1)
    return within(abs(loss - known.figures.hello), HELLO_TOLERANCE, f"a loss of {loss:.6f}")


def steps(known: Known) -> Result:
    """Training on one batch as llm.c does: AdamW (betas 0.9 and 0.999, eps 1e-8, decay 0.01 of all
    tensors, learning rate 1e-4), no clipping, no dropout.
    """
    model = known.load().train()
    model.set_dropout(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True
    )
    ids = torch.tensor(shakespeare(known.tokenizer, BATCH * LENGTH + 1))
    batch = ids[:-1].view(BATCH, LENGTH), ids[1:].view(BATCH, LENGTH)
    precision, scorer = Precision(torch.device("cpu"), torch.float32), Scorer(model)
    results = []
    for number, expected in enumerate(known.figures.steps):
        stats = train_step(
            scorer, batch, optimizer, precision, micro_batch_size=BATCH, learning_rate=1e-4,
            grad_clip=0.0, seed=number,
        )  # fmt: skip
        where = f"step {number + 1}: a loss of {stats.loss:.6f}"
        results.append(within(abs(stats.loss - expected), STEPS_TOLERANCE, where))
    return first_failure(results)


def shakespeare(tokenizer: Tokenizer, n_tokens: int) -> list[int]:
    """The first tokens of Tiny Shakespeare as llm.c (dev/data) makes them for its tests:
    end-of-text before what everybody says.
    """
    text = (FOLDER / "shakespeare.txt").read_text("utf-8")
    *whole, last = text.split("\n\n")
    ids: list[int] = []
    for part in [*(f"{part}\n\n" for part in whole), last]:
        ids += [tokenizer.eot, *tokenizer.encode(part)]
    assert len(ids) > n_tokens + 16, "the end of the excerpt may be cut within a word"
    return ids[:n_tokens]
