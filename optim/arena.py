"""One buffer for the gradients of all parameters that train, and how tensors lie in such a buffer.

torch gives every parameter a gradient of its own. Here each parameter's .grad is a part of one
arena, so clearing, a sum over ranks and a norm are one call each, and captured graphs may hold on
to addresses that do not change. The one who trains makes the arena and gives it to both who use
it: a micro-step adds to it, an optimizer reads it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.adamw_arenas import MOMENT_BLOCK, TILE_BLOCKS, Moments

# smaller tensors keep float32 moments: bitsandbytes' min_8bit_size
SMALLEST_8BIT = 4096


class Layout:
    """Which elements of the arenas a parameter has.

        | parameters with 8-bit moments | ... | those with float32 moments | ... |

    Each starts with a block of 256, each region with a tile of blocks; the rest is padding.

    Attributes:
        shapes: of every parameter, by name.
        starts: the first element of every parameter.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], is_8bit: bool) -> None:
        self.shapes = dict(shapes)
        self.starts: dict[str, int] = {}
        large = [name for name in shapes if is_8bit and shapes[name].numel() >= SMALLEST_8BIT]
        small = [name for name in shapes if name not in set(large)]
        self.num_8bit_blocks = self._place(large, 0)
        self.num_blocks = self._place(small, self.num_8bit_blocks)

    def _place(self, names: list[str], block: int) -> int:
        for name in names:
            self.starts[name] = block * MOMENT_BLOCK
            block += self.blocks_of(name)
        return block + -block % TILE_BLOCKS

    def blocks_of(self, name: str) -> int:
        return -(-self.shapes[name].numel() // MOMENT_BLOCK)

    def is_8bit(self, name: str) -> bool:
        return self.starts[name] < self.num_8bit_blocks * MOMENT_BLOCK

    def first_block(self, name: str) -> int:
        """Count the blocks before a parameter in its region."""
        block = self.starts[name] // MOMENT_BLOCK
        return block if self.is_8bit(name) else block - self.num_8bit_blocks

    @property
    def num_elements(self) -> int:
        return self.num_blocks * MOMENT_BLOCK

    def view(self, arena: Tensor, name: str) -> Tensor:
        """A parameter's elements of an arena over both regions."""
        start, shape = self.starts[name], self.shapes[name]
        return arena[start : start + shape.numel()].view(shape)

    def _moment_sizes(self) -> list[tuple[int, torch.dtype]]:
        """What the buffer holds, in the order of `Moments`: elements and dtype."""
        codes = (self.num_8bit_blocks * MOMENT_BLOCK, torch.uint8)
        absmax = (self.num_8bit_blocks, torch.float32)
        rest = ((self.num_blocks - self.num_8bit_blocks) * MOMENT_BLOCK, torch.float32)
        return [codes, codes, absmax, absmax, rest, rest]

    def moment_bytes(self) -> int:
        """The size of the buffer that holds both moments."""
        sizes = (count * dtype.itemsize for count, dtype in self._moment_sizes())
        return sum(size + -size % MOMENT_BLOCK for size in sizes)

    def carve(self, buffer: Tensor) -> Moments:  # (moment_bytes,) uint8
        """Cut the buffer into the moments, each aligned to 256 bytes, as views."""
        parts, start = [], 0
        for count, dtype in self._moment_sizes():
            size = count * dtype.itemsize
            parts.append(buffer[start : start + size].view(dtype))
            start += size + -size % MOMENT_BLOCK
        return Moments(*parts)


class GradientArena:
    """The gradients of parameters that train, zero at first.

    Attributes:
        parameters: by name; each one's .grad is a view of the arena.
        layout: where each parameter's gradient lies.
        values: the arena, (layout.num_elements,) float32; what lies between gradients is zero.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], is_8bit: bool = False) -> None:
        """Allocate the arena, and let every parameter's .grad be its part.

        Args:
            parameters: float32, all on one device, by name.
            is_8bit: lay parameters of 4,096 elements or more first, whose moments are quantized.

        Raises:
            ValueError: a parameter is not float32 on the device of the first.
        """
        device = next((parameter.device for parameter in parameters.values()), None)
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32 or parameter.device != device:
                raise ValueError(
                    f"parameters to train must be float32 on {device}: "
                    f"got {name} as {parameter.dtype} on {parameter.device}"
                )
        self.parameters = dict(parameters)
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.layout = Layout(shapes, is_8bit)
        self.values = torch.zeros(self.layout.num_elements, device=device)
        for name, parameter in parameters.items():
            parameter.grad = self.layout.view(self.values, name)

    def zero_(self) -> None:
        """Forget all gradients."""
        self.values.zero_()
