"""Rotate the queries and keys of a qkv buffer by their positions, in place, on the GPU.

    y1 = x1 cos - x2 sin         (x1, x2) = (x[i], x[i + head_dim / 2]): Hugging Face's half-rotate
    y2 = x2 cos + x1 sin         order; Meta's own files interleave the pairs

    a token's row | q head 0 | q head 1 | ... | k head 0 | ... | v head 0 | ...
                    x1 | x2    x1 | x2    ...   x1 | x2          as it is

Queries and keys are one run of heads, so one launch rotates both, and a token's cosines and sines
are read once a program for all heads of it. In place, because nothing else holds the buffer: the
linear group that wrote it saves its input. Queries, keys and values are views of it.

The backward pass rotates by the negated angle. Attention returns three gradients that lie apart, in
whatever layout it likes, and the linear group wants one buffer: so the rotation gathers them there,
and copies the gradient of the values on the way. To rotate in place instead would follow a pass
that moves all three.

Two functions and no autograd between them: who calls them has a backward pass of its own. Accesses
stay 16 bytes wide where strides are multiples of 16 values.

With M tokens, S bytes a value and W_qk, W_v values a token of queries and keys, and of values:

    forward     2 M W_qk S             + 8 M (head_dim / 2) of the tables
    backward    2 M (W_qk + W_v) S     + the same

and 3 FLOPs a value: memory bandwidth is the limit. The arithmetic is float32, each product rounded,
the result rounded once: bit for bit the reference, forward and back.

Rotary position embeddings: Su et al. 2021, section 3.4.2, equation 34.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch

MAX_WARPS = 4
# the widest access of a thread
VECTOR_BYTES = 16
# tiles of heads per program, whose loads are all under way before the first is worked on
MAX_TILES = 4


def rotate_reference(
    x: Tensor,  # (B, H, T, head_dim)
    cos: Tensor,  # (B, 1, T, head_dim / 2) float32
    sin: Tensor,
) -> Tensor:  # x's shape and dtype
    """Rotate the pairs (x[i], x[i + head_dim / 2]) in float32, rounded once."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


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
    cos: Tensor,  # (T_max, head_dim / 2) float32
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, T, head_dim), (B, H_kv, T, head_dim) twice
    """Rotate queries and keys into new tensors."""
    query, key, value = _heads_of(qkv, num_heads, num_kv_heads)
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    return rotate_reference(query, cos, sin), rotate_reference(key, cos, sin), value


def rope_backward_reference(
    grad_q: Tensor,  # (B, H, T, head_dim)
    grad_k: Tensor,  # (B, H_kv, T, head_dim)
    grad_v: Tensor,  # (B, H_kv, T, head_dim)
    positions: Tensor,  # (B, T)
    cos: Tensor,  # (T_max, head_dim / 2) float32
    sin: Tensor,
) -> Tensor:  # (B, T, (H + 2 H_kv) head_dim)
    """Rotate the gradients of queries and keys back and gather all three in a new buffer."""
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    grads = (rotate_reference(grad_q, cos, -sin), rotate_reference(grad_k, cos, -sin), grad_v)
    return torch.cat(grads, dim=1).transpose(1, 2).flatten(2)


@triton.jit
def _load_halves(
    head_ptr,  # the first head of a token
    stride_h,
    num_heads,
    first_head,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,  # HALF, to a power of two
    HEADS: tl.constexpr,  # of a tile
    TILES: tl.constexpr,
):
    halves = ()
    column = tl.arange(0, COLUMNS)[None, :]
    for tile in tl.static_range(TILES):
        head = first_head + tile * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (head < num_heads) & (column < HALF)
        place = head_ptr + head * stride_h + column
        halves = halves + (tl.load(place, mask=mask), tl.load(place + HALF, mask=mask))  # noqa: RUF005, triton knows no star
    return halves


