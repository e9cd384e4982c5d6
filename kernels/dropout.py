"""Drop values at random, by a mask that is computed again instead of saved, on the GPU.

    z     = x keep / (1 - p)                      and back: total += x keep / (1 - p)
    keep  = word >= round(p 2^32)

    counter  | low, high word of e // 4 | site | 0 |      e = m K + k, the element's place
    key      | low, high word of the seed |
    4 words of Philox  ->  elements 4 (e // 4) .. 4 (e // 4) + 3

The mask is a pure function of seed, site and place. So nothing is saved for the backward pass, a
layer that is computed again drops the same values, and a captured graph, which reads the seed from
the device, drops other values under another seed. torch's own dropout saves a mask of a byte a
value, and its random state belongs to the device. The reference computes the same mask bit for bit.
With S bytes a value, M rows move

    dropout         2 M K S       one read, one written
    dropout_add_    3 M K S       two read, one written

and cost about 110 instructions for 4 values, most of them Philox's. In 16 bit an H100 issues 144 in
the time that memory takes for the fewer bytes: memory bandwidth is the limit, but not by much. The
arithmetic on values is float32, rounded to their dtype once.

Philox 4x32-10: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 3.3.
"""

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_like,
    check_one_device,
    check_rows_are_contiguous,
    check_seed,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, launch

NUM_WARPS = 4
# the widest access of a thread
VECTOR_BYTES = 16
# of a thread
VECTORS = 2

WORD = 2**32
NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_reference(
    counter: tuple[Tensor, ...],  # 4 words as int64, of one shape
    key: tuple[Tensor, ...],  # 2 words as int64
) -> tuple[Tensor, ...]:  # 4 words as int64
    """Encrypt counters by Philox 4x32-10."""
    low = WORD - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        # a product wraps around in int64, which changes none of its 64 bits
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & low) ^ c1 ^ k0,
            product1 & low,
            (product0 >> 32 & low) ^ c3 ^ k1,
            product0 & low,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & low, (k1 + KEY_STEPS[1]) & low
    return c0, c1, c2, c3


