"""Products of rows that are sorted by expert, each with its expert's matrix.

y[r] = W_e x[r]        offsets[e] <= r < offsets[e + 1]

R rows of sorted tokens, E experts, C of them expanded, N rows and K columns of an expert
"""

import torch
from torch import Tensor


def grouped_matmul(
    x: Tensor,  # (R, K), sorted by expert
    W: Tensor,  # (C, N, K), of the experts from `first_expert` on
    offsets: Tensor,  # (E + 1,) int32, where each expert's rows begin
    out: Tensor | None = None,  # (R, N)
    first_expert: int = 0,
) -> Tensor:  # (R, N)
    """Multiply the rows of some experts by their matrices, transposed; the other rows of `out` stay
    as they are."""
    y = x.new_empty(x.shape[0], W.shape[1]) if out is None else out
    return _multiply(x, W.mT, offsets, y, first_expert)


def grouped_matmul_backward_input(
    grad: Tensor,  # (R, N), sorted by expert
    W: Tensor,  # (C, N, K)
    offsets: Tensor,  # (E + 1,) int32
    out: Tensor | None = None,  # (R, K)
    first_expert: int = 0,
) -> Tensor:  # (R, K)
    """Multiply the rows of some experts by their matrices; the other rows of `out` stay."""
    grad_x = grad.new_empty(grad.shape[0], W.shape[2]) if out is None else out
    return _multiply(grad, W, offsets, grad_x, first_expert)


def _multiply(x: Tensor, W: Tensor, offsets: Tensor, out: Tensor, first_expert: int) -> Tensor:
    if x.device.type == "meta":
        return out
    if x.device.type != "cpu":
        raise RuntimeError(f"grouped products must be on the CPU: got {x.device}")
    bounds = offsets[first_expert : first_expert + len(W) + 1].tolist()
    for matrix, start, stop in zip(W, bounds, bounds[1:], strict=False):
        torch.mm(x[start:stop], matrix, out=out[start:stop])
    return out
