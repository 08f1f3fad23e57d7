"""Say how good models are on a text: python -m minigpt2 evaluate --model RUN --data my.txt"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..corpus.sources.find import require_local
from ..errors import OptionError, visible
from ..evaluation.options import EvaluateOptions
from ..hub.folders import require_source
from ..system.signals import raise_on_signals
from .console import run_script
from .tables import table

if TYPE_CHECKING:
    import torch

    from ..corpus.token_file import TokenFile
    from ..evaluation.corpus_score import Score, Sums
    from ..evaluation.kept_sums import KeptSums
    from ..model import GPT2
    from ..system.processes import World
    from ..tokenizer import Tokenizer

logger = logging.getLogger("evaluate")
PROPERTIES = ("loss", "perplexity", "bits_per_byte", "bits_per_character")
HEAD = ("model", "loss", "perplexity", "bits/byte", "bits/character", "tokens")


def main(options: EvaluateOptions) -> int:
    """Judge every model, and print what was found to stdout; every process calls it."""
    require_local(options.data, None if options.task else options.text)
    for source in options.models:
        require_source(source)
    # with all that is heavy, before signals are raised
    from ..decoding import ready  # noqa: F401
    from ..evaluation.corpus_score import evaluate_row  # noqa: F401
    from ..system.precision import pick_device, pick_dtype
    from ..system.processes import device_of, join, world_from

    raise_on_signals()
    world = world_from(os.environ)
    if not world.is_main:
        logging.getLogger().setLevel(logging.ERROR)  # the main process speaks for all
    device = pick_device(device_of(options.device, world))
    pick_dtype("auto" if options.dtype == "int8" else options.dtype, device, training=False)
    if options.task:
        judge_by_task(options, Place(world, device))
        return 0
    with join(world, device):
        judge_by_text(options, Place(world, device))
    return 0


@dataclass(frozen=True)
class Place:
    """Which process this is, and what it computes on."""

    world: World
    device: torch.device


@dataclass(frozen=True)
class Judged:
    """A model, what it made of the text, and how it was computed."""

    model: str  # as it was named
    score: Score
    tokens_of: str  # the identity of its tokenizer
    dtype: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """One flat object; null for a number that JSON has not."""
        figures = {name: getattr(self.score, name) for name in PROPERTIES}
        values = {"model": self.model, **figures, **asdict(self.score)}
        values |= {"protocol": self.score.protocol, "dtype": self.dtype, "device": self.device}
        return {k: None if v == math.inf else v for k, v in values.items()}


def judge_by_text(options: EvaluateOptions, place: Place) -> None:
    """Score the text by every model, and print the figures: JSON as soon as a model is done, a
    table at the end. Until then what each has done is kept.
    """
    texts, judged, kept = Texts(options, place.world), [], []
    tokenizers = {tokenizer.identity: tokenizer for tokenizer in checked_tokenizers(options)}
    if "-" in options.data and (place.world.size > 1 or len(tokenizers) > 1):  # is read once
        several = "processes" if place.world.size > 1 else "kinds of tokens"
        raise OptionError(f"data - with several {several}: save the text to a file", "data")
    for tokenizer in tokenizers.values():
        texts.of(tokenizer)
    for source, model, tokenizer in loaded(options, place):
        sums = KeptSumsOf(source, model, texts.of(tokenizer), options, place)
        kept.append(sums)
        score = sums.score(model, tokenizer)
        judged.append(Judged(source, score, tokenizer.identity, sums.dtype, place.device.type))
        if options.json and place.world.is_main:
            print(json.dumps(judged[-1].to_json(), allow_nan=False), flush=True)
    if place.world.is_main:
        if not options.json:
            print(report(judged))
        for sums in kept:
            sums.file.remove()


def judge_by_task(options: EvaluateOptions, place: Place) -> None:
    """Score test sets by every model, and print the figures beside published ones."""
    from .tasks import judge

    if place.world.size > 1:
        raise OptionError("task runs in one process: start it without torchrun", "task")
    checked_tokenizers(options)
    judge(options, loaded(options, place), place.device.type)


def checked_tokenizers(options: EvaluateOptions) -> list[Tokenizer]:
    """The tokenizer of every model, before any weights are downloaded. Raises what finding and
    reading the models raises, as far as their weights are not needed for that.
    """
    from ..evaluation.windows import checked_stride
    from ..hub.folders import model_folder
    from ..model import config_of
    from ..tokenizer import Tokenizer

    found = []
    for source in options.models:
        folder = model_folder(source, with_weights=False)
        checked_stride(options.stride, config_of(folder).block_size)
        found.append(Tokenizer.of_model(source, folder))
    return found


def loaded(options: EvaluateOptions, place: Place) -> Iterator[tuple[str, GPT2, Tokenizer]]:
    """Every model, by the name that it was given, as `sample` would use it, and its tokenizer; one
    at a time is in memory.
    """
    from ..decoding.ready import load_with_tokenizer

    for source in options.models:
        yield (
            source,
            *load_with_tokenizer(
                source,
                device=place.device,
                dtype=options.dtype,
                cpu_routine=options.cpu_routine,
            ),
        )


@dataclass
class Texts:
    """The text as tokens, made once for equal tokenizers."""

    options: EvaluateOptions
    world: World
    _files: dict[str, TokenFile] = field(default_factory=dict)  # by the tokenizer's identity

    def of(self, tokenizer: Tokenizer) -> TokenFile:
        """The text in the tokens of this tokenizer; the first process of each machine makes it."""
        from ..corpus.prepared import prepare
        from ..corpus.tokenizing import default_workers

        options, name = self.options, tokenizer.identity
        if name not in self._files:
            with self.world.main_first():
                corpus = prepare(
                    options.data,
                    tokenizer,
                    val_fraction=0,
                    text=options.text,
                    workers=options.workers or default_workers(),
                )
            self._files[name] = corpus.train
        return self._files[name]


class KeptSumsOf:
    """One model's work on a text, which goes on where it was ended."""

    file: KeptSums

    def __init__(
        self, source: str, model: GPT2, text: TokenFile, options: EvaluateOptions, place: Place
    ) -> None:
        import torch

        from ..evaluation.kept_sums import KeptSums
        from ..evaluation.windows import checked_stride

        self._name, self._text, self._options, self._place = source, text, options, place
        number = str(model.ln_f.weight.dtype).removeprefix("torch.")
        self.dtype = "int8" if options.dtype == "int8" else number
        stride = checked_stride(options.stride, model.config.block_size)
        protocol = [stride, options.document_mask]
        computed = [
            self.dtype,
            options.cpu_routine,
            place.device.type,
            __version__,
            torch.__version__,
        ]
        weights = file_digests(source) if place.world.is_main else None
        self.file = KeptSums([weights, text.info.sha256, text.info.tokenizer, protocol, computed])

    def score(self, model: GPT2, tokenizer: Tokenizer) -> Score:
        """What the model makes of the text."""
        from ..evaluation.corpus_score import LongRow, evaluate_row
        from .progress import ScoringBar

        world, row = self._place.world, LongRow.of_file(self._text, tokenizer.eot)
        speaks = world.is_main
        latest = world.gather(self.file.read() if speaks else None)[0]
        if latest:
            at = f"{min(latest.place, row.n_tokens):,} of {row.n_tokens:,} tokens"
            logger.info("%s: going on after %s", self._name, at)

        def update(sums: Sums) -> None:
            nonlocal latest
            latest = sums
            if speaks:
                self.file.update(sums)
            bar.update(sums.place)

        done = latest.place if latest else 0
        with ScoringBar(self._name, done, row.n_tokens, shown=speaks) as bar:
            try:
                return evaluate_row(
                    model,
                    tokenizer,
                    row,
                    stride=self._options.stride,
                    document_mask=self._options.document_mask,
                    world=world,
                    begun=latest,
                    on_sums=update,
                )
            finally:
                if latest and speaks:
                    self.file.write(latest)


