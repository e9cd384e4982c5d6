"""Keys and values that generation keeps, so that each new token is computed alone."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens seen so far, one (B, H_kv, T, head_dim) pair per layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def num_tokens(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values and return all of the layer's."""
        if layer == len(self.layers):
            # views of a buffer that holds the queries too
            own = (part.clone(memory_format=torch.contiguous_format) for part in (key, value))
            self.layers.append((next(own), next(own)))
        else:
            old_key, old_value = self.layers[layer]
            self.layers[layer] = (
                torch.cat((old_key, key), dim=2),
                torch.cat((old_value, value), dim=2),
            )
        return self.layers[layer]
