"""The limit of a training step, in a process of its own; `benchmarks/train_step.py` starts it.

    keep        L (forward + backward products + attention there and back) + the head's two
    recompute   the forward products and attention of the layers once more

Products are cuBLAS's of bf16 weights: y = x W^T and grad_x = grad_y W of a layer's four groups and
of the head. With base products in FP8 those of the groups are torch's in E4M3, with fast sums and
one scale for each operand. Attention is the faster of cuDNN's and FlashAttention's over full causal
rows; of a layer that sees a window it is the same share of that time as the pairs that the window
has are of all pairs. Heads wider than both take have the time of two half as wide. Each layer
counts with its own heads. No weight is expanded, no row is quantized, no update is applied, nothing
is normalized, rotated, gated or optimized: what a step takes beyond the limit is what its author
has to answer for. Recomputation could spare down's product, and ours does.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.layer_operations import backward_calls
from benchmarks.layers import WEIGHT_STD
from benchmarks.matmul_8bit import torch_fp8
from benchmarks.measure import measure
from benchmarks.random_model import CONFIGS
from benchmarks.step_timing import parse_shape, print_row
from kernels.fp8 import E4M3, Fp8Rows, Fp8Weight, shape_obstacle
from llama.attention import FLASH_HEAD_DIM
from llama.config import LlamaConfig
from llama.layer_heads import Heads
from run.flags import BASE_COMPUTES

DTYPE = torch.bfloat16
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    # where there is no GPU
    "math": SDPBackend.MATH,
}
# of the head's products: their time grows with the rows, which are too many at once
MAX_HEAD_ROWS = 4096


class Times(NamedTuple):
    """Milliseconds of the mean layer's parts, and of the head over all rows."""

    forward_ms: float
    backward_ms: float
    attention_forward_ms: float
    attention_backward_ms: float
    head_ms: float


def group_shapes(config: LlamaConfig, heads: Heads) -> dict[str, tuple[int, int]]:
    """List the rows and columns of the groups of a layer with such heads; of experts, those that a
    token has, as one."""
    experts = config.experts
    width = experts.num_chosen * experts.width if experts else config.intermediate_size
    queries = config.num_attention_heads * heads.head_dim
    keys = heads.num_key_value_heads * heads.head_dim
    return {
        "qkv": (queries + (1 + heads.has_values) * keys, config.hidden_size),
        "o": (config.hidden_size, queries),
        "gate_up": (2 * width, config.hidden_size),
        "down": (config.hidden_size, width),
    }


def fp8_groups(config: LlamaConfig, heads: Heads, base_compute: str, is_backward: bool) -> set[str]:
    """Name the groups that a pass multiplies in 8 bits: experts stay in 16 bits, and forward
    attention's."""
    shapes = group_shapes(config, heads)
    names = {name for name, shape in shapes.items() if not shape_obstacle(*shape)}
    if config.experts:
        names -= {"gate_up", "down"}
    if is_backward:
        return names if base_compute != "bf16" else set()
    return names - {"qkv", "o"} if base_compute in ("fp8", "int8") else set()


def product_of(x: Tensor, w: Tensor, is_fp8: bool) -> Callable[[], Tensor]:
    """Make the call that multiplies rows (M, K) by a weight (K, N)."""
    if not is_fp8:
        return partial(torch.mm, x, w)
    scale = torch.ones((), device=x.device)
    # both operands lie along what is added up
    rows = Fp8Rows(x.to(E4M3), scale)
    return partial(torch_fp8, rows, Fp8Weight(w.T.contiguous().to(E4M3), scale), (scale, scale))


def products(
    shapes: Sequence[tuple[int, int]],
    num_rows: int,
    device: torch.device,
    is_backward: bool,
    is_fp8: bool = False,
) -> float:
    """Measure y = x W^T, or grad_x = grad_y W, of all weights together, in milliseconds."""
    if not shapes:
        return 0.0

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device)

    weights = [draw(*shape) * WEIGHT_STD for shape in shapes]
    calls = [
        product_of(draw(num_rows, shape[not is_backward]), W if is_backward else W.T, is_fp8)
        for shape, W in zip(shapes, weights, strict=True)
    ]
    return measure([lambda: [call() for call in calls]]).ms_p50


def groups_ms(
    config: LlamaConfig, heads: Heads, num_rows: int, device: torch.device, base_compute: str
) -> tuple[float, float]:
    """Measure the products of a layer with such heads, forward and backward, in milliseconds."""
    groups, found = group_shapes(config, heads), [0.0, 0.0]
    for is_backward in (False, True):
        in_fp8 = fp8_groups(config, heads, base_compute, is_backward)
        for is_fp8 in (False, True):
            shapes = [shape for name, shape in groups.items() if (name in in_fp8) == is_fp8]
            found[is_backward] += products(shapes, num_rows, device, is_backward, is_fp8)
    return found[0], found[1]


