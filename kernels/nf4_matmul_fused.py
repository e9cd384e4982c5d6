"""Multiply few rows by an NF4 weight that never leaves the registers: y = x W^T + h B^T + bias.

    W  | 16 rows | x  64 weights a block: levels from PRMT, in 16 bit
           tensor cores, a fresh float32 sum a block  -> * scale, added up

Reads N K (1/2 + 1/64 + 4 / (256 * 64)) bytes of W once for each BLOCK_M rows of x, 0.516 a weight,
where a bf16 product reads 2; x comes from the caches. 2 M N K FLOP, at least 8 rows' worth. What
costs is decoding: about 3 integer instructions a weight, so that on an H100 the integer units are
as busy as memory.

The warps of a program share its rows of W and split the columns, 256 at a time, so that few rows
still keep many warps loading; their sums meet in shared memory once. The exact float32 scale is
applied to exact products of rounded levels, so the result errs about as much as a product with the
expanded 16-bit weight.

The low-rank update h B^T and the bias are optional: `token_linear.py` gives them. They join the
float32 sums before the one rounding.

Which index lies where. A tensor core's operand takes neighbours of the summed index from the four
lanes of a quad in turn. Columns are renumbered so that a lane gives 16 weights of one row in one
piece, 8 bytes; x is renumbered in the same way, which leaves the sum as it is. Triton decides how
many neighbours a lane gives at a time (NEIGHBOURS); with another number the products stay right,
but their operands would travel through shared memory.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.device import TENSOR_CORES_FROM
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.low_rank import LowRank
from kernels.nf4_matmul_operands import (
    BLOCKS_PER_STEP,
    QUANT_BLOCK,
    QUANT_GROUP,
    aligned_rows,
    member_of_row,
    operand_obstacle,
    rows_obstacle,
    triton_dtype,
    weight_arguments,
)
from kernels.ptx import (
    QUAD,
    decode_word,
    load_float,
    load_four_words,
    load_planes,
    load_word,
    nested_absmax,
    split_pairs,
    stream_two_words,
)
from nf4.weight import NF4Weight

# the number that triton's compiler chooses for an operand that is joined from 32-bit loads
NEIGHBOURS = tl.constexpr(4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2)


# of an update's ranks, in one piece
RANK_TILE = tl.constexpr(16)


class Config(NamedTuple):
    """How a product is cut up: for at most `max_rows` rows and at least `min_kept` columns of y."""

    max_rows: int
    min_kept: int
    block_m: int
    block_n: int  # rows of W
    num_warps: int
    # of a thread, where the compiler left to itself takes fewer: it spills, or loads too late
    num_registers: int | None = None


# the first that fits is taken; README.md beside this file says what else was tried
CONFIGS = (
    Config(8, 6144, 8, 16, 4),
    Config(8, 0, 8, 16, 8, 120),
    Config(16, 8192, 16, 16, 4),
    Config(16, 0, 16, 16, 8),
    Config(2**31, 8192, 32, 16, 2, 224),
    Config(2**31, 0, 32, 16, 4, 224),
)


# any number of rows, one compilation
@triton.jit(do_not_specialize=["M"])
def _nf4_matmul_fused_kernel(
    y_ptr,  # (M, N), contiguous
    x_ptr,  # (M, K), row stride stride_xm
    packed_ptr,  # int32
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    dynamic_map_ptr,
    planes_ptr,
    member_table_ptr,
    bias_ptr,  # (N,)
    h_ptr,  # (M, num_ranks), contiguous like B
    B_ptr,  # (N, RANK)
    starts_ptr,  # (NUM_MEMBERS,), columns of h
    M,
    N,
    K,
    num_ranks,
    stride_xm,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,  # 0: there is no update
    NUM_MEMBERS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SLICES: tl.constexpr,  # of the columns of a step, one a warp
):
    # one program computes the (BLOCK_M, BLOCK_N) tile of y at (pid_m, pid_n)
    WORDS: tl.constexpr = QUANT_BLOCK // 8  # of packed codes, in a block
    STEP: tl.constexpr = NUM_SLICES * BLOCKS_PER_STEP
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_m = tl.program_id(1).to(tl.int64) * BLOCK_M
    blocks = K // QUANT_BLOCK  # of a row
    member, member_row, group_start = member_of_row(member_table_ptr, first_row, NUM_MEMBERS)
    packed_ptr += first_row * blocks * WORDS
    absmax_ptr += first_row * blocks
    local_block = (first_row - member_row) * blocks
    group_absmax_ptr += group_start + local_block // QUANT_GROUP
    into_group = (local_block % QUANT_GROUP).to(tl.int32)

    offs_slice = tl.arange(0, NUM_SLICES) * BLOCKS_PER_STEP
    offs_n = tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_quad = tl.arange(0, QUAD)
    offs_block = offs_n[None, :] * blocks + offs_slice[:, None]  # (NUM_SLICES, BLOCK_N)
    # (NUM_SLICES, BLOCK_N, QUAD)
    packed_ptrs = packed_ptr + (offs_block * WORDS)[:, :, None] + offs_quad * (WORDS // QUAD)
    # rows beyond M repeat the last one, and are not stored
    rows_m = tl.minimum(first_m + offs_m, M - 1) * stride_xm
    # (NUM_SLICES, BLOCK_M, QUAD, 2), 8 numbers each
    offs_x = (offs_slice * QUANT_BLOCK)[:, None, None, None] + rows_m[None, :, None, None]
    offs_x += (offs_quad * (QUANT_BLOCK // QUAD))[:, None] + tl.arange(0, 2) * 8
    x_ptrs = x_ptr + offs_x

    words = ()
    for block in tl.static_range(BLOCKS_PER_STEP):
        words = words + stream_two_words(packed_ptrs + block * WORDS)
    planes = load_planes(planes_ptr, offs_quad[None, None, :])
    if DOUBLE_QUANT:
        mean = tl.load(absmax_mean_ptr + member)
        codes = load_word((absmax_ptr + offs_block).to(tl.pointer_type(tl.int32)))
        group_absmax = load_float(group_absmax_ptr + (offs_block + into_group) // QUANT_GROUP)
    Bs = ()
    for first in tl.static_range(0, RANK, RANK_TILE):
        offs_r = first + tl.arange(0, RANK_TILE)
        B_ptrs = B_ptr + (first_row + offs_n)[:, None] * RANK + offs_r[None, :]
        Bs = Bs + (tl.load(B_ptrs, mask=offs_r[None, :] < RANK, other=0.0),)  # noqa: RUF005, triton knows no star
    acc = tl.zeros((NUM_SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, blocks, STEP):
        # the loads of the next step are under way while this step computes; the last has no next
        k_next = tl.minimum(k + STEP, blocks - STEP)
        next_words = ()
        for block in tl.static_range(BLOCKS_PER_STEP):
            x_0, x_1, x_2, x_3 = load_four_words(
                (x_ptrs + (k + block) * QUANT_BLOCK).to(tl.pointer_type(tl.int32))
            )
            # (NUM_SLICES, BLOCK_M, QUAD, 2, word // 2, word % 2, 2), the last 4 a lane's 16 numbers
            x = split_pairs(x_0, x_1, x_2, x_3, DTYPE)
            if NEIGHBOURS == 4:
                x = x.permute(0, 1, 3, 4, 2, 5, 6)
            else:
                x = x.permute(0, 1, 3, 4, 5, 2, 6)
            x = x.reshape(NUM_SLICES, BLOCK_M, QUANT_BLOCK)
            p_0, p_1, p_2, p_3 = decode_word(words[2 * block], planes)
            q_0, q_1, q_2, q_3 = decode_word(words[2 * block + 1], planes)
            w = tl.join(
                split_pairs(p_0, p_1, p_2, p_3, DTYPE), split_pairs(q_0, q_1, q_2, q_3, DTYPE)
            )
            if NEIGHBOURS == 4:
                w = w.permute(0, 1, 6, 3, 2, 4, 5)
            else:
                w = w.permute(0, 1, 6, 3, 4, 2, 5)
            w = w.reshape(NUM_SLICES, BLOCK_N, QUANT_BLOCK)
            product = tl.dot(w, x.permute(0, 2, 1))
            next_words = next_words + stream_two_words(packed_ptrs + (k_next + block) * WORDS)
            if DOUBLE_QUANT:
                code = (codes >> (8 * block)) & 0xFF
                value = load_float(dynamic_map_ptr + code)
                absmax = nested_absmax(value, group_absmax, mean)
            else:
                absmax = load_float(absmax_ptr + offs_block + (k + block))
            acc += product * absmax[:, :, None]
        words = next_words
        if DOUBLE_QUANT:
            codes = load_word((absmax_ptr + offs_block + k_next).to(tl.pointer_type(tl.int32)))
            group = (offs_block + (into_group + k_next)) // QUANT_GROUP
            group_absmax = load_float(group_absmax_ptr + group)
    total = tl.sum(acc, 0)  # (BLOCK_N, BLOCK_M)
    if RANK > 0:
        h_ptr += tl.load(starts_ptr + member)
    for first in tl.static_range(0, RANK, RANK_TILE):
        offs_r = first + tl.arange(0, RANK_TILE)
        h_ptrs = h_ptr + tl.minimum(first_m + offs_m, M - 1)[:, None] * num_ranks + offs_r[None, :]
        h = tl.load(h_ptrs, mask=offs_r[None, :] < RANK, other=0.0).to(tl.float32)
        total += tl.sum(Bs[first // RANK_TILE].to(tl.float32)[:, None, :] * h[None, :, :], 2)
    if HAS_BIAS:
        total += tl.load(bias_ptr + first_row + offs_n).to(tl.float32)[:, None]
    y = total.to(DTYPE)
    y_ptrs = y_ptr + (first_m + offs_m)[None, :] * N + (first_row + offs_n)[:, None]
    tl.store(y_ptrs, y, mask=(first_m + offs_m < M)[None, :])


def _config_for(num_rows: int, num_kept: int) -> Config:
    return next(c for c in CONFIGS if num_rows <= c.max_rows and num_kept >= c.min_kept)


def fused_obstacle(weight: NF4Weight, dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """Say what keeps a weight from the fused kernel; an empty string if nothing does."""
    obstacle = operand_obstacle(weight, dtype)
    if obstacle:
        return obstacle
    if capability < TENSOR_CORES_FROM:
        return f"the fused kernel needs the tensor cores of 8.0 and later, not {capability}"
    return rows_obstacle(weight, max(config.block_n for config in CONFIGS))


def _launch_nf4_matmul_fused(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    low_rank: LowRank | None = None,
) -> Tensor:
    (N, K), M = weight.shape, x.shape[0]
    config = _config_for(M, N)
    x = aligned_rows(x)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    steps = K // (QUANT_BLOCK.value * BLOCKS_PER_STEP.value)
    num_slices = gcd(config.num_warps, steps)
    launch(
        _nf4_matmul_fused_kernel,
        (N // config.block_n, cdiv(M, config.block_m)),
        y_ptr=y,
        x_ptr=x,
        **weight_arguments(weight, x.dtype),
        bias_ptr=x if bias is None else bias,
        h_ptr=x if h is None else h,
        B_ptr=x if low_rank is None else low_rank.B,
        starts_ptr=weight.packed if low_rank is None else low_rank.starts,
        M=M,
        N=N,
        K=K,
        num_ranks=0 if h is None else h.shape[1],
        stride_xm=x.stride(0),
        HAS_BIAS=bias is not None,
        RANK=0 if low_rank is None else low_rank.B.shape[1],
        NUM_MEMBERS=len(weight.rows),
        DOUBLE_QUANT=weight.is_double_quantized,
        DTYPE=triton_dtype(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        NUM_SLICES=num_slices,
        num_warps=num_slices,
        maxnreg=config.num_registers,
    )
    return y
