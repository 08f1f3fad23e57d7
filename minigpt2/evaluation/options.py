"""What can be set for judging models by a text, and an installation by what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ..arguments import CpuRoutine, SampleDType, check_field, check_types, refuse
from ..corpus.options import TextConfig
from ..errors import InputError, OptionError

TaskName = Literal[
    "wikitext2",
    "wikitext103",
    "ptb",
    "lambada_openai",
    "lambada_standard",
    "hellaswag",
    "cbt_cn",
    "cbt_ne",
]


@dataclass(frozen=True)
class EvaluateOptions:
    """Say how good models are on a text: loss, perplexity, bits per byte and per character. The
    same command goes on where one was stopped.
    """

    model: tuple[str, ...] = ()
    """The models to judge: Hub ids, Hugging Face folders or run folders. Default: gpt2."""
    data: tuple[str, ...] = ()
    """The text: files, folders, globs, hf://datasets/... paths, or - for stdin. Of one --task: its
    test set, by default the one on the Hub."""
    task: tuple[TaskName, ...] = ()
    """Test sets that others use, instead of a text: the figures stand beside published ones."""
    stride: int | None = None
    """How many tokens one window begins behind another: fewer give each token more to go by, and
    take longer. From 1 to the model's window. Default: half of it."""
    document_mask: bool = False
    """Read each document by itself, not after those before it."""
    workers: int | None = None
    """Processes that tokenize; the result is the same. Default: one per CPU core."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: SampleDType = "auto"
    """Precision of weights and computation, which is judged with the model; int8 rounds the
    weights. auto: bfloat16 or float16 on CUDA, else float32."""
    cpu_routine: CpuRoutine = "auto"
    """How float32 matrices are multiplied on the CPU; by-rows is plain for one text, packed for
    more. auto: by a short measurement, made once and kept."""
    json: bool = False
    """Print one JSON object per model."""
    debug: bool = False
    """Show the full traceback of an error, and which --cpu-routine was chosen, and why."""
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.task:
            if name not in get_args(TaskName):
                raise refuse("task", name, ", ".join(get_args(TaskName)))
        if len({*self.task}) < len(self.task):
            raise OptionError("task names one twice: name each once", "task")
        if self.data and len(self.task) > 1:
            raise OptionError("data is given beside several of task: name one", "data", "task")
        if not self.data and not self.task:
            raise InputError("--data is missing: name at least one file, folder or glob of text")
        if len({*self.model}) < len(self.model):
            raise OptionError("model names one twice: name each once", "model")
        check_field(self, "stride", self.stride is None or self.stride >= 1, "1 or more")
        check_field(self, "workers", self.workers is None or self.workers >= 1, "1 or more")

    @property
    def models(self) -> tuple[str, ...]:
        """What is judged."""
        return self.model or ("gpt2",)


@dataclass(frozen=True)
class VerifyOptions:
    """Prove that this installation computes what it should: PASS, FAIL or NOT HERE for each item,
    then the machine, and in the last line what to paste into a bug report. Nothing is downloaded.
    """

    item: tuple[str, ...] = ()
    """Run these items alone."""
    full: bool = False
    """Also what takes minutes: what is compiled, two processes, ten steps of GPT-2."""
    model: str = "gpt2"
    """Where OpenAI's GPT-2 124M lies, whose published figures are compared: a folder, or a Hub id
    that was downloaded before."""
    json: bool = False
    """Print all of it as one JSON object."""
    debug: bool = False
    """Show the full traceback of an error."""
