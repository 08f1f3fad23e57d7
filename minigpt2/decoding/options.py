"""What can be set for what is written: the prompts, how many tokens, and how they are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..arguments import CpuRoutine, SampleDType, check_field, flag
from ..errors import InputError
from ..sampling import SamplingConfig


@dataclass(frozen=True)
class SampleOptions:
    """Continue a prompt with GPT-2 or a model you trained. Text goes to stdout, everything else to
    stderr.
    """

    prompt: str | None = None
    """Text to continue; \\n, \\t, \\r and \\\\ are understood. - reads it from stdin, as it is; an
    empty one starts from nothing."""
    prompt_file: str | None = None
    """Read the prompt from this UTF-8 file instead, as it is."""
    prompts_file: str | None = None
    """Many prompts: one a line, understood as in --prompt, or .jsonl rows with the field prompt.
    Sample k of each is drawn with the same random numbers."""
    special_tokens: bool = False
    """Read special tokens that stand in a prompt, such as <|endoftext|>, as tokens. Default: as
    plain text, with a notice, unless --model is a run that was trained with it."""
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
    """End before any of these texts, understood as in --prompt."""
    ban: tuple[str, ...] = ()
    """Never write any of these texts, understood as in --prompt."""
    json: bool = False
    """Print one JSON object per sample: text, token ids and strings, their log-probabilities, and
    the reason for stopping."""
    top_logprobs: int = 0
    """With --json, also the N likeliest tokens in each token's place, and their
    log-probabilities."""
    guess: int = 0
    """Guess this many tokens ahead from what was written before: text that repeats itself comes
    sooner, and stays as likely as it was. 0 is off."""
    draft: str | None = None
    """Guess ahead with this smaller model, which needs the same tokens: a Hub id or a folder. How
    many at once, --guess says; 4 without it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: SampleDType = "auto"
    """Precision of weights and computation; int8 rounds the weights. auto: bfloat16 or float16 on
    CUDA, else float32."""
    compile: bool = False
    """Compile first what decoding spends its time in: by torch.compile on CUDA, by a C compiler on
    the CPU, once."""
    cpu_routine: CpuRoutine = "auto"
    """How float32 matrices are multiplied on the CPU; by-rows is plain for one text, packed for
    more. auto: by a short measurement, made once and kept. They round differently: name one to get
    the same text for a seed elsewhere."""
    debug: bool = False
    """Show the full traceback of an error, and which --cpu-routine was chosen, and why."""
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
        if self.compile and self.cpu_routine != "auto":
            raise InputError(
                f"--cpu-routine {self.cpu_routine} is given beside --compile, which makes products "
                "in C: leave one of them out"
            )
        if self.top_logprobs and not self.json:
            raise InputError("--top-logprobs is written with --json only: add --json")
        check_field(self, "max_new_tokens", self.max_new_tokens >= 0, "0 or more")
        check_field(self, "num_samples", self.num_samples >= 1, "1 or more")
        check_field(self, "top_logprobs", self.top_logprobs >= 0, "0 (off) or more")
        check_field(self, "guess", 0 <= self.guess <= 64, "from 0 (off) to 64")
        check_field(self, "seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        for name in ("stop", "ban"):
            if "" in getattr(self, name):
                raise InputError(f"{flag(name)} holds an empty text: give the text itself")