def attention(
    config: LlamaConfig, heads: Heads, shape: tuple[int, int], device: torch.device
) -> dict[str, tuple[float, float]]:
    """Measure attention there and back in milliseconds, by every backend that takes the shape."""
    num_samples, num_tokens = shape
    num_halves, width = 1, heads.head_dim
    while width > FLASH_HEAD_DIM:
        num_halves, width = 2 * num_halves, -(-width // 2)
    query, key, value = (
        torch.randn(num_samples, num, num_tokens, width, dtype=DTYPE, device=device)
        for num in (config.num_attention_heads, *[heads.num_key_value_heads] * 2)
    )
    grad = torch.randn_like(query)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    found = {}
    for name, backend in BACKENDS.items():
        if (name == "math") == (device.type == "cuda"):
            continue
        with sdpa_kernel(backend):
            try:
                run(query, key, value)
            except RuntimeError as error:
                print(f"{name} does not take {shape}: {error}", file=sys.stderr)
                continue
            forward = measure([lambda: run(query, key, value)]).ms_p50
            leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
            backward = measure(backward_calls(run, [leaves], [[grad]])).ms_p50
        found[name] = (num_halves * forward, num_halves * backward)
    return found


def num_pairs(num_tokens: int, window: int | None) -> int:
    """Count the pairs of a token and one that it sees, itself included."""
    seen = min(num_tokens, window or num_tokens)
    return seen * (seen + 1) // 2 + (num_tokens - seen) * seen


def share_of_pairs(num_tokens: int, window: int | None) -> float:
    """Compute which share of the pairs of full causal rows a layer sees."""
    return num_pairs(num_tokens, window) / num_pairs(num_tokens, None)


def times_of(
    config: LlamaConfig,
    num_tokens: int,
    products_ms: Mapping[Heads, tuple[float, float]],
    attention_ms: Mapping[Heads, tuple[float, float]],
    head_ms: float,
) -> Times:
    """Work out the mean layer's times from those of each kind of heads, forward and backward."""
    layers = [config.heads(layer) for layer in range(config.num_hidden_layers)]
    shares = [share_of_pairs(num_tokens, window) for window in config.windows]
    products = [fmean(products_ms[heads][way] for heads in layers) for way in (0, 1)]
    mixing = [
        fmean(share * attention_ms[heads][way] for heads, share in zip(layers, shares, strict=True))
        for way in (0, 1)
    ]
    return Times(products[0], products[1], mixing[0], mixing[1], head_ms)


def step_ms(times: Times, num_layers: int, policy: str) -> float:
    """Add up a step."""
    num_forward = 2 if policy == "recompute" else 1
    layer_ms = num_forward * (times.forward_ms + times.attention_forward_ms)
    layer_ms += times.backward_ms + times.attention_backward_ms
    return num_layers * layer_ms + times.head_ms


def rows_of(
    config: LlamaConfig, text: str, device: torch.device, base_compute: str = "bf16"
) -> list[dict[str, Any]]:
    """Measure the limit of one shape, for both policies."""
    shape = parse_shape(text)
    num_rows = shape[0] * shape[1]
    head_rows, head_shape = min(num_rows, MAX_HEAD_ROWS), (config.vocab_size, config.hidden_size)
    head = sum(products([head_shape], head_rows, device, is_back) for is_back in (False, True))
    products_ms, attention_ms, backends = {}, {}, []
    for heads in config.distinct_heads:
        products_ms[heads] = groups_ms(config, heads, num_rows, device, base_compute)
        by_backend = attention(config, heads, shape, device)
        backends.append(min(by_backend, key=lambda name: sum(by_backend[name])))
        attention_ms[heads] = by_backend[backends[-1]]
    head_ms = head * num_rows / head_rows
    times = times_of(config, shape[1], products_ms, attention_ms, head_ms)
    rows = []
    for policy in ("keep", "recompute"):
        ms = step_ms(times, config.num_hidden_layers, policy)
        row = {"provider": "limit", "policy": policy, "shape": text}
        row |= {"tokens_per_second": round(1e3 * num_rows / ms, 1), "ms_p50": round(ms, 3)}
        parts = {name: round(ms, 4) for name, ms in times._asdict().items()}
        rows.append(row | {"attention": ", ".join(dict.fromkeys(backends))} | parts)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the limit of a training step.")
    parser.add_argument("--shape-name", choices=CONFIGS, required=True)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--base-compute", choices=BASE_COMPUTES, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    print_row({"is_ready": True})
    for text in arguments.shapes.split(","):
        for row in rows_of(CONFIGS[arguments.shape_name], text, device, arguments.base_compute):
            print_row(row)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
