"""What a page carries to read any text by itself: the vocabulary and weights of a small model.

The weights are rounded to float16.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from ..errors import InputError
from ..evaluation.score import possible_ids
from ..formats.activations import ACTIVATIONS
from ..formats.added_words import SPACES, AddedWord
from ..formats.vocabulary import CHAR_OF
from ..model import GPT2
from ..tokenizer import PIECES, Tokenizer
from .compared import plain_weights
from .forward_pass import attention_of
from .packing import packed

LARGEST = 20_000_000  # bytes of weights in float16, before base64
IN_THE_PAGE = ("gelu_new", "gelu", "relu", "silu")  # the activation functions of live.js


def refusal(model: GPT2, tokenizer: Tokenizer) -> str | None:
    """Why a page cannot read typed text with this model; None where it can."""
    n_bytes = 2 * model.config.n_parameters
    if n_bytes > LARGEST:
        return (
            f"its weights are {n_bytes / 1e6:,.0f} MB in float16, and a page carries 20 MB at most"
        )
    if _activation(model) is None:
        return f"the page has no {model.config.activation_function}"
    return None


def live_model(model: GPT2, tokenizer: Tokenizer) -> dict[str, object]:
    """Shape, weights and vocabulary of a model as live.js takes them. Raises InputError for weights
    that float16 cannot hold.
    """
    config = model.config
    weights = rounded_weights(model)
    n_ids, unused = possible_ids(model, tokenizer)
    return {
        "config": {
            **{name: getattr(config, name) for name in ("vocab_size", "n_embd", "n_layer")},
            "n_head": config.n_head,
            "n_inner": config.n_inner or 4 * config.n_embd,
            "block_size": config.block_size,
            "epsilon": config.layer_norm_epsilon,
            "activation": _activation(model),
            "scales": [attention_of(model, n).scale for n in range(config.n_layer)],
            "n_ids": n_ids,
        },
        "unused": unused,
        "weights": {
            name.removesuffix(".weight") if name in TABLES else name: packed(value, "f16")
            for name, value in weights.items()
        },
    }


TABLES = ("wte.weight", "wpe.weight", "lm_head.weight")


def live_tokenizer(tokenizer: Tokenizer, *, special: bool = False) -> dict[str, object]:
    """What live.js makes ids with: tokens as vocab.json spells them, in the order of merging, and
    the added words, the longest first; those that are special count only with `special`.
    """
    found = tokenizer.vocabulary
    in_order = list(found.ids) == list(range(len(found.tokens)))
    pattern = PIECES.replace("++", "+").replace(r"[^\s", f"[^{SPACES}")
    pattern = pattern.replace(r"\s", f"[{SPACES}]").replace(r"\S", f"[^{SPACES}]")
    return {
        "tokens": " ".join(map(spelled, found.tokens)),
        "ids": None if in_order else list(found.ids),
        "special": {id: spelled(name.encode()) for name, id in found.special.items()},
        "pattern": pattern,
        "words": [asdict(word) for word in sorted(found.words, key=_longest_first) if word.name],
        "readSpecial": special,
        "space": f"[{SPACES}]",
        "prefixSpace": found.prefix_space,
    }


def _longest_first(word: AddedWord) -> int:
    return -len(word.name)


def spelled(token: bytes) -> str:
    """Bytes as vocab.json has them: printable characters only, a space is "Ġ"."""
    return "".join(CHAR_OF[byte] for byte in token)


def rounded_weights(model: GPT2) -> dict[str, Tensor]:
    """The weights of a model, adapters folded into them, as float16 has them."""
    rounded = {name: value.detach().half() for name, value in plain_weights(model)}
    for name, value in rounded.items():
        if not value.isfinite().all():
            raise InputError(f"{name} holds numbers that float16 cannot: they are above 65,504")
    return rounded


@torch.no_grad()
def rounded_model(model: GPT2) -> GPT2:
    """The model that a page has: the same with weights rounded to float16, computed in float32."""
    with torch.device("meta"):
        copy = GPT2(model.config)
    copy.to_empty(device="cpu")
    copy.load_state_dict({name: value.float() for name, value in rounded_weights(model).items()})
    return copy.eval()


def rounding(model: GPT2, ids: list[int]) -> dict[str, float]:
    """What the rounding changes in the scores after a text: the largest change of one, and the
    Kullback-Leibler divergence of the last token's probabilities, in nats.
    """
    idx = torch.tensor([ids])
    with torch.no_grad():
        exact, near = (found(idx)[0].double() for found in (model, rounded_model(model)))
    logs = [logits[-1].log_softmax(-1) for logits in (exact, near)]
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum())
    return {"scores": float((exact - near).abs().max()), "nats": max(divergence, 0.0)}


def _activation(model: GPT2) -> str | None:
    """The name that live.js has for the model's activation function."""
    function = ACTIVATIONS[model.config.activation_function]
    return next((name for name in IN_THE_PAGE if ACTIVATIONS[name] is function), None)
