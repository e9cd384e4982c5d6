"""Cross-entropy of rows of logits, and its gradient in their place, on the GPU.

    loss = logsumexp(z) - z[target]         z a row of logits
    z    = softmax(z) - onehot(target)      in place, where the gradient is wanted

    Where a model caps its logits (kernels/softcap.py), softcap(z) takes z's place in both, and the
    gradient is multiplied by softcap'(z).

    row of V | group 0                      | group 1 | ... | rest |
             | chunk 0 | chunk 1 | ...                                 16 bytes a thread and chunk
    1 ->       a maximum and a sum of exponentials for each place in a chunk, online; then one
               maximum and one sum across the program's threads
    2 <-       read again and overwritten, from the end of the row

One program per row. A row of a large vocabulary (250 KB for 128,256 values in bf16) fits neither
registers nor shared memory, so the second pass reads it from the L2 cache. It starts with the
values that were read last, and a longer row gets more warps, so that the rows under way on all
multiprocessors fit that cache. With V values in S bytes each, a row moves

    loss                 V S + 12
    with the gradient  3 V S + 12     two read, one written; all but 2 V S from L2 at best

and a value costs 12 instructions for the loss and 25 with the gradient, two of them exponentials,
where in 16 bit an H100 issues 18 and 36 in the time that memory takes: bandwidth is the limit,
except where logits are capped, which adds half as many instructions. The arithmetic is float32, the
gradient rounded once. The order of the sum depends on V, the dtype and where rows start, so a row's
loss is always the same bits. Rows of any V are read in vectors if they start on 16 values: only the
rest of a row is masked.

Online normalizer: Milakov and Gimelshein 2018, algorithm 3.
"""

# triton's annotations know neither static_range nor tuples of tensors, nor that
# a bool serves as a constexpr
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false

import math

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.language import tl, triton
from kernels.launch import launch, next_power_of_2
from kernels.softcap import softcap, softcap_reference, softcap_slope

# the widest access of a thread
VECTOR_BYTES = 16
# chunks of a group; all their loads are under way before the first chunk is worked on
CHUNKS = 4
# the same where logits are capped: capping takes registers, and more time than a chunk's load
CAPPED_CHUNKS = 1
# bytes of a row for every warp: 32 warps fill a multiprocessor, so the rows under way on it are
# 256 KB, and the rows on an H100's 132 multiprocessors 34 MB of its 50 MB of L2
WARP_BYTES = 8 << 10
MIN_WARPS, MAX_WARPS = 4, 32

# finite, so that a difference of two maxima is a number where no value was seen yet
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def cross_entropy_reference(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    cap: float | None = None,
) -> Tensor:  # (M,)
    """Compute the losses in float32; that of a target outside the row is NaN."""
    is_valid = (targets >= 0) & (targets < logits.shape[1])
    z, picked = _capped(logits.float(), cap), targets.where(is_valid, 0)[:, None]
    losses = z.logsumexp(dim=1) - z.gather(1, picked).squeeze(1)
    return losses.masked_fill_(~is_valid, float("nan"))


def cross_entropy_reference_(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    cap: float | None = None,
) -> Tensor:  # (M,)
    """Compute the losses, and in float32 the gradient in the logits' place."""
    losses = cross_entropy_reference(logits, targets, cap)
    is_valid = (targets >= 0) & (targets < logits.shape[1])
    z = _capped(logits.float(), cap)
    gradient = z.softmax(dim=1)
    picked = targets.where(is_valid, 0)[:, None]
    gradient.scatter_add_(1, picked, torch.full_like(losses[:, None], -1.0))
    if cap is not None:
        gradient *= 1 - (z / cap).square()
    logits.copy_(gradient.masked_fill_(~is_valid[:, None], float("nan")))
    return losses


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else softcap_reference(logits, cap)


