"""Keys and values of the tokens so far: a new token costs the work of one position, not of all.

A cache belongs to whoever made it (`model.make_cache`), never to the model: two texts can share one
model. It knows rows, slots and lengths, nothing of tokens. Row b's token at position p lies in slot
p, and the vector `lengths` alone decides where the next tokens go, which position they get and what
they may look at. So a first prompt, a single new token, rows of different length and the check of
several draft tokens are all the same call. No gradient flows through a cache: use it for decoding,
not for training.

Letters: B rows, T tokens in this call, S slots in use, H heads, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


class LayerCache(NamedTuple):
    """One layer's slots, opened for one call: what attention sees of the cache."""

    keys: Tensor  # (B, H, capacity, D)
    values: Tensor  # (B, H, capacity, D)
    positions: Tensor  # (B, T): the slot of each new token
    n_slots: int  # S: slots in use once they are written

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new k, v (B, H, T, D) and return those of all positions so far, (B, H, S,
        D).
        """
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        # an index on either side of a slice puts the indexed axes first: (B, T, H, D)
        self.keys[rows, :, self.positions] = k.detach().transpose(1, 2).to(self.keys.dtype)
        self.values[rows, :, self.positions] = v.detach().transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, : self.n_slots], self.values[:, :, : self.n_slots]


class KVCache:
    """Slots for `capacity` tokens in each of B rows, of which the first `lengths[b]` are filled.

    keys and values are (L, B, H, capacity, D) on the model's device and in its dtype; lengths is
    (B,) int64 and stays on the CPU, so that asking for it never waits for the device.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths

    @classmethod
    def empty(
        cls,
        *,
        n_layer: int,
        batch_size: int,
        n_head: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """A cache of empty rows."""
        shape = (n_layer, batch_size, n_head, capacity, head_size)
        # zeros, not empty: masked slots weigh 0, but 0 times an accidental NaN would be NaN
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, torch.zeros(batch_size, dtype=torch.int64))

    @property
    def capacity(self) -> int:
        """Tokens that fit into a row."""
        return self.keys.shape[3]

    def positions(self, n_tokens: int) -> Tensor:
        """Positions (B, T) of the next T tokens of each row.

        Raises InputError when the longest row has no room for them.
        """
        longest = int(self.lengths.max())
        if longest + n_tokens > self.capacity:
            raise InputError(
                f"the cache holds {self.capacity} tokens a row and {longest} are there: "
                f"{n_tokens} more do not fit; make a larger cache or truncate this one"
            )
        positions = self.lengths[:, None] + torch.arange(n_tokens)
        return positions.to(self.keys.device)

    def mask(self, positions: Tensor) -> Tensor | None:
        """Which slots each new token may look at: itself and those before it, (B, 1, T, S), True is
        visible.

        None for the two cases that attention knows by itself and computes faster without: the
        prefill of empty rows (T = S, causal), and a decode step of one token in rows of equal
        length (all is visible).
        """
        longest, n_tokens = int(self.lengths.max()), positions.shape[1]
        if longest == 0 or (n_tokens == 1 and int(self.lengths.min()) == longest):
            return None
        slots = torch.arange(self._slots_after(positions), device=positions.device)
        return slots <= positions[:, None, :, None]

    def layers(self, positions: Tensor) -> list[LayerCache]:
        """Every layer's slots, opened for tokens at these positions (B, T)."""
        n_slots = self._slots_after(positions)
        pairs = zip(self.keys.unbind(), self.values.unbind())
        return [LayerCache(keys, values, positions, n_slots) for keys, values in pairs]

    def all_slots(self, positions: Tensor) -> tuple[Tensor, list[LayerCache]]:
        """The mask (B, 1, T, capacity) and every layer's slots, whether in use or not: shapes that
        stay the same while the text grows, and nothing that has to be known on the CPU.
        """
        mask = torch.arange(self.capacity, device=positions.device) <= positions[:, None, :, None]
        pairs = ((self.keys[i], self.values[i]) for i in range(self.keys.shape[0]))
        return mask, [LayerCache(*pair, positions, self.capacity) for pair in pairs]

    def advance(self, n_tokens: int) -> None:
        """Count T more tokens in every row, once all layers have written them."""
        self.lengths += n_tokens  # in place: rows of this cache (`row`) see it too

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first lengths[b] tokens of row b: padding, or draft tokens that were
        not accepted.
        """
        shorter = torch.tensor(lengths, dtype=torch.int64)
        assert bool((shorter <= self.lengths).all()), "a cache can be shortened, not grown"
        self.lengths.copy_(shorter)

    def row(self, b: int) -> KVCache:
        """Row b alone, as a view: what is written to it is written here."""
        part = slice(b, b + 1)
        return KVCache(self.keys[:, part], self.values[:, part], self.lengths[part])

    def select(self, rows: Sequence[int]) -> KVCache:
        """A copy that holds these rows in this order; a row may be named several times."""
        index = torch.tensor(rows, dtype=torch.int64)
        on_device = index.to(self.keys.device)
        keys, values = self.keys.index_select(1, on_device), self.values.index_select(1, on_device)
        return KVCache(keys, values, self.lengths[index])

    def _slots_after(self, positions: Tensor) -> int:
        return int(self.lengths.max()) + positions.shape[1]
