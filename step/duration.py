"""How long a micro-step will take, from its products and the bytes that it moves."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llama.experts import ExpertMLP
from lora.expert_group import ExpertGroup
from lora.frozen_group import FrozenGroup
from lora.linear_group import LinearGroup
from step.micro_step import KEEPS_ACTIVATIONS, Policy
from step.workload import Workload

# attention's products run at about this share of a large product's rate, with the mask's half
# left out, forward and backward together
ATTENTION_SHARE = 0.5
# the rate of products in 8 bits over that of 16 bits, for which data sheets say 2: torch's multiply
# 1,335 over 767 TFLOP/s on an H100 and 1,365 over 770 on an H200, in the shapes of an 8B model
FP8_SPEEDUP = 1.75
# bytes that a number moves to be an operand in 8 bits: of an input those that its producer writes,
# of a gradient those that are read in 16 bits too
INPUT_BYTES, GRADIENT_BYTES = 1, 3
# bytes of a weight in NF4, its scales among them
PACKED_BYTES = 0.516


@dataclass(frozen=True)
class Rates:
    """How fast a device is: FLOP and bytes a second."""

    product: float
    memory: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time a few large products and copies on a GPU, about a tenth of a second.

    Note:
        Synchronizes with the device, and takes 400 MB of it in passing.
    """
    a = torch.randn(8192, 4096, device=device).to(dtype)
    b = torch.randn(4096, 8192, device=device).to(dtype)
    copied = torch.empty_like(a)

    def seconds(work: Callable[[], object], repetitions: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        start.record()
        for _ in range(repetitions):
            work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repetitions

    product = 2 * 8192 * 4096 * 8192 / seconds(lambda: a @ b, 30)
    return Rates(product, 2 * a.nbytes / seconds(lambda: copied.copy_(a), 30))


class _Products(NamedTuple):
    """What some projections ask for in one pass.

    Attributes:
        multiplied: weights by which a token is multiplied, one in 8 bits as a part of one.
        expanded: bytes that are moved to expand the weights.
        quantized: numbers of a token that are quantized.
    """

    multiplied: float
    expanded: float
    quantized: int


def _products_of(
    groups: Iterable[FrozenGroup], num_chosen: int, itemsize: int, is_backward: bool
) -> _Products:
    """Add up projections, of which experts' are those that a token has."""
    multiplied = expanded = 0.0
    quantized = 0
    for group in groups:
        weights = group.num_rows * group.in_features
        share = num_chosen / group.num_experts if isinstance(group, ExpertGroup) else 1
        if isinstance(group, LinearGroup) and group.product_format(is_backward):
            multiplied += weights / FP8_SPEEDUP
            expanded += (PACKED_BYTES + 1) * weights
            quantized += group.num_rows if is_backward else group.in_features
        else:
            multiplied += share * weights
            expanded += (PACKED_BYTES + itemsize) * weights
    return _Products(multiplied, expanded, quantized)


def step_seconds(work: Workload, policies: Sequence[Policy], rates: Rates) -> float:
    """Estimate a micro-step's time from its products and the bytes it moves.

    products: every weight forward and back, and again but for down_proj where a layer is computed
    again and its output is not normalized; the head twice. Of experts' weights, those of a token's
    experts. Bytes, in rows of D and of F numbers: 12 and 4 forward, 22 and 10 back, 2 and 3 of D
    more for each norm behind a half; for each expert of a token 4 of D more, forward and back. Of
    products in 8 bits the rows that they take, which are quantized.
    """
    config, M, e = work.config, work.M, work.dtype.itemsize
    D = config.hidden_size
    num_behind = sum(
        name is not None for name in (config.norms.behind_attention, config.norms.behind_mlp)
    )
    # q k^T and its product with v, the lower triangle of each; five such products back, seven by
    # our own kernels
    passes = 4.5 if work.is_masked else 3.5
    squares = 2 * M * (work.sample_tokens or work.tokens)
    flops, attended, num_bytes = 0.0, 0.0, 0.0
    for layer, policy in zip(work.model.layers, policies, strict=True):
        is_again, mlp = policy not in KEEPS_ACTIVATIONS, layer.mlp
        groups = [module for module in layer.modules() if isinstance(module, FrozenGroup)]
        num_pairs, F, router = 0, config.intermediate_size, 0
        if isinstance(mlp, ExpertMLP):
            assert config.experts is not None
            num_pairs, router = config.experts.num_chosen, config.experts.num_experts * D
            F = num_pairs * config.experts.width
        forward, back = (_products_of(groups, num_pairs, e, is_back) for is_back in (False, True))
        repeated = [g for g in groups if config.norms.behind_mlp or g is not mlp.down]
        again = _products_of(repeated, num_pairs, e, False)
        flops += 2 * M * (forward.multiplied + back.multiplied + 2 * router)
        flops += 2 * M * is_again * (again.multiplied + router)
        attended += squares * layer.self_attn.o.in_features * (passes + is_again)
        if policy != "expand":
            num_bytes += forward.expanded + back.expanded + is_again * again.expanded
        num_bytes += INPUT_BYTES * M * (forward.quantized + is_again * again.quantized)
        num_bytes += GRADIENT_BYTES * M * back.quantized
        num_bytes += M * e * ((12 + 22 + (2 + 3) * num_behind + 8 * num_pairs) * D + (4 + 10) * F)
        num_bytes += is_again * M * e * ((12 + 2 * num_behind + 4 * num_pairs) * D + 2 * F)
    flops += 4 * M * config.vocab_size * D
    num_bytes += 3 * M * e * config.vocab_size
    return (
        flops / rates.product
        + attended / (rates.product * ATTENTION_SHARE)
        + num_bytes / rates.memory
    )
