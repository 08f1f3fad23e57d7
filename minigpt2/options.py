"""What can be set: frozen dataclasses that are flag, type, default and help of the scripts at once.

Imports nothing heavy, so that `--help` and a mistyped flag are answered at once. Knows no torch and
no files. A field that is None takes its value from the situation; its help says which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from .errors import InputError
from .sampling import SamplingConfig

Preset = Literal["nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
SampleDType = Literal["auto", "float32", "bfloat16", "float16", "int8"]

ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def unescape(text: str) -> str:
    """Text with \\n, \\r, \\t and \\\\ understood."""
    return re.sub(r"\\([nrt\\])", lambda found: ESCAPES[found[1]], text)


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def _check(options: object, name: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise InputError(f"{flag(name)} is {getattr(options, name)}, allowed is {allowed}")


@dataclass(frozen=True)
class TextConfig:
    """How documents are found in files, and what is changed in them: by default, nothing."""

    text_field: str = "text"
    """The field or column that holds the text, in .jsonl, .json, .csv, .tsv and .parquet."""
    document_separator: str | None = None
    """Where one document ends and the next begins inside a text file; \\n and \\t are understood.
    None: a file is one document."""
    normalize_unicode: bool = False
    """Compose characters (Unicode NFC), so that the same letter is the same bytes."""
    normalize_newlines: bool = False
    """Turn the line endings of Windows and of old Macs into \\n."""
    remove_control_characters: bool = False
    """Remove control characters other than newline, tab and carriage return."""
    duplicates: Literal["keep", "drop", "drop-near"] = "keep"
    """What to do with documents that are there already: drop leaves out exact copies, drop-near
    also those that are nearly the same (needs pip install "minigpt2[data]")."""
    min_characters: int = 0
    """Leave out documents shorter than this; 0 keeps all."""

    def __post_init__(self) -> None:
        _check(self, "min_characters", self.min_characters >= 0, "0 (off) or more")
        if self.document_separator == "":
            raise InputError("--document-separator is empty: give the text between documents")
        if self.text_field == "":
            raise InputError("--text-field is empty: name the field that holds the text")

    @property
    def separator(self) -> str | None:
        """The document separator with its escapes understood."""
        return self.document_separator and unescape(self.document_separator)


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
    """Passes over the training text. None: 3, unless --max-steps is given."""
    max_steps: int | None = None
    """Optimizer steps in all, instead of --epochs. None: nano 800."""
    batch_size: int | None = None
    """Sequences per optimizer step; never changes by itself. None: nano 16, otherwise 8."""
    micro_batch_size: int | None = None
    """Sequences computed at once, the rest is accumulated. None: as many as fit into memory; halved
    when it runs out all the same."""
    block_size: int | None = None
    """Tokens per sequence. None: the model's context."""
    learning_rate: float | None = None
    """Peak learning rate. None: nano 2e-3, other presets 6e-4, fine-tuning 5e-5, LoRA 2e-4."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises from 0. None: a twentieth of the run."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices and embeddings; biases and layer norms never decay."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out text. None: a tenth of the run."""
    save_every: int | None = None
    """Steps between checkpoints. None: as --eval-every."""
    patience: int = 0
    """Stop after this many evaluations without a better one; 0 never stops early."""
    seed: int = 1337
    """Decides initial weights, order of the text and dropout."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "block_size",
            "eval_every",
            "save_every",
        ):
            value = getattr(self, name)
            _check(self, name, value is None or value >= 1, "1 or more")
        _check(self, "epochs", self.epochs is None or 0 < self.epochs < float("inf"), "above 0")
        rate = self.learning_rate
        _check(self, "learning_rate", rate is None or 0 < rate < float("inf"), "above 0")
        _check(
            self, "warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "0 or more"
        )
        _check(self, "weight_decay", 0 <= self.weight_decay < float("inf"), "0 or more")
        _check(self, "grad_clip", 0 <= self.grad_clip < float("inf"), "0 (off) or more")
        _check(self, "patience", self.patience >= 0, "0 (never) or more")
        _check(self, "seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        if self.epochs is not None and self.max_steps is not None:
            raise InputError("--epochs and --max-steps are both given: choose one")


@dataclass(frozen=True)
class TrainOptions:
    """Fine-tune GPT-2 on your own text, or train a small one from random weights (--preset nano).

    The run folder (--out) is a Hugging Face model folder with the best weights; checkpoints,
    metrics and the loss curve lie in it too.
    """

    data: tuple[str, ...]
    """Files, folders, globs, hf://datasets/... paths, or - for stdin."""
    val_data: tuple[str, ...] = ()
    """Held-out text of your own, instead of a part of --data."""
    val_fraction: float = 0.1
    """Share of --data held out to judge the model; 0 holds out nothing."""
    model: str = "gpt2"
    """Weights to start from: a Hub id, a Hugging Face folder or a run folder."""
    preset: Preset | None = None
    """Start from random weights of this size instead."""
    document_mask: bool = False
    """Let tokens look only at their own document, not at those before it in the window."""
    mask_prompt: bool = False
    """In rows with the fields prompt and completion, learn the completion only."""
    workers: int | None = None
    """Processes that tokenize; the result is the same. None: one per CPU core."""
    out: str | None = None
    """Run folder. None: runs/<name of the data>-<model>."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    dropout: float | None = None
    """Share of activations dropped while training. None: the model's own, 0.1 in GPT-2."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: DType = "auto"
    """Precision of the computation; weights stay float32. auto: bfloat16 or float16 on CUDA, else
    float32.
    """
    compile: bool = False
    """Compile the model with torch.compile; falls back to plain PyTorch where that fails."""
    activation_checkpointing: bool = False
    """Compute each block twice instead of remembering what is inside: a third slower, much less
    memory, the same numbers."""
    lora_rank: int = 0
    """Train small adapters of this rank (LoRA) and leave GPT-2's own weights alone; 0 trains all
    weights."""
    lora_alpha: float | None = None
    """Strength of the adapters. None: twice the rank."""
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
        _check(self, "workers", self.workers is None or self.workers >= 1, "1 or more")
        if not self.data:
            raise InputError("--data is empty: name at least one file, folder or glob of text")
        _check(self, "val_fraction", 0 <= self.val_fraction < 1, "from 0 to below 1")
        _check(self, "dropout", self.dropout is None or 0 <= self.dropout < 1, "from 0 to below 1")
        _check(self, "lora_rank", self.lora_rank >= 0, "0 (off) or more")
        alpha = self.lora_alpha
        _check(self, "lora_alpha", alpha is None or 0 < alpha < float("inf"), "above 0")
        for name in ("lora_alpha", "merge_lora"):
            if getattr(self, name) and not self.lora_rank:
                raise InputError(f"{flag(name)} is given without --lora-rank: give a rank, say 8")
        if self.lora_rank and self.preset:
            raise InputError(
                "--lora-rank adapts a trained model, --preset starts without: choose one"
            )
        if self.lora_rank and self.fsdp:
            raise InputError("--lora-rank with --fsdp is not supported: leave out one of them")


