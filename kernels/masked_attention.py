"""Causal grouped-query attention with what torch's products leave out, forward and back: capped
scores, windows, several samples in a row. The scores are not held.

    s     = softcap(scale q k^T)                    softcap(x) = cap tanh(x / cap), or x
    p     = exp(s - lse)                            lse = log sum exp(s), over the tokens seen
    out   = p v

    grad_v = p^T grad
    grad_s = p (grad v^T - delta) softcap'(s)       delta = sum(grad out) of each row
    grad_q = scale grad_s k
    grad_k = scale grad_s^T q

    queries |     keys -->              token i sees j <= i; in a window of W tokens j > i - W; and
     BLOCK_M|  . x x . . .              only tokens of its sample. A program passes over the tiles
       |    |  . . x x . .              that hold any such pair: out and grad_q of one tile of
       v    |  . . . x x .              queries along the row, grad_k and grad_v of one tile of keys
            |    BLOCK_N                down the column, for all query heads that share them

Where samples lie side by side, a token's position in its sample says how many tokens before it it
sees, and the number that remain behind it how many see it. Both are read from the device, so one
launch, or one captured graph, serves every way to fill a row.

torch's products know no cap, and a mask they take as a tensor of T^2 scores. Gemma 2 caps at 50
with heads of 256 (Gemma Team 2024, section 2).

Scores and their gradients live in registers, tile by tile, in float32; what is multiplied again is
rounded to the inputs' dtype. The backward pass computes them again from lse, one number a row and
head. No atomic addition: each result is summed by one program, in one order, so equal inputs give
equal bits. With P pairs seen by each head (T^2 / 2 without a window, T L / 2 in samples of L) and
heads of E values, FLOPs are

    forward      4 B H P E
    backward    14 B H P E       three products for grad_q, four for grad_k and grad_v: q k^T and
                                 grad v^T are computed by both

and a capped score costs about 25 instructions beside them each time, three of them on the special
function unit.

FlashAttention-2: Dao 2023, algorithms 1 and 2; here without a running maximum below -cap.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import properties
from kernels.launch import MAX_LATER_AXIS, launch
from kernels.softcap import softcap, softcap_reference, softcap_slope


class Samples(NamedTuple):
    """Where each token of a row lies, if the row holds several samples."""

    positions: Tensor  # (B, T) int32: tokens of its sample before it
    remaining: Tensor  # (B, T) int32: tokens of its sample after it


class Tile(NamedTuple):
    """Queries and keys of a tile, and the warps of the program that works on it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    out: Tile
    grad_q: Tile
    grad_kv: Tile