@triton.jit
def _load_group(
    row_ptr,
    first,
    V,
    cap,
    HAS_CAP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_LAST_USE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # values that are read for the last time may leave the cache before those that are read again
    policy: tl.constexpr = "evict_first" if IS_LAST_USE else ""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        offs = first + chunk * CHUNK + tl.arange(0, CHUNK)
        if IS_WHOLE:
            tile = tl.load(row_ptr + offs, eviction_policy=policy)
        else:
            tile = tl.load(
                row_ptr + offs, mask=offs < V, other=float("-inf"), eviction_policy=policy
            )
        tiles = tiles + (tile,)  # noqa: RUF005, triton knows no star
    if HAS_CAP:
        # all loads are under way before the first is worked on
        capped = ()
        for chunk in tl.static_range(CHUNKS):
            tile = softcap(tiles[chunk].to(tl.float32), cap)
            if not IS_WHOLE:
                offs = first + chunk * CHUNK + tl.arange(0, CHUNK)
                tile = tl.where(offs < V, tile, float("-inf"))
            capped = capped + (tile,)  # noqa: RUF005
        tiles = capped
    return tiles


@triton.jit
def _add_group(largest, total, tiles, CHUNKS: tl.constexpr):
    raised = largest
    for chunk in tl.static_range(CHUNKS):
        raised = tl.maximum(raised, tiles[chunk].to(tl.float32))
    total *= tl.exp(largest - raised)
    for chunk in tl.static_range(CHUNKS):
        total += tl.exp(tiles[chunk].to(tl.float32) - raised)
    return raised, total


@triton.jit
def _store_group(
    row_ptr,
    first,
    V,
    tiles,
    largest,
    factor,
    target,
    cap,
    HAS_CAP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    for chunk in tl.static_range(CHUNKS):
        offs = first + chunk * CHUNK + tl.arange(0, CHUNK)
        z = tiles[chunk].to(tl.float32)
        gradient = tl.exp(z - largest) * factor
        gradient = tl.where(offs == target, gradient - 1.0, gradient)
        if HAS_CAP:
            gradient *= softcap_slope(z, cap)
        gradient = gradient.to(row_ptr.dtype.element_ty)
        if IS_WHOLE:
            tl.store(row_ptr + offs, gradient, eviction_policy="evict_first")
        else:
            tl.store(row_ptr + offs, gradient, mask=offs < V, eviction_policy="evict_first")


@triton.jit
def _cross_entropy_kernel(
    losses_ptr,  # (M,)
    logits_ptr,  # (M, V), written if WRITES
    targets_ptr,  # (M,)
    V,
    cap,
    stride_m,
    HAS_CAP: tl.constexpr,
    WRITES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program computes the loss of one row, and its gradient
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_m
    wanted = tl.load(targets_ptr + row)
    is_valid = (wanted >= 0) & (wanted < V)
    target = tl.where(is_valid, wanted, 0).to(tl.int32)
    # before the row is written to: the reductions below have barriers
    target_logit = tl.load(row_ptr + target).to(tl.float32)
    if HAS_CAP:
        target_logit = softcap(target_logit, cap)

    num_groups = V // (CHUNK * CHUNKS)
    rest = num_groups * (CHUNK * CHUNKS)
    maxima = tl.full((CHUNK,), LOWEST, tl.float32)
    totals = tl.zeros((CHUNK,), tl.float32)
    for group in range(num_groups):
        tiles = _load_group(
            row_ptr,
            group * (CHUNK * CHUNKS),
            V,
            cap,
            HAS_CAP,
            True,
            not WRITES,
            CHUNK,
            CHUNKS,
        )
        maxima, totals = _add_group(maxima, totals, tiles, CHUNKS)
    if rest < V:
        tiles = _load_group(row_ptr, rest, V, cap, HAS_CAP, False, not WRITES, CHUNK, CHUNKS)
        maxima, totals = _add_group(maxima, totals, tiles, CHUNKS)
    largest = tl.max(maxima, 0)
    total = tl.sum(totals * tl.exp(maxima - largest), 0)
    loss = tl.log(total) - (target_logit - largest)
    tl.store(losses_ptr + row, tl.where(is_valid, loss, float("nan")))

    if WRITES:
        factor = tl.where(is_valid, tl.div_rn(1.0, total), float("nan"))
        if rest < V:
            tiles = _load_group(row_ptr, rest, V, cap, HAS_CAP, False, True, CHUNK, CHUNKS)
            _store_group(
                row_ptr, rest, V, tiles, largest, factor, target, cap, HAS_CAP, False, CHUNK, CHUNKS
            )
        for group in range(num_groups):
            first = (num_groups - 1 - group) * (CHUNK * CHUNKS)
            tiles = _load_group(row_ptr, first, V, cap, HAS_CAP, True, True, CHUNK, CHUNKS)
            _store_group(
                row_ptr, first, V, tiles, largest, factor, target, cap, HAS_CAP, True, CHUNK, CHUNKS
            )


def _shape(V: int, itemsize: int, is_capped: bool) -> dict[str, int]:
    """Choose warps by the length of a row, and chunks with a vector for every thread."""
    wanted = min(max(V * itemsize // WARP_BYTES, MIN_WARPS), MAX_WARPS)
    num_warps = next_power_of_2(wanted)
    return {
        "CHUNK": 32 * num_warps * VECTOR_BYTES // itemsize,
        "CHUNKS": CAPPED_CHUNKS if is_capped else CHUNKS,
        "num_warps": num_warps,
    }


def _launch_cross_entropy(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    writes: bool,
    cap: float | None = None,
) -> Tensor:  # (M,) float32
    M, V = logits.shape
    assert logits.stride(1) == 1 or V == 1
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    if M > 0:
        launch(
            _cross_entropy_kernel,
            (M,),
            losses_ptr=losses,
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            V=V,
            cap=1.0 if cap is None else cap,
            stride_m=logits.stride(0),
            HAS_CAP=cap is not None,
            WRITES=writes,
            # multiply-adds round less
            enable_fp_fusion=True,
            **_shape(V, logits.element_size(), cap is not None),
        )
    return losses


def _check(logits: Tensor, targets: Tensor, cap: float | None) -> None:
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"the cap must be a positive number: got {cap}")
    check_dtype("logits", logits.dtype)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be rows of values: got shape {tuple(logits.shape)}")
    check_rows_are_contiguous("logits", logits)
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets must be one int64 for each row: got {targets.dtype} {tuple(targets.shape)} "
            f"beside logits of {tuple(logits.shape)}"
        )
    check_one_device({"logits": logits, "targets": targets})


def cross_entropy(
    logits: Tensor,  # (M, V), rows of any stride
    targets: Tensor,  # (M,) int64
    cap: float | None = None,
) -> Tensor:  # (M,) float32
    """Compute the loss of each row, in one pass and without a gradient.

        loss = logsumexp(z) - z[target]

    A target outside the row makes its loss NaN.

    Args:
        cap: softcap(z) takes z's place; None: nothing is capped.

    Raises:
        ValueError: the cap is not positive, shapes, dtypes, strides or devices do not fit.
    """
    _check(logits, targets, cap)
    if logits.device.type == "cpu":
        return cross_entropy_reference(logits, targets, cap)
    return _launch_cross_entropy(logits, targets, writes=False, cap=cap)


def cross_entropy_(
    logits: Tensor,  # (M, V), rows of any stride; overwritten
    targets: Tensor,  # (M,) int64
    cap: float | None = None,
) -> Tensor:  # (M,) float32
    """Compute the loss of each row, and overwrite the row with the loss's gradient.

        loss = logsumexp(z) - z[target]
        z    = softmax(z) - onehot(target)

    A target outside the row makes its loss and its gradient NaN.

    Args:
        cap: softcap(z) takes z's place, and the gradient is that of z; None: nothing is capped.

    Raises:
        ValueError: the cap is not positive, shapes, dtypes, strides or devices do not fit, or rows
            overlap.
    """
    _check(logits, targets, cap)
    check_rows_are_apart("logits", logits)
    if logits.device.type == "cpu":
        return cross_entropy_reference_(logits, targets, cap)
    return _launch_cross_entropy(logits, targets, writes=True, cap=cap)
