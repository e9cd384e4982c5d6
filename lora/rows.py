"""Rows that a linear group multiplies."""

from typing import NamedTuple

from torch import Tensor

from kernels.fp8 import Fp8Rows


class Rows(NamedTuple):
    """An input in the dtype of the passes with a tail behind its columns, and the same in E4M3."""

    ext: Tensor  # (M, K + T)
    # where base products read it; None: they do not, or the group has to quantize the first K
    # columns itself
    fp8: Fp8Rows | None = None  # (M, K)
