"""Compute the gradients of h = z A^T and of B from y's gradient, read once, on the GPU.

    grad_h   = grad_y s B               (M, T), R columns an update
    grad_B  += s grad_y^T h             (rows of the updates, R)

    grad_y              stripe of BLOCK_N columns
             . . . . . | = = = = | . . .
    group of . . . . . | = = = = | . . .    a program, tile by tile of BLOCK_M rows
    rows     . . . . . | = = = = | . . .        grad_y^T h added up     (BLOCK_N, R) registers
             . . . . . | = = = = | . . .        grad_y s B              a part of grad_h

Two products would read grad_y twice: 0.9 GB for a Llama-3-8B gate and up at 8,192 rows. One pass
has to add over columns for grad_h and over rows for grad_B. So a program takes a rectangle and
writes its part of both sums in float32; a second launch adds the parts up in a fixed order: equal
runs give equal bits. At rank 16, parts are 32 / BLOCK_N + 32 / rows of a group of grad_y's bytes,
written and read again, mostly from L2. The FLOPs, 4 M N R, take a tenth of the bytes' time.

The updates of a weight's members lie side by side, so a stripe belongs to one member, and columns
of grad_h that no update fills become zero.

Both products take grad_y from shared memory, one of them transposed: Hopper's tensor cores read it
there, those of other GPUs through registers. A tile takes no more than the 99 KB that a program has
at least. Dense products (`lora_gradient_products.py`) serve GPUs below compute capability 8.0, for
which Triton knows no tensor cores, float32, and higher ranks, whose parts are larger and whose
tiles are smaller.

LoRA: Hu et al. 2021, section 4.1.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

import math
from functools import cache

import torch
from torch import Tensor

from kernels.checks import (
    check_is,
    check_is_contiguous,
    check_one_device,
    check_rows_are_contiguous,
)
from kernels.constants import constant
from kernels.device import TENSOR_CORES_FROM, properties
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.lora_extension import Place, Update, places_of, scalings
from kernels.lora_gradient_products import lora_gradient_by_products

lora_gradient_reference = lora_gradient_by_products

# the most ranks of an update, and the least width of a product of tiles
MAX_RANK = tl.constexpr(16)
# three tiles under way fill the shared memory of a multiprocessor of sm_90; one fits everywhere
BLOCK_M = 64
BLOCK_N = 512
NUM_WARPS = 8
NUM_STAGES = 3
MAX_GROUPS = 32
# the extra time of a program's first and last tile, in tiles: nothing is under way beside them
TILES_TO_FILL = 2
# the launch that adds parts up: numbers a program writes, parts that it reads at once
SUM_VALUES = 256
SUM_PARTS = tl.constexpr(16)
SUM_WARPS = 4
# y_start, y_stop, A_start, B_start, first_stripe
TABLE_COLUMNS = tl.constexpr(5)


@triton.jit
def _lora_gradient_kernel(
    grad_h_parts_ptr,  # (stripes, M, R) float32
    grad_B_parts_ptr,  # (groups, rows of B, R) float32
    grad_y_ptr,  # (M, N)
    sB_ptr,  # (N, T)
    h_ptr,  # (M, T)
    table_ptr,  # (NUM_UPDATES, TABLE_COLUMNS)
    M,
    R,
    num_rows_B,
    num_stripes,
    rows_per_group,
    stride_grad_ym,
    stride_sBn,
    stride_hm,
    NUM_UPDATES: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of where the members' rows begin and end
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    stripe = tl.program_id(0) % num_stripes
    group = tl.program_id(0) // num_stripes
    y_start, y_stop, A_start, B_start, first_stripe = 0, 0, 0, 0, 0
    for update in tl.static_range(NUM_UPDATES):
        row = table_ptr + update * TABLE_COLUMNS
        begins = tl.load(row + 4)
        y_start = tl.where(stripe >= begins, tl.load(row), y_start)
        y_stop = tl.where(stripe >= begins, tl.load(row + 1), y_stop)
        A_start = tl.where(stripe >= begins, tl.load(row + 2), A_start)
        B_start = tl.where(stripe >= begins, tl.load(row + 3), B_start)
        first_stripe = tl.where(stripe >= begins, begins, first_stripe)
    # so that 16 bytes at a time are copied
    y_start = tl.multiple_of(y_start, ALIGNMENT)
    y_stop = tl.multiple_of(y_stop, ALIGNMENT)
    offs_r = tl.arange(0, MAX_RANK)[None, :]
    in_R = offs_r < R
    member_rows = (stripe - first_stripe) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = y_start + member_rows
    in_y = offs_n < y_stop
    sB_ptrs = sB_ptr + offs_n.to(tl.int64)[:, None] * stride_sBn + A_start + offs_r
    sB = tl.load(sB_ptrs, in_y[:, None] & in_R, 0.0)
    grad_B = tl.zeros((BLOCK_N, MAX_RANK), tl.float32)
    grad_h_parts_ptr += stripe.to(tl.int64) * M * R
    first_row = group * rows_per_group
    for start in range(first_row, min(first_row + rows_per_group, M), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)[:, None]
        in_M = offs_m < M
        rows = offs_m.to(tl.int64)
        grad_y = tl.load(
            grad_y_ptr + rows * stride_grad_ym + offs_n[None, :], in_M & in_y[None, :], 0.0
        )
        h = tl.load(h_ptr + rows * stride_hm + A_start + offs_r, in_M & in_R, 0.0)
        grad_B = tl.dot(tl.trans(grad_y), h, grad_B)
        tl.store(grad_h_parts_ptr + rows * R + offs_r, tl.dot(grad_y, sB), in_M & in_R)
    grad_B_parts_ptr += group.to(tl.int64) * num_rows_B * R
    B_rows = (B_start + member_rows)[:, None]
    tl.store(grad_B_parts_ptr + B_rows * R + offs_r, grad_B, in_y[:, None] & in_R)


@triton.jit
def _sum_of_parts(parts_ptr, first, stop, length, offs):
    total = tl.zeros(offs.shape, tl.float32)
    for start in range(first, stop, SUM_PARTS):
        part = (start + tl.arange(0, SUM_PARTS))[:, None]
        is_one = (part < stop) & (offs < length)[None, :]
        values = tl.load(parts_ptr + part.to(tl.int64) * length + offs[None, :], is_one, 0.0)
        total += tl.sum(values, 0)
    return total


# not compiled anew for every number of rows
@triton.jit(do_not_specialize=["num_groups", "programs_per_update"])
def _lora_gradient_sum_kernel(
    grad_h_ptr,  # (M, T)
    grad_B_ptr,  # (rows of B, R) float32
    grad_h_parts_ptr,  # (stripes, M, R) float32
    grad_B_parts_ptr,  # (groups, rows of B, R) float32
    table_ptr,  # (NUM_UPDATES, TABLE_COLUMNS)
    scaling_ptr,  # (NUM_UPDATES,)
    M,
    R,
    T,
    num_rows_B,
    num_stripes,
    num_groups,
    stride_grad_hm,
    programs_per_update,
    num_B_programs,
    NUM_UPDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program writes BLOCK numbers: of grad_B, of an update's columns of grad_h, or of the
    # columns that no update fills
    pid = tl.program_id(0)
    values = tl.arange(0, BLOCK)
    num_h_programs = programs_per_update * NUM_UPDATES
    if pid < num_B_programs:
        offs = pid * BLOCK + values
        length = num_rows_B * R
        total = _sum_of_parts(grad_B_parts_ptr, 0, num_groups, length, offs)
        scaling = tl.zeros((BLOCK,), tl.float32)
        for update in tl.static_range(NUM_UPDATES):
            begins = tl.load(table_ptr + update * TABLE_COLUMNS + 3)
            scaling = tl.where(offs // R >= begins, tl.load(scaling_ptr + update), scaling)
        before = tl.load(grad_B_ptr + offs, offs < length)
        tl.store(grad_B_ptr + offs, before + total * scaling, offs < length)
    elif pid < num_B_programs + num_h_programs:
        update = (pid - num_B_programs) // programs_per_update
        offs = (pid - num_B_programs) % programs_per_update * BLOCK + values
        row = table_ptr + update * TABLE_COLUMNS
        stop = num_stripes
        if update + 1 < NUM_UPDATES:
            stop = tl.load(row + TABLE_COLUMNS + 4)
        total = _sum_of_parts(grad_h_parts_ptr, tl.load(row + 4), stop, M * R, offs)
        places = (offs // R).to(tl.int64) * stride_grad_hm + tl.load(row + 2) + offs % R
        tl.store(grad_h_ptr + places, total.to(grad_h_ptr.dtype.element_ty), offs < M * R)
    else:
        offs = (pid - num_B_programs - num_h_programs) * BLOCK + values
        filled = NUM_UPDATES * R
        places = (offs // (T - filled)).to(tl.int64) * stride_grad_hm + filled
        zeros = tl.zeros((BLOCK,), grad_h_ptr.dtype.element_ty)
        tl.store(grad_h_ptr + places + offs % (T - filled), zeros, offs < M * (T - filled))


@constant
def _stripe_table(
    places: tuple[Place, ...], device: torch.device
) -> tuple[Tensor, int]:  # (updates, TABLE_COLUMNS) int32, and the number of stripes
    rows, num_stripes = [], 0
    for place in places:
        rows.append((*place, num_stripes))
        num_stripes += cdiv(place.y_stop - place.y_start, BLOCK_N)
    return torch.tensor(rows, dtype=torch.int32).to(device), num_stripes


def make_lora_gradient_tables(updates: tuple[Update, ...], device: torch.device) -> None:
    """Make the tables that updates' gradients need on a device, before the first pass."""
    _stripe_table(places_of(updates), device)
    scalings(updates, device)