@triton.jit
def _store_rotated(
    out_ptr,  # the first head of a token, heads one behind the other
    halves,
    cos,  # (COLUMNS,)
    sin,
    num_heads,
    first_head,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    ROTATES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    for tile in tl.static_range(TILES):
        head = first_head + tile * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (head < num_heads) & (column < HALF)
        place = out_ptr + head * (2 * HALF) + column
        y1, y2 = halves[2 * tile], halves[2 * tile + 1]
        if ROTATES:
            x1, x2 = y1.to(tl.float32), y2.to(tl.float32)
            y1 = (x1 * cos[None, :] - x2 * sin[None, :]).to(out_ptr.dtype.element_ty)
            y2 = (x2 * cos[None, :] + x1 * sin[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(place, y1, mask=mask)
        tl.store(place + HALF, y2, mask=mask)


@triton.jit
def _load_angle(
    cos_ptr,
    sin_ptr,
    positions_ptr,  # of the token
    num_positions,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    position = tl.load(positions_ptr).to(tl.int64)
    # one that is not in the tables gives NaN instead of what lies beside them
    is_known = (position >= 0) & (position < num_positions)
    column = tl.arange(0, COLUMNS)
    offs = tl.where(is_known, position, 0) * HALF + column
    cos = tl.load(cos_ptr + offs, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + offs, mask=column < HALF, other=0.0)
    cos = tl.where(is_known, cos, float("nan"))
    sin = tl.where(is_known, sin, float("nan"))
    return cos, sin


@triton.jit
def _rope_kernel(
    qkv_ptr,  # (B, T, at least num_heads * 2 * HALF)
    positions_ptr,  # (B, T)
    cos_ptr,  # (num_positions, HALF)
    sin_ptr,
    num_tokens,  # T
    num_heads,  # of queries and keys
    num_positions,
    stride_b,
    stride_t,
    stride_positions_b,
    stride_positions_t,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    # one program rotates HEADS * TILES heads of one token in place
    b = (tl.program_id(0) // num_tokens).to(tl.int64)
    t = (tl.program_id(0) % num_tokens).to(tl.int64)
    first_head = tl.program_id(1) * (HEADS * TILES)
    token_ptr = qkv_ptr + b * stride_b + t * stride_t
    positions_ptr += b * stride_positions_b + t * stride_positions_t
    halves = _load_halves(token_ptr, 2 * HALF, num_heads, first_head, HALF, COLUMNS, HEADS, TILES)
    cos, sin = _load_angle(cos_ptr, sin_ptr, positions_ptr, num_positions, HALF, COLUMNS)
    _store_rotated(
        token_ptr, halves, cos, sin, num_heads, first_head, HALF, COLUMNS, HEADS, TILES, True
    )


@triton.jit
def _rope_backward_kernel(
    grad_qkv_ptr,  # (B, T, (num_heads + 2 num_kv_heads) * 2 * HALF)
    grad_q_ptr,  # (B, num_heads, T, 2 * HALF)
    grad_k_ptr,  # (B, num_kv_heads, T, 2 * HALF)
    grad_v_ptr,  # (B, num_kv_heads, T, 2 * HALF)
    positions_ptr,  # (B, T)
    cos_ptr,  # (num_positions, HALF)
    sin_ptr,
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
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    Q_TILES: tl.constexpr,
    KV_TILES: tl.constexpr,
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
    out_k_ptr = out_q_ptr + num_heads * (2 * HALF)
    out_v_ptr = out_k_ptr + num_kv_heads * (2 * HALF)
    q = _load_halves(q_ptr, stride_qh, num_heads, first_q, HALF, COLUMNS, HEADS, Q_TILES)
    k = _load_halves(k_ptr, stride_kh, num_kv_heads, first_kv, HALF, COLUMNS, HEADS, KV_TILES)
    v = _load_halves(v_ptr, stride_vh, num_kv_heads, first_kv, HALF, COLUMNS, HEADS, KV_TILES)
    cos, sin = _load_angle(cos_ptr, sin_ptr, positions_ptr, num_positions, HALF, COLUMNS)
    _store_rotated(out_q_ptr, q, cos, -sin, num_heads, first_q, HALF, COLUMNS, HEADS, Q_TILES, True)
    _store_rotated(
        out_k_ptr, k, cos, -sin, num_kv_heads, first_kv, HALF, COLUMNS, HEADS, KV_TILES, True
    )
    _store_rotated(
        out_v_ptr, v, cos, sin, num_kv_heads, first_kv, HALF, COLUMNS, HEADS, KV_TILES, False
    )


def _shape(num_heads: int, half: int, itemsize: int) -> dict[str, int]:
    """Choose warps and tiles, so that every thread has a vector of each half of a tile's heads.

    Whole tiles in any case: two threads would load a smaller one's values, and one of them might do
    so after the other has written.
    """
    columns = triton.next_power_of_2(half)
    warp_width = 32 * VECTOR_BYTES // itemsize
    warps = triton.cdiv(triton.next_power_of_2(num_heads) * columns, warp_width)
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
    cos: Tensor,  # (T_max, head_dim / 2) float32
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, T, head_dim), (B, H_kv, T, head_dim) twice
    B, T, _ = qkv.shape
    num_rotated = num_heads + num_kv_heads
    shape = _shape(num_rotated, cos.shape[1], qkv.element_size())
    num_tiles = triton.cdiv(num_rotated, shape["HEADS"])
    tiles = min(num_tiles, MAX_TILES)
    if B * T > 0:
        launch(
            _rope_kernel,
            (B * T, triton.cdiv(num_tiles, tiles)),
            qkv,
            positions,
            cos,
            sin,
            T,
            num_rotated,
            cos.shape[0],
            qkv.stride(0),
            qkv.stride(1),
            positions.stride(0),
            positions.stride(1),
            TILES=tiles,
            enable_fp_fusion=False,
            **shape,
        )
    return _heads_of(qkv, num_heads, num_kv_heads)


def _launch_rope_backward(
    grad_q: Tensor,  # (B, H, T, head_dim)
    grad_k: Tensor,  # (B, H_kv, T, head_dim)
    grad_v: Tensor,  # (B, H_kv, T, head_dim)
    positions: Tensor,  # (B, T)
    cos: Tensor,  # (T_max, head_dim / 2) float32
    sin: Tensor,
    out: Tensor | None = None,  # (B, T, (H + 2 H_kv) head_dim)
) -> Tensor:  # (B, T, (H + 2 H_kv) head_dim)
    B, H, T, head_dim = grad_q.shape
    H_kv = grad_k.shape[1]
    if out is None:
        width = (H + 2 * H_kv) * head_dim
        out = torch.empty((B, T, width), dtype=grad_q.dtype, device=grad_q.device)
    shape = _shape(H, head_dim // 2, grad_q.element_size())
    num_tiles = triton.cdiv(H, shape["HEADS"])
    q_tiles = min(num_tiles, MAX_TILES)
    num_programs = triton.cdiv(num_tiles, q_tiles)
    if B * T > 0:
        launch(
            _rope_backward_kernel,
            (B * T, num_programs),
            out,
            grad_q,
            grad_k,
            grad_v,
            positions,
            cos,
            sin,
            T,
            H,
            H_kv,
            cos.shape[0],
            out.stride(0),
            out.stride(1),
            *(stride for grad in (grad_q, grad_k, grad_v) for stride in grad.stride()[:3]),
            positions.stride(0),
            positions.stride(1),
            Q_TILES=q_tiles,
            KV_TILES=triton.cdiv(triton.cdiv(H_kv, shape["HEADS"]), num_programs),
            enable_fp_fusion=False,
            **shape,
        )
    return out


def _check_tables(positions: Tensor, cos: Tensor, sin: Tensor, tokens: tuple[int, int]) -> None:
    tables = (cos, sin)
    if (
        cos.dim() != 2
        or cos.shape != sin.shape
        or any(table.dtype != torch.float32 or not table.is_contiguous() for table in tables)
    ):
        raise ValueError(
            "cos and sin must be contiguous float32 matrices of one shape: got "
            + " and ".join(f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}" for t in tables)
        )
    if tuple(positions.shape) != tokens or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions must be int32 or int64 of shape {tokens}: "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )


def _check_buffer(name: str, buffer: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse a buffer of another shape, or one whose rows are scattered or overlap."""
    if tuple(buffer.shape) != shape or buffer.stride(2) != 1:
        raise ValueError(
            f"{name} must have shape {shape}, each row contiguous: "
            f"got {tuple(buffer.shape)} with strides {buffer.stride()}"
        )
    if any(
        n > 1 and stride < shape[2] for n, stride in zip(shape[:2], buffer.stride(), strict=False)
    ):
        raise ValueError(f"{name} must have rows that do not overlap: got {buffer.stride()}")


def _check_together(**tensors: Tensor) -> None:
    """Refuse tensors, by name, of several devices, and those that require a gradient."""
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{', '.join(tensors)} must be on one device: got {devices}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        raise ValueError(
            "nothing is recorded for autograd: got a tensor that requires a gradient; "
            "call under torch.no_grad(), and rope_backward for the gradient"
        )


def rope(
    qkv: Tensor,  # (B, T, (H + 2 H_kv) head_dim): queries, keys, values
    positions: Tensor,  # (B, T) int32 or int64, rows of the tables
    cos: Tensor,  # (T_max, head_dim / 2) float32
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, T, head_dim), (B, H_kv, T, head_dim) twice
    """Rotate queries and keys by their positions and take the buffer apart.

        y1 = x1 cos - x2 sin
        y2 = x2 cos + x1 sin

    Args:
        qkv: consumed: on a GPU it is overwritten, and the results are views of it.
        positions: on a GPU, one that is not in the tables gives NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a row is not contiguous, or something
            requires a gradient.
    """
    if qkv.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"qkv must be bfloat16, float16 or float32: got {qkv.dtype}")
    if qkv.dim() != 3:
        raise ValueError(f"qkv must have three dimensions, (B, T, -1): got {tuple(qkv.shape)}")
    B, T, _ = qkv.shape
    _check_tables(positions, cos, sin, (B, T))
    _check_buffer("qkv", qkv, (B, T, (num_heads + 2 * num_kv_heads) * 2 * cos.shape[1]))
    _check_together(qkv=qkv, positions=positions, cos=cos, sin=sin)
    if qkv.device.type == "cpu":
        return rope_reference(qkv, positions, cos, sin, num_heads, num_kv_heads)
    return _launch_rope(qkv, positions, cos, sin, num_heads, num_kv_heads)


def rope_backward(
    grad_q: Tensor,  # (B, H, T, head_dim), any layout whose heads are contiguous; so the next two
    grad_k: Tensor,  # (B, H_kv, T, head_dim)
    grad_v: Tensor,  # (B, H_kv, T, head_dim)
    positions: Tensor,  # (B, T) int32 or int64, rows of the tables
    cos: Tensor,  # (T_max, head_dim / 2) float32
    sin: Tensor,
    out: Tensor | None = None,  # (B, T, (H + 2 H_kv) head_dim)
) -> Tensor:  # (B, T, (H + 2 H_kv) head_dim)
    """Compute the gradient of `rope`'s buffer: rotate back, and gather.

        grad_x1 = grad_y1 cos + grad_y2 sin
        grad_x2 = grad_y2 cos - grad_y1 sin

    Args:
        positions: those that were given to `rope`, and so the tables.
        out: what to write into and return, for instance the first columns of a wider buffer, whose
            other columns stay as they are; shares no memory with the gradients. A new tensor if
            None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a head of a gradient or a row of out is
            not contiguous, or something requires a gradient.
    """
    grads = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    if grad_q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"grad_q must be bfloat16, float16 or float32: got {grad_q.dtype}")
    if grad_q.dim() != 4 or grad_k.dim() != 4:
        raise ValueError(
            "grad_q and grad_k must have four dimensions, (B, H, T, head_dim): "
            f"got {tuple(grad_q.shape)} and {tuple(grad_k.shape)}"
        )
    B, H, T, head_dim = grad_q.shape
    H_kv = grad_k.shape[1]
    _check_tables(positions, cos, sin, (B, T))
    if head_dim != 2 * cos.shape[1]:
        raise ValueError(
            f"heads must be twice as long as the tables' rows: got {head_dim} and {cos.shape[1]}"
        )
    for (name, grad), num_heads in zip(grads.items(), (H, H_kv, H_kv), strict=True):
        shape = (B, num_heads, T, head_dim)
        if (tuple(grad.shape), grad.dtype) != (shape, grad_q.dtype) or grad.stride(3) != 1:
            raise ValueError(
                f"{name} must be {grad_q.dtype} of shape {shape}, each head contiguous: "
                f"got {grad.dtype} {tuple(grad.shape)} with strides {grad.stride()}"
            )
    if out is not None:
        _check_buffer("out", out, (B, T, (H + 2 * H_kv) * head_dim))
        if out.dtype != grad_q.dtype:
            raise ValueError(f"out must have the gradients' dtype, {grad_q.dtype}: got {out.dtype}")
        grads |= {"out": out}
    _check_together(**grads, positions=positions, cos=cos, sin=sin)
    if grad_q.device.type == "cpu":
        grad_qkv = rope_backward_reference(grad_q, grad_k, grad_v, positions, cos, sin)
        return grad_qkv if out is None else out.copy_(grad_qkv)
    return _launch_rope_backward(grad_q, grad_k, grad_v, positions, cos, sin, out)
