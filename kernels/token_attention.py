"""Attention of one new token for each sequence to the cache, and its way down to the ranks.

    mixed = softmax(scale q k^T) v               over the last `window` of `place + 1` cached tokens
                                                 and the head's sink, if it has one
    h     = mixed A^T

    program (b, kv head, split) | the queries that share a kv head | a share of the tokens
                                  -> largest score, sum, weighted values, in float32
    program (b, p)              | adds the splits of all heads up  -> mixed[b], h[b, p]

One query a sequence leaves a GPU idle where a program works on a whole head: so the tokens of a
sequence are split among NUM_SPLITS programs, as many as keep the multiprocessors busy, and a second
kernel adds their sums up (Dao et al. 2023, "Flash-Decoding"). How many tokens there are is read on
the device: one captured graph serves all lengths. The first kernel reads 4 H_kv head_dim bytes a
token in 16 bits, its limit; the second one 4 H head_dim NUM_SPLITS bytes from L2, once for each
rank. Scores are float32; probabilities are rounded to the values' dtype before they weigh them.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import check_dtype, check_is, check_is_contiguous, check_one_device
from kernels.device import TENSOR_CORES_FROM, properties
from kernels.language import tl, triton
from kernels.launch import cdiv, launch, next_power_of_2
from kernels.masked_attention_tiles import PRECISION
from kernels.softcap import softcap, softcap_reference

# the fewest rows of a tensor core's product
MIN_ROWS = 16
MAX_SPLITS = 32
# the most heads that the second kernel adds up at a time, and their sums: 64 of a thread
MAX_HEADS, MAX_SUMS = 8, 1 << 15


class Tile(NamedTuple):
    """The tokens that a program works on at a time, and its warps."""

    BLOCK_T: int
    num_warps: int
    num_stages: int


# the first kernel's tiles for heads up to a width, and where tensor cores do not multiply
TILES = {128: Tile(64, 4, 2), 256: Tile(32, 4, 2), 512: Tile(16, 4, 2)}
UNROLLED = Tile(16, 8, 1)


class TokenScores(NamedTuple):
    """How the scores are computed."""

    scale: float
    cap: float | None
    window: int | None  # tokens that a token sees, itself included
    sinks: Tensor | None = None  # (H,), scores beside the tokens', without a value


def token_attention_reference(
    query: Tensor,  # (B, H, head_dim)
    keys: Tensor,  # (B, H_kv, C, head_dim)
    values: Tensor,
    place: Tensor,  # (B,) int64
    scores: TokenScores,
    A: Tensor | None,  # (P, H head_dim)
) -> tuple[Tensor, Tensor | None]:  # mixed (B, H head_dim), h (B, P)
    """Mix in float32, with a mask over the whole cache."""
    B, H, _ = query.shape
    H_kv, C = keys.shape[1:3]
    shared = query.view(B, H_kv, H // H_kv, -1).float()
    s = shared @ keys.float().transpose(2, 3) * scores.scale
    if scores.cap is not None:
        s = softcap_reference(s, scores.cap)
    behind = place[:, None] - torch.arange(C, device=place.device)
    is_seen = (behind >= 0) & (behind < (scores.window or C))
    s = s.masked_fill(~is_seen[:, None, None], float("-inf"))
    # what was never written may be NaN
    v = values.float().masked_fill(~is_seen[:, None, :, None], 0.0)
    p = s.softmax(-1)
    if scores.sinks is not None:
        # the share that the sink leaves
        p *= torch.sigmoid(s.logsumexp(-1, True) - scores.sinks.float().view(H_kv, -1, 1))
    mixed = (p @ v).reshape(B, -1).to(query.dtype)
    return mixed, None if A is None else (mixed.float() @ A.float().T).to(mixed.dtype)


@triton.jit
def shares_of(place, window, NUM_SPLITS: tl.constexpr, BLOCK_T: tl.constexpr):
    # the first token that is seen, and how many each split takes; the last splits may have none
    first = tl.maximum(place + 1 - window, 0)
    share = tl.cdiv(tl.cdiv(place + 1 - first, NUM_SPLITS), BLOCK_T) * BLOCK_T
    return first, share


@triton.jit
def _token_attention_kernel(
    sums_ptr,  # (B, H, NUM_SPLITS, HEAD_DIM) float32
    largest_ptr,  # (B, H, NUM_SPLITS) float32
    total_ptr,
    query_ptr,  # (B, H, HEAD_DIM)
    keys_ptr,  # (B, H_kv, C, HEAD_DIM)
    values_ptr,
    place_ptr,  # (B,)
    scale,
    cap,
    window,
    H_kv,
    C,
    GROUP: tl.constexpr,  # queries that share a key
    CAPPED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,  # HEAD_DIM, to a power of two
    ROWS: tl.constexpr,  # at least GROUP
    BLOCK_T: tl.constexpr,
):
    # one program mixes a share of a sequence's tokens for the queries of one kv head
    split = tl.program_id(1)
    kv_head = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD)
    is_inside = (row[:, None] < GROUP) & (column[None, :] < HEAD_DIM)
    heads = kv_head * GROUP + row
    place = tl.load(place_ptr + kv_head // H_kv).to(tl.int32)
    first, share = shares_of(place, window, NUM_SPLITS, BLOCK_T)
    start = first + split * share
    stop = tl.minimum(start + share, place + 1)
    q = tl.load(query_ptr + heads[:, None] * HEAD_DIM + column[None, :], mask=is_inside, other=0.0)
    keys_ptr += kv_head * C * HEAD_DIM
    values_ptr += kv_head * C * HEAD_DIM
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for t in range(start, stop, BLOCK_T):
        tokens = t + tl.arange(0, BLOCK_T)
        mask = (tokens[:, None] < stop) & (column[None, :] < HEAD_DIM)
        offs = tokens[:, None].to(tl.int64) * HEAD_DIM + column[None, :]
        k = tl.load(keys_ptr + offs, mask=mask, other=0.0)
        v = tl.load(values_ptr + offs, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAPPED:
            s = softcap(s, cap)
        s = tl.where(tokens[None, :] < stop, s, float("-inf"))
        raised = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp(s - raised[:, None])
        factor = tl.exp(largest - raised)
        total = total * factor + tl.sum(p, 1)
        acc = acc * factor[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        largest = raised
    out = heads * NUM_SPLITS + split
    tl.store(sums_ptr + out[:, None] * HEAD_DIM + column[None, :], acc, mask=is_inside)
    tl.store(largest_ptr + out, largest, mask=row < GROUP)
    tl.store(total_ptr + out, total, mask=row < GROUP)


@triton.jit
def _add_splits_kernel(
    mixed_ptr,  # (B, H, HEAD_DIM)
    h_ptr,  # (B, num_programs(1)), written where there is an update
    sums_ptr,  # (B, H, NUM_SPLITS, HEAD_DIM) float32
    largest_ptr,  # (B, H, NUM_SPLITS) float32
    total_ptr,
    A_ptr,  # (num_programs(1), H * HEAD_DIM)
    place_ptr,  # (B,)
    sinks_ptr,  # (H,), read where HAS_SINKS
    window,
    H,
    HAS_UPDATE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # one program adds a sequence's splits up for one rank of h, and writes its share of the heads
    b = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    split = tl.arange(0, NUM_SPLITS)
    column = tl.arange(0, HEAD)
    is_column = column < HEAD_DIM
    place = tl.load(place_ptr + b).to(tl.int32)
    first_token, share = shares_of(place, window, NUM_SPLITS, BLOCK_T)
    has_tokens = first_token + split * share <= place
    acc = tl.zeros((HEADS, HEAD), tl.float32)
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)
        is_head = (head < H)[:, None]
        places = (b * H + head)[:, None] * NUM_SPLITS + split[None, :]
        is_known = is_head & has_tokens[None, :]
        # the first split always has tokens
        largest = tl.load(largest_ptr + places, mask=is_known, other=-1e30)
        total = tl.load(total_ptr + places, mask=is_known, other=0.0)
        offs = places[:, :, None] * HEAD_DIM + column[None, None, :]
        mask = is_known[:, :, None] & is_column[None, None, :]
        sums = tl.load(sums_ptr + offs, mask=mask, other=0.0)
        top = tl.max(largest, 1)
        sink = top
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head, mask=head < H, other=0.0).to(tl.float32)
        top = tl.maximum(top, sink)
        factor = tl.exp(largest - top[:, None])
        whole = tl.sum(total * factor, 1)
        if HAS_SINKS:
            whole += tl.exp(sink - top)
        # heads that are not there would divide by zero
        whole = tl.where(is_head, whole[:, None], 1.0)
        mixed = tl.sum(sums * (factor / whole)[:, :, None], 1).to(mixed_ptr.dtype.element_ty)
        is_own = is_head & (head // HEADS % tl.num_programs(1) == rank)[:, None]
        out = (b * H + head)[:, None] * HEAD_DIM + column[None, :]
        tl.store(mixed_ptr + out, mixed, mask=is_own & is_column[None, :])
        if HAS_UPDATE:
            a_ptrs = A_ptr + (rank.to(tl.int64) * H + head[:, None]) * HEAD_DIM + column[None, :]
            a = tl.load(a_ptrs, mask=is_head & is_column[None, :], other=0.0)
            acc += mixed.to(tl.float32) * a.to(tl.float32)
    if HAS_UPDATE:
        h = tl.sum(tl.sum(acc, 1), 0)
        tl.store(h_ptr + b * tl.num_programs(1) + rank, h.to(h_ptr.dtype.element_ty))


def num_splits(device: torch.device, num_kv_heads: int) -> int:
    """Choose among how many programs the tokens of so many heads are split, a power of two."""
    if device.type == "cpu":
        return 2
    wanted = max(properties(device).num_multiprocessors // num_kv_heads, 1)
    return min(1 << (wanted.bit_length() - 1), MAX_SPLITS)


def _has_tensor_cores(query: Tensor) -> bool:
    is_there = query.device.type == "cpu" or properties(query.device).capability >= (
        TENSOR_CORES_FROM
    )
    return is_there and query.dtype != torch.float32


def _launch_token_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    scores: TokenScores,
    A: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    B, H, head_dim = query.shape
    H_kv, C = keys.shape[1:3]
    splits = num_splits(query.device, B * H_kv)
    sums = query.new_empty(B, H, splits, head_dim, dtype=torch.float32)
    largest = query.new_empty(B, H, splits, dtype=torch.float32)
    total = torch.empty_like(largest)
    head = max(next_power_of_2(head_dim), MIN_ROWS)
    tile = UNROLLED
    if _has_tensor_cores(query):
        # wider heads come in a plan for a CPU alone
        tile = next((tile for width, tile in TILES.items() if head <= width), UNROLLED)
    shape = {
        "NUM_SPLITS": splits,
        "HEAD_DIM": head_dim,
        "HEAD": head,
        "BLOCK_T": tile.BLOCK_T,
        "window": scores.window or C,
        "place_ptr": place,
    }
    heads = max(min(MAX_HEADS, MAX_SUMS // (splits * head)), 1)
    launch(
        _token_attention_kernel,
        (B * H_kv, splits),
        sums_ptr=sums,
        largest_ptr=largest,
        total_ptr=total,
        query_ptr=query,
        keys_ptr=keys,
        values_ptr=values,
        scale=scores.scale,
        cap=scores.cap or 0.0,
        H_kv=H_kv,
        C=C,
        GROUP=H // H_kv,
        CAPPED=scores.cap is not None,
        ROWS=max(next_power_of_2(H // H_kv), MIN_ROWS),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **shape,
    )
    mixed = query.new_empty(B, H * head_dim)
    h = None if A is None else query.new_empty(B, A.shape[0])
    launch(
        _add_splits_kernel,
        (B, cdiv(H, heads) if A is None else A.shape[0]),
        mixed_ptr=mixed,
        h_ptr=mixed if h is None else h,
        sums_ptr=sums,
        largest_ptr=largest,
        total_ptr=total,
        A_ptr=mixed if A is None else A,
        H=H,
        sinks_ptr=mixed if scores.sinks is None else scores.sinks,
        HAS_UPDATE=A is not None,
        HAS_SINKS=scores.sinks is not None,
        HEADS=heads,
        num_warps=16,
        **shape,
    )
    return mixed, h


def token_attention(
    query: Tensor,  # (B, H, head_dim)
    keys: Tensor,  # (B, H_kv, C, head_dim)
    values: Tensor,
    place: Tensor,  # (B,) int64, row of the newest token of each sequence
    scores: TokenScores,
    A: Tensor | None,  # (P, H head_dim)
) -> tuple[Tensor, Tensor | None]:  # mixed (B, H head_dim), h (B, P)
    """Let the newest token of each sequence mix the values that it sees, and multiply by A.

        mixed = softmax(softcap(scale q k^T), sinks) v        h = mixed A^T

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a tensor is not contiguous.
    """
    check_dtype("query", query.dtype)
    B, H, head_dim = query.shape
    is_too_wide = query.device.type == "cuda" and head_dim > max(TILES)
    if H % keys.shape[1] or is_too_wide:
        raise ValueError(
            f"query heads must share keys evenly and on a GPU be at most {max(TILES)} wide: "
            f"got {H} and {keys.shape[1]} heads of {head_dim}"
        )
    check_is("keys", keys, query.dtype, (B, *keys.shape[1:3], head_dim))
    check_is("values", values, query.dtype, tuple(keys.shape))
    check_is("place", place, torch.int64, (B,))
    given = {"query": query, "keys": keys, "values": values, "place": place}
    if A is not None:
        check_is("A", A, query.dtype, (A.shape[0], H * head_dim))
        given["A"] = A
    if scores.sinks is not None:
        check_is("sinks", scores.sinks, scores.sinks.dtype, (H,))
        given["sinks"] = scores.sinks
    for name, tensor in given.items():
        check_is_contiguous(name, tensor)
    check_one_device(given)
    if query.device.type == "cpu":
        return token_attention_reference(query, keys, values, place, scores, A)
    return _launch_token_attention(query, keys, values, place, scores, A)
