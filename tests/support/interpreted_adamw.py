"""Runs the kernels of AdamW on tiny arenas in Triton's interpreter; a process of its own.

Writes what each step leaves, by case, to the safetensors file that is its argument.
"""

import os
import sys
from typing import Any

assert os.environ["TRITON_INTERPRET"] == "1"

import numpy as np  # noqa: E402, the assertion comes first
import torch  # noqa: E402
import triton  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support.adamw_cases import (  # noqa: E402
    CASES,
    LEARNING_RATE,
    NUM_STEPS,
    critical_magnitudes,
    held_tensors,
    nearest_magnitudes,
    random_arenas,
    set_gradients,
)
from support.interpreted_kernels import let_loops_run_under_numpy_2_4  # noqa: E402
from support.poison import poisoned_memory  # noqa: E402
from support.quick_interpreter import quicken  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels import adamw as module  # noqa: E402
from kernels import adamw_plan as plan_module  # noqa: E402


def let_fma_round_once() -> None:
    """Compute a fused multiply-add as one.

    Before 3.9 triton's interpreter rounded the product too. May go when pyproject.toml requires
    triton 3.9.
    """

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def main() -> None:
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9):
        let_loops_run_under_numpy_2_4()
        let_fma_round_once()
    quicken()
    # the interpreter runs one after the other; two tiles then meet in one
    plan_module.SUM_PROGRAMS = 2
    results = {}
    with poisoned_memory():
        for case in CASES:
            arenas = random_arenas(case)
            scale = torch.tensor(case.loss_scale)
            for step in range(NUM_STEPS):
                set_gradients(arenas, case, step)
                plan_module._launch_adamw_plan(
                    arenas, LEARNING_RATE / (1 + step), case.max_norm, scale
                )
                module._launch_adamw(arenas)
                held = held_tensors(arenas) | {"norm": arenas.scalars[:1]}
                results |= {f"{case}/{step}/{name}": t.clone() for name, t in held.items()}
    for is_signed in (True, False):
        results[f"magnitudes-{is_signed}"] = nearest_magnitudes(
            critical_magnitudes(is_signed), is_signed
        )
    save_file(results, sys.argv[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
