"""bitsandbytes in the process of a benchmark, so that one run measures both on one GPU.

It asks for Hugging Face's package `kernels` in one place, its CPU backend: with this checkout on
the path it finds ours, which has no `get_kernel`, and logs that it goes on without. Nothing that
runs on a GPU is concerned. The tests, which run its CPU backend, keep it in a process of its own.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from torch import Tensor


class Bitsandbytes:
    """The operations that it is compared on, called as transformers calls them."""

    def __init__(self) -> None:
        # installed with the extra `test`; a benchmark runs without
        self._bitsandbytes: Any = import_module("bitsandbytes")
        self._functional: Any = import_module("bitsandbytes.functional")
        self._optim: Any = import_module("bitsandbytes.optim")
        self.version = version("bitsandbytes")

    def quantize(self, matrix: Tensor) -> tuple[Tensor, Any]:  # packed and its state
        """Quantize to NF4 with double quantization, in blocks of 64."""
        return self._functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)

    def dequantize(self, packed: Tensor, state: Any) -> Tensor:
        """Expand to the dtype that was quantized."""
        return self._functional.dequantize_4bit(packed, state)

    def matmul(self, x: Tensor, packed: Tensor, state: Any) -> Tensor:
        """Multiply by the transpose: y = x W^T."""
        return self._bitsandbytes.matmul_4bit(x, packed.t(), state)

    def adamw(
        self,
        parameters: Sequence[Tensor],
        rate: float,
        weight_decay: float,
        is_8bit: bool,
        is_paged: bool,
    ) -> Any:
        """Make its optimizer, whose `step` uses the parameters' gradients."""
        name = f"{'Paged' if is_paged else ''}AdamW{'8bit' if is_8bit else '32bit'}"
        optimizer_class = getattr(self._optim, name)
        return optimizer_class(parameters, lr=rate, weight_decay=weight_decay)


def bitsandbytes() -> Bitsandbytes | None:
    """Load bitsandbytes if it is installed."""
    return Bitsandbytes() if find_spec("bitsandbytes") else None
