"""Make the heads of one new token for each sequence: normalize, rotate, and append to the cache.

    a sequence's row of qkv | q head 0 | q head 1 | ... | k head 0 | ... | v head 0 | ...
                              norm, rotate                norm, rotate     as it is
                              to query                    to keys          to values

One program works on one head of one sequence. What `rope.py` does in place, and `rms_norm.py`
before it in families that normalize queries and keys, is done in one launch here, because a launch
costs more than its work: some 40 KB a sequence. A normalized head is rounded before it is rotated,
as in training; so the results are those of the two operations, bit for bit.

Rotary position embeddings: Su et al. 2021, section 3.4.2, equation 34.
"""

# triton's annotations know no tuples of tensors
# pyright: reportAttributeAccessIssue=false

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import check_is, check_is_contiguous, check_one_device
from kernels.language import tl, triton
from kernels.launch import launch, next_power_of_2
from kernels.rms_norm import rms_norm_reference
from kernels.rms_norm_row import factor_of, rstd_of
from kernels.rope import rope_reference
from kernels.rope_tables import RopeTables, check_tables


class HeadNorms(NamedTuple):
    """The norms of queries and keys in families that have them."""

    query: Tensor  # (head_dim,)
    key: Tensor
    eps: float
    offset: float


class Places(NamedTuple):
    """Where the new token of each sequence goes."""

    cache: Tensor  # (B,) int64, row of the cache
    table: Tensor  # (B,) int64, row of the rotary tables


def token_heads_reference(
    qkv: Tensor,  # (B, (H + 2 H_kv) head_dim)
    keys: Tensor,  # (B, H_kv, C, head_dim)
    values: Tensor,
    places: Places,
    tables: RopeTables,
    norms: HeadNorms | None,
) -> Tensor:  # (B, H, head_dim)
    """Normalize, rotate and append with the references of each."""
    B, H_kv, _, head_dim = keys.shape
    H = qkv.shape[1] // head_dim - 2 * H_kv
    heads = qkv.view(B, 1, -1, head_dim).clone()
    if norms is not None:
        for part, weight in (
            (heads[:, :, :H], norms.query),
            (heads[:, :, H : H + H_kv], norms.key),
        ):
            rows = part.reshape(-1, head_dim)
            part.copy_(
                rms_norm_reference(rows, weight, norms.eps, offset=norms.offset)[0].view(part.shape)
            )
    rotated = rope_reference(heads.flatten(2), places.table[:, None], tables, H, H_kv)
    query, key, value = (part.squeeze(2) for part in rotated)
    sequences = torch.arange(B, device=qkv.device)
    keys[sequences, :, places.cache] = key
    values[sequences, :, places.cache] = value
    return query


