"""What AdamW works on: the records of an optimizer's buffers, and how they are cut into blocks.

block        | 256 | 256 | ... | 256 | ... |    each parameter starts with a block; the rest of
parameters   | p0        | p1  | p2  | ... |    its last block is padding: zero, and stays zero
gradients    | g0        | g1  | g2  | ... |
moments      | 8-bit codes, one absmax a block | float32 |    either region may be empty
"""

from dataclasses import dataclass

from torch import Tensor

from kernels.language import tl

# elements that share an absmax, and a learning rate
MOMENT_BLOCK = 256
# blocks of a program, one a warp; both regions of an arena are multiples of it
TILE_BLOCKS = 4
# programs that add up squares, whatever the GPU: so the order of the sum is always the same
SUM_PROGRAMS = 1024

# the scalars that the plan writes and the update reads: these four, then decay and step size of
# each parameter group
NORM, IS_FINITE, FACTOR, CORRECTION2 = (tl.constexpr(index) for index in range(4))
NUM_SHARED_SCALARS = tl.constexpr(4)


@dataclass(frozen=True, eq=False)
class Moments:
    """Both moments of an arena: the first blocks in 8 bit, the others in float32."""

    exp_avg_codes: Tensor  # (num_8bit_blocks * MOMENT_BLOCK,) uint8
    exp_avg_sq_codes: Tensor
    exp_avg_absmax: Tensor  # (num_8bit_blocks,) float32
    exp_avg_sq_absmax: Tensor
    exp_avg: Tensor  # (num_32bit_blocks * MOMENT_BLOCK,) float32
    exp_avg_sq: Tensor


@dataclass(frozen=True, eq=False)
class Arenas:
    """What a step reads and writes; blocks of all tensors lie in one order."""

    parameters: Tensor  # (num_blocks * MOMENT_BLOCK,) float32
    gradients: Tensor  # (num_blocks * MOMENT_BLOCK,) float32
    moments: Moments
    group_of_block: Tensor  # (num_blocks,) uint8, the parameter group of each block
    groups: Tensor  # (num_groups, 2) float64: factor of the learning rate, weight decay
    betas: tuple[float, float]  # decay of the first and of the second moment
    num_updates: Tensor  # (1,) int32, t: steps that were not skipped
    scalars: Tensor  # (NUM_SHARED_SCALARS + 2 * num_groups,) float32, from launch to launch
    partial_sums: Tensor  # (SUM_PROGRAMS,) float64, of the gradients' squares
