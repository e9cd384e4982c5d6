"""Runs the kernels of 8 bits for all tiny cases in Triton's interpreter; a process of its own.

Writes what the launchers compute, by case, to the safetensors file that is its first argument; the
second is the name of the kernels' file. Values in E4M3 are written as bytes.
"""

import os
import sys
from functools import partial
from typing import Any

assert os.environ["TRITON_INTERPRET"] == "1"

import numpy as np  # noqa: E402, the assertion comes first
import torch  # noqa: E402
import triton  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support.cases_8bit import (  # noqa: E402
    FORMATS,
    GATES_IN_8_BITS,
    NORMS_IN_8_BITS,
    TINY_8BIT_WEIGHTS,
    TINY_MATMULS,
    TINY_ROWS,
    UNWRITTEN,
    gate_in_8_bits,
    in_both,
    non_finite_rows,
    norm_in_8_bits,
    product,
    quantized_rows,
    unwritten_rows,
)
from support.interpreted_kernels import (  # noqa: E402
    gated_in_place,
    let_loops_run_under_numpy_2_4,
)
from support.nf4_cases import random_weight  # noqa: E402
from support.poison import poisoned_memory  # noqa: E402
from support.quick_interpreter import quicken  # noqa: E402
from torch import Tensor  # noqa: E402
from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels.fp8 import E4M3  # noqa: E402
from kernels.glu_8bit import _launch_glu_8bit  # noqa: E402
from kernels.matmul_8bit import _launch_matmul_8bit  # noqa: E402
from kernels.matmul_8bit_pointers import launch_matmul_8bit_pointers  # noqa: E402
from kernels.nf4_to_fp8 import _launch_nf4_to_fp8, fp8_scale  # noqa: E402
from kernels.nf4_to_int8 import _launch_nf4_to_int8, int8_scales  # noqa: E402
from kernels.rms_norm import _launch_rms_norm  # noqa: E402
from kernels.rms_norm_backward import _launch_rms_norm_backward  # noqa: E402
from kernels.rotation import INT8, RotatedRows  # noqa: E402
from kernels.rows_8bit import _launch_quantize_rows  # noqa: E402


def let_e4m3_be_converted_as_by_torch() -> None:
    """Convert to E4M3 and from it as a GPU does, and torch.

    The interpreters of triton 3.6 to 3.9 round a midpoint up, cut subnormal numbers off and do not
    carry into the exponent.
    """
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.float8e4nv not in (source, target):
            return original(data, source, target, rounding)
        given = torch.from_numpy(np.ascontiguousarray(data))
        if target == tl.float8e4nv:
            return given.to(E4M3).view(torch.uint8).numpy()
        return given.view(E4M3).to({tl.float16: torch.float16}[target]).numpy()

    interpreter._convert_float = convert


def rows(results: dict[str, Tensor]) -> None:
    """Add rows in 8 bits and their scales."""
    for case in TINY_ROWS:
        found = quantized_rows(case, _launch_quantize_rows)
        results |= {f"{case}/values": found.values, f"{case}/scales": found.scales}
    x = non_finite_rows()
    for format in FORMATS:
        out = unwritten_rows((4, 304), format)
        _launch_quantize_rows(x, out)
        name = f"non-finite-{format}"
        results |= {f"{name}/values": out.values.contiguous(), f"{name}/scales": out.scales}


def weights(results: dict[str, Tensor]) -> None:
    """Add weights in E4M3 and their transposes."""
    for case in TINY_8BIT_WEIGHTS:
        weight = random_weight(case)
        for shape, is_transposed in ((weight.shape, False), (weight.shape[::-1], True)):
            out = torch.full(shape, float("nan"), dtype=E4M3)
            _launch_nf4_to_fp8(weight, fp8_scale(weight), out, is_transposed)
            results[f"{case}-{is_transposed}"] = out


def rotated_weights(results: dict[str, Tensor]) -> None:
    """Add weights in INT8."""
    for case in TINY_8BIT_WEIGHTS:
        weight = random_weight(case)
        values = torch.full(weight.shape, UNWRITTEN, dtype=INT8)
        _launch_nf4_to_int8(weight, RotatedRows(values, int8_scales(weight)))
        results[str(case)] = values


def products(results: dict[str, Tensor]) -> None:
    """Add the products by both kernels."""
    for case in TINY_MATMULS:
        # some programs have two tiles, one has one
        results[f"tiles-{case}"] = product(case, partial(_launch_matmul_8bit, num_programs=3))
        results[f"pointers-{case}"] = product(case, launch_matmul_8bit_pointers)


def norms(results: dict[str, Tensor]) -> None:
    """Add normalized rows, in 8 bits too, and their gradients."""
    for case, format in in_both(NORMS_IN_8_BITS):
        found = norm_in_8_bits(case, format, _launch_rms_norm, _launch_rms_norm_backward)
        results |= {f"{format}-{case}/{name}": tensor for name, tensor in found.items()}


def gates(results: dict[str, Tensor]) -> None:
    """Add gated rows, in 8 bits too, and their gradients."""
    for case, format in in_both(GATES_IN_8_BITS):
        found = gate_in_8_bits(case, format, _launch_glu_8bit, gated_in_place)
        results |= {f"{format}-{case}/{name}": tensor for name, tensor in found.items()}


# by the file in kernels/
KERNELS = {
    "rows_8bit": rows,
    "nf4_to_fp8": weights,
    "nf4_to_int8": rotated_weights,
    "matmul_8bit": products,
    "rms_norm": norms,
    "glu_8bit": gates,
}


def main() -> None:
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9):
        let_loops_run_under_numpy_2_4()
    quicken()
    let_e4m3_be_converted_as_by_torch()
    results: dict[str, Tensor] = {}
    with poisoned_memory():
        KERNELS[sys.argv[2]](results)
    save_file(
        {k: v.view(torch.uint8) if v.dtype == E4M3 else v for k, v in results.items()}, sys.argv[1]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
