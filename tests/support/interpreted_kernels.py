"""Runs the kernels of a file for all tiny cases in Triton's interpreter; a process of its own.

TRITON_INTERPRET has to be set before triton is imported. Writes what the launchers compute, by
case, to the safetensors file that is its first argument; the second is the file's name.
"""

import os
import sys
from functools import partial
from typing import Any

assert os.environ["TRITON_INTERPRET"] == "1"

import torch  # noqa: E402, the assertion comes first
import triton  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support.cross_entropy_cases import (  # noqa: E402
    TINY_LOGITS,
    logits_with_targets_outside,
    loss_results,
)
from support.dropout_cases import TINY_DROPOUTS, dropout_results  # noqa: E402
from support.expert_gradient_cases import (  # noqa: E402
    TINY_EXPERT_GRADIENTS,
    expert_gradient_of,
)
from support.expert_rows_cases import TINY_EXPERT_ROWS, expert_rows_results  # noqa: E402
from support.grouped_matmul_cases import (  # noqa: E402
    TINY_GROUPS,
    TINY_ODD_GROUPS,
    grouped_product,
    ways,
)
from support.layer_cases import (  # noqa: E402
    TINY_GATES,
    TINY_NORMS,
    TINY_ROPES,
    gate_gradient_apart,
    gate_results,
    norm_results,
    rope_results,
)
from support.lora_extension_cases import TINY_EXTENSIONS, extended  # noqa: E402
from support.lora_gradient_cases import NUM_MULTIPROCESSORS, TINY_GRADIENTS, gradients  # noqa: E402
from support.lora_input_cases import TINY_INPUTS, extended_input  # noqa: E402
from support.neftune_cases import TINY_NOISES, noisy  # noqa: E402
from support.nf4_cases import (  # noqa: E402
    IDENTITY_WEIGHT,
    INTERPRETED_DTYPES,
    LONG_ROWS,
    TINY_PRODUCTS,
    TINY_WEIGHTS,
    random_rows,
    random_weight,
    scratch_around,
)
from support.nf4_quantize_cases import (  # noqa: E402
    INTERPRETED_CASES,
    held_tensors,
    matrices_of,
    non_finite_matrix,
    scales_on_midpoints,
)
from support.poison import poisoned_memory  # noqa: E402
from support.quick_interpreter import quicken  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels.cross_entropy import _launch_cross_entropy  # noqa: E402
from kernels.device import H200  # noqa: E402
from kernels.dropout import _launch_dropout  # noqa: E402
from kernels.expert_gradient import _launch_expert_gradient  # noqa: E402
from kernels.expert_rows import (  # noqa: E402
    _launch_combine_expert_rows,
    _launch_gather_expert_rows,
    _launch_weigh_expert_rows_backward,
)
from kernels.glu import Activation, _launch_glu, _launch_glu_backward  # noqa: E402
from kernels.grouped_matmul import _launch_grouped_matmul  # noqa: E402
from kernels.grouped_matmul_copied import _launch_grouped_matmul_copied  # noqa: E402
from kernels.lora_extension import _launch_write_updates  # noqa: E402
from kernels.lora_gradient import _launch_lora_gradient  # noqa: E402
from kernels.lora_input import _launch_extend_input  # noqa: E402
from kernels.neftune import _launch_neftune  # noqa: E402
from kernels.nf4_dequantize import _launch_nf4_dequantize  # noqa: E402
from kernels.nf4_matmul_fused import _launch_nf4_matmul_fused  # noqa: E402
from kernels.nf4_matmul_warpgroup import _launch_nf4_matmul_warpgroup  # noqa: E402
from kernels.nf4_quantize import (  # noqa: E402
    _launch_nf4_quantize,
    _launch_nf4_quantize_absmax,
)
from kernels.rms_norm import _launch_rms_norm  # noqa: E402
from kernels.rms_norm_backward import _launch_rms_norm_backward  # noqa: E402
from kernels.rope import _launch_rope  # noqa: E402
from kernels.rope_backward import _launch_rope_backward  # noqa: E402
from nf4.double_quant import quantize_absmax  # noqa: E402
from nf4.weight import empty_weight, member  # noqa: E402

