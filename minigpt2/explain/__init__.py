"""What happens inside a model is measured and shown.

from minigpt2 import GPT2, Tokenizer
from minigpt2.explain import attribution, logit_lens, surprise, trace

model, tokenizer = GPT2.from_pretrained("gpt2"), Tokenizer.from_pretrained("gpt2")
idx = torch.tensor([tokenizer.encode("The lamp")])
found = trace(model, idx)  # every layer's stream, queries, keys, values, probabilities
logit_lens(model, found)  # what each layer would say next
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compared import Differences, differences
    from .forward_pass import LayerTrace, Trace, trace
    from .measures import (
        Attribution,
        attribution,
        induction_scores,
        logit_lens,
        previous_token_scores,
        surprise,
    )

__all__ = [
    "Attribution",
    "Differences",
    "LayerTrace",
    "Trace",
    "attribution",
    "differences",
    "induction_scores",
    "logit_lens",
    "previous_token_scores",
    "surprise",
    "trace",
]

_HOMES = {
    **dict.fromkeys(("Differences", "differences"), "compared"),
    **dict.fromkeys(("LayerTrace", "Trace", "trace"), "forward_pass"),
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'measures')}", __name__), name)
