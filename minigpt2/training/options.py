"""What can be set for a training run.

A field that is None takes its value from the situation; its help says which.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any

from ..arguments import DType, Preset, check_field, check_types, did_you_mean, flag, refuse, texts
from ..corpus.options import FEWEST_TOKENS, MOST_TOKENS, TextConfig, check_one_source
from ..errors import InputError, OptionError

DEFAULT_MODEL = "gpt2"
GPT2S_TOKENS = 50257  # in GPT-2's own vocabulary


@dataclass(frozen=True)
class Recipe:
    """What a kind of run takes where the user gave no value; the helps below quote these."""

    batch_size: int = 8
    learning_rate: float = 5e-5
    epochs: float = 3
    max_steps: int | None = None


RECIPES = {
    "nano": Recipe(batch_size=16, learning_rate=2e-3, max_steps=800),
    "from-scratch": Recipe(learning_rate=6e-4),
    "fine-tune": Recipe(),
    "lora": Recipe(learning_rate=2e-4),  # LoRA paper (arXiv:2106.09685), table 11, for GPT-2
}


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how large the steps of a training run are."""

    epochs: float | None = None
    """Passes over the training text. Default: 3, unless --max-steps is given."""
    max_steps: int | None = None
    """Optimizer steps in all, instead of --epochs. Default: nano 800."""
    batch_size: int | None = None
    """Sequences per optimizer step; never changes by itself. Default: nano 16, otherwise 8."""
    micro_batch_size: int | None = None
    """Sequences computed at once, the rest is accumulated. Default: as many as fit into memory;
    halved when it runs out all the same."""
    block_size: int | None = None
    """Tokens per sequence. Default: the model's context."""
    learning_rate: float | None = None
    """Peak learning rate. Default: nano 2e-3, other presets 6e-4, fine-tuning 5e-5, LoRA 2e-4."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises from 0. Default: a twentieth of the run."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices and embeddings; biases and layer norms never decay."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out text. Default: a tenth of the run."""
    save_every: int | None = None
    """Steps between checkpoints. Default: as --eval-every."""
    patience: int = 0
    """Stop after this many evaluations without a better one; 0 never stops early."""
    seed: int = 1337
    """Decides initial weights, order of the text and dropout."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "block_size",
            "eval_every",
            "save_every",
        ):
            value = getattr(self, name)
            check_field(self, name, value is None or value >= 1, "1 or more")
        check_field(
            self, "epochs", self.epochs is None or 0 < self.epochs < float("inf"), "above 0"
        )
        rate = self.learning_rate
        check_field(self, "learning_rate", rate is None or 0 < rate < float("inf"), "above 0")
        check_field(
            self, "warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "0 or more"
        )
        check_field(self, "weight_decay", 0 <= self.weight_decay < float("inf"), "0 or more")
        check_field(self, "grad_clip", 0 <= self.grad_clip < float("inf"), "0 (off) or more")
        check_field(self, "patience", self.patience >= 0, "0 (never) or more")
        check_field(self, "seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        if self.epochs is not None and self.max_steps is not None:
            names = ("epochs", "max_steps")
            raise OptionError(f"{' and '.join(names)} are both given: choose one", *names)


@dataclass(frozen=True)
class TrainOptions:
    """Fine-tune GPT-2 on your own text, or train a small one from random weights (--preset nano).

    The run folder (--out) is a Hugging Face model folder with the best weights; checkpoints,
    metrics and the loss curve lie in it too.
    """

    data: tuple[str, ...] = ()
    """Files, folders, globs, hf://datasets/... paths, or - for stdin. Needed but with --resume."""
    val_data: tuple[str, ...] = ()
    """Held-out text of your own, instead of a part of --data."""
    val_fraction: float = 0.1
    """Share of --data held out to judge the model; 0 holds out nothing."""
    model: str | None = None
    """Weights to start from: a Hub id, a Hugging Face folder or a run folder. Default: gpt2, unless
    --preset is given."""
    preset: Preset | None = None
    """Start from random weights of this size instead."""
    train_vocabulary: bool = False
    """With --preset, train a vocabulary of the text's own, on the part that is not held out. Needs
    pip install tokenizers."""
    vocab_size: int | None = None
    """Tokens of a preset's vocabulary: the first of GPT-2's, or with --train-vocabulary your own.
    Default: the preset's, nano 2048, otherwise 50257."""
    add_tokens: tuple[str, ...] = ()
    """Make each of these texts a token of its own, understood as in --document-separator. Its row
    begins as the mean of the others and is trained, also with --lora-rank; OUT/base keeps the model
    as it begins."""
    document_mask: bool = False
    """Let tokens look only at their own document, not at those before it in the window."""
    mask_prompt: bool = False
    """In chats, and in rows with the fields prompt and completion, learn the answers only."""
    workers: int | None = None
    """Processes that tokenize; the result is the same. Default: one per CPU core."""
    out: str | None = None
    """Run folder. Default: runs/<name of the data>-<model>."""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with the flags that the run was started with;
    those given now take their place."""
    dropout: float | None = None
    """Share of activations dropped while training. Default: the model's own, 0.1 in GPT-2."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: DType = "auto"
    """Precision of the computation; weights stay float32. auto: bfloat16 or float16 on CUDA, else
    float32.
    """
    compile: bool | None = None
    """Compile parts of the model: in float32 on the CPU a C file, otherwise with torch.compile;
    falls back to plain PyTorch where that fails. Default: the C file, where there is a C compiler
    and the run is longer than half a minute or so."""
    activation_checkpointing: bool = False
    """Compute each block twice instead of remembering what is inside: a third slower, much less
    memory, the same numbers."""
    lora_rank: int = 0
    """Train small adapters of this rank (LoRA) and leave GPT-2's own weights alone; 0 trains all
    weights."""
    lora_alpha: float | None = None
    """Strength of the adapters. Default: twice the rank."""
    merge_lora: bool = False
    """Also write the model with its best adapters folded in, to OUT/merged."""
    fsdp: bool = False
    """With torchrun: give each process a part of the weights instead of a copy."""
    tensorboard: bool = False
    """Also log to OUT/tensorboard; needs pip install tensorboard."""
    debug: bool = False
    """Show the full traceback of an error."""
    text: TextConfig = field(default_factory=TextConfig)
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_types(self)
        check_field(self, "workers", self.workers is None or self.workers >= 1, "1 or more")
        if not self.data and not (self.resume and self.out):
            also = "; or give --resume with --out and the run folder" * self.resume
            raise InputError(
                f"--data is missing: name at least one file, folder or glob of text{also}"
            )
        check_field(self, "val_fraction", 0 <= self.val_fraction < 1, "from 0 to below 1")
        check_field(
            self, "dropout", self.dropout is None or 0 <= self.dropout < 1, "from 0 to below 1"
        )
        check_field(self, "lora_rank", self.lora_rank >= 0, "0 (off) or more")
        alpha = self.lora_alpha
        check_field(self, "lora_alpha", alpha is None or 0 < alpha < float("inf"), "above 0")
        for name in ("lora_alpha", "merge_lora"):
            if getattr(self, name) and not self.lora_rank:
                raise InputError(f"{flag(name)} is given without --lora-rank: give a rank, say 8")
        if self.add_tokens and self.preset:
            raise InputError(
                "--add-tokens is for a model that has tokens, --preset begins one: choose one"
            )
        check_vocabulary(self)
        if "" in self.add_tokens or len({*self.add_tokens}) < len(self.add_tokens):
            raise InputError("--add-tokens holds an empty text, or one twice: give each once")
        if self.lora_rank and self.preset:
            raise InputError(
                "--lora-rank adapts a trained model, --preset starts without: choose one"
            )
        if self.lora_rank and self.fsdp:
            raise InputError("--lora-rank with --fsdp is not supported: leave out one of them")
        check_one_source(self)

    @property
    def source(self) -> str:
        """What the weights come from: the preset, or the model."""
        return self.preset or self.model or DEFAULT_MODEL

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.out or default_out(self.data[0], self.source)


