"""What a new token costs, with a cache of keys and values and without one, in multiplications.

Counted as the model computes: what softmax, layer norms and activations take is left out, which
grows with the tokens and not with the weights.
"""

from __future__ import annotations

from ..model import GPT2Config


def multiplications(config: GPT2Config, n_new: int, n_cached: int = 0) -> dict[str, int]:
    """Multiplications of one forward pass of n_new tokens behind n_cached ones, by part, and with
    the scores of one next token.
    """
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    each = config.n_layer * n_new
    return {
        "queries, keys and values": each * 3 * width**2,
        "queries times keys": each * (n_cached + n_new) * width,
        "mixing of values": each * (n_cached + n_new) * width,
        "attention's output": each * width**2,
        "MLP": each * 2 * width * inner,
        "scores of the next token": config.vocab_size * width,
    }


def cached_numbers(config: GPT2Config, n_tokens: int) -> int:
    """How many numbers the cache of n_tokens holds: a key and a value in each layer."""
    return 2 * config.n_layer * config.n_embd * n_tokens
