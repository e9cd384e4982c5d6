"""Take the rows of tokens to their experts and back, on the GPU.

    rows[places[m, j]]  = x[m]                                          gather
    y[m]                = start[m] + sum_j weights[m, j] rows[places[m, j]]     combine
    grad_weights[m, j]  = grad[places[m, j]] . rows[places[m, j]]       the backward pass of weights
    grad[places[m, j]] *= weights[m, j]                                 and of rows

    token m, its k experts        m 0 | m 1 | m 2 | ...         places (M, k): a row of each pair
    rows, sorted by expert        . m1 . | m0 m2 | . m0 | ...   R = M k, each the row of one pair

The gradient of `gather` is `combine` without weights. Of the weighted sum, the gradient of a row is
that of its token times the weight, and the gradient of a weight the product of its row and that of
the token: `gather` brings the tokens' gradients to the rows first, or the products of experts do,
which the gradient may have passed in between.

A program computes one token, so that a token's row is read or written once: S D (M + R) bytes of S
a value, or 3 S D R for the gradients. Sums are in float32, in the order of the token's experts and
without atomic additions, and are rounded once: equal runs give equal bits.
"""

# triton's annotations know neither static_range nor that tensors have numbers' operators
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_is,
    check_is_contiguous,
    check_like,
    check_not_recorded,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.language import tl, triton
from kernels.launch import launch

# columns that a program handles at a time: 16 bytes a thread in 16 bits
BLOCK = 1024
NUM_WARPS = 4


def gather_expert_rows_reference(x: Tensor, places: Tensor) -> Tensor:
    """Copy the row of each token to its places."""
    rows = x.new_empty(places.numel(), x.shape[1])
    for column in places.unbind(1):
        rows[column] = x
    return rows