def check_vocabulary(options: TrainOptions) -> None:
    """Raise OptionError for a vocabulary of a size that none has, or beside the weights of a model,
    which belong to theirs.
    """
    for name in ("train_vocabulary", "vocab_size"):
        if getattr(options, name) not in (None, False) and not options.preset:
            raise OptionError(
                f"{name} is given without preset: the weights of a model belong to its own tokens",
                *(name, "preset"),
            )
    size, trained = options.vocab_size, options.train_vocabulary
    if size is not None and not FEWEST_TOKENS <= size <= (MOST_TOKENS if trained else GPT2S_TOKENS):
        allowed = f"{FEWEST_TOKENS} to {MOST_TOKENS if trained else GPT2S_TOKENS}"
        more = "" if trained else ", or more with train_vocabulary"
        raise OptionError(
            f"vocab_size is {size}, allowed is {allowed}{more}", "vocab_size", "train_vocabulary"
        )


def default_out(data: str, source: str) -> str:
    """runs/<name of the first data path>-<preset or model>: the run folder without --out."""
    name = PurePath(data).stem.strip("*") or "data"
    return str(PurePath("runs") / f"{name}-{PurePath(source).name}")


# what is set where a run is begun or resumed, not among its settings
OWN = ("data", "model", "out", "resume", "debug", "text", "training")
INNER = {"text": TextConfig, "training": TrainConfig}
SETTINGS = tuple(
    part.name
    for options in (TrainOptions, *INNER.values())
    for part in fields(options)
    if part.name not in OWN
)


def options_from(values: Mapping[str, Any]) -> TrainOptions:
    """The options of fields by name, whichever dataclass they are in; paths may be one or many.

    Raises OptionError for a name that is none, and what the options raise of their values.
    """
    left = dict(values)
    inner = {
        name: options(
            **{part.name: left.pop(part.name) for part in fields(options) if part.name in left}
        )
        for name, options in INNER.items()
    }
    own = {part.name for part in fields(TrainOptions)} - INNER.keys()
    require_settings(left, (*own, *SETTINGS))
    for name, value in left.items():
        if name in ("data", "val_data"):
            left[name] = paths(name, value)
        elif name == "add_tokens":
            left[name] = texts(name, value)
        elif isinstance(value, PurePath):
            left[name] = str(value)
    return TrainOptions(**left, **inner)


def require_settings(given: Iterable[str], names: Collection[str]) -> None:
    """Raise OptionError for a name that is none of those that there are."""
    for name in given:
        if name not in names:
            near = did_you_mean(name, names)
            raise OptionError(f"there is no setting {name}{near}; train.py --help lists them")


def paths(name: str, value: object) -> tuple[str, ...]:
    """Paths as texts, one alone too; OptionError for anything else."""
    if isinstance(value, (str, PurePath)):
        return (str(value),)
    found: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) else (value,)
    for path in found:
        if not isinstance(path, (str, PurePath)):
            raise refuse(name, value, "a path, or several")
    return tuple(map(str, found))
