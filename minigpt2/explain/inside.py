"""What the page shows of one forward pass, as plain data, all of it measured by the library.

Letters: T tokens, C n_embd, H heads, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError
from ..evaluation.score import possible_ids, score_ids
from ..model import GPT2, MLP, Block
from ..sampling import without
from ..tokenizer import Tokenizer
from .forward_pass import LayerTrace, Trace, trace
from .measures import attribution, induction_scores, logit_lens, previous_token_scores
from .packing import lower_triangle, packed

MOST_SHOWN = 5  # tokens that a layer would say next
LENS_TOKENS = 8
NEURONS = 8  # of an MLP, those that are most active at a token
COMPONENTS = 8  # of a vector
# likeliest next tokens: the page shows 12, and a repetition penalty may move 128 out of the way
NAMED = 160


@dataclass(frozen=True)
class Reading:
    """A model that reads a text: ids (T), its forward pass, and which ids it may write."""

    model: GPT2
    tokenizer: Tokenizer
    ids: list[int]
    trace: Trace

    @classmethod
    def of(cls, model: GPT2, tokenizer: Tokenizer, ids: list[int]) -> Reading:
        """One forward pass. Raises InputError where the scores are not finite."""
        found = trace(model, torch.tensor([ids], device=model.ln_f.weight.device))
        if not found.logits.isfinite().all():
            raise InputError("the model's scores are not finite: its weights are damaged")
        return cls(model, tokenizer, ids, found)

    @cached_property
    def possible(self) -> tuple[int, list[int]]:
        """How many ids have a token and a row, and those below that no token has."""
        return possible_ids(self.model, self.tokenizer)

    def written(self, logits: Tensor) -> Tensor:
        """Logits (..., V) of what can be written, in float32."""
        n_ids, unused = self.possible
        return without(logits[..., :n_ids].float(), unused)


@torch.no_grad()
def inside(reading: Reading) -> tuple[dict[str, object], set[int]]:
    """What the page shows of a reading, with arrays `packed`, and the ids of the tokens that it
    names.
    """
    found, layers = reading.trace, reading.trace.layers
    last = reading.written(found.logits[0, -1])  # (V)
    lens, named = _lens(reading)
    named |= set(last.topk(min(NAMED, len(last))).indices.tolist())
    record: dict[str, object] = {
        "embeddings": _embeddings(found),
        "layers": [_layer(reading, n) for n in range(len(layers))],
        "streams": packed(torch.stack([x[0].norm(dim=-1) for x in found.streams])),  # (L + 1, T)
        "lens": lens,
        "previous": packed(previous_token_scores(found)),  # (L, H)
        "induction": packed(induction_scores(found)),  # (L, H)
        "attribution": _attribution(reading, int(last.argmax())),
        "logits": packed(last),
        "nats": _nats(reading),
    }
    return record, named | set(reading.ids)


def _embeddings(found: Trace) -> dict[str, object]:
    token, position = found.token_embedding[0], found.position_embedding[0]  # (T, C)
    parts = torch.stack([token, position, token + position])  # (3, T, C)
    return {
        "norms": packed(parts.norm(dim=-1)),  # (3, T)
        "begins": packed(parts[..., :COMPONENTS]),  # (3, T, 8)
    }


def _layer(reading: Reading, n: int) -> dict[str, object]:
    layer, block = reading.trace.layers[n], reading.model.h[n]
    assert isinstance(block, Block)
    ids, activations, active = _neurons(block.mlp, block.ln_2(layer.middle)[0])
    return {
        "probs": packed(lower_triangle(layer.probs[0]), "share"),  # (H, T (T + 1) / 2)
        "scores": packed(lower_triangle(_scores(layer)), "f16"),  # the same
        "values": packed(layer.v[0].norm(dim=-1)),  # (H, T)
        "norm_1": _norm(layer.before[0], block.ln_1(layer.before)[0]),
        "norm_2": _norm(layer.middle[0], block.ln_2(layer.middle)[0]),
        "attn": packed(layer.attn[0].norm(dim=-1)),  # (T)
        "mlp": packed(layer.mlp[0].norm(dim=-1)),  # (T)
        "neurons": packed(ids, "i32"),  # (T, 8)
        "activations": packed(activations),  # (T, 8)
        "active": packed(active),  # (T)
    }


def _scores(layer: LayerTrace) -> Tensor:
    """What softmax is taken of, before the mask: (H, T, T)."""
    return (layer.q[0].float() * layer.scale) @ layer.k[0].float().transpose(1, 2)


def _norm(before: Tensor, after: Tensor) -> dict[str, object]:
    """A layer norm at work on (T, C): mean and standard deviation before it, and how the vectors
    begin before and after.
    """
    moments = torch.stack([before.mean(-1), before.std(-1, unbiased=False)])
    begins = torch.stack([before[:, :COMPONENTS], after[:, :COMPONENTS]])
    return {"moments": packed(moments), "begins": packed(begins)}  # (2, T), (2, T, 8)


def _neurons(mlp: MLP, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of an MLP that reads x (T, C): the neurons furthest from 0, their activations, both (T, 8),
    and which share of all is above 0, (T).
    """
    hidden = mlp.act(mlp.c_fc(x))
    ids = hidden.abs().topk(min(NEURONS, hidden.shape[-1]), dim=-1).indices
    return ids, hidden.gather(-1, ids), (hidden > 0).float().mean(-1)


def _lens(reading: Reading) -> tuple[dict[str, object], set[int]]:
    """What every layer would say next at every token: ids and probabilities (L + 1, T, 5); and
    which ids these are.
    """
    ids, probs = [], []
    # a few at once: all logits would be (L + 1, T, V), and each call reads the whole head
    for places in torch.arange(len(reading.ids)).split(LENS_TOKENS):
        found = logit_lens(reading.model, reading.trace, places.tolist())[:, 0]
        logits = reading.written(found)  # (L + 1, N, V)
        top = logits.softmax(-1).topk(min(MOST_SHOWN, logits.shape[-1]), dim=-1)
        ids.append(top.indices)
        probs.append(top.values)
    found = torch.cat(ids, 1)
    lens: dict[str, object] = {
        "ids": packed(found, "i32"),
        "probs": packed(torch.cat(probs, 1)),
    }
    return lens, set(found.unique().tolist())


def _attribution(reading: Reading, token: int) -> dict[str, object]:
    parts = attribution(reading.model, reading.trace, token)
    return {
        "token": token,
        "logit": parts.logit,
        "token_embedding": parts.token_embedding,
        "position_embedding": parts.position_embedding,
        "final_bias": parts.final_bias,
        "heads": packed(parts.heads),
        "attn_biases": packed(parts.attn_biases),
        "mlps": packed(parts.mlps),
    }


def _nats(reading: Reading) -> list[float | None]:
    """What every token costs, as `score` has it; None for the first."""
    n_ids, unused = reading.possible
    return score_ids(reading.model, [reading.ids], vocab_size=n_ids, unused=unused)[0]
