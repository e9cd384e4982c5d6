"""Write low-rank updates as a weight's two products read them, on the GPU.

    W_ext       | W        | s B |    N rows           y      = [x | x A^T] [W | s B]^T
                | A        |     |    T rows           grad_x = [grad_y | grad_y s B] [W; A]

                  K columns  T columns                 T = R num_updates, rounded up

Behind a weight in 16 bits they ride in its products; a weight in 8 bits has them in matrices of
their own. The updates of a weight's members lie side by side: A is stacked, B is block-diagonal
with a block for each member that has an update, and the rest is zero. Every update has
room for R ranks; an update of a lower rank has zeros in the rest. Each update has its own scaling
s. One launch writes both tails. With S bytes a value of W_ext it moves 4 + S a value of A and S a
value of the rows that fill it up to T, S a value of s B's N T and 4 of each in its blocks: 6.6 MB
beside the 235 MB of a Llama-3-8B gate and up at rank 16. The scaling is applied in float32 and the
result rounded once.

LoRA: Hu et al. 2021, section 4.1.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import check_is_contiguous, check_one_device, check_rows_are_contiguous
from kernels.constants import constant
from kernels.language import tl, triton
from kernels.launch import cdiv, launch, next_power_of_2

NUM_WARPS = 4
# of a program that writes a tail of columns, values
TILE_VALUES = 4096
# of a program that writes a piece of a row of A
BLOCK_K = 1024
# y_start, y_stop, B_start
TABLE_COLUMNS = tl.constexpr(3)


class Update(NamedTuple):
    """The update of one member: its rows of y, of the stacked A and B, and its factor."""

    y: slice
    A: slice
    B: slice
    scaling: float


class Place(NamedTuple):
    """Where one update lies, as the kernels' tables hold it, which have no factor."""

    y_start: int
    y_stop: int
    A_start: int
    B_start: int


def places_of(updates: tuple[Update, ...]) -> tuple[Place, ...]:
    """List where updates lie."""
    return tuple(Place(u.y.start, u.y.stop, u.A.start, u.B.start) for u in updates)


def write_updates_reference(
    A: Tensor,  # (T, K)
    sB: Tensor,  # (N, T)
    lora_A: Tensor,  # (num_updates * R, K) float32
    lora_B: Tensor,  # (sum of the updates' rows, R) float32
    updates: tuple[Update, ...],
) -> None:
    """Write both matrices with torch."""
    sB.zero_()
    for update in updates:
        sB[update.y, update.A] = lora_B[update.B] * update.scaling
    A[: lora_A.shape[0]] = lora_A
    A[lora_A.shape[0] :] = 0


