"""The norms of the model, each with its weight: what `kernels/rms_norm.py` computes, as a module.

Where a family multiplies by m what a layer adds to the residual stream (Granite), the stream is
kept divided by m, and additions stay what they are in other families. Norms hardly see that:

    r2 = r1 + m delta           r2 / m = r1 / m + delta
    norm(r; eps)  =  norm(r / m; eps / m^2)

So the multiplier is in two constants: the scale of embeddings, and eps of the stream's norms.
"""

import torch
from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from kernels.rms_norm_backward import rms_norm_backward
from kernels.rotation import EightBitRows
from kernels.rows_8bit import quantize_rows
from llama.config import LlamaConfig


class RMSNorm(nn.Module):
    """A root mean square normalization (Zhang and Sennrich 2019) and its weight.

        y = (weight + offset) r / sqrt(mean(r^2) + eps)

    Where r is centred before, it is layer normalization without a bias (Ba et al. 2016). In
    float32, rounded once. transformers rounds r / sqrt(...) first, so in 16 bits it differs by up
    to one rounding.
    """

    weight: Tensor

    def __init__(
        self, width: int, config: LlamaConfig, divisor: float = 1.0, has_weight: bool = True
    ) -> None:
        """Leave the weight to be loaded.

        Args:
            divisor: what the rows to normalize are kept divided by.
            has_weight: False: the weights are ones, and no tensor of a checkpoint.
        """
        super().__init__()
        self.eps = config.rms_norm_eps / divisor**2
        self.offset = config.norm_offset if has_weight else 0.0
        if has_weight:
            self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        else:
            # on the CPU, so that a model built on the meta device has them too
            self.register_buffer("weight", torch.ones(width, device="cpu"), persistent=False)
        self.is_centred = config.has_centred_norms

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        in_8_bits: EightBitRows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D), rstd (M,) float32
        """Normalize r = x + residual as `kernels.rms_norm.rms_norm` does."""
        kind = (self.offset, self.is_centred)
        return rms_norm(x, self.weight, self.eps, residual, out, *kind, in_8_bits)

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
        kind = (self.offset, self.is_centred)
        return rms_norm_backward(grad_y, grad_r, r, rstd, self.weight, out, y, *kind)


class NoNorm:
    """What stands before a half of a layer where a family has no norm there: y = r."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        in_8_bits: EightBitRows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D), rstd (0,) float32
        """Add as `RMSNorm.forward` does."""
        r = x if residual is None else x + residual
        y = r if out is None else out.copy_(r)
        if in_8_bits is not None:
            quantize_rows(y, in_8_bits)
        return y, r, x.new_empty(0, dtype=torch.float32)

    def backward(
        self,
        grad_y: Tensor,  # (M, D)
        grad_r: Tensor,  # (M, D)
        r: Tensor,  # (M, D)
        rstd: Tensor,  # (0,)
        out: Tensor,  # (M, D)
        y: Tensor,  # (M, D)
    ) -> Tensor:  # (M, D)
        """Add the gradients up, and write y again, as `RMSNorm.backward` does."""
        torch.add(grad_y, grad_r, out=out)
        y.copy_(r)
        return out


def stream_norm(config: LlamaConfig) -> RMSNorm:
    """Make a norm of the residual stream."""
    return RMSNorm(config.hidden_size, config, config.residual_multiplier or 1.0)
