"""Runs the NF4 kernels of all tiny cases in Triton's interpreter; a process of its own.

TRITON_INTERPRET has to be set before triton is imported. Writes what the launchers return, by case,
to the safetensors file that is its argument.
"""

import os
import sys
from typing import Any

assert os.environ["TRITON_INTERPRET"] == "1"

import torch  # noqa: E402, the assertion comes first
import triton  # noqa: E402
from nf4_cases import (  # noqa: E402
    INTERPRETED_DTYPES,
    TINY_PRODUCTS,
    TINY_WEIGHTS,
    random_rows,
    random_weight,
)
from poison import poisoned_memory  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels.nf4_dequantize import _launch_nf4_dequantize  # noqa: E402
from kernels.nf4_matmul import _launch_nf4_matmul  # noqa: E402


def let_loops_run_under_numpy_2_4() -> None:
    """Convert a one-element array to an integer as triton's interpreter meant to.

    Before 3.9 it called int() on an array of one dimension, which numpy 2.4 refuses. May go when
    pyproject.toml requires triton 3.9.
    """
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


def main() -> None:
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9):
        let_loops_run_under_numpy_2_4()
    results = {}
    with poisoned_memory():
        for case in TINY_WEIGHTS:
            for dtype in INTERPRETED_DTYPES:
                results[f"{case}-{dtype}"] = _launch_nf4_dequantize(random_weight(case), dtype)
        for case in TINY_PRODUCTS:
            weight = random_weight(case.weight)
            results[str(case)] = _launch_nf4_matmul(random_rows(case), weight, case.transposed)
    save_file(results, sys.argv[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
