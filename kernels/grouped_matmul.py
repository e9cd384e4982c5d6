"""Multiply rows by their experts' matrices in one launch: the products of a mixture of experts.

    y[r]      = x[r] W[e]^T + bias[e]   offsets[e] <= r < offsets[e + 1]
    grad_x[r] = grad_y[r] W[e]

    rows of x    | expert 0 | expert 1 |  | expert 3 | ...      sorted by expert; any number each
    offsets      0          300        417 417       ...
    W            | 0 | 1 | 2 | 3 | ...                          or a chunk, from first_expert on

The numbers of rows are known to the device alone: nothing waits for them, and nothing is allocated
by them, so that launches can be captured in a CUDA graph. A product of R rows takes 2 R N K FLOPs
and, with E matrices, S (R K + R N + E N K) bytes of S a value; the matrices are read once as long
as those that are multiplied at a time stay in the L2 cache. For Qwen3-30B-A3B's gate and up, E =
128, N x K = 1536 x 2048 and 65,536 rows, that is 412 GFLOP and 1.3 GB.

A row is summed over k in one order, with one tile for all rows: equal rows of an expert give equal
bits, however many rows the expert has. Tiles that are not full are computed whole, which costs half
a tile of rows an expert. `grouped_matmul_copied.py` serves GPUs that copy tiles asynchronously; the
kernel here loads by pointers and serves the other GPUs, float32, and addresses that do not fit.

Grouped products: Gale et al. 2022, "MegaBlocks", section 3.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from itertools import pairwise

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_is,
    check_is_contiguous,
    check_not_recorded,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.device import TENSOR_CORES_FROM, Properties, properties
from kernels.grouped_matmul_copied import _launch_grouped_matmul_copied, copied_obstacle
from kernels.grouped_matmul_tiles import (
    Tile,
    count_row_tiles,
    find_tile,
    is_aligned,
    load_bias,
    most_tiles,
)
from kernels.language import tl, triton
from kernels.launch import launch, next_power_of_2

TILE = Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4)
# of rows that are loaded value by value, of float32, and of GPUs whose tensor cores Triton does not
# know: products are unrolled there
SMALL_TILE = Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=4)
# of a multiprocessor, that has room for one or two
PROGRAMS = 2
# of float32: no tensor cores
PRECISION = tl.constexpr("ieee")


def grouped_matmul_reference(
    x: Tensor,  # (R, K)
    W: Tensor,  # (C, N, K), of any strides
    offsets: Tensor,  # (E + 1,)
    out: Tensor,  # (R, N), written
    first_expert: int = 0,
    bias: Tensor | None = None,  # (C, N)
) -> Tensor:
    """Multiply expert by expert, accumulating in float32."""
    chunk = offsets[first_expert : first_expert + len(W) + 1].tolist()
    for expert, (start, stop) in enumerate(pairwise(chunk)):
        y = x[start:stop].float() @ W[expert].float().T
        out[start:stop] = (y if bias is None else y + bias[expert].float()).to(x.dtype)
    return out


@triton.jit(do_not_specialize=["first_expert"])
def _grouped_matmul_kernel(
    y_ptr,  # (R, N)
    x_ptr,  # (R, K)
    W_ptr,  # (num_experts, N, K)
    offsets_ptr,
    bias_ptr,  # (num_experts, N), read where HAS_BIAS
    first_expert,
    num_experts,
    N,
    K,
    stride_ym,
    stride_xm,
    stride_we,
    stride_wn,
    stride_wk,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # one program computes every num_programs-th (BLOCK_M, BLOCK_N) tile of y
    offsets_ptr += first_expert
    ends = count_row_tiles(offsets_ptr, num_experts, BLOCK_E, BLOCK_M)
    num_column_tiles = (N + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.max(ends, 0) * num_column_tiles
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, row, stop, column = find_tile(tile, ends, offsets_ptr, num_column_tiles, BLOCK_M)
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = offs_m.to(tl.int64)[:, None]
        x_ptrs = x_ptr + rows * stride_xm + offs_k[None, :]
        w_ptrs = W_ptr + expert.to(tl.int64) * stride_we
        w_ptrs += (
            offs_n.to(tl.int64)[None, :] * stride_wn + offs_k.to(tl.int64)[:, None] * stride_wk
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            in_K = k + offs_k < K
            x = tl.load(x_ptrs, (offs_m < stop)[:, None] & in_K[None, :], 0.0)
            w = tl.load(w_ptrs, (offs_n < N)[None, :] & in_K[:, None], 0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
        if HAS_BIAS:
            acc += load_bias(bias_ptr, expert, offs_n, N)[None, :]
        mask = (offs_m < stop)[:, None] & (offs_n < N)[None, :]
        tl.store(y_ptr + rows * stride_ym + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask)


def _launch_grouped_matmul(
    x: Tensor,  # (R, K)
    W: Tensor,  # (C, N, K), or where is_transposed (C, K, N)
    offsets: Tensor,  # (E + 1,) int32
    y: Tensor,  # (R, N)
    first_expert: int,
    is_transposed: bool,
    gpu: Properties,
    bias: Tensor | None = None,  # (C, N)
) -> None:
    (R, K), N = x.shape, y.shape[1]
    unrolled = x.dtype == torch.float32 or gpu.capability < TENSOR_CORES_FROM
    tile = SMALL_TILE if unrolled or not is_aligned(x, W, y) else TILE
    W = W.mT if is_transposed else W
    launch(
        _grouped_matmul_kernel,
        (min(PROGRAMS * gpu.num_multiprocessors, most_tiles(R, len(W), N, tile)),),
        y_ptr=y,
        x_ptr=x,
        W_ptr=W,
        offsets_ptr=offsets,
        bias_ptr=offsets if bias is None else bias,
        first_expert=first_expert,
        num_experts=len(W),
        N=N,
        K=K,
        stride_ym=y.stride(0),
        stride_xm=x.stride(0),
        stride_we=W.stride(0),
        stride_wn=W.stride(1),
        stride_wk=W.stride(2),
        HAS_BIAS=bias is not None,
        BLOCK_E=next_power_of_2(len(W)),
        **tile._asdict(),
        # multiply-adds round less
        enable_fp_fusion=True,
    )


def _check(
    name: str, x: Tensor, W: Tensor, offsets: Tensor, first_expert: int, is_transposed: bool
) -> None:
    check_dtype(name, x.dtype)
    summed = 1 if is_transposed else 2
    if x.dim() != 2 or W.dim() != 3 or x.shape[1] != W.shape[summed]:
        raise ValueError(
            f"{name} must be a matrix as wide as dimension {summed} of W, of three: "
            f"got {tuple(x.shape)} and {tuple(W.shape)}"
        )
    num_experts = offsets.numel() - 1
    if not 0 <= first_expert <= num_experts - len(W):
        raise ValueError(
            f"W must have matrices of some of the {num_experts} experts that offsets divide: "
            f"got {len(W)} from expert {first_expert} on"
        )
    check_is("W", W, x.dtype, tuple(W.shape))
    check_is("offsets", offsets, torch.int32, (num_experts + 1,))
    check_is_contiguous("offsets", offsets)
    check_rows_are_contiguous(name, x)
    check_rows_are_contiguous("W", W)
    check_one_device({name: x, "W": W, "offsets": offsets})
    check_not_recorded({name: x, "W": W}, "grouped_matmul_backward_input")


def _multiply(
    x: Tensor,  # (R, K)
    W: Tensor,  # (C, N, K), or where is_transposed (C, K, N)
    offsets: Tensor,
    out: Tensor | None,  # (R, N)
    first_expert: int,
    is_transposed: bool,
    bias: Tensor | None = None,  # (C, N)
) -> Tensor:
    shape = (len(x), W.shape[2 if is_transposed else 1])
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    check_is("out", out, x.dtype, shape)
    check_rows_are_contiguous("out", out)
    check_rows_are_apart("out", out)
    check_one_device({"x": x, "out": out})
    if x.device.type == "cpu":
        W = W.mT if is_transposed else W
        grouped_matmul_reference(x, W, offsets, out, first_expert, bias)
    elif out.numel() > 0 and len(W) > 0:
        gpu = properties(x.device)
        obstacle = copied_obstacle(x, W, out, gpu)
        launch_product = _launch_grouped_matmul if obstacle else _launch_grouped_matmul_copied
        launch_product(x, W, offsets, out, first_expert, is_transposed, gpu, bias)
    return out


def grouped_matmul(
    x: Tensor,  # (R, K), sorted by expert
    W: Tensor,  # (C, N, K), the matrices of the experts from first_expert on
    offsets: Tensor,  # (E + 1,) int32: where each expert's rows begin; at last R
    out: Tensor | None = None,  # (R, N), rows of any stride
    first_expert: int = 0,
    bias: Tensor | None = None,  # (C, N), of the same experts as W
) -> Tensor:  # (R, N), x's dtype
    """Multiply rows by the transposes of their experts' matrices, and add their biases.

        y[r] = x[r] W[e - first_expert]^T + bias[e - first_expert]

    where offsets[e] <= r < offsets[e + 1].

    Args:
        offsets: not decreasing, from 0 to R; their values are not looked at, which would wait for
            the device.
        out: what to write into and return; rows of experts outside of the chunk stay as they are,
            which in a new tensor is undefined.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, rows are scattered, those of `out`
            overlap, or something requires a gradient.
    """
    _check("x", x, W, offsets, first_expert, is_transposed=False)
    if bias is not None:
        check_dtype("bias", bias.dtype)
        check_is("bias", bias, bias.dtype, tuple(W.shape[:2]))
        check_is_contiguous("bias", bias)
        check_one_device({"x": x, "bias": bias})
        check_not_recorded({"bias": bias}, "grouped_matmul_backward_input")
    return _multiply(x, W, offsets, out, first_expert, is_transposed=False, bias=bias)


def grouped_matmul_backward_input(
    grad: Tensor,  # (R, N), y's gradient
    W: Tensor,  # (C, N, K), the matrices of the experts from first_expert on
    offsets: Tensor,  # (E + 1,) int32
    out: Tensor | None = None,  # (R, K), rows of any stride
    first_expert: int = 0,
) -> Tensor:  # (R, K), grad's dtype
    """Compute the gradient of x: multiply rows by their experts' matrices.

        grad_x[r] = grad[r] W[e - first_expert]     offsets[e] <= r < offsets[e + 1]

    Offsets, out and the chunk are those of `grouped_matmul`. W is frozen and has no gradient.

    Raises:
        ValueError: as `grouped_matmul` does.
    """
    _check("grad", grad, W, offsets, first_expert, is_transposed=True)
    return _multiply(grad, W, offsets, out, first_expert, is_transposed=True)
