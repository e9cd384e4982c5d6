"""Compile kernels before they are launched, in a process that uses no GPU.

    compile_share(walk, gpu, number, num_shares)

What a run will launch is known before its weights are there: `step/walk.py` walks through its
passes with tensors of the meta device, which have the sizes, the alignment and the dtypes that a
kernel is compiled for. A launch of that kind computes nothing. In a process that compiles a share,
it compiles: every n-th kernel of the walk, into Triton's cache on the disk, where the launch on the
GPU finds it.
"""

from collections.abc import Callable, Hashable
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import Tensor

from kernels.device import Properties
from kernels.language import TensorDescriptor, triton

WARP = 32
# pointers that are multiples of so many bytes are told to the compiler
ALIGNMENT = 16


class _AbsentGpu:
    """What the compiler asks of a GPU's driver."""

    def __init__(self, capability: tuple[int, int]) -> None:
        major, minor = capability
        target = import_module("triton.backends.compiler").GPUTarget
        self._target = target("cuda", 10 * major + minor, WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


class _Share:
    """Every n-th of the kernels that come, each counted once."""

    def __init__(self, number: int, num_shares: int) -> None:
        self._number, self._num_shares = number, num_shares
        self._seen: set[Hashable] = set()

    def has(self, kernel: Any, arguments: dict[str, Any]) -> bool:
        key = (kernel.__name__, *map(_form_of, arguments.values()))
        if key in self._seen:
            return False
        self._seen.add(key)
        return len(self._seen) % self._num_shares == self._number


def _form_of(argument: Any) -> Hashable:
    """What a kernel is compiled for, of an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNMENT == 0
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, tuple(argument.block_shape)
    return argument


# of this process; None where nothing is compiled ahead
_share: _Share | None = None


def compile_share(
    walk: Callable[[], object], gpu: Properties, number: int, num_shares: int
) -> None:
    """Compile every `num_shares`-th kernel that a walk launches, beginning with the `number`-th.

    The process is good for nothing else afterwards: it takes an absent GPU for the one it has.
    """
    global _share
    _share = _Share(number, num_shares)
    driver: Any = _AbsentGpu(gpu.capability)
    triton.runtime.driver.set_active(driver)
    walk()


def compile_ahead(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Compile a kernel that is launched on the meta device, where it is of this process's share."""
    if _share is None or not _share.has(kernel, arguments):
        return
    # what does not compile is for its launch to raise, and no reason to leave the rest
    with suppress(Exception):
        compiled = kernel.warmup(grid=grid, **arguments)
        driver = import_module("triton.backends.nvidia.driver")
        if hasattr(driver, "make_launcher"):
            # Triton before 3.9 has a launcher in C for each signature, which takes as long
            driver.CudaLauncher(compiled.src, compiled.metadata)