@triton.jit
def _token_heads_kernel(
    query_ptr,  # (B, H, HEAD), contiguous like all tensors here
    keys_ptr,  # (B, H_kv, C, HEAD)
    values_ptr,
    qkv_ptr,  # (B, (H + 2 H_kv) * HEAD)
    cache_place_ptr,  # (B,)
    table_place_ptr,  # (B,)
    cos_ptr,  # (num_positions, HALF)
    sin_ptr,
    factor_ptr,  # (num_positions,), read where SCALES
    query_weight_ptr,  # (HEAD,), read where heads are normalized
    key_weight_ptr,
    H,
    H_kv,
    C,
    eps,
    OFFSET: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head that turn
    INTERLEAVED: tl.constexpr,
    SCALES: tl.constexpr,  # queries
    COLUMNS: tl.constexpr,  # HEAD / 2, to a power of two
):
    # one program works on one head of one sequence
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    is_query = head < H
    is_key = (head >= H) & (head < H + H_kv)
    column = tl.arange(0, COLUMNS)
    mask = column < HEAD // 2
    turns = column < HALF
    dim1, dim2 = column, column + HALF
    if INTERLEAVED:
        dim1, dim2 = 2 * column, 2 * column + 1
    # behind the pairs that turn, the two halves of the rest
    dim1, dim2 = tl.where(turns, dim1, column + HALF), tl.where(turns, dim2, column + HEAD // 2)
    head_ptr = qkv_ptr + (b * tl.num_programs(1) + head) * HEAD
    y1 = tl.load(head_ptr + dim1, mask=mask, other=0.0)
    y2 = tl.load(head_ptr + dim2, mask=mask, other=0.0)
    dtype = query_ptr.dtype.element_ty
    if is_query | is_key:
        x1, x2 = y1.to(tl.float32), y2.to(tl.float32)
        if HAS_NORM:
            weight_ptr = key_weight_ptr
            if is_query:
                weight_ptr = query_weight_ptr
            w1 = factor_of(tl.load(weight_ptr + dim1, mask=mask, other=0.0), OFFSET)
            w2 = factor_of(tl.load(weight_ptr + dim2, mask=mask, other=0.0), OFFSET)
            rstd = rstd_of(x1 * x1 + x2 * x2, HEAD, eps)
            x1 = (x1 * rstd * w1).to(dtype).to(tl.float32)
            x2 = (x2 * rstd * w2).to(dtype).to(tl.float32)
        position = tl.load(table_place_ptr + b)
        row = position * HALF
        # the rest turns by nothing
        cos = tl.load(cos_ptr + row + column, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + row + column, mask=turns, other=0.0)
        if SCALES:
            of_head = tl.where(is_query, tl.load(factor_ptr + position), 1.0)
            cos, sin = cos * of_head, sin * of_head
        y1 = (x1 * cos - x2 * sin).to(dtype)
        y2 = (x2 * cos + x1 * sin).to(dtype)
    out_ptr = query_ptr + (b * H + head) * HEAD
    if not is_query:
        cache_ptr = values_ptr
        kv_head = head - H - H_kv
        if is_key:
            cache_ptr = keys_ptr
            kv_head = head - H
        out_ptr = cache_ptr + ((b * H_kv + kv_head) * C + tl.load(cache_place_ptr + b)) * HEAD
    tl.store(out_ptr + dim1, y1, mask=mask)
    tl.store(out_ptr + dim2, y2, mask=mask)


def _launch_token_heads(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Places,
    tables: RopeTables,
    norms: HeadNorms | None,
) -> Tensor:
    B, H_kv, C, head_dim = keys.shape
    num_heads = qkv.shape[1] // head_dim
    H = num_heads - 2 * H_kv
    query = qkv.new_empty(B, H, head_dim)
    launch(
        _token_heads_kernel,
        (B, num_heads),
        query_ptr=query,
        keys_ptr=keys,
        values_ptr=values,
        qkv_ptr=qkv,
        cache_place_ptr=places.cache,
        table_place_ptr=places.table,
        query_weight_ptr=qkv if norms is None else norms.query,
        key_weight_ptr=qkv if norms is None else norms.key,
        H=H,
        H_kv=H_kv,
        C=C,
        eps=0.0 if norms is None else norms.eps,
        OFFSET=0.0 if norms is None else norms.offset,
        HAS_NORM=norms is not None,
        HEAD=head_dim,
        HALF=tables.cos.shape[1],
        **tables.launched(),
        COLUMNS=next_power_of_2(head_dim // 2),
        num_warps=1,
        # each product rounded, as in rope.py
        enable_fp_fusion=False,
    )
    return query


def token_heads(
    qkv: Tensor,  # (B, (H + 2 H_kv) head_dim)
    keys: Tensor,  # (B, H_kv, C, head_dim), one row of each sequence is written
    values: Tensor,
    places: Places,
    tables: RopeTables,
    norms: HeadNorms | None,
) -> Tensor:  # (B, H, head_dim)
    """Take the new tokens' queries, keys and values apart, and append keys and values.

    Returns:
        The queries, normalized where heads are, and rotated.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a tensor is not contiguous.
    """
    B, _, _, head_dim = keys.shape
    check_is("values", values, keys.dtype, tuple(keys.shape))
    check_is("qkv", qkv, keys.dtype, (B, qkv.shape[1]))
    check_tables(places.table[:, None], tables, (B, 1), head_dim)
    given = {"qkv": qkv, "keys": keys, "values": values} | tables.tensors()
    given |= {"places in the cache": places.cache, "places in the tables": places.table}
    for name, place in places._asdict().items():
        check_is(f"places in the {name}", place, torch.int64, (B,))
    for name, tensor in given.items():
        check_is_contiguous(name, tensor)
    check_one_device(given)
    if qkv.device.type == "cpu":
        return token_heads_reference(qkv, keys, values, places, tables, norms)
    return _launch_token_heads(qkv, keys, values, places, tables, norms)
