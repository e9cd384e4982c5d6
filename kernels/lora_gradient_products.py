"""Compute the gradients of h = z A^T and of B from y's gradient by dense products.

    grad_h   = grad_y s B               one product
    grad_B  += s grad_y^T h             one product for each update

Each product reads grad_y, so its 2 M N bytes in 16 bit are moved twice; `lora_gradient.py` reads
grad_y once. The products serve the cases that the one pass does not: CPUs, where they are also its
reference, GPUs whose tensor cores Triton does not know, float32, and ranks above 16.
"""

import torch
from torch import Tensor

from kernels.lora_extension import Update


def add_product(total: Tensor, a: Tensor, b: Tensor, scaling: float = 1.0) -> None:
    """Add s a b to a float32 matrix, accumulated in float32 and rounded nowhere in between."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        total.addmm_(a.float(), b.float(), alpha=scaling)
    elif a.device.type != "meta":
        # takes no memory; on the meta device torch 2.11 does not know it
        torch.addmm(total, a, b, alpha=scaling, out_dtype=torch.float32, out=total)


def lora_gradient_by_products(
    grad_y: Tensor,  # (M, N)
    h: Tensor,  # (M, T)
    sB: Tensor,  # (N, T)
    grad_h: Tensor,  # (M, T), written
    grad_B: Tensor,  # (sum of the updates' rows, R) float32, added to
    updates: tuple[Update, ...],
) -> None:
    """Compute h's gradient by one product, and add B's by one product for each update."""
    torch.mm(grad_y, sB, out=grad_h)
    for update in updates:
        add_product(grad_B[update.B], grad_y[:, update.y].T, h[:, update.A], update.scaling)
