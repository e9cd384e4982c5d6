"""Apply an NF4 weight, its bias and its low-rank updates to a few rows, in one launch.

    y = x W^T + bias + h B^T             h = x A^T, which the launch before has computed

`nf4_matmul_fused.py` has the kernel. What an update adds costs 2 M N R FLOPs and N R values of B.
"""

import torch
from torch import Tensor

from kernels.checks import check_dtype, check_is, check_is_contiguous, check_one_device
from kernels.device import properties
from kernels.low_rank import LowRank, add_low_rank_reference
from kernels.nf4_matmul_fused import _launch_nf4_matmul_fused, fused_obstacle
from nf4.weight import NF4Weight, dequantize

# a pass over more rows is faster with the weight expanded
MAX_ROWS = 32


def token_linear_reference(
    x: Tensor,  # (M, K)
    weight: NF4Weight,  # (N, K)
    bias: Tensor | None,  # (N,)
    h: Tensor | None,  # (M, P)
    low_rank: LowRank | None,
) -> Tensor:  # (M, N)
    """Multiply by the expanded weight, add in float32, round once."""
    y = x.float() @ dequantize(weight, x.dtype).float().T
    if h is not None and low_rank is not None:
        y = add_low_rank_reference(y, h, low_rank, weight.rows)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def token_linear_obstacle(weight: NF4Weight, dtype: torch.dtype, num_rows: int) -> str:
    """Say what keeps a weight on a GPU from this product; an empty string if nothing does."""
    if num_rows > MAX_ROWS:
        return f"there are {num_rows} rows; it wins up to {MAX_ROWS}"
    return fused_obstacle(weight, dtype, properties(weight.device).capability)


def token_linear(
    x: Tensor,  # (M, K)
    weight: NF4Weight,  # (N, K)
    bias: Tensor | None,  # (N,)
    h: Tensor | None,  # (M, P)
    low_rank: LowRank | None,
) -> Tensor:  # (M, N), x's dtype
    """Apply a weight with its bias and its updates.

        y = x W^T + bias + h B^T

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or something keeps the weight from it.
    """
    check_dtype("x", x.dtype)
    M, (N, K) = x.shape[0], weight.shape
    check_is("x", x, x.dtype, (M, K))
    given = {"x": x, "the weight": weight.packed}
    if bias is not None:
        check_is("the bias", bias, bias.dtype, (N,))
        given["the bias"] = bias
    if low_rank is not None:
        if h is None:
            raise ValueError("an update needs h: got none")
        check_is("h", h, x.dtype, (M, low_rank.A.shape[0]))
        check_is("B", low_rank.B, x.dtype, (N, low_rank.B.shape[1]))
        given |= {"h": h, "B": low_rank.B}
    for name, tensor in given.items():
        check_is_contiguous(name, tensor)
    check_one_device(given)
    if x.device.type == "cpu":
        return token_linear_reference(x, weight, bias, h, low_rank)
    obstacle = token_linear_obstacle(weight, x.dtype, M)
    if obstacle:
        raise ValueError(f"the weight must fit: {obstacle}")
    return _launch_nf4_matmul_fused(x, weight, bias, h, low_rank)
