"""Rotate the gradients of queries and keys back, and gather all three in one buffer, on the GPU.

    grad_x1 = grad_y1 cos + grad_y2 sin         the rotation of `rope.py` by the negated angle
    grad_x2 = grad_y2 cos - grad_y1 sin         of queries by their cos and sin, as there

    grad_q  (B, H, T, head_dim)      \
    grad_k  (B, H_kv, T, head_dim)    >   | q head 0 | ... | k head 0 | ... | v head 0 | ... |
    grad_v  (B, H_kv, T, head_dim)   /        rotated          rotated          copied

Dimensions of queries and keys behind those that turn are copied like values.

Attention returns three gradients that lie apart, in any layout, and the linear group takes one
buffer: so the rotation gathers them there, and copies the gradient of the values on the way. To
rotate in place instead would follow a pass that moves all three.

With M tokens, S bytes a value and W_qk, W_v values a token of queries and keys, and of values, it
moves 2 M (W_qk + W_v) S + 8 M (r / 2) bytes, the last term of the tables, and costs 3 FLOPs
a value: memory bandwidth is the limit. The result equals the reference bit for bit.
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
    check_rows_are_contiguous,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, head_strides, launch, next_power_of_2
from kernels.rope import (
    MAX_TILES,
    check_buffer,
    load_angle,
    load_pairs,
    rotate_reference,
    shape_of,
    store_rotated,
)
from kernels.rope_tables import RopeTables, check_tables


def rope_backward_reference(
    grad_q: Tensor,  # (B, H, T, head_dim)
    grad_k: Tensor,  # (B, H_kv, T, head_dim)
    grad_v: Tensor,  # (B, H_kv, T, head_dim)
    positions: Tensor,  # (B, T)
    tables: RopeTables,
) -> Tensor:  # (B, T, (H + 2 H_kv) head_dim)
    """Rotate the gradients of queries and keys back and gather all three in a new buffer."""
    back = tables._replace(sin=-tables.sin).at(positions)
    grad_q = rotate_reference(grad_q, back.of_queries())
    grads = (grad_q, rotate_reference(grad_k, back), grad_v)
    return torch.cat(grads, dim=1).transpose(1, 2).flatten(2)


@triton.jit
def _copy_rest(
    out_ptr,  # the first head of a token, heads one behind the other
    head_ptr,
    stride_h,
    num_heads,
    first_head,
    HEAD: tl.constexpr,
    START: tl.constexpr,  # the first dimension that is copied
    COLUMNS: tl.constexpr,  # HEAD - START, to a power of two
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    dim = START + tl.arange(0, COLUMNS)[None, :]
    for tile in tl.static_range(TILES):
        head = first_head + tile * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (head < num_heads) & (dim < HEAD)
        rest = tl.load(head_ptr + head * stride_h + dim, mask=mask)
        tl.store(out_ptr + head * HEAD + dim, rest, mask=mask)


@triton.jit
def _rope_backward_kernel(
    grad_qkv_ptr,  # (B, T, (num_heads + 2 num_kv_heads) * HEAD)
    grad_q_ptr,  # (B, num_heads, T, HEAD)
    grad_k_ptr,  # (B, num_kv_heads, T, HEAD)
    grad_v_ptr,  # (B, num_kv_heads, T, HEAD)
    positions_ptr,  # (B, T)
    cos_ptr,  # (num_positions, HALF)
    sin_ptr,
    factor_ptr,  # (num_positions,), read where SCALES
    num_tokens,  # T
    num_heads,
    num_kv_heads,
    num_positions,
    stride_b,
    stride_t,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_positions_b,
    stride_positions_t,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,  # half a head, to a power of two
    REST_COLUMNS: tl.constexpr,  # dimensions that do not turn, to a power of two
    HEADS: tl.constexpr,
    Q_TILES: tl.constexpr,
    KV_TILES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALES: tl.constexpr,
):
    # one program gathers the gradients of a share of one token's heads: of queries, keys and values
    b = (tl.program_id(0) // num_tokens).to(tl.int64)
    t = (tl.program_id(0) % num_tokens).to(tl.int64)
    first_q = tl.program_id(1) * (HEADS * Q_TILES)
    first_kv = tl.program_id(1) * (HEADS * KV_TILES)
    positions_ptr += b * stride_positions_b + t * stride_positions_t
    q_ptr = grad_q_ptr + b * stride_qb + t * stride_qt
    k_ptr = grad_k_ptr + b * stride_kb + t * stride_kt
    v_ptr = grad_v_ptr + b * stride_vb + t * stride_vt
    out_q_ptr = grad_qkv_ptr + b * stride_b + t * stride_t
    out_k_ptr = out_q_ptr + num_heads * HEAD
    out_v_ptr = out_k_ptr + num_kv_heads * HEAD
    q = load_pairs(q_ptr, stride_qh, num_heads, first_q, HALF, COLUMNS, HEADS, Q_TILES, INTERLEAVED)
    k = load_pairs(
        k_ptr, stride_kh, num_kv_heads, first_kv, HALF, COLUMNS, HEADS, KV_TILES, INTERLEAVED
    )
    # a head of values in two halves, whatever turns of the others
    v = load_pairs(
        v_ptr, stride_vh, num_kv_heads, first_kv, HEAD // 2, V_COLUMNS, HEADS, KV_TILES, False
    )
    cos, sin, factor = load_angle(
        cos_ptr, sin_ptr, factor_ptr, positions_ptr, num_positions, HALF, COLUMNS, SCALES
    )
    store_rotated(
        out_q_ptr,
        q,
        cos,
        -sin,
        factor,
        num_heads,
        num_heads,
        first_q,
        HEAD,
        HALF,
        COLUMNS,
        HEADS,
        Q_TILES,
        INTERLEAVED,
        ROTATES=True,
        SCALES=SCALES,
    )
    store_rotated(
        out_k_ptr,
        k,
        cos,
        -sin,
        factor,
        0,
        num_kv_heads,
        first_kv,
        HEAD,
        HALF,
        COLUMNS,
        HEADS,
        KV_TILES,
        INTERLEAVED,
        ROTATES=True,
        SCALES=False,
    )
    store_rotated(
        out_v_ptr,
        v,
        cos,
        sin,
        factor,
        0,
        num_kv_heads,
        first_kv,
        HEAD,
        HEAD // 2,
        V_COLUMNS,
        HEADS,
        KV_TILES,
        INTERLEAVED=False,
        ROTATES=False,
        SCALES=False,
    )
    if REST_COLUMNS > 0:
        _copy_rest(
            out_q_ptr,
            q_ptr,
            stride_qh,
            num_heads,
            first_q,
            HEAD,
            2 * HALF,
            REST_COLUMNS,
            HEADS,
            Q_TILES,
        )
        _copy_rest(
            out_k_ptr,
            k_ptr,
            stride_kh,
            num_kv_heads,
            first_kv,
            HEAD,
            2 * HALF,
            REST_COLUMNS,
            HEADS,
            KV_TILES,
        )


def _launch_rope_backward(
    grad_q: Tensor,  # (B, H, T, head_dim)
    grad_k: Tensor,  # (B, H_kv, T, head_dim)
    grad_v: Tensor,  # (B, H_kv, T, head_dim)
    positions: Tensor,  # (B, T)
    tables: RopeTables,
    out: Tensor | None = None,  # (B, T, (H + 2 H_kv) head_dim)
) -> Tensor:  # (B, T, (H + 2 H_kv) head_dim)
    B, H, T, head_dim = grad_q.shape
    H_kv = grad_k.shape[1]
    if out is None:
        width = (H + 2 * H_kv) * head_dim
        out = torch.empty((B, T, width), dtype=grad_q.dtype, device=grad_q.device)
    num_positions, half = tables.cos.shape
    shape = shape_of(H, half, grad_q.element_size())
    num_tiles = cdiv(H, shape["HEADS"])
    q_tiles = min(num_tiles, MAX_TILES)
    num_programs = cdiv(num_tiles, q_tiles)
    if B * T > 0:
        launch(
            _rope_backward_kernel,
            (B * T, num_programs),
            grad_qkv_ptr=out,
            grad_q_ptr=grad_q,
            grad_k_ptr=grad_k,
            grad_v_ptr=grad_v,
            positions_ptr=positions,
            num_tokens=T,
            num_heads=H,
            num_kv_heads=H_kv,
            num_positions=num_positions,
            stride_b=out.stride(0),
            stride_t=out.stride(1),
            **head_strides(q=grad_q, k=grad_k, v=grad_v),
            stride_positions_b=positions.stride(0),
            stride_positions_t=positions.stride(1),
            HEAD=head_dim,
            V_COLUMNS=next_power_of_2(head_dim // 2),
            REST_COLUMNS=next_power_of_2(rest) if (rest := head_dim - 2 * half) else 0,
            Q_TILES=q_tiles,
            KV_TILES=cdiv(cdiv(H_kv, shape["HEADS"]), num_programs),
            **tables.launched(),
            enable_fp_fusion=False,
            **shape,
        )
    return out


def rope_backward(
    grad_q: Tensor,  # (B, H, T, head_dim), any layout whose heads are contiguous; so the next two
    grad_k: Tensor,  # (B, H_kv, T, head_dim)
    grad_v: Tensor,  # (B, H_kv, T, head_dim)
    positions: Tensor,  # (B, T) int32 or int64, rows of the tables
    tables: RopeTables,
    out: Tensor | None = None,  # (B, T, (H + 2 H_kv) head_dim)
) -> Tensor:  # (B, T, (H + 2 H_kv) head_dim)
    """Compute the gradient of `rope`'s buffer: rotate back, and gather.

        grad_x1 = grad_y1 cos + grad_y2 sin
        grad_x2 = grad_y2 cos - grad_y1 sin

    For queries cos and sin are multiplied by the factor of their position, if the tables have one.

    Args:
        positions, tables: as they were given to `rope`.
        out: the buffer that is written and returned, for instance the first columns of a wider
            buffer, whose other columns stay as they are; shares no memory with the gradients. A new
            tensor if None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a head of a gradient or a row of out is
            not contiguous, or something requires a gradient.
    """
    grads = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    check_dtype("grad_q", grad_q.dtype)
    if grad_q.dim() != 4 or grad_k.dim() != 4:
        raise ValueError(
            "grad_q and grad_k must have four dimensions, (B, H, T, head_dim): "
            f"got {tuple(grad_q.shape)} and {tuple(grad_k.shape)}"
        )
    B, H, T, head_dim = grad_q.shape
    H_kv = grad_k.shape[1]
    check_tables(positions, tables, (B, T), head_dim)
    for (name, grad), num_heads in zip(grads.items(), (H, H_kv, H_kv), strict=True):
        check_is(name, grad, grad_q.dtype, (B, num_heads, T, head_dim))
        check_rows_are_contiguous(name, grad, "heads")
    if out is not None:
        check_buffer("out", out, grad_q.dtype, (B, T, (H + 2 * H_kv) * head_dim))
        grads |= {"out": out}
    given = grads | {"positions": positions} | tables.tensors()
    check_one_device(given)
    check_not_recorded(given, "rope_backward")
    if grad_q.device.type == "cpu":
        grad_qkv = rope_backward_reference(grad_q, grad_k, grad_v, positions, tables)
        return grad_qkv if out is None else out.copy_(grad_qkv)
    return _launch_rope_backward(grad_q, grad_k, grad_v, positions, tables, out)