# by the least bytes of shared memory that a program must have, the most first; then by the width of
# a head, to a power of two, and bytes of a value. They spill nothing where not said, but for 16 to
# 48 bytes on sm_120; wider tiles are slower for heads of 128
CONFIGS = {
    227 << 10: {
        (256, 2): Tiles(Tile(64, 16, 4, 4), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    99 << 10: {
        (64, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
        (128, 2): Tiles(Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 3)),
        (256, 2): Tiles(Tile(64, 16, 4, 4), Tile(32, 64, 8, 1), Tile(32, 32, 8, 1)),
        (64, 4): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (128, 4): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
        # spills: its products are unrolled over the head
        (256, 4): Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    # of sm_75, for which Triton knows no tensor cores: its products are unrolled in any dtype
    64 << 10: {
        (64, 2): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (128, 2): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        # the gradients spill
        (256, 2): Tiles(Tile(32, 16, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (64, 4): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (128, 4): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
        # the queries' gradient spills
        (256, 4): Tiles(Tile(16, 16, 8, 1), Tile(8, 16, 8, 1), Tile(16, 8, 8, 1)),
    },
}
MIN_HEAD, MAX_HEAD = 64, 256
# of float32, which is there for trials: no tensor cores
PRECISION = tl.constexpr("ieee")
# below every score that is no infinity, and finite: a row whose tile it sees nothing of stays at 0
LOWEST = tl.constexpr(-1e30)
# numbers that the reference holds of the scores at once
NUM_SCORES = 1 << 24


def masked_attention_reference(
    query: Tensor,  # (B, H, T, E)
    key: Tensor,  # (B, H_kv, T_all, E)
    value: Tensor,  # (B, H_kv, T_all, E)
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> tuple[Tensor, Tensor]:  # out (B, H, T, E), lse (B, H, T) float32
    """Attend in float32, some queries at a time, rounding once."""
    outs, lses = [], []
    for rows in _row_chunks(query, key):
        scores = _scores(query[:, :, rows], rows, query, key, scale, cap, window, samples)
        lse = scores.logsumexp(dim=-1)
        out = (scores - lse[..., None]).exp() @ value[:, :, None].float()
        outs.append(out.flatten(1, 2).to(query.dtype))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def masked_attention_backward_reference(
    grad: Tensor,  # (B, H, T, E)
    query: Tensor,  # (B, H, T, E)
    key: Tensor,  # (B, H_kv, T, E)
    value: Tensor,  # (B, H_kv, T, E)
    out: Tensor,  # (B, H, T, E)
    lse: Tensor,  # (B, H, T) float32
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients in float32, some queries at a time, rounding once."""
    grad_q = torch.empty_like(query)
    grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
    for rows in _row_chunks(query, key):
        some_q, some_grad, some_out = (
            _grouped(x[:, :, rows], key).float() for x in (query, grad, out)
        )
        scores = _scores(query[:, :, rows], rows, query, key, scale, cap, window, samples)
        p = (scores - _grouped(lse[:, :, rows], key)[..., None]).exp()
        delta = (some_grad * some_out).sum(dim=-1, keepdim=True)
        grad_s = scale * p * (some_grad @ value[:, :, None].float().mT - delta)
        if cap is not None:
            grad_s *= 1 - (scores.clamp(min=-cap) / cap).square()
        grad_q[:, :, rows] = (grad_s @ key[:, :, None].float()).flatten(1, 2).to(query.dtype)
        grad_k += (grad_s.mT @ some_q).sum(dim=2)
        grad_v += (p.mT @ some_grad).sum(dim=2)
    return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype)


def _row_chunks(query: Tensor, key: Tensor) -> list[slice]:
    """Split the queries so that their scores do not exceed NUM_SCORES."""
    B, H, T, _ = query.shape
    step = max(1, NUM_SCORES // (B * H * key.shape[2]))
    return [slice(first, min(first + step, T)) for first in range(0, T, step)]


def _grouped(heads: Tensor, key: Tensor) -> Tensor:  # (B, H, ...) -> (B, H_kv, H / H_kv, ...)
    """View the query heads by the head of keys and values that they share."""
    return heads.unflatten(1, (key.shape[1], -1))


def _scores(
    some: Tensor,  # (B, H, some rows, E)
    rows: slice,
    query: Tensor,
    key: Tensor,
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> Tensor:  # (B, H_kv, H / H_kv, some rows, T_all) float32
    """Compute the capped scores of some queries, minus infinity where they do not see."""
    num_keys = key.shape[2]
    products = scale * (_grouped(some, key).float() @ key[:, :, None].float().mT)
    places = torch.arange(num_keys - query.shape[2], num_keys, device=key.device)[rows]
    distance = places[:, None] - torch.arange(num_keys, device=key.device)
    is_seen = (distance >= 0) & (distance < (window or num_keys))
    if samples is not None:
        # over the heads
        is_seen = (is_seen & (distance <= samples.positions[:, rows, None]))[:, None, None]
    scores = products if cap is None else softcap_reference(products, cap)
    return scores.masked_fill(~is_seen, -math.inf)


@triton.jit
def _load_tile(ptr, offs, num_rows, stride, HEAD_DIM: tl.constexpr, HEAD: tl.constexpr):
    column = tl.arange(0, HEAD)[None, :]
    mask = (offs[:, None] < num_rows) & (column < HEAD_DIM)
    return tl.load(ptr + offs[:, None].to(tl.int64) * stride + column, mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, tile, offs, num_rows, stride, HEAD_DIM: tl.constexpr, HEAD: tl.constexpr):
    column = tl.arange(0, HEAD)[None, :]
    mask = (offs[:, None] < num_rows) & (column < HEAD_DIM)
    place = ptr + offs[:, None].to(tl.int64) * stride + column
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reach(in_sample_ptr, offs, num_tokens, window, PACKED: tl.constexpr):
    # how many tokens before these they see, or after these see them
    reach = tl.zeros(offs.shape, tl.int32) + (window - 1)
    if PACKED:
        reach = tl.minimum(reach, tl.load(in_sample_ptr + offs, mask=offs < num_tokens, other=0))
    return reach


@triton.jit
def _masked_attention_kernel(
    out_ptr,  # (B, T, H, E), contiguous
    lse_ptr,  # (B, H, T)
    q_ptr,  # (B, H, T, E)
    k_ptr,  # (B, H_kv, T_all, E)
    v_ptr,
    positions_ptr,  # (B, T), read where rows hold several samples
    scale,
    cap,
    window,
    num_queries,
    num_keys,
    num_heads,
    num_shared,  # H / H_kv
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
    HEAD: tl.constexpr,  # HEAD_DIM, to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program computes the results of BLOCK_M queries of one head; those that see most start
    # first
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // num_shared * stride_kh
    v_ptr += b * stride_vb + h // num_shared * stride_vh
    out_ptr += (b * num_queries * num_heads + h) * HEAD_DIM
    lse_ptr += (b * num_heads + h) * num_queries
    rows = first_row + tl.arange(0, BLOCK_M)
    # the queries are the last of all tokens
    num_past = num_keys - num_queries
    places = num_past + rows
    reach = _reach(positions_ptr + b * num_queries, rows, num_queries, window, PACKED)
    q = _load_tile(q_ptr, rows, num_queries, stride_qt, HEAD_DIM, HEAD)
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # no score is below
    largest = tl.zeros((BLOCK_M,), tl.float32) + (-cap if CAPPED else LOWEST)
    first = tl.maximum(tl.min(places - reach), 0) // BLOCK_N * BLOCK_N
    last = tl.minimum(num_past + first_row + BLOCK_M, num_keys)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = _load_tile(k_ptr, columns, num_keys, stride_kt, HEAD_DIM, HEAD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAPPED:
            s = softcap(s, cap)
        distance = places[:, None] - columns[None, :]
        s = tl.where((distance >= 0) & (distance <= reach[:, None]), s, float("-inf"))
        raised = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp(s - raised[:, None])
        factor = tl.exp(largest - raised)
        total = total * factor + tl.sum(p, 1)
        v = _load_tile(v_ptr, columns, num_keys, stride_vt, HEAD_DIM, HEAD)
        acc = acc * factor[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        largest = raised
    out = acc / total[:, None]
    _store_tile(out_ptr, out, rows, num_queries, num_heads * HEAD_DIM, HEAD_DIM, HEAD)
    tl.store(lse_ptr + rows, largest + tl.log(total), mask=rows < num_queries)


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
    stride_grad_b,
    stride_grad_h,
    stride_grad_t,
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
    grad_ptr += b * stride_grad_b + h * stride_grad_h
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // num_shared * stride_kh
    v_ptr += b * stride_vb + h // num_shared * stride_vh
    place = (b * num_tokens * num_heads + h) * HEAD_DIM
    lse_ptr += (b * num_heads + h) * num_tokens
    delta_ptr += (b * num_heads + h) * num_tokens
    rows = first_row + tl.arange(0, BLOCK_M)
    grad = _load_tile(grad_ptr, rows, num_tokens, stride_grad_t, HEAD_DIM, HEAD)
    out = _load_tile(out_ptr + place, rows, num_tokens, num_heads * HEAD_DIM, HEAD_DIM, HEAD)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=rows < num_tokens)
    lse = tl.load(lse_ptr + rows, mask=rows < num_tokens, other=float("inf"))
    q = _load_tile(q_ptr, rows, num_tokens, stride_qt, HEAD_DIM, HEAD)
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    reach = _reach(positions_ptr + b * num_tokens, rows, num_tokens, window, PACKED)
    first = tl.maximum(tl.min(rows - reach), 0) // BLOCK_N * BLOCK_N
    last = tl.minimum(first_row + BLOCK_M, num_tokens)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = _load_tile(k_ptr, columns, num_tokens, stride_kt, HEAD_DIM, HEAD)
        v = _load_tile(v_ptr, columns, num_tokens, stride_vt, HEAD_DIM, HEAD)
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
    _store_tile(
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
    stride_grad_b,
    stride_grad_h,
    stride_grad_t,
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
    k = _load_tile(k_ptr, columns, num_tokens, stride_kt, HEAD_DIM, HEAD)
    v = _load_tile(v_ptr, columns, num_tokens, stride_vt, HEAD_DIM, HEAD)
    acc_k = tl.zeros((BLOCK_N, HEAD), tl.float32)
    acc_v = tl.zeros((BLOCK_N, HEAD), tl.float32)
    first = first_column // BLOCK_M * BLOCK_M
    followers = _reach(remaining_ptr + b * num_tokens, columns, num_tokens, window, PACKED)
    last = tl.minimum(tl.max(columns + followers) + 1, num_tokens)
    num_blocks = tl.cdiv(last - first, BLOCK_M)
    for turn in range(num_shared * num_blocks):
        h = h_kv * num_shared + turn // num_blocks
        rows = first + turn % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        q = _load_tile(
            q_ptr + b * stride_qb + h * stride_qh, rows, num_tokens, stride_qt, HEAD_DIM, HEAD
        )
        grad = _load_tile(
            grad_ptr + b * stride_grad_b + h * stride_grad_h,
            rows,
            num_tokens,
            stride_grad_t,
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
        # in a sample whoever sees a token is one of its followers
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
    _store_tile(grad_k_ptr + place, acc_k * scale, columns, num_tokens, stride, HEAD_DIM, HEAD)
    _store_tile(grad_v_ptr + place, acc_v, columns, num_tokens, stride, HEAD_DIM, HEAD)


def _tiles(heads: Tensor) -> tuple[int, Tiles]:
    """Find a head's width to a power of two, and the tiles for it."""
    head = max(triton.next_power_of_2(heads.shape[3]), MIN_HEAD)
    kind = (head, heads.element_size())
    shared_bytes = properties(heads.device).shared_bytes
    return head, next(
        configs[kind]
        for least, configs in CONFIGS.items()
        if shared_bytes >= least and kind in configs
    )


def _empty_heads(like: Tensor) -> Tensor:
    """Make a (B, H, T, E) tensor in which the heads of a token lie side by side."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def _launch_masked_attention(
    query: Tensor,  # (B, H, T, E)
    key: Tensor,  # (B, H_kv, T_all, E)
    value: Tensor,
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> tuple[Tensor, Tensor]:  # out (B, H, T, E), lse (B, H, T)
    B, H, T, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    out = _empty_heads(query)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=query.device)
    head, tiles = _tiles(query)
    tile = tiles.out
    # the programs of a head follow one another, since they read the same keys; an axis for heads
    # and one for rows, because both together may be more than one has
    launch(
        _masked_attention_kernel,
        (triton.cdiv(T, tile.BLOCK_M), H, B),
        out,
        lse,
        query,
        key,
        value,
        samples.positions if samples else lse,
        scale,
        cap or 0.0,
        window or num_keys,
        T,
        num_keys,
        H,
        H // num_kv_heads,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        CAPPED=cap is not None,
        PACKED=samples is not None,
        HEAD_DIM=head_dim,
        HEAD=head,
        # multiply-adds round less
        enable_fp_fusion=True,
        **tile._asdict(),
    )
    return out, lse


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
    grad_q, grad_k, grad_v = _empty_heads(query), _empty_heads(key), _empty_heads(value)
    delta = torch.empty_like(lse)
    head, tiles = _tiles(query)
    sizes = (scale, cap or 0.0, window or T, T)
    strides = [s for x in (grad, query, key, value) for s in x.stride()[:3]]
    launch(
        _masked_attention_grad_q_kernel,
        (triton.cdiv(T, tiles.grad_q.BLOCK_M), H, B),
        grad_q,
        delta,
        grad,
        out,
        lse,
        query,
        key,
        value,
        samples.positions if samples else lse,
        *sizes,
        H,
        H // num_kv_heads,
        *strides,
        CAPPED=cap is not None,
        PACKED=samples is not None,
        HEAD_DIM=head_dim,
        HEAD=head,
        # multiply-adds round less
        enable_fp_fusion=True,
        **tiles.grad_q._asdict(),
    )
    launch(
        _masked_attention_grad_kv_kernel,
        (triton.cdiv(T, tiles.grad_kv.BLOCK_N), num_kv_heads, B),
        grad_k,
        grad_v,
        delta,
        grad,
        lse,
        query,
        key,
        value,
        samples.remaining if samples else lse,
        *sizes,
        num_kv_heads,
        H // num_kv_heads,
        *strides,
        CAPPED=cap is not None,
        PACKED=samples is not None,
        HEAD_DIM=head_dim,
        HEAD=head,
        # multiply-adds round less
        enable_fp_fusion=True,
        **tiles.grad_kv._asdict(),
    )
    return grad_q, grad_k, grad_v


def _check(
    tensors: dict[str, Tensor],  # of the first the others have dtype, device and E
    num_keys: int,
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> None:
    query, key = tensors["query"], tensors["key"]
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"query must be bfloat16, float16 or float32: got {query.dtype}")
    if query.dim() != 4 or key.dim() != 4 or 0 in query.shape or 0 in key.shape:
        raise ValueError(
            "query and key must be heads of some tokens, (B, H, T, head_dim): "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    B, H, T, head_dim = query.shape
    if head_dim > MAX_HEAD or H % key.shape[1] or num_keys < T:
        raise ValueError(
            f"heads must be at most {MAX_HEAD} wide, shared evenly, and there must be a key for "
            f"each query: got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if B > MAX_LATER_AXIS or H > MAX_LATER_AXIS:
        raise ValueError(
            f"there must be at most {MAX_LATER_AXIS:,} rows and as many heads: got {B:,} and {H:,}"
        )
    kv_shape = (B, key.shape[1], num_keys, head_dim)
    for name, tensor in tensors.items():
        shape = kv_shape if name in ("key", "value") else tuple(query.shape)
        if (tuple(tensor.shape), tensor.dtype) != (shape, query.dtype):
            raise ValueError(
                f"{name} must be {query.dtype} of shape {shape}: "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.stride(3) != 1 and head_dim > 1:
            raise ValueError(f"{name} must have contiguous heads: got strides {tensor.stride()}")
        if tensor.device != query.device:
            raise ValueError(
                f"all must be on one device: got {query.device} and {name} on {tensor.device}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"nothing is recorded for autograd: got {name} that requires a gradient; call "
                "under torch.no_grad(), and masked_attention_backward for the gradients"
            )
    if samples is not None:
        for name, places in samples._asdict().items():
            found = (tuple(places.shape), places.dtype, places.device)
            if found != ((B, T), torch.int32, query.device) or not places.is_contiguous():
                raise ValueError(
                    f"the samples' {name} must be contiguous int32 of shape {(B, T)} on "
                    f"{query.device}: got {places.dtype} {tuple(places.shape)} on {places.device}"
                )
        if num_keys != T:
            raise ValueError(f"rows of several samples have no past: got {num_keys - T} tokens")
    numbers = (("scale", scale), ("cap", 1 if cap is None else cap), ("window", window or 1))
    for name, number in numbers:
        if not 0 < number < math.inf:
            raise ValueError(f"the {name} must be a positive number: got {number}")


def masked_attention(
    query: Tensor,  # (B, H, T, head_dim), any layout whose heads are contiguous; so the next two
    key: Tensor,  # (B, H_kv, T_all, head_dim)
    value: Tensor,
    scale: float,
    cap: float | None = None,
    window: int | None = None,
    samples: Samples | None = None,
) -> tuple[Tensor, Tensor]:  # out (B, H, T, head_dim), lse (B, H, T) float32
    """Let every token mix the values of itself and of those before it.

        out = softmax(softcap(scale q k^T)) v

    The queries are the last of all tokens.

    Args:
        cap: of the scores; None: they are not capped.
        window: tokens that each sees, itself included; None: all.
        samples: a token sees those of its own alone; None: a row is one sample.

    Returns:
        out: a token's heads side by side, so its rows may be viewed as a matrix.
        lse: what `masked_attention_backward` needs beside out.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a head is not contiguous or wider than
            MAX_HEAD, there are more rows or heads than MAX_LATER_AXIS, a number is not positive,
            or something requires a gradient.
    """
    tensors = {"query": query, "key": key, "value": value}
    _check(tensors, key.shape[2] if key.dim() == 4 else 0, scale, cap, window, samples)
    if query.device.type == "cpu":
        return masked_attention_reference(query, key, value, scale, cap, window, samples)
    return _launch_masked_attention(query, key, value, scale, cap, window, samples)


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
            is not contiguous or wider than MAX_HEAD, a number is not positive, or something
            requires a gradient.
    """
    tensors = {"query": query, "key": key, "value": value, "grad": grad, "out": out}
    _check(tensors, query.shape[2] if query.dim() == 4 else 0, scale, cap, window, samples)
    if (lse.shape, lse.dtype) != (query.shape[:3], torch.float32) or not lse.is_contiguous():
        raise ValueError(
            f"lse must be contiguous float32 of shape {tuple(query.shape[:3])}: "
            f"got {lse.dtype} {tuple(lse.shape)}"
        )
    arguments = (grad, query, key, value, out, lse, scale, cap, window, samples)
    if query.device.type == "cpu":
        return masked_attention_backward_reference(*arguments)
    return _launch_masked_attention_backward(*arguments)