def file_digests(source: str) -> list[list[str]]:
    """What tells a model's files from others: names and SHA-256, also of what adapters lie on."""
    from ..formats.bases import base_folder, is_adapter
    from ..hub.folders import MODEL_FILES, model_folder
    from ..system.files import file_sha256

    folders = [model_folder(source)]
    while is_adapter(folders[-1]):
        folders.append(base_folder(folders[-1]))
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    return [[p.name, file_sha256(p)] for p in paths if MODEL_FILES.fullmatch(p.name)]


def report(judged: Sequence[Judged]) -> str:
    """The figures of all models as a table, and below it what they are figures of."""
    scores = [found.score for found in judged]
    text = [f"{counted(scores[0].documents, 'document')}, {scores[0].bytes:,} bytes in UTF-8"]
    text += [f"on {judged[0].device} in {judged[0].dtype}"]
    known = scores[0].standard_error is not None
    text += [f"{'±' if known else 'one gives no'} standard error over documents"]
    lines = [table(HEAD, [cells(found) for found in judged]), "", "; ".join(text)]
    protocols = {score.protocol: found.model for found, score in zip(judged, scores)}
    for protocol, model in protocols.items():
        lines.append(protocol if len(protocols) == 1 else f"{visible(model)}: {protocol}")
    if len({found.tokens_of for found in judged}) > 1:
        lines.append(
            "these models have different tokens: compare bits per byte, not loss and perplexity"
        )
    return "\n".join(lines)


def cells(found: Judged) -> list[str]:
    """A model's row of the table."""
    score, error = found.score, found.score.standard_error
    return [
        visible(found.model),
        f"{score.loss:.4f}" + ("" if error is None else f" ± {error:.4f}"),
        f"{score.perplexity:,.2f}",
        f"{score.bits_per_byte:.4f}",
        f"{score.bits_per_character:.4f}",
        f"{score.tokens:,}",
    ]


def counted(n: int, what: str) -> str:
    """A number of things."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def run(argv: Sequence[str] | None = None) -> int:
    """The command, from its flags to its exit code."""
    return run_script(main, EvaluateOptions, argv)
