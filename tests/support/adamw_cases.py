"""The arenas on which the kernels of AdamW are tried: in the interpreter and on a GPU."""

# triton's annotations know no launch options
# pyright: reportCallIssue=false

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamw_8bit import ZERO_CODES, moment_tables, nearest_magnitude
from kernels.adamw_arenas import (
    MOMENT_BLOCK,
    NUM_SHARED_SCALARS,
    SUM_PROGRAMS,
    TILE_BLOCKS,
    Arenas,
    Moments,
)
from nf4.double_quant import DYNAMIC_MAP_MIDPOINTS, UNSIGNED_DYNAMIC_MAP_MIDPOINTS
from optim.adamw import BETAS

LEARNING_RATE = 1e-2
# factor of the learning rate, weight decay
GROUPS = ((1.0, 0.1), (16.0, 0.0), (0.5, 0.01))


@dataclass(frozen=True)
class AdamWCase:
    """Tiles of each region, and what a step is asked to do."""

    num_8bit_tiles: int
    num_32bit_tiles: int
    max_norm: float = 1.0
    loss_scale: float = 1.0
    num_groups: int = 1
    non_finite: float | None = None  # the last gradient of the second step
    betas: tuple[float, float] = BETAS

    def __str__(self) -> str:
        last = f"-{self.non_finite}" if self.non_finite is not None else ""
        last += "-betas{}-{}".format(*self.betas) if self.betas != BETAS else ""
        return (
            f"{self.num_8bit_tiles}x8bit-{self.num_32bit_tiles}x32bit-norm{self.max_norm}"
            f"-scale{self.loss_scale}-groups{self.num_groups}{last}"
        )


CASES = [
    AdamWCase(0, 3),
    AdamWCase(0, 2, max_norm=0.0, num_groups=3),
    AdamWCase(0, 1, max_norm=1e9, loss_scale=65536.0),
    AdamWCase(2, 0, num_groups=2),
    AdamWCase(2, 1, loss_scale=1024.0, num_groups=3),
    AdamWCase(1, 1, betas=(0.95, 0.95)),
    # a moment that begins at the gradient's end, and one that is the gradient
    AdamWCase(0, 1, betas=(0.4, 0.99)),
    AdamWCase(1, 0, betas=(0.0, 0.0)),
    *(AdamWCase(1, 1, non_finite=float(value)) for value in ("nan", "inf", "-inf")),
]
NUM_STEPS = 3


