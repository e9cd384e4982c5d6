"""Multiply rows by their experts' matrices with Hopper's asynchronous copies: y[r] = x[r] W[e]^T.

    x  | BLOCK_M rows of an expert  | x BLOCK_K columns     a copy each, into shared memory, by
    W  | BLOCK_N rows of its matrix | x BLOCK_K columns     hardware (TMA); num_stages under way
                                        wgmma, float32 sums in registers

A program of each multiprocessor computes tile after tile. The loop over tiles and the loop over
columns are one: the first copies of a tile are under way while the last is multiplied and stored.
A copy takes the rows of other experts that follow in its tile along, and zeros for what lies beyond
a matrix; such rows are computed and not stored.

A tile reads 2 (BLOCK_M + BLOCK_N) BLOCK_K bytes for 2 BLOCK_M BLOCK_N BLOCK_K FLOPs: 128 x 256 is
the most whose sums fit the registers of two warpgroups, and a multiprocessor's share of the L2
cache's bandwidth is just enough for it.
"""

# triton's annotations know neither range's options nor descriptors
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

import torch
from torch import Tensor

from kernels.device import Properties
from kernels.grouped_matmul_tiles import (
    Tile,
    count_row_tiles,
    find_tile,
    is_aligned,
    load_bias,
    most_tiles,
)
from kernels.language import TensorDescriptor, tl, triton
from kernels.launch import launch, next_power_of_2

# the first GPUs that copy tiles asynchronously, and the shared memory that the tile takes
CAPABILITY = (9, 0)
SHARED_BYTES = 227 << 10
TILE = Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=4)


@triton.jit(do_not_specialize=["first_expert"])
def _grouped_matmul_copied_kernel(
    y_ptr,  # (R, N)
    x_tiles,  # of (R, K)
    W_tiles,  # of (num_experts, N, K), or where IS_TRANSPOSED of (num_experts, K, N)
    offsets_ptr,
    bias_ptr,  # (num_experts, N), read where HAS_BIAS
    first_expert,
    num_experts,
    N,
    K,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
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
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        expert, row, stop, column = find_tile(tile, ends, offsets_ptr, num_column_tiles, BLOCK_M)
        column *= BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_tiles.load([row, k])
            if IS_TRANSPOSED:
                w = W_tiles.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
                acc = tl.dot(x, w, acc)
            else:
                w = W_tiles.load([expert, column, k]).reshape(BLOCK_N, BLOCK_K)
                acc = tl.dot(x, w.T, acc)
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = column + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            acc += load_bias(bias_ptr, expert, offs_n, N)[None, :]
        y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
        mask = (offs_m < stop)[:, None] & (offs_n < N)[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask)


def copied_obstacle(x: Tensor, W: Tensor, y: Tensor, gpu: Properties) -> str:
    """Say what keeps a product from asynchronous copies; an empty string if nothing does."""
    if gpu.capability < CAPABILITY or gpu.shared_bytes < SHARED_BYTES:
        return f"tiles are copied from 9.0 on with {SHARED_BYTES:,} bytes, not on {gpu}"
    if x.dtype == torch.float32:
        return "tensor cores multiply in bfloat16 or float16, not in torch.float32"
    if not is_aligned(x, W, y) or 0 in (*x.shape, x.stride(0), *W.stride()):
        return "addresses, sizes and strides must be multiples of 16, and not 0"
    return ""


def _launch_grouped_matmul_copied(
    x: Tensor,  # (R, K)
    W: Tensor,  # (C, N, K), or where is_transposed (C, K, N)
    offsets: Tensor,  # (E + 1,) int32
    y: Tensor,  # (R, N)
    first_expert: int,
    is_transposed: bool,
    gpu: Properties,
    bias: Tensor | None = None,  # (C, N)
) -> None:
    (R, K), N, tile = x.shape, y.shape[1], TILE
    block = (tile.BLOCK_K, tile.BLOCK_N) if is_transposed else (tile.BLOCK_N, tile.BLOCK_K)
    stage_bytes = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * x.element_size()
    programs = gpu.num_multiprocessors * (SHARED_BYTES // (tile.num_stages * stage_bytes))
    launch(
        _grouped_matmul_copied_kernel,
        (min(programs, most_tiles(R, len(W), N, tile)),),
        y_ptr=y,
        x_tiles=TensorDescriptor.from_tensor(x, [tile.BLOCK_M, tile.BLOCK_K]),
        W_tiles=TensorDescriptor.from_tensor(W, [1, *block]),
        offsets_ptr=offsets,
        bias_ptr=offsets if bias is None else bias,
        first_expert=first_expert,
        num_experts=len(W),
        N=N,
        K=K,
        stride_ym=y.stride(0),
        HAS_BIAS=bias is not None,
        IS_TRANSPOSED=is_transposed,
        BLOCK_E=next_power_of_2(len(W)),
        **tile._asdict(),
        # multiply-adds round less
        enable_fp_fusion=True,
    )
