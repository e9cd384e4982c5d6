"""Rows that a linear group multiplies."""

from typing import NamedTuple

from torch import Tensor

from kernels.rotation import EightBitRows


class Rows(NamedTuple):
    """An input in the dtype of the passes, with a tail behind its columns, and in 8 bits."""

    ext: Tensor  # (M, K + T)
    # where base products read it; None: they do not, or the group has to quantize the first K
    # columns itself
    in_8_bits: EightBitRows | None = None  # (M, K)