@dataclass(frozen=True)
class CorpusOptions:
    """Prepare text for training and report what is in it: how much, how long, how well GPT-2's
    tokens fit, what repeats, what is held out. Training does the same by itself.
    """

    paths: tuple[str, ...]
    """Files, folders, globs, hf://datasets/... paths, or - for stdin."""
    val_data: tuple[str, ...] = ()
    """Held-out text of your own, instead of a part of PATHS."""
    val_fraction: float = 0.1
    """Share held out to judge the model; 0 holds out nothing."""
    model: str = "gpt2"
    """Whose tokenizer to use: a Hub id, a Hugging Face folder or a run folder."""
    preset: Preset | None = None
    """Use the tokenizer of this preset instead."""
    workers: int | None = None
    """Processes that tokenize; the result is the same. None: one per CPU core."""
    json: bool = False
    """Print the report as one JSON object."""
    debug: bool = False
    """Show the full traceback of an error."""
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("no path is given: name at least one file, folder or glob of text")
        _check(self, "val_fraction", 0 <= self.val_fraction < 1, "from 0 to below 1")
        _check(self, "workers", self.workers is None or self.workers >= 1, "1 or more")


@dataclass(frozen=True)
class SampleOptions:
    """Continue a prompt with GPT-2 or a model you trained. Text goes to stdout, everything else to
    stderr.
    """

    prompt: str | None = None
    """Text to continue; - reads it from stdin; an empty one starts from nothing."""
    prompt_file: str | None = None
    """Read the prompt from this UTF-8 file instead."""
    prompts_file: str | None = None
    """Many prompts: one a line, with \\n and \\t understood, or .jsonl rows with the field
    prompt."""
    interactive: bool = False
    """Ask for prompts until Ctrl-D; Ctrl-C stops an answer."""
    model: str = "gpt2"
    """A Hub id, a Hugging Face folder or a run folder."""
    max_new_tokens: int = 200
    """Most tokens to add to the prompt."""
    finish_sentence: bool = False
    """At --max-new-tokens, go on to the end of the sentence, for 100 tokens at most."""
    num_samples: int = 1
    """Continuations to draw of each prompt; sample k is the same for any number of samples."""
    seed: int = 1337
    """The same seed gives the same text on the same machine."""
    stop: tuple[str, ...] = ()
    """End before any of these texts; \\n and \\t are understood."""
    ban: tuple[str, ...] = ()
    """Never write any of these texts; \\n and \\t are understood."""
    json: bool = False
    """Print one JSON object per sample: text, token ids, log-probabilities, reason for stopping."""
    guess: int = 0
    """Guess this many tokens ahead from what was written before: text that repeats itself comes
    sooner, and stays as likely as it was. 0 is off."""
    draft: str | None = None
    """Guess ahead with this smaller model, which needs the same tokens: a Hub id or a folder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: SampleDType = "auto"
    """Precision of weights and computation; int8 rounds the weights. auto: bfloat16 or float16 on
    CUDA, else float32."""
    compile: bool = False
    """Compile first what decoding spends its time in: torch.compile on CUDA, a C function for int8
    on the CPU."""
    debug: bool = False
    """Show the full traceback of an error."""
    # gentler than the library's neutral defaults: untempered GPT-2 wanders, greedy GPT-2 repeats
    # itself
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95)
    )

    def __post_init__(self) -> None:
        places = (self.prompt, self.prompt_file, self.prompts_file)
        if sum(place is not None for place in places) + self.interactive != 1:
            raise InputError(
                "give exactly one of --prompt, --prompt-file, --prompts-file and --interactive"
            )
        if self.interactive and (self.json or self.num_samples > 1):
            raise InputError(
                "--interactive writes one answer a prompt, as text: leave out --json and "
                "--num-samples"
            )
        _check(self, "max_new_tokens", self.max_new_tokens >= 0, "0 or more")
        _check(self, "num_samples", self.num_samples >= 1, "1 or more")
        _check(self, "guess", 0 <= self.guess <= 64, "from 0 (off) to 64")
        _check(self, "seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        for name in ("stop", "ban"):
            if "" in getattr(self, name):
                raise InputError(f"{flag(name)} holds an empty text: give the text itself")


@dataclass(frozen=True)
class ConvertOptions:
    """Rewrite a GPT-2 checkpoint as a clean Hugging Face folder, and read it back to prove it."""

    source: str
    """A Hub id, a Hugging Face folder (safetensors, sharded or pytorch_model.bin) or a run
    folder.
    """
    dest: str
    """Folder to write."""
    to: Literal["hf"] = "hf"
    """Format to write: hf is config.json, model.safetensors and the tokenizer's files."""
    dtype: DType = "auto"
    """Cast the weights. auto: keep each tensor's own."""
    force: bool = False
    """Replace the model files in an existing DEST; its other files stay."""
    debug: bool = False
    """Show the full traceback of an error."""