@cache
def _tiles_per_group(num_tiles: int, num_stripes: int, num_multiprocessors: int) -> int:
    """Choose how many row tiles a program takes, so that all of them end together."""

    def duration(num_groups: int) -> int:
        num_rounds = cdiv(num_groups * num_stripes, num_multiprocessors)
        return num_rounds * (cdiv(num_tiles, num_groups) + TILES_TO_FILL)

    num_groups = min(range(1, min(MAX_GROUPS, num_tiles) + 1), key=duration)
    return cdiv(num_tiles, num_groups)


def _launch_lora_gradient(
    grad_y: Tensor,  # (M, N)
    h: Tensor,  # (M, T)
    sB: Tensor,  # (N, T)
    grad_h: Tensor,  # (M, T)
    grad_B: Tensor,  # (sum of the updates' rows, R) float32
    updates: tuple[Update, ...],
    num_multiprocessors: int,
) -> None:
    M, T = h.shape
    num_rows_B, R = grad_B.shape
    places = places_of(updates)
    table, num_stripes = _stripe_table(places, h.device)
    num_tiles = cdiv(M, BLOCK_M)
    rows_per_group = BLOCK_M * _tiles_per_group(num_tiles, num_stripes, num_multiprocessors)
    num_groups = cdiv(M, rows_per_group)
    grad_h_parts = grad_B.new_empty(num_stripes, M, R)
    grad_B_parts = grad_B.new_empty(num_groups, num_rows_B, R)
    programs_per_update = cdiv(M * R, SUM_VALUES)
    num_B_programs = cdiv(num_rows_B * R, SUM_VALUES)
    num_rest_programs = cdiv(M * (T - len(updates) * R), SUM_VALUES)
    launch(
        _lora_gradient_kernel,
        (num_stripes * num_groups,),
        grad_h_parts_ptr=grad_h_parts,
        grad_B_parts_ptr=grad_B_parts,
        grad_y_ptr=grad_y,
        sB_ptr=sB,
        h_ptr=h,
        table_ptr=table,
        M=M,
        R=R,
        num_rows_B=num_rows_B,
        num_stripes=num_stripes,
        rows_per_group=rows_per_group,
        stride_grad_ym=grad_y.stride(0),
        stride_sBn=sB.stride(0),
        stride_hm=h.stride(0),
        NUM_UPDATES=len(updates),
        ALIGNMENT=math.gcd(16, *(row for place in places for row in place[:2])),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        # multiply-adds round less
        enable_fp_fusion=True,
    )
    launch(
        _lora_gradient_sum_kernel,
        (num_B_programs + programs_per_update * len(updates) + num_rest_programs,),
        grad_h_ptr=grad_h,
        grad_B_ptr=grad_B,
        grad_h_parts_ptr=grad_h_parts,
        grad_B_parts_ptr=grad_B_parts,
        table_ptr=table,
        scaling_ptr=scalings(updates, h.device),
        M=M,
        R=R,
        T=T,
        num_rows_B=num_rows_B,
        num_stripes=num_stripes,
        num_groups=num_groups,
        stride_grad_hm=grad_h.stride(0),
        programs_per_update=programs_per_update,
        num_B_programs=num_B_programs,
        NUM_UPDATES=len(updates),
        BLOCK=SUM_VALUES,
        num_warps=SUM_WARPS,
        enable_fp_fusion=True,
    )


