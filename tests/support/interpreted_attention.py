"""Runs the kernels of capped attention on tiny heads in Triton's interpreter; a process of its own.

Writes what the launchers compute, by case, to the safetensors file that is its argument.
"""

import os
import sys
from unittest.mock import patch

assert os.environ["TRITON_INTERPRET"] == "1"

import torch  # noqa: E402, the assertion comes first
import triton  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support.attention_cases import TINY_ATTENTIONS, attention_results  # noqa: E402
from support.interpreted_kernels import (  # noqa: E402
    let_loops_run_under_numpy_2_4,
)
from support.poison import poisoned_memory  # noqa: E402
from support.quick_interpreter import quicken  # noqa: E402

from kernels import device as device_module  # noqa: E402
from kernels.device import H200  # noqa: E402
from kernels.masked_attention import _launch_masked_attention  # noqa: E402
from kernels.masked_attention_backward import _launch_masked_attention_backward  # noqa: E402


def main() -> None:
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9):
        let_loops_run_under_numpy_2_4()
    quicken()
    results = {}
    # tiles are chosen by GPU, and there is none
    with poisoned_memory(), patch.object(device_module, "_properties_of_gpu", lambda _: H200):
        for case in TINY_ATTENTIONS:
            found = attention_results(
                case, _launch_masked_attention, _launch_masked_attention_backward
            )
            results |= {f"{case}/{name}": tensor for name, tensor in found.items()}
    save_file(results, sys.argv[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
