"""Multiply tens of rows by an NF4 weight with Hopper's warpgroup products: y = x W^T.

    W  | 64 rows | x  64 weights a block: levels from PRMT, in 16 bit, in registers
    x  | up to 64 rows | x  64 columns: through shared memory, copied asynchronously
                  wgmma, a fresh float32 sum a block  -> * scale, added up

A tensor core of Hopper takes one operand from registers and the other from shared memory, where 64
rows of W share it: a weight is decoded once for 64 rows of x, where `nf4_matmul_fused` decodes it
for 32. Reads 0.516 bytes a weight and does 2 M N K FLOP. Where few tiles of y would leave
multiprocessors idle, programs split the columns, and a second kernel adds their sums up in order.

A lane has 16 weights of one row in one piece, 8 bytes, and its quad the whole block; a tensor core
wants neighbours from the four lanes in turn. So columns are renumbered. Shared memory holds x in
the order in which it was copied, so a small kernel renumbers the columns of x first:

    pairs of a block of x  | 0 .. 7 | 8 .. 15 | 16 .. 23 | 24 .. 31 |    lane 0, 1, 2, 3
    renumbered             | 0 8 16 24 | 1 9 17 25 | ...                a pair of each in turn

Scales are applied as in `nf4_matmul_fused`: exact in float32, to exact products of rounded levels.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

from functools import cache

import torch
from torch import Tensor

from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.nf4_matmul_operands import (
    BLOCKS_PER_STEP,
    QUANT_BLOCK,
    QUANT_GROUP,
    aligned_rows,
    member_of_row,
    operand_obstacle,
    rows_obstacle,
    sum_partials,
    triton_dtype,
    weight_arguments,
)
from kernels.ptx import (
    QUAD,
    decode_word,
    load_float,
    load_planes,
    load_word,
    nested_absmax,
    split_pairs,
    stream_two_words,
)
from nf4.weight import NF4Weight

# the one GPU generation whose tensor cores take an operand from registers, another from memory
CAPABILITY = (9, 0)
BLOCK_N = 64
NUM_WARPS = 4
# the smallest that holds all rows, or the last; with 128 rows the sums do not fit the registers
BLOCKS_M = (32, 64)
# of x's tiles: one step is copied while another is multiplied
NUM_STAGES = 2
# pairs of x that a program renumbers
RENUMBERED_WORDS = 512
# fewer programs leave multiprocessors of an H100 idle
ENOUGH_PROGRAMS = 200


@triton.jit
def _renumber_columns_kernel(
    out_ptr,  # (M, words of a row), contiguous
    x_ptr,  # (M, words of a row), row stride stride_xm; int32: pairs of 16-bit numbers
    stride_xm,
    words_per_row,
    WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,  # of a quantization block
):
    # one program renumbers WORDS pairs of a row
    LANE_WORDS: tl.constexpr = BLOCK_WORDS // QUAD
    row = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    place = offs % BLOCK_WORDS
    source = offs - place + place % QUAD * LANE_WORDS + place // QUAD
    mask = offs < words_per_row
    pair = tl.load(x_ptr + row * stride_xm + source, mask=mask)
    tl.store(out_ptr + row * words_per_row + offs, pair, mask=mask)


# any number of rows, one compilation
@triton.jit(do_not_specialize=["M"])
def _nf4_matmul_warpgroup_kernel(
    y_ptr,  # (number of splits, M, N), contiguous
    x_ptr,  # (M, K), contiguous, columns renumbered
    packed_ptr,  # int32
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    dynamic_map_ptr,
    planes_ptr,
    member_table_ptr,
    M,
    N,
    K,
    blocks_per_split,
    NUM_MEMBERS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # one program sums a range of columns for the (BLOCK_M, BLOCK_N) tile of y at (pid_m, pid_n)
    WORDS: tl.constexpr = QUANT_BLOCK // 8  # of packed codes, in a block
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_m = tl.program_id(1) * BLOCK_M
    first_block = tl.program_id(2) * blocks_per_split
    blocks = K // QUANT_BLOCK  # of a row
    member, member_row, group_start = member_of_row(member_table_ptr, first_row, NUM_MEMBERS)
    packed_ptr += (first_row * blocks + first_block) * WORDS
    absmax_ptr += first_row * blocks + first_block
    local_block = (first_row - member_row) * blocks + first_block
    group_absmax_ptr += group_start + local_block // QUANT_GROUP
    into_group = (local_block % QUANT_GROUP).to(tl.int32)

    offs_n = tl.arange(0, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_quad = tl.arange(0, QUAD)
    offs_block = offs_n * blocks
    packed_ptrs = packed_ptr + (offs_block * WORDS)[:, None] + offs_quad * (WORDS // QUAD)
    # rows beyond M repeat the last one, and are not stored
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64) * K
    x_ptrs = x_ptr + first_block * QUANT_BLOCK + rows_m[:, None] + tl.arange(0, QUANT_BLOCK)

    words = ()
    for block in tl.static_range(BLOCKS_PER_STEP):
        words = words + stream_two_words(packed_ptrs + block * WORDS)
    planes = load_planes(planes_ptr, offs_quad[None, :])
    if DOUBLE_QUANT:
        mean = tl.load(absmax_mean_ptr + member)
        codes = load_word((absmax_ptr + offs_block).to(tl.pointer_type(tl.int32)))
        group_absmax = load_float(group_absmax_ptr + (offs_block + into_group) // QUANT_GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, blocks_per_split, BLOCKS_PER_STEP, num_stages=NUM_STAGES):
        # the loads of the next step are under way while this step computes; the last has no next
        k_next = tl.minimum(k + BLOCKS_PER_STEP, blocks_per_split - BLOCKS_PER_STEP)
        next_words = ()
        for block in tl.static_range(BLOCKS_PER_STEP):
            x = tl.load(x_ptrs + (k + block) * QUANT_BLOCK)
            p_0, p_1, p_2, p_3 = decode_word(words[2 * block], planes)
            q_0, q_1, q_2, q_3 = decode_word(words[2 * block + 1], planes)
            # (BLOCK_N, QUAD, 2, 2, 2, 2), the last 4 a lane's pair // 2 % 2, pair % 2, which of
            # the pair, and pair // 4
            w = tl.join(
                split_pairs(p_0, p_1, p_2, p_3, DTYPE), split_pairs(q_0, q_1, q_2, q_3, DTYPE)
            )
            w = w.permute(0, 5, 2, 3, 1, 4).reshape(BLOCK_N, QUANT_BLOCK)
            product = tl.dot(w, x.permute(1, 0))
            next_words = next_words + stream_two_words(packed_ptrs + (k_next + block) * WORDS)
            if DOUBLE_QUANT:
                code = (codes >> (8 * block)) & 0xFF
                value = load_float(dynamic_map_ptr + code)
                absmax = nested_absmax(value, group_absmax, mean)
            else:
                absmax = load_float(absmax_ptr + offs_block + (k + block))
            acc += product * absmax[:, None]
        words = next_words
        if DOUBLE_QUANT:
            codes = load_word((absmax_ptr + offs_block + k_next).to(tl.pointer_type(tl.int32)))
            group = (offs_block + (into_group + k_next)) // QUANT_GROUP
            group_absmax = load_float(group_absmax_ptr + group)
    y_ptr += tl.program_id(2).to(tl.int64) * M * N + first_row
    y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[None, :])


def warpgroup_obstacle(weight: NF4Weight, dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """Say what keeps a weight from the warpgroup kernel; an empty string if nothing does."""
    if capability != CAPABILITY:
        return f"the warpgroup kernel runs on compute capability 9.0, not {capability}"
    return operand_obstacle(weight, dtype) or rows_obstacle(weight, BLOCK_N)


def _renumbered(x: Tensor) -> Tensor:  # (M, K), contiguous
    """Bring the pairs of each block into the order in which the quads of lanes supply W."""
    pairs = aligned_rows(x).view(torch.int32)
    num_rows, words_per_row = pairs.shape
    renumbered = torch.empty((num_rows, words_per_row), dtype=torch.int32, device=x.device)
    launch(
        _renumber_columns_kernel,
        (cdiv(words_per_row, RENUMBERED_WORDS), num_rows),
        out_ptr=renumbered,
        x_ptr=pairs,
        stride_xm=pairs.stride(0),
        words_per_row=words_per_row,
        WORDS=RENUMBERED_WORDS,
        BLOCK_WORDS=QUANT_BLOCK.value // 2,
    )
    return renumbered.view(x.dtype)


def _block_m(num_rows: int) -> int:
    return next((size for size in BLOCKS_M if size >= num_rows), BLOCKS_M[-1])


@cache
def _num_splits(blocks: int, tiles: int) -> int:
    """Count the ranges of columns: a power of two, no more than it takes to have enough programs.

    A range is a whole number of steps.
    """
    splits = 1
    while tiles * splits < ENOUGH_PROGRAMS and blocks % (2 * splits * BLOCKS_PER_STEP.value) == 0:
        splits *= 2
    return splits


def _launch_nf4_matmul_warpgroup(x: Tensor, weight: NF4Weight) -> Tensor:
    (N, K), M = weight.shape, x.shape[0]
    block_m = _block_m(M)
    tiles_n, tiles_m = N // BLOCK_N, cdiv(M, block_m)
    blocks = K // QUANT_BLOCK.value
    splits = _num_splits(blocks, tiles_n * tiles_m)
    x_renumbered = _renumbered(x)
    y_dtype = x.dtype if splits == 1 else torch.float32
    y = torch.empty((splits, M, N), dtype=y_dtype, device=x.device)
    launch(
        _nf4_matmul_warpgroup_kernel,
        (tiles_n, tiles_m, splits),
        y_ptr=y,
        x_ptr=x_renumbered,
        **weight_arguments(weight, x.dtype),
        M=M,
        N=N,
        K=K,
        blocks_per_split=blocks // splits,
        NUM_MEMBERS=len(weight.rows),
        DOUBLE_QUANT=weight.is_double_quantized,
        DTYPE=triton_dtype(x.dtype),
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        NUM_STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
    )
    return y[0] if splits == 1 else sum_partials(y, x.dtype)
