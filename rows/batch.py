"""A batch: the one record that `data/` makes and that `llama/` and `step/` take.

Neither knows the other: data needs no model, and a model needs no tokenizer. So the record is
defined below both, as the only thing here. Hugging Face's collators return a dictionary with keys
of these names.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

# the label of a token that nothing is learned from, as in torch and Hugging Face
NO_LOSS = -100


@dataclass(frozen=True)
class Batch:
    """Rows of tokens on the CPU, padded on the right.

    Attributes:
        labels: of the same tokens, not yet shifted.
        positions: of every token in its sample, where rows hold several samples; each begins with
            a token at position 0, which has no label. None: one sample a row.
        lengths: of the sample that a token is of, 0 for padding; None if no noise is added to
            embeddings.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, NO_LOSS where nothing is to be predicted
    positions: Tensor | None = None  # (B, T) int64
    lengths: Tensor | None = None  # (B, T) int64

    def padded(self, num_tokens: int) -> "Batch":
        """Pad every row by so many tokens more.

        Padding has id 0, no label, position 0 and length 0. Attention is causal and padding comes
        last, so no real token sees it.
        """

        def pad(tensor: Tensor, value: int = 0) -> Tensor:
            return F.pad(tensor, (0, num_tokens), value=value)

        return Batch(
            pad(self.input_ids),
            pad(self.labels, NO_LOSS),
            None if self.positions is None else pad(self.positions),
            None if self.lengths is None else pad(self.lengths),
        )
