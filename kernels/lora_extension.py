"""Write low-rank updates behind an expanded weight, so that they ride in its two products, on the
GPU.

    W_ext       | W        | s B |    N rows           y      = [x | x A^T] [W | s B]^T
                | A        |     |    T rows           grad_x = [grad_y | grad_y s B] [W; A]

                  K columns  T columns                 T = R num_updates, rounded up

The updates of a weight's members lie side by side: A is stacked, B is block-diagonal with a block
for each member that has an update, and the rest is zero. The corner is never read. Every update has
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


def extend_with_lora_reference(
    W_ext: Tensor,  # (N + T, K + T)
    lora_A: Tensor,  # (num_updates * R, K) float32
    lora_B: Tensor,  # (sum of the updates' rows, R) float32
    updates: tuple[Update, ...],
) -> None:
    """Write both tails with torch."""
    K = lora_A.shape[1]
    N = W_ext.shape[0] - (W_ext.shape[1] - K)
    W_ext[:N, K:] = 0
    for update in updates:
        columns = slice(K + update.A.start, K + update.A.stop)
        W_ext[update.y, columns] = lora_B[update.B] * update.scaling
    W_ext[N : N + lora_A.shape[0], :K] = lora_A
    W_ext[N + lora_A.shape[0] :, :K] = 0


@triton.jit
def _extend_with_lora_kernel(
    W_ptr,  # (N + T, K + T)
    A_ptr,  # (NUM_UPDATES * R, K)
    B_ptr,  # (rows of all updates, R)
    table_ptr,  # (NUM_UPDATES, TABLE_COLUMNS)
    scaling_ptr,  # (NUM_UPDATES,)
    N,
    K,
    R,
    T,
    stride_wn,
    num_B_programs,
    pieces_per_row,
    NUM_UPDATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # at least T
    BLOCK_K: tl.constexpr,
):
    # one program writes the tails of BLOCK_N rows of W, or BLOCK_K values of a row of A
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
            W_ptr + offs_n.to(tl.int64) * stride_wn + K + offs_t,
            B.to(W_ptr.dtype.element_ty),
            mask=(offs_n < N) & (offs_t < T),
        )
    else:
        a_row = (pid - num_B_programs) // pieces_per_row
        offs_k = (pid - num_B_programs) % pieces_per_row * BLOCK_K + tl.arange(0, BLOCK_K)
        num_filled = tl.where(a_row < NUM_UPDATES * R, K, 0)
        A = tl.load(A_ptr + a_row.to(tl.int64) * K + offs_k, offs_k < num_filled, 0.0)
        tl.store(
            W_ptr + (N + a_row).to(tl.int64) * stride_wn + offs_k,
            A.to(W_ptr.dtype.element_ty),
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


def _launch_extend_with_lora(
    W_ext: Tensor, lora_A: Tensor, lora_B: Tensor, updates: tuple[Update, ...]
) -> None:
    K, R = lora_A.shape[1], lora_B.shape[1]
    T = W_ext.shape[1] - K
    N = W_ext.shape[0] - T
    block_t = next_power_of_2(T)
    block_n = max(TILE_VALUES // block_t, 1)
    num_B_programs = cdiv(N, block_n)
    pieces_per_row = cdiv(K, BLOCK_K)
    launch(
        _extend_with_lora_kernel,
        (num_B_programs + T * pieces_per_row,),
        W_ptr=W_ext,
        A_ptr=lora_A,
        B_ptr=lora_B,
        table_ptr=_update_table(places_of(updates), W_ext.device),
        scaling_ptr=scalings(updates, W_ext.device),
        N=N,
        K=K,
        R=R,
        T=T,
        stride_wn=W_ext.stride(0),
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


def extend_with_lora(
    W_ext: Tensor,  # (N + T, K + T), each row contiguous
    lora_A: Tensor,  # (num_updates * R, K) float32
    lora_B: Tensor,  # (sum of the updates' rows, R) float32
    updates: tuple[Update, ...],
) -> None:
    """Write s B behind the columns of an expanded weight and A below its rows.

    Args:
        W_ext: holds the weight in its first N rows and K columns, which stay as they are.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    tail = W_ext.shape[1] - lora_A.shape[1]
    num_rows = sum(update.B.stop - update.B.start for update in updates)
    if (
        not updates
        or tail < lora_A.shape[0]
        or lora_A.shape[0] != len(updates) * lora_B.shape[1]
        or lora_B.shape[0] != num_rows
        or max(update.y.stop for update in updates) > W_ext.shape[0] - tail
    ):
        raise ValueError(
            f"W_ext must have room for the updates {updates}: got {tuple(W_ext.shape)} for "
            f"A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
        )
    if not lora_A.dtype == lora_B.dtype == torch.float32:
        raise ValueError(f"A and B must be float32: got {lora_A.dtype} and {lora_B.dtype}")
    check_one_device({"W_ext": W_ext, "A": lora_A, "B": lora_B})
    check_rows_are_contiguous("W_ext", W_ext)
    check_is_contiguous("A", lora_A)
    check_is_contiguous("B", lora_B)
    if W_ext.device.type == "cpu":
        extend_with_lora_reference(W_ext, lora_A, lora_B, updates)
    else:
        _launch_extend_with_lora(W_ext, lora_A, lora_B, updates)
