"""Runs the kernels of a pass for one token in Triton's interpreter; a process of its own.

python tests/support/interpreted_token.py OUTPUT KERNEL
"""

import os
import sys

assert os.environ.get("TRITON_INTERPRET") == "1"

import torch  # noqa: E402, the assertion comes first
from safetensors.torch import save_file  # noqa: E402
from support.poison import poisoned_memory  # noqa: E402
from support.quick_interpreter import quicken  # noqa: E402
from support.token_cases import TINY, results  # noqa: E402

from kernels.nf4_matmul_fused import _launch_nf4_matmul_fused  # noqa: E402
from kernels.token_attention import _launch_token_attention  # noqa: E402
from kernels.token_glu import _launch_token_glu  # noqa: E402
from kernels.token_heads import _launch_token_heads  # noqa: E402
from kernels.token_norm import _launch_token_norm  # noqa: E402

LAUNCHERS = {
    "norm": _launch_token_norm,
    "glu": _launch_token_glu,
    "linear": _launch_nf4_matmul_fused,
    "heads": _launch_token_heads,
    "attn": _launch_token_attention,
}


def main() -> None:
    output, kernel = sys.argv[1:]
    quicken()
    found = {}
    with poisoned_memory(), torch.no_grad():
        for case in TINY[kernel]:
            for name, tensor in results(case, LAUNCHERS[kernel], torch.device("cpu")).items():
                found[f"{case}/{name}"] = tensor.clone()
    save_file(found, output)


main()
