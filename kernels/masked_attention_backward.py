"""Compute the gradients of `kernels/masked_attention.py` by two kernels, on the GPU.

    p      = exp(s - lse)                           s, lse: as the forward pass has them
    grad_v = p^T grad
    grad_s = p (grad v^T - delta) softcap'(s)       delta = sum(grad out) of each row
    grad_q = scale grad_s k
    grad_k = scale grad_s^T q

    queries |     keys -->              grad_q of one tile of queries is summed along the row, which
     BLOCK_M|  . x x . . .              also writes their delta; grad_k and grad_v of one tile of
       |    |  . . x x . .              keys down the column, for all query heads that share them
       v    |  . . . x x .
            |    BLOCK_N

The scores are computed again from lse, one number a row and head. With P pairs seen by each head
and heads of E values, both kernels take 14 B H P E FLOPs: three products for grad_q, four for
grad_k and grad_v, of which q k^T and grad v^T are computed by both.

FlashAttention-2: Dao 2023, algorithm 2.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

import torch
from torch import Tensor

from kernels.checks import check_is, check_is_contiguous
from kernels.device import properties
from kernels.language import tl, triton
from kernels.launch import cdiv, head_strides, launch
from kernels.masked_attention import check_heads
from kernels.masked_attention_mask import Samples, reach_of
from kernels.masked_attention_reference import masked_attention_backward_reference
from kernels.masked_attention_tiles import (
    PRECISION,
    empty_heads,
    load_tile,
    padded_width,
    store_tile,
    tiles_of,
)
from kernels.softcap import softcap, softcap_slope


@triton.jit
def _masked_attention_grad_q_kernel(
    grad_q_ptr,  # (B, T, H, E), contiguous
    delta_ptr,  # (B, H, T), written
    grad_ptr,  # (B, H, T, E)
    out_ptr,  # (B, T, H, E), contiguous
    lse_ptr,  # (B, H, T)
    q_ptr,  # (B, H, T, E)
    k_ptr,  # (B, H_kv, T, E)
    v_ptr,
    positions_ptr,  # (B, T), read where rows hold several samples
    scale,
    cap,
    window,
    num_tokens,
    num_heads,
    num_shared,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    CAPPED: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program computes the gradients of BLOCK_M queries of one head, and their delta
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    grad_ptr += b * stride_gb + h * stride_gh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // num_shared * stride_kh
    v_ptr += b * stride_vb + h // num_shared * stride_vh
    place = (b * num_tokens * num_heads + h) * HEAD_DIM
    lse_ptr += (b * num_heads + h) * num_tokens
    delta_ptr += (b * num_heads + h) * num_tokens
    rows = first_row + tl.arange(0, BLOCK_M)
    grad = load_tile(grad_ptr, rows, num_tokens, stride_gt, HEAD_DIM, HEAD)
    out = load_tile(out_ptr + place, rows, num_tokens, num_heads * HEAD_DIM, HEAD_DIM, HEAD)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=rows < num_tokens)
    lse = tl.load(lse_ptr + rows, mask=rows < num_tokens, other=float("inf"))
    q = load_tile(q_ptr, rows, num_tokens, stride_qt, HEAD_DIM, HEAD)
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    reach = reach_of(positions_ptr + b * num_tokens, rows, num_tokens, window, PACKED)
    first = tl.maximum(tl.min(rows - reach), 0) // BLOCK_N * BLOCK_N
    last = tl.minimum(first_row + BLOCK_M, num_tokens)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, columns, num_tokens, stride_kt, HEAD_DIM, HEAD)
        v = load_tile(v_ptr, columns, num_tokens, stride_vt, HEAD_DIM, HEAD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAPPED:
            s = softcap(s, cap)
        distance = rows[:, None] - columns[None, :]
        is_seen = (distance >= 0) & (distance <= reach[:, None])
        p = tl.where(is_seen, tl.exp(s - lse[:, None]), 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_s = p * (grad_p - delta[:, None])
        if CAPPED:
            grad_s *= softcap_slope(s, cap)
        acc = tl.dot(grad_s.to(k.dtype), k, acc, input_precision=PRECISION)
    store_tile(
        grad_q_ptr + place, acc * scale, rows, num_tokens, num_heads * HEAD_DIM, HEAD_DIM, HEAD
    )


@triton.jit
def _masked_attention_grad_kv_kernel(
    grad_k_ptr,  # (B, T, H_kv, E), contiguous
    grad_v_ptr,
    delta_ptr,  # (B, H, T)
    grad_ptr,  # (B, H, T, E)
    lse_ptr,  # (B, H, T)
    q_ptr,  # (B, H, T, E)
    k_ptr,  # (B, H_kv, T, E)
    v_ptr,
    remaining_ptr,  # (B, T), read where rows hold several samples
    scale,
    cap,
    window,
    num_tokens,
    num_kv_heads,
    num_shared,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    CAPPED: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program computes the gradients of BLOCK_N keys and values of one head, from all query
    # heads that share it; the first keys are seen by most, and start first
    first_column = tl.program_id(0) * BLOCK_N
    h_kv = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    columns = first_column + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, columns, num_tokens, stride_kt, HEAD_DIM, HEAD)
    v = load_tile(v_ptr, columns, num_tokens, stride_vt, HEAD_DIM, HEAD)
    acc_k = tl.zeros((BLOCK_N, HEAD), tl.float32)
    acc_v = tl.zeros((BLOCK_N, HEAD), tl.float32)
    first = first_column // BLOCK_M * BLOCK_M
    followers = reach_of(remaining_ptr + b * num_tokens, columns, num_tokens, window, PACKED)
    last = tl.minimum(tl.max(columns + followers) + 1, num_tokens)
    num_blocks = tl.cdiv(last - first, BLOCK_M)
    for turn in range(num_shared * num_blocks):
        h = h_kv * num_shared + turn // num_blocks
        rows = first + turn % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_tile(
            q_ptr + b * stride_qb + h * stride_qh, rows, num_tokens, stride_qt, HEAD_DIM, HEAD
        )
        grad = load_tile(
            grad_ptr + b * stride_gb + h * stride_gh,
            rows,
            num_tokens,
            stride_gt,
            HEAD_DIM,
            HEAD,
        )
        offs = (b * num_kv_heads * num_shared + h) * num_tokens + rows
        lse = tl.load(lse_ptr + offs, mask=rows < num_tokens, other=float("inf"))
        delta = tl.load(delta_ptr + offs, mask=rows < num_tokens, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if CAPPED:
            s = softcap(s, cap)
        distance = rows[None, :] - columns[:, None]
        # in a sample, the tokens that see a token are its followers
        is_seen = (distance >= 0) & (distance <= followers[:, None])
        p = tl.where(is_seen, tl.exp(s - lse[None, :]), 0.0)
        acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_s = p * (grad_p - delta[None, :])
        if CAPPED:
            grad_s *= softcap_slope(s, cap)
        acc_k = tl.dot(grad_s.to(q.dtype), q, acc_k, input_precision=PRECISION)
    place = (b * num_tokens * num_kv_heads + h_kv) * HEAD_DIM
    stride = num_kv_heads * HEAD_DIM
    store_tile(grad_k_ptr + place, acc_k * scale, columns, num_tokens, stride, HEAD_DIM, HEAD)
    store_tile(grad_v_ptr + place, acc_v, columns, num_tokens, stride, HEAD_DIM, HEAD)


def _launch_masked_attention_backward(
    grad: Tensor,  # (B, H, T, E)
    query: Tensor,
    key: Tensor,  # (B, H_kv, T, E)
    value: Tensor,
    out: Tensor,  # (B, H, T, E), as the forward pass made it
    lse: Tensor,  # (B, H, T)
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, head_dim = query.shape
    num_kv_heads = key.shape[1]
    assert out.transpose(1, 2).is_contiguous()
    grad_q, grad_k, grad_v = empty_heads(query), empty_heads(key), empty_heads(value)
    delta = torch.empty_like(lse)
    tiles = tiles_of(head_dim, query.dtype, properties(query.device))
    if tiles is None:
        # as in the forward pass
        assert query.device.type == "meta"
        return grad_q, grad_k, grad_v
    # what both kernels take
    shared = {
        "delta_ptr": delta,
        "grad_ptr": grad,
        "lse_ptr": lse,
        "q_ptr": query,
        "k_ptr": key,
        "v_ptr": value,
        "scale": scale,
        "cap": cap or 0.0,
        "window": window or T,
        "num_tokens": T,
        "num_shared": H // num_kv_heads,
        **head_strides(g=grad, q=query, k=key, v=value),
        "CAPPED": cap is not None,
        "PACKED": samples is not None,
        "HEAD_DIM": head_dim,
        "HEAD": padded_width(head_dim),
        # multiply-adds round less
        "enable_fp_fusion": True,
    }
    launch(
        _masked_attention_grad_q_kernel,
        (cdiv(T, tiles.grad_q.BLOCK_M), H, B),
        grad_q_ptr=grad_q,
        out_ptr=out,
        positions_ptr=samples.positions if samples else lse,
        num_heads=H,
        **shared,
        **tiles.grad_q._asdict(),
    )
    launch(
        _masked_attention_grad_kv_kernel,
        (cdiv(T, tiles.grad_kv.BLOCK_N), num_kv_heads, B),
        grad_k_ptr=grad_k,
        grad_v_ptr=grad_v,
        remaining_ptr=samples.remaining if samples else lse,
        num_kv_heads=num_kv_heads,
        **shared,
        **tiles.grad_kv._asdict(),
    )
    return grad_q, grad_k, grad_v


def masked_attention_backward(
    grad: Tensor,  # (B, H, T, head_dim), any layout whose heads are contiguous; so the next three
    query: Tensor,  # (B, H, T, head_dim)
    key: Tensor,  # (B, H_kv, T, head_dim)
    value: Tensor,
    out: Tensor,  # (B, H, T, head_dim)
    lse: Tensor,  # (B, H, T) float32
    scale: float,
    cap: float | None = None,
    window: int | None = None,
    samples: Samples | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # grad_q (B, H, T, head_dim), grad_k and grad_v as key
    """Compute the gradients of `masked_attention`'s query, key and value from that of out.

    Args:
        out, lse: as `masked_attention` returned them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, there are more keys than queries, a head
            is not contiguous or, on a GPU, as `check_head_dim`, a number is not positive, or
            something requires a gradient.
    """
    tensors = {"query": query, "key": key, "value": value, "grad": grad, "out": out}
    check_heads(tensors, query.shape[2] if query.dim() == 4 else 0, scale, cap, window, samples)
    check_is("lse", lse, torch.float32, tuple(query.shape[:3]))
    check_is_contiguous("lse", lse)
    arguments = (grad, query, key, value, out, lse, scale, cap, window, samples)
    if query.device.type == "cpu":
        return masked_attention_backward_reference(*arguments)
    return _launch_masked_attention_backward(*arguments)
