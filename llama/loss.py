"""Cross-entropy of the head's logits without ever holding them all.

The logits of 8,192 tokens over a vocabulary of 128,256 take 2 GiB in bfloat16 and 4 GiB in float32,
and their gradient as much again. The head is frozen, so the gradient with respect to the hidden
states is all that is needed, and it can be formed chunk by chunk while the logits are at hand: one
product for the logits, one for the gradient, nothing computed again. One chunk of logits is held at
a time. Its gradient overwrites it, and the gradient of the hidden states overwrites the hidden
states. Rows without a label never reach the head.

What is left out: autograd. The training step asks for loss and gradient at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy, cross_entropy_

# logits held at once
LOGITS_BYTES = 128 << 20
# rows of a tile of the products; chunks are whole tiles where that leaves any
TILE_ROWS = 128
# values on which each row of the logits starts, so that a vocabulary of any size is read in vectors
ROW_ALIGNMENT = 16


def chunk_rows(vocab_size: int, dtype: torch.dtype, num_rows: int) -> int:
    """Count the rows whose logits are held at once: LOGITS_BYTES of them, but at least one row."""
    rows = LOGITS_BYTES // (_row_width(vocab_size) * dtype.itemsize)
    if rows > TILE_ROWS:
        rows -= rows % TILE_ROWS
    return max(1, min(rows, num_rows))


def _row_width(vocab_size: int) -> int:
    return -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _chunks(
    hidden: Tensor,  # (M, D)
    head: Tensor,  # (V, D), hidden's dtype
    targets: Tensor,  # (M,)
    scale: float | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows of hidden, their logits and their targets; the next logits overwrite these."""
    M, V = hidden.shape[0], head.shape[0]
    num_rows = chunk_rows(V, hidden.dtype, M)
    buffer = torch.empty((num_rows, _row_width(V)), dtype=hidden.dtype, device=hidden.device)
    for rows, some_targets in zip(hidden.split(num_rows), targets.split(num_rows), strict=True):
        logits = buffer[: rows.shape[0], :V]
        # the product's own factor costs nothing
        alpha = 1.0 if scale is None else scale
        torch.addmm(logits, rows, head.T, beta=0, alpha=alpha, out=logits)
        yield rows, logits, some_targets


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices of one dtype without rounding the result to it."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    if a.device.type == "meta":
        # torch 2.9 does not know the product there
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32)


def _check(hidden: Tensor, head: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            "hidden and head must be matrices with rows of one length: "
            f"got shapes {tuple(hidden.shape)} and {tuple(head.shape)}"
        )
    if hidden.dtype != head.dtype:
        raise ValueError(
            f"hidden and head must share a dtype: got {hidden.dtype} and {head.dtype}; a copy of "
            "the head would take as much memory again"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            "targets must be one for each row of hidden: "
            f"got shapes {tuple(targets.shape)} and {tuple(hidden.shape)}"
        )
    if not hidden.device == head.device == targets.device:
        raise ValueError(
            "hidden, head and targets must be on one device: "
            f"got {hidden.device}, {head.device} and {targets.device}"
        )
    if hidden.stride(1) != 1 and hidden.shape[1] > 1:
        raise ValueError(f"hidden must have contiguous rows: got strides {hidden.stride()}")


@torch.no_grad()
def linear_cross_entropy(
    hidden: Tensor,  # (M, D), only rows that have a target; rows of any stride
    head: Tensor,  # (V, D), hidden's dtype
    targets: Tensor,  # (M,) int64
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:  # () float32, summed over the rows
    """Sum the cross-entropy of softmax(scale hidden head^T) at the targets, without a gradient.

        z    = scale hidden head^T                    one chunk of rows at a time
        loss = sum_i logsumexp(z_i) - z_i[target_i]

    The product is in hidden's dtype, everything after it in float32.

    Args:
        scale: of the logits; None: 1.
        cap: of the logits, softcap(z) taking z's place; None: they are not capped.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    _check(hidden, head, targets)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for _, logits, some_targets in _chunks(hidden, head, targets, scale):
        loss += cross_entropy(logits, some_targets, cap).sum()
    return loss


@torch.no_grad()
def linear_cross_entropy_with_gradient(
    hidden: Tensor,  # (M, D), only rows that have a target; rows of any stride
    head: Tensor,  # (V, D), hidden's dtype; frozen
    targets: Tensor,  # (M,) int64
    factor: Tensor,  # () float32
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # () float32, summed over the rows; (M, D), hidden's dtype
    """Sum the cross-entropy as `linear_cross_entropy` does, and compute its gradient.

        z           = scale hidden head^T             one chunk of rows at a time
        loss        = sum_i logsumexp(z_i) - z_i[target_i]
        grad_hidden = factor scale (softmax(z) - onehot(targets)) head

    Both products are of matrices in hidden's dtype; the second one's result is float32, and rounded
    once, after the factor: a loss scale over a number of tokens, which float16 might not hold.

    Args:
        hidden: consumed; the gradient is written over it, and returned.
        factor: of the gradient, on hidden's device; not of the loss.
        scale: of the logits; None: 1.
        cap: of the logits, softcap(z) taking z's place; None: they are not capped.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    _check(hidden, head, targets)
    if factor.shape != () or factor.dtype != torch.float32 or factor.device != hidden.device:
        raise ValueError(
            "the factor must be one float32 on hidden's device: "
            f"got {factor.dtype} {tuple(factor.shape)} on {factor.device}, not {hidden.device}"
        )
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    if scale is not None:
        factor = scale * factor
    for rows, logits, some_targets in _chunks(hidden, head, targets, scale):
        loss += cross_entropy_(logits, some_targets, cap).sum()
        torch.mul(_product_in_float32(logits, head), factor, out=rows)
    return loss, hidden