@triton.jit
def _write_updates_kernel(
    A_out_ptr,  # (T, K)
    sB_ptr,  # (N, T)
    A_ptr,  # (NUM_UPDATES * R, K)
    B_ptr,  # (rows of all updates, R)
    table_ptr,  # (NUM_UPDATES, TABLE_COLUMNS)
    scaling_ptr,  # (NUM_UPDATES,)
    N,
    K,
    R,
    T,
    stride_at,
    stride_bn,
    num_B_programs,
    pieces_per_row,
    NUM_UPDATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # at least T
    BLOCK_K: tl.constexpr,
):
    # one program writes BLOCK_N rows of s B, or BLOCK_K values of a row of A
    pid = tl.program_id(0)
    if pid < num_B_programs:
        offs_n = (pid * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        offs_t = tl.arange(0, BLOCK_T)[None, :]
        B = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for update in tl.static_range(NUM_UPDATES):
            row = table_ptr + update * TABLE_COLUMNS
            y_start, y_stop, B_start = tl.load(row), tl.load(row + 1), tl.load(row + 2)
            column = offs_t - update * R
            is_inside = (offs_n >= y_start) & (offs_n < y_stop) & (column >= 0) & (column < R)
            values = tl.load(B_ptr + (B_start + offs_n - y_start) * R + column, is_inside, 0.0)
            # outside of the update's block the product is zero, which changes nothing
            B += values * tl.load(scaling_ptr + update)
        tl.store(
            sB_ptr + offs_n.to(tl.int64) * stride_bn + offs_t,
            B.to(sB_ptr.dtype.element_ty),
            mask=(offs_n < N) & (offs_t < T),
        )
    else:
        a_row = (pid - num_B_programs) // pieces_per_row
        offs_k = (pid - num_B_programs) % pieces_per_row * BLOCK_K + tl.arange(0, BLOCK_K)
        num_filled = tl.where(a_row < NUM_UPDATES * R, K, 0)
        A = tl.load(A_ptr + a_row.to(tl.int64) * K + offs_k, offs_k < num_filled, 0.0)
        tl.store(
            A_out_ptr + a_row.to(tl.int64) * stride_at + offs_k,
            A.to(A_out_ptr.dtype.element_ty),
            mask=offs_k < K,
        )


@constant
def _update_table(places: tuple[Place, ...], device: torch.device) -> Tensor:
    rows = [(place.y_start, place.y_stop, place.B_start) for place in places]
    return torch.tensor(rows, dtype=torch.int64).to(device)


@constant
def _scaling_table(factors: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(factors, dtype=torch.float32).to(device)


def scalings(updates: tuple[Update, ...], device: torch.device) -> Tensor:  # (updates,) float32
    """The updates' factors on a device, copied there once."""
    return _scaling_table(tuple(update.scaling for update in updates), device)


def make_lora_extension_tables(updates: tuple[Update, ...], device: torch.device) -> None:
    """Make the tables that updates need on a device, before the first pass."""
    _update_table(places_of(updates), device)
    scalings(updates, device)


def _launch_write_updates(
    A: Tensor, sB: Tensor, lora_A: Tensor, lora_B: Tensor, updates: tuple[Update, ...]
) -> None:
    K, R = lora_A.shape[1], lora_B.shape[1]
    N, T = sB.shape
    block_t = next_power_of_2(T)
    block_n = max(TILE_VALUES // block_t, 1)
    num_B_programs = cdiv(N, block_n)
    pieces_per_row = cdiv(K, BLOCK_K)
    launch(
        _write_updates_kernel,
        (num_B_programs + T * pieces_per_row,),
        A_out_ptr=A,
        sB_ptr=sB,
        A_ptr=lora_A,
        B_ptr=lora_B,
        table_ptr=_update_table(places_of(updates), sB.device),
        scaling_ptr=scalings(updates, sB.device),
        N=N,
        K=K,
        R=R,
        T=T,
        stride_at=A.stride(0),
        stride_bn=sB.stride(0),
        num_B_programs=num_B_programs,
        pieces_per_row=pieces_per_row,
        NUM_UPDATES=len(updates),
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS,
        # there is nothing to fuse, and triton wants to be told
        enable_fp_fusion=False,
    )


def write_updates(
    A: Tensor,  # (T, K), written; each row contiguous
    sB: Tensor,  # (N, T), written, likewise
    lora_A: Tensor,  # (num_updates * R, K) float32
    lora_B: Tensor,  # (sum of the updates' rows, R) float32
    updates: tuple[Update, ...],
) -> None:
    """Write the stacked A and s B in the dtype and the places that a weight's products read.

    Args:
        A: of [[W, s B], [A, -]], for instance, the rows below W; sB the columns behind it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    (T, K), (N, tail) = A.shape, sB.shape
    num_rows = sum(update.B.stop - update.B.start for update in updates)
    if (
        not updates
        or tail != T
        or lora_A.shape[0] > T
        or lora_A.shape != (len(updates) * lora_B.shape[1], K)
        or lora_B.shape[0] != num_rows
        or max(update.y.stop for update in updates) > N
    ):
        raise ValueError(
            f"A and s B must have room for the updates {updates}: got {tuple(A.shape)} and "
            f"{tuple(sB.shape)} for {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
    if not lora_A.dtype == lora_B.dtype == torch.float32:
        raise ValueError(f"the updates must be float32: got {lora_A.dtype} and {lora_B.dtype}")
    if A.dtype != sB.dtype:
        raise ValueError(f"A and s B must share a dtype: got {A.dtype} and {sB.dtype}")
    check_one_device({"A": A, "s B": sB, "the updates' A": lora_A, "the updates' B": lora_B})
    check_rows_are_contiguous("A", A)
    check_rows_are_contiguous("s B", sB)
    check_is_contiguous("the updates' A", lora_A)
    check_is_contiguous("the updates' B", lora_B)
    if A.device.type == "cpu":
        write_updates_reference(A, sB, lora_A, lora_B, updates)
    else:
        _launch_write_updates(A, sB, lora_A, lora_B, updates)
