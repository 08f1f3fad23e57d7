"""Texts that must never be written, however they are cut into tokens.

A token is banned when the bytes written so far, with its own behind them, would complete one of the
texts. For every way to cut a text in two that is: tokens that begin with its second half, where the
first half has just been written; and tokens that hold the whole of it, always. Knows bytes, and
nothing of models and tokenizers.

Letters: V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arguments import shown
from ..errors import InputError


class BannedTexts:
    """Which tokens (V of them, as bytes) must not come next."""

    def __init__(self, token_bytes: Sequence[bytes], texts: Sequence[str]) -> None:
        """Raises InputError for an empty text, and where no token would be left."""
        self._texts = [text.encode() for text in texts]
        self._tokens = token_bytes
        if not all(self._texts):
            raise InputError("a banned text is empty: give the text that must not be written")
        self._always = self._marked(lambda token: any(text in token for text in self._texts))
        if self._always.all():
            raise InputError(f"no token is left without {shown([*texts])}: ban less")
        self._beginning_with = functools.cache(self._beginning)

    def mask(self, tail: bytes) -> Tensor:
        """The banned tokens, (V,) bool, after `tail`, the bytes written so far or their end.

        Raises InputError where no token would be left.
        """
        mask = self._always
        for text in self._texts:
            for cut in range(1, len(text)):
                if tail.endswith(text[:cut]):
                    mask = mask | self._beginning_with(text[cut:])
        if mask.all():
            raise InputError(f"after {tail[-20:]!r} no token is left that is not banned: ban less")
        return mask

    def _beginning(self, rest: bytes) -> Tensor:
        return self._marked(lambda token: token.startswith(rest))

    def _marked(self, wanted: Callable[[bytes], bool]) -> Tensor:
        return torch.tensor([wanted(token) for token in self._tokens], dtype=torch.bool)
