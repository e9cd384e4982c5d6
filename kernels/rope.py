"""Rotate the queries and keys of a qkv buffer by their positions, in place, on the GPU.

    y1 = x1 cos - x2 sin         (x1, x2) = (x[i], x[i + r / 2]): Hugging Face's half-rotate order;
    y2 = x2 cos + x1 sin         or (x[2 i], x[2 i + 1]): the pairs interleaved, as in Meta's files

    of queries cos and sin are times the factor of their position, in models that have one

    a token's row | q head 0 | q head 1 | ... | k head 0 | ... | v head 0 | ...
                    x1 | x2    x1 | x2    ...   x1 | x2          as it is

The first r dimensions of a head turn, in most models all. The tables have a column for each pair,
and say so: r = 2 columns. Dimensions behind them are neither read nor written.

Queries and keys are one run of heads, so one launch rotates both, and a token's cosines and sines
are read once a program for all heads of it. The rotation is in place, because nothing else holds
the buffer: the linear group that wrote it keeps its own input for the backward pass. Queries, keys
and values are views of the buffer.

The backward pass is another function (`rope_backward.py`), and autograd records neither: the layer
writes its backward pass out. Accesses stay 16 bytes wide where strides are multiples of 16 values.

With M tokens, S bytes a value and W_qk values that turn a token, a launch moves
2 M W_qk S + 8 M (r / 2) bytes, the last term of the tables, and costs 3 FLOPs a value:
memory bandwidth is the limit. The arithmetic is float32, each product rounded, the result rounded
once: the result equals the reference bit for bit.

Rotary position embeddings: Su et al. 2021, section 3.4.2, equation 34.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_is,
    check_not_recorded,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, launch, next_power_of_2
from kernels.rope_tables import RopeTables, check_tables

MAX_WARPS = 4
# the widest access of a thread
VECTOR_BYTES = 16
# tiles of heads in a program; all their loads are under way before the first tile is worked on
MAX_TILES = 4


def rotate_reference(
    x: Tensor,  # (B, H, T, head_dim)
    rotations: RopeTables,  # (B, 1, T, r / 2)
) -> Tensor:  # x's shape and dtype
    """Rotate the pairs of the first r dimensions in float32, rounded once."""
    cos, sin, is_interleaved, _ = rotations
    turned, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    if is_interleaved:
        x1, x2 = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    else:
        x1, x2 = turned.float().chunk(2, dim=-1)
    y = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1 if is_interleaved else -2)
    return torch.cat((y.flatten(-2).to(x.dtype), rest), dim=-1)


def _heads_of(
    qkv: Tensor,  # (B, T, (H + 2 H_kv) head_dim)
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, T, head_dim), (B, H_kv, T, head_dim) twice
    """View a buffer as queries, keys and values."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return query, key, value


def rope_reference(
    qkv: Tensor,  # (B, T, (H + 2 H_kv) head_dim)
    positions: Tensor,  # (B, T)
    tables: RopeTables,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, T, head_dim), (B, H_kv, T, head_dim) twice
    """Rotate queries and keys into new tensors."""
    query, key, value = _heads_of(qkv, num_heads, num_kv_heads)
    rotations = tables.at(positions)
    query = rotate_reference(query, rotations.of_queries())
    return query, rotate_reference(key, rotations), value