def random_arenas(case: AdamWCase, seed: int = 0) -> Arenas:
    """Make arenas on the CPU whose moments are those of a first step.

    The second half of the last block is padding; the first block has no gradient at all.
    """
    generator = torch.Generator().manual_seed(seed)
    num_8bit = case.num_8bit_tiles * TILE_BLOCKS
    num_32bit = case.num_32bit_tiles * TILE_BLOCKS
    num_blocks = num_8bit + num_32bit
    parameters = torch.randn(num_blocks * MOMENT_BLOCK, generator=generator)
    parameters[-MOMENT_BLOCK // 2 :] = 0
    codes = torch.full((2, num_8bit * MOMENT_BLOCK), ZERO_CODES[0], dtype=torch.uint8)
    codes[1] = ZERO_CODES[1]
    moments = Moments(*codes, *torch.zeros(2, num_8bit), *torch.zeros(2, num_32bit * MOMENT_BLOCK))
    return Arenas(
        parameters,
        torch.zeros_like(parameters),
        moments,
        (torch.arange(num_blocks) // 3 % case.num_groups).to(torch.uint8),
        torch.tensor(GROUPS[: case.num_groups], dtype=torch.float64),
        case.betas,
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(NUM_SHARED_SCALARS.value + 2 * case.num_groups),
        torch.zeros(SUM_PROGRAMS, dtype=torch.float64),
    )


def set_gradients(arenas: Arenas, case: AdamWCase, step: int) -> None:
    """Draw a step's gradients, of very different sizes."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = arenas.gradients.numel()
    gradients = torch.randn(size, generator=generator) * case.loss_scale
    gradients *= torch.exp2(torch.randint(-20, 1, (size,), generator=generator))
    gradients[:MOMENT_BLOCK] = 0
    gradients[-MOMENT_BLOCK // 2 :] = 0
    if case.non_finite is not None and step == 1:
        gradients[-MOMENT_BLOCK // 2 - 1] = case.non_finite
    arenas.gradients.copy_(gradients)


def held_tensors(arenas: Arenas) -> dict[str, Tensor]:
    """What a step writes, by name."""
    tensors = {"parameters": arenas.parameters, "num_updates": arenas.num_updates}
    return tensors | vars(arenas.moments)


def moved_to(arenas: Arenas, device: torch.device) -> Arenas:
    """Copy arenas to a device."""
    moments = Moments(*(tensor.to(device) for tensor in vars(arenas.moments).values()))
    tensors = {k: v.to(device) for k, v in vars(arenas).items() if isinstance(v, Tensor)}
    return replace(arenas, moments=moments, **tensors)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    # the product is exact in float64
    return (a.double() * b.double() + c.double()).float()


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Give torch's CPU operations that the reference uses the rounding that the kernels have.

    The square root is MKL's, which errs by one unit in the last place for a fifth of all numbers.
    `lerp_` and `addcmul_` are fused where the CPU is an x86 with 256-bit vectors, not everywhere.
    """

    def sqrt(self: Tensor) -> Tensor:
        return torch.from_numpy(np.sqrt(self.numpy()))

    def lerp_(self: Tensor, end: Tensor, weight: float) -> Tensor:
        near = torch.tensor(weight, dtype=torch.float32)
        factor, start = (near, self) if near < 0.5 else (near - 1, end)
        return self.copy_(_fused(factor, end - self, start))

    def addcmul_(self: Tensor, a: Tensor, b: Tensor, value: float) -> Tensor:
        return self.copy_(_fused(a * value, b, self))

    is_fused = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    with ExitStack() as stack:
        for operation in (sqrt,) if is_fused else (sqrt, lerp_, addcmul_):
            stack.enter_context(patch.object(Tensor, operation.__name__, operation))
        yield


@triton.jit
def _magnitudes_kernel(
    index_ptr, scaled_ptr, thresholds_ptr, FIRST_CELLS: tl.constexpr, TILE: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    scaled = tl.load(scaled_ptr + offs)
    tl.store(index_ptr + offs, nearest_magnitude(scaled, thresholds_ptr, FIRST_CELLS))


def nearest_magnitudes(scaled: Tensor, is_signed: bool) -> Tensor:  # (n * 128,) -> int32
    """Find the index of magnitudes in a map as the kernel does."""
    _, signed, _, unsigned = moment_tables(scaled.device)
    index = torch.empty_like(scaled, dtype=torch.int32)
    _magnitudes_kernel[(scaled.numel() // 128,)](
        index,
        scaled,
        signed if is_signed else unsigned,
        FIRST_CELLS=1 if is_signed else 2,
        TILE=128,
        enable_fp_fusion=False,
    )
    return index


def critical_magnitudes(is_signed: bool) -> Tensor:  # (n * 128,) float32
    """List where an index changes or the search may err: midpoints, decades and the ends."""
    midpoints = DYNAMIC_MAP_MIDPOINTS[127:] if is_signed else UNSIGNED_DYNAMIC_MAP_MIDPOINTS
    exact = torch.cat((midpoints, 10.0 ** torch.arange(-7.0, 1.0), torch.tensor([2.0**-149])))
    ends = (torch.tensor(0.0), torch.tensor(2.0))
    around = [torch.nextafter(exact, end) for end in ends]
    grid = torch.cat((torch.linspace(0, 1, 1000), torch.logspace(-9, 0, 1000)))
    # a magnitude times its rounded reciprocal may exceed one
    values = torch.cat((exact, *around, grid, torch.tensor([0.0, 1 + 2**-23])))
    return torch.nn.functional.pad(values, (0, -values.numel() % 128))
