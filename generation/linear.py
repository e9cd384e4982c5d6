"""A linear group as a pass over one token a sequence applies it: to few rows, again and again."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.low_rank import low_rank_of
from kernels.nf4_dequantize import nf4_dequantize
from kernels.token_linear import token_linear, token_linear_obstacle
from lora.linear_group import LinearGroup
from nf4.weight import NF4Weight


class TokenLinear:
    """A linear group with its low-rank updates rounded once.

        y = x W^T + bias + h B^T             h = x A^T, which whoever makes x computes as well

    On a GPU the product decodes the packed weight, where `token_linear` takes it; otherwise the
    weight is expanded for each token. On a CPU it is expanded once, and takes that memory.
    """

    def __init__(self, group: LinearGroup, dtype: torch.dtype, num_rows: int) -> None:
        """Round the updates, which are those of now.

        Args:
            num_rows: of the x to come.
        """
        self._group, self._low_rank = group, None
        if group.lora_A is not None and group.lora_B is not None:
            A, B = group.lora_A.detach(), group.lora_B.detach()
            self._low_rank = low_rank_of(A, B, group.updates, group.rows, dtype)
        weight, self._packed, self._dense = group.weight, None, None
        if isinstance(weight, Tensor):
            self._dense = weight.to(dtype)
        elif weight.device.type == "cpu":
            self._dense = nf4_dequantize(weight, dtype)
        elif not token_linear_obstacle(weight, dtype, num_rows):
            self._packed = weight

    @property
    def A(self) -> Tensor | None:  # (P, K)
        """What x is multiplied by for h; None without updates."""
        return None if self._low_rank is None else self._low_rank.A

    def __call__(self, x: Tensor, h: Tensor | None) -> Tensor:  # (M, K), (M, P) -> (M, N)
        """Apply all members to x."""
        group, low_rank = self._group, self._low_rank
        if self._packed is not None:
            return token_linear(x, self._packed, group.bias, h, low_rank)
        dense = self._dense
        if dense is None:
            assert isinstance(group.weight, NF4Weight)
            dense = nf4_dequantize(group.weight, x.dtype)
        y = F.linear(x, dense, None if group.bias is None else group.bias.to(x.dtype))
        if low_rank is not None:
            assert h is not None
            for update in group.updates:
                y[:, update.y].addmm_(h[:, update.A], low_rank.B[update.y].T)
        return y
