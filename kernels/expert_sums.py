"""Add up what the experts of a token computed, each row times its weight, on the GPU.

    y[m] = start[m] + sum_j weights[m, j] rows[places[m, j]]        j = 0 .. k - 1, in this order

    rows     | expert 0 | expert 1 | ...         sorted by expert: a token's rows lie anywhere
    places   | 2 0 | 1 7 | ...                   k of each token

Forward, weights are the router's; backward, the rows are gradients of one input, without weights,
and the router's part is where the sum starts. M tokens of D values in S bytes move (k + 1) S M D
bytes, 4 M D more with a start, and cost 2 k FLOPs a value: memory bandwidth is the limit. Torch
would write each of the k terms. The sum is in float32, its terms and its steps rounded each by
itself, and rounded once more in the end: the result equals the reference bit for bit.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_is,
    check_is_contiguous,
    check_one_device,
    check_rows_are_contiguous,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, launch

NUM_WARPS = 4
# the widest access of a thread
VECTOR_BYTES = 16


def expert_sums_reference(
    rows: Tensor,  # (R, D)
    places: Tensor,  # (M, k)
    weights: Tensor | None = None,  # (M, k)
    start: Tensor | None = None,  # (M, D)
) -> Tensor:  # (M, D), rows' dtype
    """Add up in float32, one expert of each token after the other."""
    total = rows.new_zeros(places.shape[0], rows.shape[1], dtype=torch.float32)
    if start is not None:
        total += start
    for j, place in enumerate(places.unbind(1)):
        term = rows[place].float()
        total += term if weights is None else term * weights[:, j : j + 1]
    return total.to(rows.dtype)


@triton.jit
def _expert_sums_kernel(
    y_ptr,  # (M, D), contiguous
    rows_ptr,  # (R, D)
    places_ptr,  # (M, NUM_TERMS)
    weights_ptr,  # (M, NUM_TERMS)
    start_ptr,  # (M, D), contiguous
    D,
    programs_per_row,
    stride_rows,
    NUM_TERMS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_START: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # one program computes CHUNK values of one token
    token = (tl.program_id(0) // programs_per_row).to(tl.int64)
    offs = tl.program_id(0) % programs_per_row * CHUNK + tl.arange(0, CHUNK)
    mask = offs < D
    acc = tl.zeros((CHUNK,), tl.float32)
    if HAS_START:
        acc += tl.load(start_ptr + token * D + offs, mask=mask, other=0.0)
    for j in tl.static_range(NUM_TERMS):
        place = tl.load(places_ptr + token * NUM_TERMS + j)
        term = tl.load(rows_ptr + place * stride_rows + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            term *= tl.load(weights_ptr + token * NUM_TERMS + j)
        acc += term
    tl.store(y_ptr + token * D + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def _launch_expert_sums(
    rows: Tensor,  # (R, D)
    places: Tensor,  # (M, k) int64
    weights: Tensor | None = None,  # (M, k) float32
    start: Tensor | None = None,  # (M, D) float32
) -> Tensor:  # (M, D)
    (M, num_terms), D = places.shape, rows.shape[1]
    y = torch.empty((M, D), dtype=rows.dtype, device=rows.device)
    vector = VECTOR_BYTES // rows.element_size()
    # values that are loaded one by one take a register each, of every term
    chunk = 32 * NUM_WARPS * (vector if D % vector == 0 else 2)
    programs_per_row = cdiv(D, chunk)
    if y.numel() > 0:
        launch(
            _expert_sums_kernel,
            (M * programs_per_row,),
            y_ptr=y,
            rows_ptr=rows,
            places_ptr=places,
            # one that is not there is not read
            weights_ptr=rows if weights is None else weights,
            start_ptr=rows if start is None else start,
            D=D,
            programs_per_row=programs_per_row,
            stride_rows=rows.stride(0),
            NUM_TERMS=num_terms,
            HAS_WEIGHTS=weights is not None,
            HAS_START=start is not None,
            CHUNK=chunk,
            num_warps=NUM_WARPS,
            # the product and the sum round apart, as torch's do: the reference bit for bit
            enable_fp_fusion=False,
        )
    return y


def expert_sums(
    rows: Tensor,  # (R, D), rows of any stride
    places: Tensor,  # (M, k) int64, of each token's rows
    weights: Tensor | None = None,  # (M, k) float32
    start: Tensor | None = None,  # (M, D) float32
) -> Tensor:  # (M, D), rows' dtype
    """Add up the rows of each token, each times its weight.

        y[m] = start[m] + sum_j weights[m, j] rows[places[m, j]]

    Args:
        places: from 0 to R - 1; their values are not looked at, which would wait for the device.
        weights: None: all are one.
        start: None: zero.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    check_dtype("rows", rows.dtype)
    if rows.dim() != 2 or places.dim() != 2:
        raise ValueError(
            f"rows and places must be matrices: got shapes {tuple(rows.shape)} and "
            f"{tuple(places.shape)}"
        )
    check_rows_are_contiguous("rows", rows)
    given = {"places": (places, torch.int64, tuple(places.shape))}
    if weights is not None:
        given["weights"] = (weights, torch.float32, tuple(places.shape))
    if start is not None:
        given["start"] = (start, torch.float32, (places.shape[0], rows.shape[1]))
    for name, (tensor, dtype, shape) in given.items():
        check_is(name, tensor, dtype, shape)
        check_is_contiguous(name, tensor)
    check_one_device({"rows": rows} | {name: tensor for name, (tensor, _, _) in given.items()})
    if rows.device.type == "cpu":
        return expert_sums_reference(rows, places, weights, start)
    return _launch_expert_sums(rows, places, weights, start)
