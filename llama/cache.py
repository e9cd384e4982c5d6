"""Keys and values that generation keeps, so that each new token is computed alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from llama.config import LlamaConfig


class KeyValueCache:
    """Room for the keys and values of some sequences, each of up to `capacity` tokens.

    Attributes:
        keys: of each layer, (B, H_kv, capacity, head_dim) by its own heads; the tokens of a
            sequence from row 0 on.
        values: as keys.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate; what was not stored yet is undefined."""
        self.num_sequences, self.capacity = num_sequences, capacity
        shapes = [
            (num_sequences, heads.num_key_value_heads, capacity, heads.head_dim)
            for heads in map(config.heads, range(config.num_hidden_layers))
        ]
        self.keys, self.values = (
            [torch.empty(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(2)
        )

    @staticmethod
    def num_bytes(
        config: LlamaConfig, num_sequences: int, capacity: int, dtype: torch.dtype
    ) -> int:
        """Count what a cache takes."""
        layers = map(config.heads, range(config.num_hidden_layers))
        values = 2 * sum(heads.num_key_value_heads * heads.head_dim for heads in layers)
        return values * num_sequences * capacity * dtype.itemsize


class Slot(NamedTuple):
    """The place of one sequence in a cache."""

    cache: KeyValueCache
    sequence: Tensor  # (1,) int64

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:  # (1, H_kv, T, head_dim)
        """Keep what a layer computed for the first tokens of the sequence, as many as there is
        room for."""
        T = min(key.shape[2], self.cache.capacity)
        for rows, part in ((self.cache.keys[layer], key), (self.cache.values[layer], value)):
            rows[:, :, :T].index_copy_(0, self.sequence, part[:, :, :T])
