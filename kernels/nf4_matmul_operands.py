"""What products that decode a weight in registers share: its arguments, its members, partial sums.

It holds no product: device functions, launch arguments, and the kernel that adds up the partial
sums of programs that share the rows of a product and split its columns.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
from torch import Tensor

from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.nf4_decode import TABLE_COLUMNS, device_constant, member_table, scale_tensors
from kernels.ptx import level_planes
from nf4.double_quant import GROUP_SIZE
from nf4.weight import NF4Weight

# the only block size that the kernels know: the usual one
QUANT_BLOCK = tl.constexpr(64)
QUANT_GROUP = tl.constexpr(GROUP_SIZE)
# blocks of a row that a warp works on in one step: their codes are one word
BLOCKS_PER_STEP = tl.constexpr(4)

SUM_ELEMENTS = 512


@triton.jit
def member_of_row(
    member_table_ptr,
    row,  # of the stacked weight
    NUM_MEMBERS: tl.constexpr,
):
    # a program's rows lie in one member; the only one begins everything, and nothing waits for it
    if NUM_MEMBERS == 1:
        return 0, 0, 0
    else:
        member = 0
        for m in tl.static_range(1, NUM_MEMBERS):
            member += (row >= tl.load(member_table_ptr + m * TABLE_COLUMNS)).to(tl.int32)
        first_row = tl.load(member_table_ptr + member * TABLE_COLUMNS)
        first_group = tl.load(member_table_ptr + member * TABLE_COLUMNS + 3)
        return member, first_row, first_group


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(
    out_ptr,  # (num_elements,)
    partial_ptr,  # (num_partials, num_elements) float32
    num_elements,
    num_partials,
    ELEMENTS: tl.constexpr,
):
    # one program adds the partial sums of ELEMENTS results up, in order
    offs = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = offs < num_elements
    stride = tl.cast(num_elements, tl.int64)
    acc = tl.zeros((ELEMENTS,), tl.float32)
    for index in tl.range(0, num_partials):
        acc += tl.load(partial_ptr + index * stride + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def sum_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Add matrices of float32 up, the first dimension, in order, and round once."""
    num_partials, num_rows, num_columns = partial.shape
    total = torch.empty((num_rows, num_columns), dtype=dtype, device=partial.device)
    grid = (cdiv(total.numel(), SUM_ELEMENTS),)
    launch(
        _sum_partials_kernel,
        grid,
        out_ptr=total,
        partial_ptr=partial,
        num_elements=total.numel(),
        num_partials=num_partials,
        ELEMENTS=SUM_ELEMENTS,
    )
    return total


def operand_obstacle(weight: NF4Weight, dtype: torch.dtype) -> str:
    """Say what keeps a weight from being decoded in a product; an empty string if nothing does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"products that decode W multiply in bfloat16 or float16, not in {dtype}"
    if weight.block_size != QUANT_BLOCK.value:
        return (
            f"products that decode W know block_size {QUANT_BLOCK.value}, not {weight.block_size}"
        )
    return ""


def rows_obstacle(weight: NF4Weight, rows: int) -> str:
    """Say what keeps a weight from programs of `rows` rows and whole steps of columns; an empty
    string if nothing does."""
    columns = QUANT_BLOCK.value * BLOCKS_PER_STEP.value
    if weight.in_features % columns:
        return f"in_features {weight.in_features} is no multiple of {columns}"
    if any(num_rows % rows for num_rows in weight.rows):
        return f"rows {weight.rows} are no multiples of {rows}"
    return ""


def aligned_rows(x: Tensor) -> Tensor:
    """Copy rows that do not begin on 16 bytes, which the vector loads need."""
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def weight_arguments(weight: NF4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name the weight's tensors as the kernels do."""
    table = member_table(weight.rows, weight.in_features, weight.block_size, weight.device)
    return {
        "packed_ptr": weight.packed.view(torch.int32),
        **scale_tensors(weight),
        "dynamic_map_ptr": device_constant("dynamic_map", weight.device),
        "planes_ptr": level_planes(dtype, weight.device),
        "member_table_ptr": table,
    }


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Name a 16-bit dtype as Triton does."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
