"""The norms of a layer, each with its weight: what `kernels/rms_norm.py` computes, as a module."""

import torch
from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from kernels.rms_norm_backward import rms_norm_backward
from llama.config import LlamaConfig


class RMSNorm(nn.Module):
    """A root mean square normalization (Zhang and Sennrich 2019) and its weight.

        y = (weight + offset) r / sqrt(mean(r^2) + eps)

    In float32, rounded once. transformers rounds r / sqrt(...) first, so in 16 bits it differs by
    up to one rounding.
    """

    def __init__(self, width: int, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D), rstd (M,) float32
        """Normalize r = x + residual as `kernels.rms_norm.rms_norm` does."""
        return rms_norm(x, self.weight, self.eps, residual, out, self.offset)

    def backward(
        self,
        grad_y: Tensor,  # (M, D)
        grad_r: Tensor | None,  # (M, D)
        r: Tensor,  # (M, D)
        rstd: Tensor,  # (M,) float32
        out: Tensor | None = None,  # (M, D)
        y: Tensor | None = None,  # (M, D)
    ) -> Tensor:  # (M, D)
        """Compute r's gradient as `kernels.rms_norm.rms_norm_backward` does."""
        return rms_norm_backward(grad_y, grad_r, r, rstd, self.weight, out, y, self.offset)