def one_pass_obstacle(grad_y: Tensor, rank: int) -> str:
    """Say what keeps a CUDA tensor from the one pass; an empty string if nothing does."""
    capability = properties(grad_y.device).capability
    if capability < TENSOR_CORES_FROM:
        return f"one pass needs the tensor cores of 8.0 and later, not {capability}"
    if grad_y.dtype == torch.float32:
        return "one pass multiplies in bfloat16 or float16, not in torch.float32"
    if rank > MAX_RANK.value:
        return f"one pass is for ranks up to {MAX_RANK.value}, not {rank}"
    return ""


def _check(
    grad_y: Tensor,
    h: Tensor,
    sB: Tensor,
    grad_h: Tensor,
    grad_B: Tensor,
    updates: tuple[Update, ...],
) -> None:
    M, N = grad_y.shape
    T = sB.shape[1]
    if h.shape != (M, T) or grad_h.shape != (M, T) or sB.shape[0] != N:
        raise ValueError(
            f"h and grad_h must be (M, T), s B (N, T) for a gradient of (M, N), {(M, N)}: "
            f"got {tuple(h.shape)}, {tuple(grad_h.shape)} and {tuple(sB.shape)}"
        )
    num_rows = sum(update.B.stop - update.B.start for update in updates)
    R = grad_B.shape[1]
    if not updates or grad_B.shape[0] != num_rows or len(updates) * R > T:
        raise ValueError(
            f"the gradient of B must have the rows of the updates {updates}, and ranks that h's "
            f"{T} columns hold: got {tuple(grad_B.shape)}"
        )
    check_is("the gradient of B", grad_B, torch.float32, (num_rows, R))
    check_is_contiguous("the gradient of B", grad_B)
    if not grad_y.dtype == h.dtype == sB.dtype == grad_h.dtype:
        raise ValueError(
            "y's gradient, h, s B and h's gradient must share a dtype: "
            f"got {grad_y.dtype}, {h.dtype}, {sB.dtype} and {grad_h.dtype}"
        )
    matrices = {"y's gradient": grad_y, "h": h, "s B": sB, "h's gradient": grad_h}
    for name, matrix in matrices.items():
        check_rows_are_contiguous(name, matrix)
    check_one_device(matrices | {"the gradient of B": grad_B})


def lora_gradient(
    grad_y: Tensor,  # (M, N)
    h: Tensor,  # (M, T), z A^T
    sB: Tensor,  # (N, T), s B as `write_updates` writes it
    grad_h: Tensor,  # (M, T), written
    grad_B: Tensor,  # (sum of the updates' rows, R) float32, added to
    updates: tuple[Update, ...],
) -> None:
    """Compute h's gradient, and add B's gradient to a sum.

        grad_h   = grad_y s B
        grad_B  += s grad_y^T h

    Args:
        grad_y: may be the first columns of wider rows, as may h, s B and grad_h.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a row is not contiguous.
    """
    _check(grad_y, h, sB, grad_h, grad_B, updates)
    if not grad_y.shape[0]:
        return
    if grad_y.device.type == "cpu":
        lora_gradient_reference(grad_y, h, sB, grad_h, grad_B, updates)
    elif one_pass_obstacle(grad_y, grad_B.shape[1]):
        lora_gradient_by_products(grad_y, h, sB, grad_h, grad_B, updates)
    else:
        num_multiprocessors = properties(grad_y.device).num_multiprocessors
        _launch_lora_gradient(grad_y, h, sB, grad_h, grad_B, updates, num_multiprocessors)
