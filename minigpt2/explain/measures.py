"""What a trace says: what every layer would say next, what moved a score, what each head does.

Letters: B batch, T tokens, C n_embd, H heads, D head size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import refuse
from ..evaluation.score import score_ids
from ..model import GPT2, evaluation_mode
from .forward_pass import Trace, attention_of, require_plain, require_tokens


@torch.no_grad()
def logit_lens(model: GPT2, trace: Trace, positions: Sequence[int] = (-1,)) -> Tensor:
    """What the model would say if it ended before each block: logits (L + 1, B, N, V) at the N
    tokens at `positions`, by default the last; the last of the L + 1 are the model's own.

    The stream at each depth is put through the final layer norm and the head: nostalgebraist 2020,
    "interpreting GPT: the logit lens". `model` is the one that was traced.
    """
    require_plain(model)
    places = [_position(trace, position) for position in positions]
    return torch.stack([model.head(model.ln_f(x[:, places])) for x in trace.streams])


def surprise(model: GPT2, idx: Tensor) -> list[list[float | None]]:
    """What every token of idx (B, T) costs the model, in nats; None for the first of each row.

    Raises InputError as `trace` does.
    """
    require_plain(model)
    require_tokens(idx)
    return score_ids(model, idx.tolist())


@dataclass(frozen=True)
class Attribution:
    """What moved one score, as parts that add up to it.

    `heads` (L, H) is what each attention head wrote, `attn_biases` (L) what the bias of each
    layer's attention did, `mlps` (L) each MLP. `final_bias` is the final layer norm's.
    """

    logit: float
    token_embedding: float
    position_embedding: float
    heads: Tensor
    attn_biases: Tensor
    mlps: Tensor
    final_bias: float

    @property
    def attns(self) -> Tensor:
        """What the attention of each layer wrote, (L)."""
        return self.heads.sum(1) + self.attn_biases

    @property
    def total(self) -> float:
        """The sum of all parts: the logit, up to rounding."""
        outside = self.token_embedding + self.position_embedding + self.final_bias
        return outside + float(self.attns.sum() + self.mlps.sum())


@torch.no_grad()
def attribution(
    model: GPT2, trace: Trace, token: int, position: int = -1, row: int = 0
) -> Attribution:
    """How much every write to the residual stream moved the score of a next `token` at a position.

    The final layer norm divides by what it measured on the whole stream, so that the parts add up:
    the direct logit attribution of TransformerLens. Raises OptionError for another token, position
    or row. `model` is the one that was traced: with another, the parts do not add up.
    """
    require_plain(model)
    at = _position(trace, position)
    if not 0 <= token < model.config.vocab_size:
        raise refuse("token", token, f"an id from 0 to {model.config.vocab_size - 1}")
    if not 0 <= row < len(trace.idx):
        raise refuse("row", row, f"from 0 to {len(trace.idx) - 1}")
    direction = _Direction(model, trace.streams[-1][row, at], token)
    heads, biases = zip(*(_head_writes(model, trace, n, row, at) for n in range(len(model.h))))
    return Attribution(
        logit=float(trace.logits[row, at, token]),
        token_embedding=float(direction.of(trace.token_embedding[row, at])),
        position_embedding=float(direction.of(trace.position_embedding[0, at])),
        heads=direction.of(torch.stack(heads)),
        attn_biases=direction.of(torch.stack(biases)),
        mlps=direction.of(torch.stack([layer.mlp[row, at] for layer in trace.layers])),
        final_bias=direction.bias,
    )


class _Direction:
    """The way in the residual stream that leads to a token, past the final layer norm."""

    def __init__(self, model: GPT2, stream: Tensor, token: int) -> None:
        head = model.wte if model.config.tie_word_embeddings else model.lm_head
        self._dtype = torch.promote_types(stream.dtype, torch.float32)
        unembedding, norm = head.weight[token].to(self._dtype), model.ln_f
        variance = stream.to(self._dtype).var(unbiased=False)
        weight = norm.weight.to(self._dtype) * unembedding
        self._weight = weight / (variance + norm.eps).sqrt()  # (C)
        self.bias = float(norm.bias.to(self._dtype) @ unembedding)

    def of(self, x: Tensor) -> Tensor:
        """How far parts of the stream (..., C) lead there: (...)."""
        x = x.to(self._dtype)
        return (x - x.mean(-1, keepdim=True)) @ self._weight


def _head_writes(model: GPT2, trace: Trace, n: int, row: int, at: int) -> tuple[Tensor, Tensor]:
    """What each head of layer n wrote at a token, (H, C), and what the bias did, (C)."""
    layer, c_proj = trace.layers[n], attention_of(model, n).c_proj
    v = layer.v[row, :, : at + 1]  # (H, S, D)
    y = layer.probs_at(row, at)[:, None].to(v.dtype) @ v  # (H, 1, D)
    with evaluation_mode(model):
        bias = c_proj(y.new_zeros(model.config.n_embd))
        alone = torch.block_diag(*y)  # (H, C), in each row one head, where it lies beside others
        return c_proj(alone) - bias, bias


def previous_token_scores(trace: Trace) -> Tensor:
    """How much each head attends to the token before, on average over all but the first: (L, H);
    NaN for texts of one token.
    """
    return torch.stack(
        [layer.probs.diagonal(-1, 2, 3).float().mean((0, 2)) for layer in trace.layers]
    )


def induction_scores(trace: Trace) -> Tensor:
    """How much each head attends to what came after earlier occurrences of the token it is at,
    on average over the tokens that have such: (L, H); NaN where no token has.

    Near 1 for a head that goes on as the text went on before: Olsson et al. 2022,
    arXiv:2209.11895. Measure it on random tokens that are repeated once, where nothing else helps.
    """
    follows = _after_same(trace.idx)  # (B, T, T)
    asked = follows.any(-1)
    count = int(asked.sum())
    if not count:
        n_head = trace.layers[0].q.shape[1]
        return torch.full((len(trace.layers), n_head), math.nan)
    return torch.stack(
        [
            torch.where(follows[:, None], layer.probs, 0).float().sum((0, 2, 3)) / count
            for layer in trace.layers
        ]
    )


def _after_same(idx: Tensor) -> Tensor:
    """Whether the token before place s is that at place t, and earlier: (B, T, T) for t, s."""
    same = idx[:, :, None] == idx[:, None, :]  # (B, T, T)
    after = same.new_zeros(same.shape)
    after[:, :, 1:] = same[:, :, :-1]
    return after.tril()


def _position(trace: Trace, position: int) -> int:
    n_tokens = trace.idx.shape[1]
    if not -n_tokens <= position < n_tokens:
        raise refuse("position", position, f"from {-n_tokens} to {n_tokens - 1}")
    return position % n_tokens
