"""Causal grouped-query attention with capped scores, windows, sinks and several samples in a row,
on the GPU.

    s     = softcap(scale q k^T)                    softcap(x) = cap tanh(x / cap), or x
    p     = exp(s - lse)                            lse = log sum exp(s), over the tokens seen
    out   = p v                                           and the head's sink, if it has one

    queries |     keys -->              token i sees j <= i; in a window of W tokens j > i - W; and
     BLOCK_M|  . x x . . .              only tokens of its sample (`masked_attention_mask.py`). A
       |    |  . . x x . .              program computes one tile of queries: it passes over the
       v    |  . . . x x .              tiles of keys that hold any such pair
            |    BLOCK_N

torch's products know no cap, and a mask they take as a tensor of T^2 scores. Gemma 2 caps at 50
with heads of 256 (Gemma Team 2024, section 2). A sink is a score beside those of the tokens that
weighs no value (gpt-oss; Xiao et al. 2023, "Efficient Streaming Language Models with Attention
Sinks"): the sum begins with it. The gradients need no more than an lse that counts it.

Scores live in registers, tile by tile, in float32; what is multiplied again is rounded to the
inputs' dtype. No atomic addition: each result is summed by one program, in one order, so equal
inputs give equal bits. With P pairs seen by each head (T^2 / 2 without a window, T L / 2 in samples
of L) and heads of E values, a launch takes 4 B H P E FLOPs, and a capped score about 25
instructions beside them, three of them on the special function unit. The gradients are computed by
`masked_attention_backward.py`, from lse.

FlashAttention-2: Dao 2023, algorithm 1; here without a running maximum below -cap.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

import math

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_is,
    check_is_contiguous,
    check_not_recorded,
    check_one_device,
    check_rows_are_contiguous,
)
from kernels.device import properties
from kernels.language import tl, triton
from kernels.launch import MAX_LATER_AXIS, cdiv, head_strides, launch
from kernels.masked_attention_mask import Samples, reach_of
from kernels.masked_attention_reference import masked_attention_reference
from kernels.masked_attention_tiles import (
    PRECISION,
    check_head_dim,
    empty_heads,
    load_tile,
    padded_width,
    store_tile,
    tiles_of,
)
from kernels.softcap import softcap

# finite, and below every finite score: the sum of a row that sees nothing of a tile stays at 0
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _masked_attention_kernel(
    out_ptr,  # (B, T, H, E), contiguous
    lse_ptr,  # (B, H, T)
    q_ptr,  # (B, H, T, E)
    k_ptr,  # (B, H_kv, T_all, E)
    v_ptr,
    positions_ptr,  # (B, T), read where rows hold several samples
    sinks_ptr,  # (H,), read where HAS_SINKS
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
    HAS_SINKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,  # HEAD_DIM, to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program computes the results of BLOCK_M queries of one head; the queries that see the most
    # keys start first
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
    reach = reach_of(positions_ptr + b * num_queries, rows, num_queries, window, PACKED)
    q = load_tile(q_ptr, rows, num_queries, stride_qt, HEAD_DIM, HEAD)
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # no score is below
    largest = tl.zeros((BLOCK_M,), tl.float32) + (-cap if CAPPED else LOWEST)
    if HAS_SINKS:
        # as after a first token with this score and no value
        largest = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + h).to(tl.float32)
        total += 1.0
    first = tl.maximum(tl.min(places - reach), 0) // BLOCK_N * BLOCK_N
    last = tl.minimum(num_past + first_row + BLOCK_M, num_keys)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, columns, num_keys, stride_kt, HEAD_DIM, HEAD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAPPED:
            s = softcap(s, cap)
        distance = places[:, None] - columns[None, :]
        s = tl.where((distance >= 0) & (distance <= reach[:, None]), s, float("-inf"))
        raised = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp(s - raised[:, None])
        factor = tl.exp(largest - raised)
        total = total * factor + tl.sum(p, 1)
        v = load_tile(v_ptr, columns, num_keys, stride_vt, HEAD_DIM, HEAD)
        acc = acc * factor[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        largest = raised
    out = acc / total[:, None]
    store_tile(out_ptr, out, rows, num_queries, num_heads * HEAD_DIM, HEAD_DIM, HEAD)
    tl.store(lse_ptr + rows, largest + tl.log(total), mask=rows < num_queries)


def _launch_masked_attention(
    query: Tensor,  # (B, H, T, E)
    key: Tensor,  # (B, H_kv, T_all, E)
    value: Tensor,
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> tuple[Tensor, Tensor]:  # out (B, H, T, E), lse (B, H, T)
    B, H, T, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    out = empty_heads(query)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=query.device)
    tiles = tiles_of(head_dim, query.dtype, properties(query.device))
    if tiles is None:
        # a plan for a CPU, which takes heads of any width
        assert query.device.type == "meta"
        return out, lse
    tile = tiles.out
    # the programs of a head follow one another, since they read the same keys; an axis for heads
    # and one for rows, because both together may be more than one has
    launch(
        _masked_attention_kernel,
        (cdiv(T, tile.BLOCK_M), H, B),
        out_ptr=out,
        lse_ptr=lse,
        q_ptr=query,
        k_ptr=key,
        v_ptr=value,
        positions_ptr=samples.positions if samples else lse,
        sinks_ptr=lse if sinks is None else sinks,
        scale=scale,
        cap=cap or 0.0,
        window=window or num_keys,
        num_queries=T,
        num_keys=num_keys,
        num_heads=H,
        num_shared=H // num_kv_heads,
        **head_strides(q=query, k=key, v=value),
        CAPPED=cap is not None,
        PACKED=samples is not None,
        HAS_SINKS=sinks is not None,
        HEAD_DIM=head_dim,
        HEAD=padded_width(head_dim),
        # multiply-adds round less
        enable_fp_fusion=True,
        **tile._asdict(),
    )
    return out, lse


def check_heads(
    tensors: dict[str, Tensor],  # of the first the others have dtype, device and E
    num_keys: int,
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> None:
    """Refuse heads that do not go together, and numbers that are not positive.

    Raises:
        ValueError: what the public functions say.
    """
    query, key = tensors["query"], tensors["key"]
    check_dtype("query", query.dtype)
    if query.dim() != 4 or key.dim() != 4 or 0 in query.shape or 0 in key.shape:
        raise ValueError(
            "query and key must be heads of some tokens, (B, H, T, head_dim): "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    B, H, T, head_dim = query.shape
    if H % key.shape[1] or num_keys < T:
        raise ValueError(
            "heads must be shared evenly, and there must be a key for each query: "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.device.type == "cuda":
        check_head_dim(head_dim, query.dtype, properties(query.device))
    if B > MAX_LATER_AXIS or H > MAX_LATER_AXIS:
        raise ValueError(
            f"there must be at most {MAX_LATER_AXIS:,} rows and as many heads: got {B:,} and {H:,}"
        )
    kv_shape = (B, key.shape[1], num_keys, head_dim)
    for name, tensor in tensors.items():
        shape = kv_shape if name in ("key", "value") else tuple(query.shape)
        check_is(name, tensor, query.dtype, shape)
        check_rows_are_contiguous(name, tensor, "heads")
    check_one_device(tensors)
    check_not_recorded(tensors, "masked_attention_backward")
    if samples is not None:
        for name, places in samples._asdict().items():
            check_is(f"the samples' {name}", places, torch.int32, (B, T))
            check_is_contiguous(f"the samples' {name}", places)
            check_one_device({"query": query, f"the samples' {name}": places})
        if num_keys != T:
            raise ValueError(f"rows of several samples have no past: got {num_keys - T} tokens")
    numbers = (("scale", scale), ("cap", 1 if cap is None else cap), ("window", window or 1))
    for name, number in numbers:
        if not 0 < number < math.inf:
            raise ValueError(f"the {name} must be a positive number: got {number}")


def check_sinks(sinks: Tensor, query: Tensor) -> None:
    """Refuse sinks that are not one of each head.

    Raises:
        ValueError: what the public functions say.
    """
    check_dtype("sinks", sinks.dtype)
    check_is("sinks", sinks, sinks.dtype, (query.shape[1],))
    check_is_contiguous("sinks", sinks)
    check_one_device({"query": query, "sinks": sinks})
    check_not_recorded({"sinks": sinks}, "masked_attention_backward")


def masked_attention(
    query: Tensor,  # (B, H, T, head_dim), any layout whose heads are contiguous; so the next two
    key: Tensor,  # (B, H_kv, T_all, head_dim)
    value: Tensor,
    scale: float,
    cap: float | None = None,
    window: int | None = None,
    samples: Samples | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> tuple[Tensor, Tensor]:  # out (B, H, T, head_dim), lse (B, H, T) float32
    """Compute attention: a token mixes its own value with those of the tokens before it.

        out = softmax(softcap(scale q k^T)) v

    The queries are the last of all tokens.

    Args:
        cap: of the scores; None: they are not capped.
        window: how many tokens a token sees, itself included; None: all.
        samples: where the samples of a row lie: a token sees its own sample alone; None: a row is
            one sample.
        sinks: of each head, a score that takes its share and has no value; None: there are none.

    Returns:
        out: a token's heads side by side, so its rows may be viewed as a matrix.
        lse: what `masked_attention_backward` needs beside out; it counts the sinks.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a head is not contiguous or, on a GPU, as
            `check_head_dim`, there are more rows or heads than MAX_LATER_AXIS, a number is not
            positive, or something requires a gradient.
    """
    tensors = {"query": query, "key": key, "value": value}
    check_heads(tensors, key.shape[2] if key.dim() == 4 else 0, scale, cap, window, samples)
    if sinks is not None:
        check_sinks(sinks, query)
    arguments = (query, key, value, scale, cap, window, samples, sinks)
    if query.device.type == "cpu":
        return masked_attention_reference(*arguments)
    return _launch_masked_attention(*arguments)