CPU = torch.device("cpu")
PRODUCTS = {"fused": _launch_nf4_matmul_fused, "warpgroup": _launch_nf4_matmul_warpgroup}


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


def quantized(results: dict[str, Tensor]) -> None:
    """Add what the quantization launchers write."""
    for case in INTERPRETED_CASES:
        shape = case.weight
        weight = empty_weight(
            shape.rows, shape.in_features, shape.block_size, shape.double_quant, CPU
        )
        for index, matrix in enumerate(matrices_of(case)):
            _launch_nf4_quantize(member(weight, index), matrix)
        results |= {f"{case}/{name}": tensor for name, tensor in held_tensors(weight).items()}
    for dtype in INTERPRETED_DTYPES:
        for value in (float("nan"), float("inf"), float("-inf")):
            weight = empty_weight((5,), 70, 64, True, CPU)
            absmax = _launch_nf4_quantize(weight, non_finite_matrix(value, dtype))
            results[f"{value}-{dtype}/absmax"] = absmax
    for name, absmax in (
        ("on midpoints", scales_on_midpoints()),
        ("overflow", torch.full((300,), 3e38)),
    ):
        # of the right shapes; all but the mean is written over
        scales = quantize_absmax(torch.rand(absmax.numel()))
        scales.mean.fill_(0.0 if name == "on midpoints" else float("inf"))
        _launch_nf4_quantize_absmax(scales, absmax)
        results |= {f"{name}/{part}": tensor for part, tensor in vars(scales).items()}


def expanded(results: dict[str, Tensor]) -> None:
    """Add matrices, and some of whose columns the dequantization launcher writes the first."""
    for case in TINY_WEIGHTS:
        for dtype in INTERPRETED_DTYPES:
            results[f"{case}-{dtype}"] = _launch_nf4_dequantize(random_weight(case), dtype)
    for case in [*TINY_WEIGHTS, *LONG_ROWS]:
        for dtype in INTERPRETED_DTYPES:
            scratch = scratch_around(case, dtype)
            _launch_nf4_dequantize(random_weight(case), dtype, scratch[:, : case.in_features])
            results[f"{case}-{dtype}-strided"] = scratch


def products(results: dict[str, Tensor]) -> None:
    """Add the products of the fused and the warpgroup kernels."""
    for case in TINY_PRODUCTS:
        weight = random_weight(case.weight)
        for name, launch in PRODUCTS.items():
            results[f"{name}-{case}"] = launch(random_rows(case), weight)
    weight = random_weight(IDENTITY_WEIGHT)
    for name, launch in PRODUCTS.items():
        results[f"identity-{name}"] = launch(torch.eye(weight.in_features).half(), weight)