@triton.jit
def load_pairs(
    head_ptr,  # the first head of a token
    stride_h,
    num_heads,
    first_head,
    HALF: tl.constexpr,  # pairs of a head
    COLUMNS: tl.constexpr,  # HALF, to a power of two
    HEADS: tl.constexpr,  # of a tile
    TILES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    pairs = ()
    column = tl.arange(0, COLUMNS)[None, :]
    # of both numbers of all pairs
    dim = tl.arange(0, 2 * COLUMNS)[None, :]
    for tile in tl.static_range(TILES):
        head = first_head + tile * HEADS + tl.arange(0, HEADS)[:, None]
        place = head_ptr + head * stride_h
        if INTERLEAVED:
            x = tl.load(place + dim, mask=(head < num_heads) & (dim < 2 * HALF))
            x1, x2 = tl.split(tl.reshape(x, (HEADS, COLUMNS, 2)))
        else:
            mask = (head < num_heads) & (column < HALF)
            x1 = tl.load(place + column, mask=mask)
            x2 = tl.load(place + HALF + column, mask=mask)
        pairs = pairs + (x1, x2)  # noqa: RUF005, triton knows no star
    return pairs


@triton.jit
def store_rotated(
    out_ptr,  # the first head of a token, heads one behind the other
    pairs,
    cos,  # (COLUMNS,)
    sin,
    factor,  # of the token's queries, read where SCALES
    num_queries,
    num_heads,
    first_head,
    HEAD: tl.constexpr,  # dimensions
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATES: tl.constexpr,
    SCALES: tl.constexpr,  # the first num_queries heads
):
    column = tl.arange(0, COLUMNS)[None, :]
    dim = tl.arange(0, 2 * COLUMNS)[None, :]
    for tile in tl.static_range(TILES):
        head = first_head + tile * HEADS + tl.arange(0, HEADS)[:, None]
        place = out_ptr + head * HEAD
        y1, y2 = pairs[2 * tile], pairs[2 * tile + 1]
        if ROTATES:
            x1, x2 = y1.to(tl.float32), y2.to(tl.float32)
            c, s = cos[None, :], sin[None, :]
            if SCALES:
                of_head = tl.where(head < num_queries, factor, 1.0)
                c, s = c * of_head, s * of_head
            y1 = (x1 * c - x2 * s).to(out_ptr.dtype.element_ty)
            y2 = (x2 * c + x1 * s).to(out_ptr.dtype.element_ty)
        if INTERLEAVED:
            y = tl.reshape(tl.join(y1, y2), (HEADS, 2 * COLUMNS))
            tl.store(place + dim, y, mask=(head < num_heads) & (dim < 2 * HALF))
        else:
            mask = (head < num_heads) & (column < HALF)
            tl.store(place + column, y1, mask=mask)
            tl.store(place + HALF + column, y2, mask=mask)


@triton.jit
def load_angle(
    cos_ptr,
    sin_ptr,
    factor_ptr,  # read where SCALES
    positions_ptr,  # of the token
    num_positions,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALES: tl.constexpr,
):
    position = tl.load(positions_ptr).to(tl.int64)
    # a position outside the tables gives NaN instead of the memory beside them
    is_known = (position >= 0) & (position < num_positions)
    column = tl.arange(0, COLUMNS)
    offs = tl.where(is_known, position, 0) * HALF + column
    cos = tl.load(cos_ptr + offs, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + offs, mask=column < HALF, other=0.0)
    cos = tl.where(is_known, cos, float("nan"))
    sin = tl.where(is_known, sin, float("nan"))
    factor = 1.0
    if SCALES:
        factor = tl.load(factor_ptr + position, mask=is_known, other=float("nan"))
    return cos, sin, factor


@triton.jit
def _rope_kernel(
    qkv_ptr,  # (B, T, at least num_heads * HEAD)
    positions_ptr,  # (B, T)
    cos_ptr,  # (num_positions, HALF)
    sin_ptr,
    factor_ptr,  # (num_positions,), read where SCALES
    num_tokens,  # T
    num_heads,  # of queries and keys
    num_queries,
    num_positions,
    stride_b,
    stride_t,
    stride_positions_b,
    stride_positions_t,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALES: tl.constexpr,
):
    # one program rotates HEADS * TILES heads of one token in place
    b = (tl.program_id(0) // num_tokens).to(tl.int64)
    t = (tl.program_id(0) % num_tokens).to(tl.int64)
    first_head = tl.program_id(1) * (HEADS * TILES)
    token_ptr = qkv_ptr + b * stride_b + t * stride_t
    positions_ptr += b * stride_positions_b + t * stride_positions_t
    pairs = load_pairs(
        token_ptr, HEAD, num_heads, first_head, HALF, COLUMNS, HEADS, TILES, INTERLEAVED
    )
    cos, sin, factor = load_angle(
        cos_ptr, sin_ptr, factor_ptr, positions_ptr, num_positions, HALF, COLUMNS, SCALES
    )
    store_rotated(
        token_ptr,
        pairs,
        cos,
        sin,
        factor,
        num_queries,
        num_heads,
        first_head,
        HEAD,
        HALF,
        COLUMNS,
        HEADS,
        TILES,
        INTERLEAVED,
        ROTATES=True,
        SCALES=SCALES,
    )


def shape_of(num_heads: int, half: int, itemsize: int) -> dict[str, int]:
    """Choose warps and tiles, so that every thread has a vector of each half of a tile's heads,
    or two of its pairs where they are interleaved.

    Whole tiles in any case: two threads would load a smaller one's values, and one of them might do
    so after the other has written.
    """
    columns = next_power_of_2(half)
    warp_width = 32 * VECTOR_BYTES // itemsize
    warps = cdiv(next_power_of_2(num_heads) * columns, warp_width)
    num_warps = min(warps, MAX_WARPS)
    return {
        "HALF": half,
        "COLUMNS": columns,
        "HEADS": max(1, num_warps * warp_width // columns),
        "num_warps": num_warps,
    }


def _launch_rope(
    qkv: Tensor,  # (B, T, (H + 2 H_kv) head_dim), overwritten
    positions: Tensor,  # (B, T)
    tables: RopeTables,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, T, head_dim), (B, H_kv, T, head_dim) twice
    B, T, width = qkv.shape
    num_rotated = num_heads + num_kv_heads
    num_positions, half = tables.cos.shape
    shape = shape_of(num_rotated, half, qkv.element_size())
    num_tiles = cdiv(num_rotated, shape["HEADS"])
    tiles = min(num_tiles, MAX_TILES)
    if B * T > 0:
        launch(
            _rope_kernel,
            (B * T, cdiv(num_tiles, tiles)),
            qkv_ptr=qkv,
            positions_ptr=positions,
            num_tokens=T,
            num_heads=num_rotated,
            num_queries=num_heads,
            num_positions=num_positions,
            stride_b=qkv.stride(0),
            stride_t=qkv.stride(1),
            stride_positions_b=positions.stride(0),
            stride_positions_t=positions.stride(1),
            HEAD=width // (num_rotated + num_kv_heads),
            TILES=tiles,
            **tables.launched(),
            enable_fp_fusion=False,
            **shape,
        )
    return _heads_of(qkv, num_heads, num_kv_heads)


def check_buffer(
    name: str, buffer: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Refuse a buffer of another shape, or one whose rows are scattered or overlap.

    Raises:
        ValueError: the dtype, the shape or the strides do not fit.
    """
    check_is(name, buffer, dtype, shape)
    check_rows_are_contiguous(name, buffer)
    check_rows_are_apart(name, buffer)


def rope(
    qkv: Tensor,  # (B, T, (H + 2 H_kv) head_dim): queries, keys, values
    positions: Tensor,  # (B, T) int32 or int64, rows of the tables
    tables: RopeTables,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, T, head_dim), (B, H_kv, T, head_dim) twice
    """Rotate queries and keys by their positions and take the buffer apart.

        y1 = x1 cos - x2 sin
        y2 = x2 cos + x1 sin

    For queries cos and sin are multiplied by the factor of their position, if the tables have one.

    Args:
        qkv: consumed: on a GPU it is overwritten, and the results are views of it.
        positions: on a GPU, a position outside the tables gives NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a row is not contiguous, or something
            requires a gradient.
    """
    check_dtype("qkv", qkv.dtype)
    if qkv.dim() != 3:
        raise ValueError(f"qkv must have three dimensions, (B, T, -1): got {tuple(qkv.shape)}")
    B, T, _ = qkv.shape
    check_tables(positions, tables, (B, T), head_dim)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    check_buffer("qkv", qkv, qkv.dtype, (B, T, width))
    given = {"qkv": qkv, "positions": positions} | tables.tensors()
    check_one_device(given)
    check_not_recorded(given, "rope_backward")
    if qkv.device.type == "cpu":
        return rope_reference(qkv, positions, tables, num_heads, num_kv_heads)
    return _launch_rope(qkv, positions, tables, num_heads, num_kv_heads)