def combine_expert_rows_reference(
    rows: Tensor, places: Tensor, weights: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """Add in the order of the token's experts, in float32."""
    total = torch.zeros(len(places), rows.shape[1], device=rows.device) if start is None else start
    for j, column in enumerate(places.unbind(1)):
        part = rows[column].float()
        total = total + (part if weights is None else part * weights[:, j : j + 1])
    return total.to(rows.dtype)


def weigh_expert_rows_backward_reference(
    grad: Tensor, rows: Tensor, places: Tensor, weights: Tensor
) -> Tensor:
    """Compute the gradient of the weights, and weigh that of the rows in place."""
    products = (grad.float() * rows.float()).sum(1)[places]
    weighted = grad[places].float() * weights[:, :, None]
    grad[places.flatten()] = weighted.flatten(0, 1).to(grad.dtype)
    return products


@triton.jit
def _gather_expert_rows_kernel(
    rows_ptr,  # (R, D), contiguous
    x_ptr,  # (M, D)
    places_ptr,  # (M, NUM_CHOSEN)
    D,
    stride_xm,
    NUM_CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program copies one token's row to its places
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * stride_xm
    places_ptr += token * NUM_CHOSEN
    for column in range(0, D, BLOCK):
        offs = column + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < D)
        for j in tl.static_range(NUM_CHOSEN):
            place = tl.load(places_ptr + j).to(tl.int64)
            tl.store(rows_ptr + place * D + offs, x, mask=offs < D)


@triton.jit
def _combine_expert_rows_kernel(
    y_ptr,  # (M, D), contiguous
    rows_ptr,  # (R, D)
    places_ptr,  # (M, NUM_CHOSEN)
    weights_ptr,  # (M, NUM_CHOSEN), read where HAS_WEIGHTS
    start_ptr,  # (M, D) contiguous, read where HAS_START
    D,
    stride_rm,
    NUM_CHOSEN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program adds up the rows of one token
    token = tl.program_id(0).to(tl.int64)
    places_ptr += token * NUM_CHOSEN
    weights_ptr += token * NUM_CHOSEN
    for column in range(0, D, BLOCK):
        offs = column + tl.arange(0, BLOCK)
        if HAS_START:
            total = tl.load(start_ptr + token * D + offs, mask=offs < D, other=0.0)
        else:
            total = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(NUM_CHOSEN):
            place = tl.load(places_ptr + j).to(tl.int64)
            part = tl.load(rows_ptr + place * stride_rm + offs, mask=offs < D, other=0.0)
            part = part.to(tl.float32)
            if HAS_WEIGHTS:
                part *= tl.load(weights_ptr + j)
            total += part
        tl.store(y_ptr + token * D + offs, total.to(y_ptr.dtype.element_ty), mask=offs < D)


@triton.jit
def _weigh_expert_rows_backward_kernel(
    grad_weights_ptr,  # (M, NUM_CHOSEN), contiguous
    grad_ptr,  # (R, D), written over
    rows_ptr,  # (R, D)
    places_ptr,  # (M, NUM_CHOSEN)
    weights_ptr,  # (M, NUM_CHOSEN)
    D,
    stride_gm,
    stride_rm,
    BLOCK: tl.constexpr,
):
    # one program computes the gradients of one pair of a token and an expert
    pair = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + pair).to(tl.int64)
    weight = tl.load(weights_ptr + pair)
    grad_ptr += place * stride_gm
    rows_ptr += place * stride_rm
    products = tl.zeros((BLOCK,), tl.float32)
    for column in range(0, D, BLOCK):
        offs = column + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
        row = tl.load(rows_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
        products += grad * row
        weighted = (grad * weight).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + offs, weighted, mask=offs < D)
    tl.store(grad_weights_ptr + pair, tl.sum(products, 0))


def _launch_gather_expert_rows(x: Tensor, places: Tensor) -> Tensor:
    (M, k), D = places.shape, x.shape[1]
    rows = torch.empty((M * k, D), dtype=x.dtype, device=x.device)
    if rows.numel() > 0:
        launch(
            _gather_expert_rows_kernel,
            (M,),
            rows_ptr=rows,
            x_ptr=x,
            places_ptr=places,
            D=D,
            stride_xm=x.stride(0),
            NUM_CHOSEN=k,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # there is nothing to fuse, and triton wants to be told
            enable_fp_fusion=False,
        )
    return rows


def _launch_combine_expert_rows(
    rows: Tensor, places: Tensor, weights: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    (M, k), D = places.shape, rows.shape[1]
    y = torch.empty((M, D), dtype=rows.dtype, device=rows.device)
    if y.numel() > 0:
        launch(
            _combine_expert_rows_kernel,
            (M,),
            y_ptr=y,
            rows_ptr=rows,
            places_ptr=places,
            weights_ptr=places if weights is None else weights,
            start_ptr=y if start is None else start,
            D=D,
            stride_rm=rows.stride(0),
            NUM_CHOSEN=k,
            HAS_WEIGHTS=weights is not None,
            HAS_START=start is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # as the reference rounds
            enable_fp_fusion=False,
        )
    return y


def _launch_weigh_expert_rows_backward(
    grad: Tensor, rows: Tensor, places: Tensor, weights: Tensor
) -> Tensor:
    grad_weights = torch.empty_like(weights)
    if grad_weights.numel() > 0:
        launch(
            _weigh_expert_rows_backward_kernel,
            (grad_weights.numel(),),
            grad_weights_ptr=grad_weights,
            grad_ptr=grad,
            rows_ptr=rows,
            places_ptr=places,
            weights_ptr=weights,
            D=rows.shape[1],
            stride_gm=grad.stride(0),
            stride_rm=rows.stride(0),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # multiply-adds round less
            enable_fp_fusion=True,
        )
    return grad_weights


def _check(name: str, matrix: Tensor, places: Tensor, num_rows: int) -> None:
    check_dtype(name, matrix.dtype)
    if matrix.dim() != 2 or places.dim() != 2 or len(matrix) != num_rows:
        raise ValueError(
            f"{name} must be a matrix of {num_rows} rows, and places one of tokens and experts: "
            f"got {tuple(matrix.shape)} and {tuple(places.shape)}"
        )
    if places.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"places must be int32 or int64: got {places.dtype}")
    check_is_contiguous("places", places)
    check_rows_are_contiguous(name, matrix)
    check_one_device({name: matrix, "places": places})


def _check_weights(weights: Tensor, places: Tensor) -> None:
    check_is("weights", weights, torch.float32, tuple(places.shape))
    check_is_contiguous("weights", weights)
    check_one_device({"places": places, "weights": weights})


def gather_expert_rows(
    x: Tensor,  # (M, D), rows of any stride
    places: Tensor,  # (M, k), a permutation of M k rows
) -> Tensor:  # (M k, D)
    """Copy the row of each token to the places of its experts.

        rows[places[m, j]] = x[m]

    Its gradient is `combine_expert_rows` without weights.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, rows are scattered, or x requires a
            gradient.
    """
    _check("x", x, places, len(places))
    check_not_recorded({"x": x}, "combine_expert_rows")
    if x.device.type == "cpu":
        return gather_expert_rows_reference(x, places)
    return _launch_gather_expert_rows(x, places)


def combine_expert_rows(
    rows: Tensor,  # (M k, D), rows of any stride
    places: Tensor,  # (M, k), a permutation of the rows
    weights: Tensor | None = None,  # (M, k) float32
    start: Tensor | None = None,  # (M, D) float32
) -> Tensor:  # (M, D), the rows' dtype
    """Add the rows of each token up, each times its weight, in float32.

        y[m] = start[m] + sum_j weights[m, j] rows[places[m, j]]

    Args:
        weights: None: all one.
        start: None: zeros.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, rows are scattered, or something requires
            a gradient.
    """
    _check("rows", rows, places, places.numel())
    if weights is not None:
        _check_weights(weights, places)
    if start is not None:
        check_is("start", start, torch.float32, (len(places), rows.shape[1]))
        check_is_contiguous("start", start)
        check_one_device({"rows": rows, "start": start})
    given = {"rows": rows, "weights": weights, "start": start}
    recorded = {name: tensor for name, tensor in given.items() if tensor is not None}
    check_not_recorded(recorded, "weigh_expert_rows_backward")
    if rows.device.type == "cpu":
        return combine_expert_rows_reference(rows, places, weights, start)
    return _launch_combine_expert_rows(rows, places, weights, start)


def weigh_expert_rows_backward(
    grad: Tensor,  # (M k, D), of the weighted rows; written over with that of the rows
    rows: Tensor,  # (M k, D)
    places: Tensor,  # (M, k), a permutation of the rows
    weights: Tensor,  # (M, k) float32
) -> Tensor:  # (M, k) float32
    """Compute the gradient of the weights, and turn that of the weighted rows into the rows'.

        grad_weights[m, j]  = grad[places[m, j]] . rows[places[m, j]]
        grad[places[m, j]] *= weights[m, j]

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or rows are scattered or overlap.
    """
    _check("rows", rows, places, places.numel())
    check_like("grad", grad, "rows", rows)
    check_rows_are_contiguous("grad", grad)
    check_rows_are_apart("grad", grad)
    check_one_device({"rows": rows, "grad": grad})
    _check_weights(weights, places)
    if rows.device.type == "cpu":
        return weigh_expert_rows_backward_reference(grad, rows, places, weights)
    return _launch_weigh_expert_rows_backward(grad, rows, places, weights)