def gated_in_place(
    grad_h: Tensor, gate_up: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Call a launcher as the public function does."""
    _launch_glu_backward(grad_h, gate_up, activation, gate_up, grad_h)
    return gate_up, grad_h


def norms(results: dict[str, Tensor]) -> None:
    """Add normalized rows and their gradients."""
    for case in TINY_NORMS:
        found = norm_results(case, _launch_rms_norm, _launch_rms_norm_backward)
        results |= {f"{case}/{name}": tensor for name, tensor in found.items()}


def ropes(results: dict[str, Tensor]) -> None:
    """Add rotated heads and their gradients."""
    for case in TINY_ROPES:
        found = rope_results(case, _launch_rope, _launch_rope_backward)
        results |= {f"{case}/{name}": tensor for name, tensor in found.items()}


def gates(results: dict[str, Tensor]) -> None:
    """Add gated rows and their gradients, in place and apart."""
    for case in TINY_GATES:
        found = gate_results(case, _launch_glu, gated_in_place)
        results |= {f"{case}/{name}": tensor for name, tensor in found.items()}
        apart = gate_gradient_apart(case, _launch_glu_backward)
        results |= {f"{case}/apart/{name}": tensor for name, tensor in apart.items()}


def losses(results: dict[str, Tensor]) -> None:
    """Add what cross-entropy computes alone, and with its gradient in place."""
    alone = partial(_launch_cross_entropy, writes=False)
    in_place = partial(_launch_cross_entropy, writes=True)
    for case in TINY_LOGITS:
        found = loss_results(case, alone, in_place)
        results |= {f"{case}/{name}": tensor for name, tensor in found.items()}
    logits, targets = logits_with_targets_outside()
    results["outside/losses alone"] = alone(logits, targets)
    results["outside/losses"] = in_place(logits, targets)
    results["outside/gradient"] = logits


def dropouts(results: dict[str, Tensor]) -> None:
    """Add what dropout writes and adds."""
    write, add = partial(_launch_dropout, adds=False), partial(_launch_dropout, adds=True)
    for case in TINY_DROPOUTS:
        found = dropout_results(case, write, add)
        results |= {f"{case}/{name}": tensor for name, tensor in found.items()}


def extensions(results: dict[str, Tensor]) -> None:
    """Add weights with the updates behind them."""
    for case in TINY_EXTENSIONS:
        results[f"{case}/W_ext"] = extended(case, _launch_write_updates)


def update_gradients(results: dict[str, Tensor]) -> None:
    """Add what the updates' gradients are, in one pass."""
    compute = partial(_launch_lora_gradient, num_multiprocessors=NUM_MULTIPROCESSORS)
    for num_tokens, case in TINY_GRADIENTS:
        found = gradients(num_tokens, case, compute)
        results |= {f"M{num_tokens}-{case}/{name}": tensor for name, tensor in found.items()}


def grouped_products(results: dict[str, Tensor]) -> None:
    """Add the products of experts, tiles loaded and copied, with several tiles a program."""
    gpu = H200._replace(num_multiprocessors=3)
    launches = {"loaded": _launch_grouped_matmul, "copied": _launch_grouped_matmul_copied}
    for name, launch in launches.items():
        cases = TINY_GROUPS if name == "copied" else TINY_GROUPS + TINY_ODD_GROUPS
        for case, is_transposed in ways(cases):
            compute = partial(launch, is_transposed=is_transposed, gpu=gpu)
            found = grouped_product(case, is_transposed, compute)
            results[f"{name}-{case}-{is_transposed}"] = found


def rows_of_tokens(results: dict[str, Tensor]) -> None:
    """Add what is taken to experts and back."""
    launches = (
        _launch_gather_expert_rows,
        _launch_combine_expert_rows,
        _launch_weigh_expert_rows_backward,
    )
    for case in TINY_EXPERT_ROWS:
        found = expert_rows_results(case, *launches)
        results |= {f"{case}/{name}": tensor for name, tensor in found.items()}


def gradients_of_experts(results: dict[str, Tensor]) -> None:
    """Add the gradients of experts' updates."""
    compute = partial(_launch_expert_gradient, gpu=H200)
    results |= {str(case): expert_gradient_of(case, compute) for case in TINY_EXPERT_GRADIENTS}


def inputs(results: dict[str, Tensor]) -> None:
    """Add inputs with their low-rank part behind them."""
    results |= {str(case): extended_input(case, _launch_extend_input) for case in TINY_INPUTS}


def noises(results: dict[str, Tensor]) -> None:
    """Add embeddings with their noise."""
    results |= {str(case): noisy(case, _launch_neftune) for case in TINY_NOISES}


# by the file in kernels/
KERNELS = {
    "nf4_dequantize": expanded,
    "nf4_matmul": products,
    "nf4_quantize": quantized,
    "rms_norm": norms,
    "rope": ropes,
    "glu": gates,
    "cross_entropy": losses,
    "dropout": dropouts,
    "neftune": noises,
    "lora_extension": extensions,
    "lora_gradient": update_gradients,
    "grouped_matmul": grouped_products,
    "expert_gradient": gradients_of_experts,
    "expert_rows": rows_of_tokens,
    "lora_input": inputs,
}


def main() -> None:
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9):
        let_loops_run_under_numpy_2_4()
    quicken()
    results: dict[str, Tensor] = {}
    with poisoned_memory():
        KERNELS[sys.argv[2]](results)
    save_file(results, sys.argv[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
