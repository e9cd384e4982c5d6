"""What the NF4 kernels share: where each member of a weight begins, the tables, a block's scale.

A device function and the tables the kernels read; no launches. An NF4 weight stacks members (q, k,
v) whose bytes, blocks and groups of blocks each start anew, so a kernel must know where each member
begins. It reads that from a small table in device memory, one row a member, which `member_table`
makes once for a shape.

    member_table   | row | byte | block | group | num_elements |      int64, one line a member
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

import torch
from torch import Tensor

from kernels.constants import constant
from kernels.language import tl, triton
from nf4.double_quant import DYNAMIC_MAP, GROUP_SIZE, QuantizedAbsmax
from nf4.levels import LEVELS
from nf4.weight import NF4Weight, member_spans

# row, byte, block, group, num_elements
TABLE_COLUMNS = tl.constexpr(5)
QUANT_GROUP = tl.constexpr(GROUP_SIZE)


@constant
def device_constant(name: str, device: torch.device) -> Tensor:
    """Copy one of the format's tables, "levels" or "dynamic_map", to a device once."""
    return {"levels": LEVELS, "dynamic_map": DYNAMIC_MAP}[name].to(device)


@constant
def member_table(
    rows: tuple[int, ...], in_features: int, block_size: int, device: torch.device
) -> Tensor:  # (len(rows), TABLE_COLUMNS) int64
    """Tabulate where each member begins in each buffer, and its number of elements."""
    return torch.tensor(
        [
            [span.row, span.packed.start, span.blocks.start, span.groups.start, span.num_elements]
            for span in member_spans(rows, in_features, block_size)
        ],
        dtype=torch.int64,
    ).to(device)


def make_nf4_tables(weight: NF4Weight) -> None:
    """Make the tables that kernels read to expand a weight, before the first pass:
    `kernels.constants` says why."""
    device_constant("levels", weight.device)
    device_constant("dynamic_map", weight.device)
    member_table(weight.rows, weight.in_features, weight.block_size, weight.device)


def scale_tensors(weight: NF4Weight) -> dict[str, Tensor]:
    """Name the three scale buffers as the kernels do.

    Without double quantization the first stands for all three; a kernel reads that one only.
    """
    scales = weight.absmax
    if isinstance(scales, QuantizedAbsmax):
        buffers = (scales.codes, scales.group_absmax, scales.mean)
    else:
        buffers = (scales, scales, scales)
    return dict(zip(("absmax_ptr", "group_absmax_ptr", "absmax_mean_ptr"), buffers, strict=True))


@triton.jit
def load_absmax(
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    dynamic_map_ptr,
    block,  # index of the block within its member
    block_start,  # the member's first block
    group_start,  # the member's first group of blocks
    member,
    mask,
    DOUBLE_QUANT: tl.constexpr,
):
    # launch with enable_fp_fusion=False: the reference rounds product and sum separately
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + block_start + block, mask=mask, other=0).to(tl.int32)
        group = group_start + block // QUANT_GROUP
        group_absmax = tl.load(group_absmax_ptr + group, mask=mask, other=0.0)
        value = tl.load(dynamic_map_ptr + code, mask=mask, other=0.0)
        return value * group_absmax + tl.load(absmax_mean_ptr + member)
    else:
        return tl.load(absmax_ptr + block_start + block, mask=mask, other=0.0)
