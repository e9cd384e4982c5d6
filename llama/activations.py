"""What the layers of one pass share, and what each keeps of its forward pass: the records of
`llama/layer.py`, which has the names in its equations."""

from typing import NamedTuple

from torch import Tensor

from kernels.masked_attention_mask import Samples
from kernels.rope_tables import RopeTables
from llama.attention import Mixed
from llama.balance import Balance
from llama.experts import Routed


class Shared(NamedTuple):
    """What all layers of one pass share."""

    positions: Tensor  # (B, T), rows of the tables
    tables: list[RopeTables]  # of each of the config's distinct turns
    dropout_seed: Tensor | None = None  # (1,) int64, needed where a group drops
    samples: Samples | None = None  # where rows hold several
    balance: Balance | None = None  # where there is an auxiliary loss


class Activations(Routed):
    """What a layer's backward pass needs; the forward pass sets each as soon as it is computed.

    Of a linear group's input only h is kept, what the low-rank updates make of the input. A layer
    that is computed again keeps r1 and h_down alone.
    """

    r1: Tensor  # (M, D), the residual stream at the norm before attention
    rstd1: Tensor  # (M,) float32; empty without a norm there
    # queries, keys and values before their norms, in rows of the norms' width, and rstd; empty
    # without such norms
    heads: list[tuple[Tensor, Tensor]]
    mixed: Mixed
    h_o: Tensor  # (M, tail)
    # o's output before the norm behind it, (M, D), and rstd; None without such a norm
    output_o: tuple[Tensor, Tensor] | None = None
    h_qkv: Tensor  # (M, tail)
    # the residual stream at the norm before the MLP, (M, D), and its rstd; unset where the MLP has
    # attention's input
    r2: Tensor
    rstd2: Tensor
    output_down: tuple[Tensor, Tensor] | None = None  # as output_o
