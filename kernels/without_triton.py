"""Stand-ins for triton: what files with kernels use of it outside of the kernels.

Decorators, constants and dtypes work as triton's; a kernel that is launched raises. A name
that is missing here is missing where it is used, when the file is imported.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn


class _Kernel:
    """A function that triton would compile."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__ = function.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> NoReturn:
        raise OSError(
            f"triton must be installed to launch {self.__name__}: this Python has none; install it "
            "(it has wheels for Linux), or compute on the CPU (--device cpu)"
        )


def _jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorate a function, with options or without."""
    return _Kernel(function) if function else _Kernel


class _Constant:
    """A value that kernels take as a constant."""

    def __init__(self, value: Any) -> None:
        self.value = value


class TensorDescriptor:
    """A matrix that a launch would copy tiles of."""

    @staticmethod
    def from_tensor(tensor: Any, block_shape: list[int]) -> "TensorDescriptor":
        """Describe a tensor, for a launch that raises."""
        return TensorDescriptor()


class _OutOfResources(Exception):
    """A GPU has less than a kernel takes: never raised here."""


triton = SimpleNamespace(
    # before every release
    __version__="0.0",
    OutOfResources=_OutOfResources,
    jit=_jit,
)
tl = SimpleNamespace(bfloat16="bfloat16", constexpr=_Constant, dtype=str, float16="float16")
knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
