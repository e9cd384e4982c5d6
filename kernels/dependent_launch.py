"""Kernels that begin while the kernel before them in the stream still runs.

    kernel n      | read weights | wait | work ............ |
    kernel n + 1            | read weights |           wait | work ....

A pass for one token launches some ten small kernels a layer. Beginning costs each as long as its
work: the launch, the first loads of weights, which wait for memory. From compute capability 9.0 on
a kernel may do both before its predecessor has ended (CUDA programming guide, "Programmatic
Dependent Launch and Synchronization"). Three rules make that safe:

- A kernel waits before it reads what earlier kernels of the pass write, and before it writes
  anything. What it reads earlier (weights, tables) must have been written before the pass.
- Waiting is for the end of the predecessor, which has waited for its own: so all earlier kernels
  have ended.
- A kernel lets the next one begin as its first act: the next one's programs become resident only
  when all of this kernel's are.
"""

# triton's annotations do not know what it has for each kind of device
# pyright: reportAttributeAccessIssue=false

from typing import Any

import torch

from kernels.device import properties
from kernels.language import tl, triton

DEPENDENT_FROM = (9, 0)


@triton.jit
def let_next_begin(IS_DEPENDENT: tl.constexpr):
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(IS_DEPENDENT: tl.constexpr):
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()


def dependent(device: torch.device) -> dict[str, Any]:
    """Choose the arguments of a launch that let a kernel begin early, on GPUs that can do that."""
    if device.type == "cpu" or properties(device).capability < DEPENDENT_FROM:
        return {"IS_DEPENDENT": False}
    return {"IS_DEPENDENT": True, "launch_pdl": True}