def keep_reference(shape: tuple[int, int], seed: Tensor, site: int, p: float) -> Tensor:
    """Compute the mask of a matrix, True where a value is kept."""
    M, K = shape
    groups = torch.arange(-(-M * K // 4), device=seed.device)
    low, zeros = WORD - 1, torch.zeros_like(groups)
    counter = (groups & low, groups >> 32, zeros + site, zeros)
    words = philox_reference(counter, (seed & low, seed >> 32 & low))
    return (torch.stack(words, dim=1).view(-1)[: M * K] >= _threshold(p)).view(M, K)


def dropout_reference(x: Tensor, seed: Tensor, site: int, p: float) -> Tensor:  # (M, K), float32
    """Drop and scale in float32; the result is not rounded to x's dtype yet."""
    keep = keep_reference((x.shape[0], x.shape[1]), seed, site, p)
    return torch.where(keep, x.float() * (1 / (1 - p)), 0.0)


def _threshold(p: float) -> int:
    """Compute the smallest word whose value is kept."""
    return round(p * WORD)


@triton.jit(do_not_specialize=["site"])
def _dropout_kernel(
    z_ptr,  # (M, K)
    x_ptr,  # (M, K)
    seed_ptr,  # (1,)
    site,
    K,
    programs_per_row,
    stride_zm,
    stride_xm,
    scale,
    THRESHOLD: tl.constexpr,
    ADDS: tl.constexpr,  # to z; otherwise z is written only
    IS_ALIGNED: tl.constexpr,  # each row starts with the first of 4 words
    CHUNK: tl.constexpr,
):
    # one program drops values of CHUNK places in one row
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    first = (tl.program_id(0) % programs_per_row) * CHUNK
    place = row * K + first
    groups = place // 4 + tl.arange(0, CHUNK // 4)
    low, high = groups.to(tl.uint32), (groups >> 32).to(tl.uint32)
    zeros = tl.zeros((CHUNK // 4,), tl.uint32)
    sites = zeros + site.to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(tl.load(seed_ptr), low, high, sites, zeros)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    offs = first + tl.arange(0, CHUNK)
    mask = offs < K
    if not IS_ALIGNED:
        # the first group may begin in the row before
        offs -= (place % 4).to(tl.int32)
        mask = (offs >= 0) & (offs < K)
    x = tl.load(x_ptr + row * stride_xm + offs, mask=mask, other=0.0).to(tl.float32)
    z = tl.where(words >= THRESHOLD, x * scale, 0.0)
    z_ptr += row * stride_zm
    if ADDS:
        z += tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)


def _launch_dropout(
    z: Tensor,  # (M, K), written or added to; may be x
    x: Tensor,  # (M, K)
    seed: Tensor,  # (1,) int64
    site: int,
    p: float,
    adds: bool,
) -> None:
    M, K = x.shape
    assert all(t.stride(1) == 1 or K == 1 for t in (z, x))
    chunk = 32 * NUM_WARPS * VECTORS * VECTOR_BYTES // x.element_size()
    is_aligned = K % 4 == 0
    programs_per_row = cdiv(K if is_aligned else K + 3, chunk)
    if x.numel() > 0:
        launch(
            _dropout_kernel,
            (M * programs_per_row,),
            z_ptr=z,
            x_ptr=x,
            seed_ptr=seed,
            site=site,
            K=K,
            programs_per_row=programs_per_row,
            stride_zm=z.stride(0),
            stride_xm=x.stride(0),
            scale=1 / (1 - p),
            THRESHOLD=_threshold(p),
            ADDS=adds,
            IS_ALIGNED=is_aligned,
            CHUNK=chunk,
            num_warps=NUM_WARPS,
            # the product and the sum round apart, as torch's do: the reference bit for bit
            enable_fp_fusion=False,
        )


def _check(x: Tensor, z: Tensor, seed: Tensor, site: int, p: float) -> None:
    check_dtype("x", x.dtype)
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix: got shape {tuple(x.shape)}")
    check_like("the result", z, "x", x)
    check_rows_are_contiguous("x", x)
    check_rows_are_contiguous("the result", z)
    check_seed(seed)
    check_one_device({"x": x, "the result": z, "the seed": seed})
    if not 0 <= site < 2**31:
        raise ValueError(f"the site must be from 0 to 2^31 - 1: got {site}")
    # a threshold is a word
    if not 0 <= p < 1 or _threshold(p) == WORD:
        raise ValueError(f"p must be at least 0 and less than 1: got {p}")


def dropout(
    x: Tensor,  # (M, K), rows of any stride
    seed: Tensor,  # (1,) int64
    site: int,
    p: float,
    out: Tensor | None = None,  # (M, K), rows of any stride
) -> Tensor:  # (M, K)
    """Drop each value with probability p and scale the others.

        z = x * keep(seed, site) / (1 - p)

    Args:
        site: the mask's number among those under one seed; each place that drops has its own.
        p: the probability, at least 0 and less than 1, to 32 bits.
        out: takes the result; may be x.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or site or p is out of range.
    """
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check(x, z, seed, site, p)
    if x.device.type == "cpu":
        return z.copy_(dropout_reference(x, seed, site, p))
    _launch_dropout(z, x, seed, site, p, adds=False)
    return z


def dropout_add_(
    total: Tensor,  # (M, K), rows of any stride; added to
    x: Tensor,  # (M, K), rows of any stride
    seed: Tensor,  # (1,) int64
    site: int,
    p: float,
) -> Tensor:  # total
    """Add a dropped matrix to a sum: the gradient of `dropout`, accumulated.

        total = total + x * keep(seed, site) / (1 - p)

    Args:
        site, p: as they were given to `dropout`.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or site or p is out of range.
    """
    _check(x, total, seed, site, p)
    if x.device.type == "cpu":
        return total.copy_(total.float() + dropout_reference(x, seed, site, p))
    _launch_dropout(total, x, seed, site, p, adds=True)
    return total
