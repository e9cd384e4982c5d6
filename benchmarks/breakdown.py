"""Say where the time of a micro-step goes: every kernel in a family, beside the family's limit.

    python -m benchmarks breakdown --shape 4x2048 --json benchmarks/results/breakdown.h100.json
    python -m benchmarks breakdown --base-compute fp8 ...

One micro-step of Llama-3-8B's shape with random weights, rank 16 on all linear layers, is run
kernel by kernel, as it is before it is captured, under torch's profiler. A kernel's name tells ours
apart, but not a base product from an update's, nor forward from backward. So three things are read
from the profiler's trace:

    kernel       its name and time on the device
    launch       the runtime's call with the kernel's correlation number: when, in which thread
    operation    the innermost operation of that thread around the launch, with its inputs' sizes;
                 or, where the thread has none, the one with the kernel's external id
    region       the innermost of the functions that are marked here (REGIONS) around the launch, in
                 whatever thread: autograd runs backward in one of its own while its caller waits

and `family_of` decides. Regions are marked by wrapping the product's functions while the profiler
runs; nothing in them changes.

A family's limit is the bytes that it cannot do without over a copy's bandwidth, or its FLOPs over
the rate of a large product, whichever takes longer; both are measured in this process. A FLOP in
E4M3 counts as half of one, as data sheets have it. What a policy computes again is counted, each
packed weight is expanded once forward and once backward, and the updates' tails within the base
products are counted as nothing. Copies between host and device run beside the rest and have no
share in the step.
"""

import argparse
import functools
import json
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import llama.experts
import llama.layer
from benchmarks import rms_norm, rope
from benchmarks.cross_entropy import cross_entropy_bytes
from benchmarks.glu import glu_bytes
from benchmarks.layers import nf4_bytes
from benchmarks.measure import copy_gbps, matmul_tflops
from benchmarks.random_model import CONFIGS, random_model
from benchmarks.record import head, write
from benchmarks.step_timing import parse_shape, random_ids
from benchmarks.tables import Row, aligned, breakdown_table
from kernels.fp8 import E4M3
from llama.config import LlamaConfig
from llama.experts import ExpertMLP
from llama.model import Llama, projections
from lora.config import LoRAConfig
from lora.expert_group import ExpertGroup
from lora.frozen_group import FrozenGroup
from lora.linear_group import LinearGroup
from optim.arena import GradientArena
from prepare.base_compute import FORWARD_FORMATS
from rows.batch import Batch
from run.flags import BASE_COMPUTES
from run.machine import configure_torch
from step import micro_step
from step.micro_step import KEEPS_ACTIVATIONS, MicroStep, Policy

FAMILIES = (
    "base products, forward",
    "base products, backward",
    "attention, forward",
    "attention, backward",
    "dequantization",
    "rows to E4M3",
    "low-rank updates",
    "norms",
    "rotation",
    "gate",
    "experts' rows",
    "routing",
    "loss, products",
    "loss, cross-entropy",
    "copies and other",
    "host transfers",
)
# our kernels, by what their names begin with
KERNELS = {
    "_nf4_dequantize_kernel": "dequantization",
    "_nf4_to_fp8_": "dequantization",
    "_nf4_matmul_": "base products, forward",
    "_quantize_rows_kernel": "rows to E4M3",
    "_write_updates_kernel": "low-rank updates",
    "_extend_input_kernel": "low-rank updates",
    "_lora_gradient_": "low-rank updates",
    "_dropout_kernel": "low-rank updates",
    "_rms_norm_": "norms",
    "_rope_": "rotation",
    "_masked_attention_kernel": "attention, forward",
    "_masked_attention_grad_": "attention, backward",
    "_glu_": "gate",
    "_gather_expert_rows_": "experts' rows",
    "_combine_expert_rows_": "experts' rows",
    "_weigh_expert_rows_": "experts' rows",
    "_cross_entropy_kernel": "loss, cross-entropy",
}
# marked while the profiler runs: where a function is looked up, its name there, its region's name
REGIONS: tuple[tuple[Any, str, str], ...] = (
    (LinearGroup, "forward", "quatrain: group forward"),
    (LinearGroup, "forward_from", "quatrain: group forward"),
    (LinearGroup, "backward", "quatrain: group backward"),
    (LinearGroup, "accumulate_grad_A", "quatrain: update backward"),
    (ExpertGroup, "forward", "quatrain: group forward"),
    (ExpertGroup, "backward", "quatrain: group backward"),
    (llama.experts, "route", "quatrain: routing"),
    (llama.experts, "route_backward", "quatrain: routing"),
    (llama.layer, "attention", "quatrain: attention forward"),
    (llama.layer, "attention_backward", "quatrain: attention backward"),
    (micro_step, "linear_cross_entropy_with_gradient", "quatrain: loss"),
)

# forward or back as the region says
BASE_PRODUCTS = ("_grouped_matmul_", "_matmul_8bit_")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
# a product with a side as short as this is an update's: ranks are, tokens and weights are not
LONGEST_RANK_SIDE = 256
BF16 = torch.bfloat16.itemsize
RANK = 16
# of the kernels that a record lists one by one
NUM_LISTED = 40


class Kernel(NamedTuple):
    """A kernel, or a copy, as the trace knows it."""

    name: str
    ms: float
    operation: str  # "aten::mm"; empty where nothing is around the launch
    sizes: tuple[tuple[int, ...], ...]  # of the operation's inputs
    region: str
    is_copy: bool = False


class _Span(NamedTuple):
    start: float
    end: float
    name: str
    sizes: tuple[tuple[int, ...], ...] = ()


class _Spans:
    """Finds the innermost of nested spans around a moment."""

    def __init__(self, spans: Iterable[_Span]) -> None:
        # an outer one before those that start with it
        self._spans = sorted(spans, key=lambda span: (span.start, -span.end))
        self._starts = [span.start for span in self._spans]
        # the last one before each that reaches beyond its start: the way to its outer span
        self._outer: list[int | None] = []
        open_spans: list[int] = []
        for index, span in enumerate(self._spans):
            while open_spans and self._spans[open_spans[-1]].end <= span.start:
                open_spans.pop()
            self._outer.append(open_spans[-1] if open_spans else None)
            open_spans.append(index)

    def around(self, moment: float) -> _Span | None:
        index: int | None = bisect_right(self._starts, moment) - 1
        if index < 0:
            return None
        while index is not None and self._spans[index].end < moment:
            index = self._outer[index]
        return None if index is None else self._spans[index]


NOWHERE = _Span(0, 0, "")


def _span_of(event: dict[str, Any]) -> _Span:
    sizes = tuple(
        tuple(size) if all(isinstance(n, int) for n in size) else ()
        for size in event.get("args", {}).get("Input Dims", ())
    )
    return _Span(event["ts"], event["ts"] + event.get("dur", 0), event["name"], sizes)


def kernels_of(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """Read the kernels from a trace of torch's profiler, in the order in which they started."""
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_category[event.get("cat", "")].append(event)
    operations: dict[Any, list[_Span]] = defaultdict(list)
    by_id: dict[Any, _Span] = {}
    for event in by_category["cpu_op"]:
        span = _span_of(event)
        operations[event["tid"]].append(span)
        # 0 is nobody's
        if external_id := event.get("args", {}).get("External id"):
            by_id[external_id] = span
    threads = {thread: _Spans(spans) for thread, spans in operations.items()}
    names = {name for _, _, name in REGIONS}
    marked = [e for e in by_category["user_annotation"] if e["name"] in names]
    regions = _Spans(_span_of(event) for event in marked)
    launches = {
        event["args"]["correlation"]: event
        for category in ("cuda_runtime", "cuda_driver")
        for event in by_category[category]
        if "correlation" in event.get("args", {})
    }
    on_device = [
        event
        for category in ("kernel", "gpu_memcpy", "gpu_memset")
        for event in by_category[category]
    ]
    found = []
    for event in sorted(on_device, key=lambda event: event["ts"]):
        arguments = event.get("args", {})
        launch = launches.get(arguments.get("correlation"))
        operation = region = None
        if launch is not None:
            region = regions.around(launch["ts"])
            if launch["tid"] in threads:
                operation = threads[launch["tid"]].around(launch["ts"])
        operation = operation or by_id.get(arguments.get("External id"), NOWHERE)
        region = region or NOWHERE
        found.append(
            Kernel(
                event["name"],
                event["dur"] / 1e3,
                operation.name,
                operation.sizes,
                region.name,
                event["cat"] == "gpu_memcpy",
            )
        )
    return found


def is_thin(operation: str, sizes: Sequence[Sequence[int]]) -> bool:
    """Tell whether a product has a side no longer than an update's ranks."""
    # addmm's first input is what it adds to; behind the two factors may be the output
    factors = sizes[1:] if "addmm" in operation else sizes
    if len(factors) < 2 or len(factors[0]) < 2 or len(factors[1]) < 2:
        return False
    a, b = factors[:2]
    return min(a[-2], a[-1], b[-1]) <= LONGEST_RANK_SIDE


def family_of(kernel: Kernel) -> str:
    """Decide which family a kernel belongs to."""
    if kernel.is_copy and any(way in kernel.name for way in ("HtoD", "DtoH")):
        return "host transfers"
    for beginning, family in KERNELS.items():
        if kernel.name.startswith(beginning):
            return family
    _, _, region = kernel.region.partition(": ")
    if region.startswith("attention"):
        return region.replace(" ", ", ")
    if region == "routing":
        return region
    if kernel.name.startswith(BASE_PRODUCTS):
        return region.replace("group", "base products,")
    if kernel.operation in PRODUCTS and not kernel.is_copy:
        if region == "loss":
            return "loss, products"
        if region == "update backward" or is_thin(kernel.operation, kernel.sizes):
            return "low-rank updates"
        if region in ("group forward", "group backward"):
            return region.replace("group", "base products,")
    return "copies and other"


@contextmanager
def marked_regions() -> Iterator[None]:
    """Mark the regions for the profiler, for as long as this lasts."""

    def marking(function: Callable[..., Any], region: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*arguments: Any, **named: Any) -> Any:
            with record_function(region):
                return function(*arguments, **named)

        return marked

    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in REGIONS]
    try:
        for (owner, name, original), (_, _, region) in zip(originals, REGIONS, strict=True):
            setattr(owner, name, marking(original, region))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def trace_of(call: Callable[[], Any], folder: Path) -> list[dict[str, Any]]:
    """Run a call under the profiler and return the events of its trace."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with marked_regions(), profile(activities=activities, record_shapes=True) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


class Cost(NamedTuple):
    """What a family cannot do without."""

    num_bytes: float = 0
    num_flops: float = 0


def _times(times: float, *costs: Cost) -> Cost:
    return Cost(times * sum(c.num_bytes for c in costs), times * sum(c.num_flops for c in costs))


def _itemsize(group: FrozenGroup, is_backward: bool) -> int:
    """Bytes of a number of a base product's operands."""
    format = group.product_format(is_backward) if isinstance(group, LinearGroup) else None
    return format.itemsize if format else BF16


def _products_of(
    groups: Sequence[FrozenGroup], M: int, num_chosen: int, is_backward: bool = False
) -> Cost:
    total = Cost()
    for group in groups:
        weights, N, num_rows = group.num_rows * group.in_features, group.num_rows, M
        if isinstance(group, ExpertGroup):
            N, num_rows = group.rows_of_one, M * num_chosen
        K = group.in_features
        read, written = (N, K) if is_backward else (K, N)
        # of the weight and of the rows that it is multiplied by
        itemsize = _itemsize(group, is_backward)
        num_bytes = itemsize * (weights + num_rows * read) + BF16 * num_rows * written
        num_flops = 2 * num_rows * N * K * itemsize / BF16
        total = _times(1, total, Cost(num_bytes, num_flops))
    return total


def _quantized(groups: Iterable[FrozenGroup], M: int) -> Cost:
    """Gradients are read in 16 bits and written in E4M3."""
    widths = (group.num_rows for group in groups if _itemsize(group, True) != BF16)
    return Cost(M * sum(widths) * (BF16 + E4M3.itemsize))


def _written_too(group: FrozenGroup, M: int) -> Cost:
    """An input is written in E4M3 by the kernel that produces it."""
    return Cost(M * group.in_features * (_itemsize(group, False) != BF16))


def _ways_of_rows(M: int, num_chosen: int, D: int, F: int) -> tuple[Cost, Cost]:
    """Rows of tokens go to experts and back, forward; and back, with weights' gradients."""
    way = BF16 * M * (1 + num_chosen) * D
    return Cost(2 * way), Cost(2 * way + 4 * M * D + BF16 * 3 * M * num_chosen * F)


def _updates_of(groups: Sequence[FrozenGroup], M: int, is_backward: bool) -> Cost:
    """Forward x is read for h; backward grad_y for grad_h and B's gradient, x for A's."""
    total = 0
    for group in groups:
        if not isinstance(group, LinearGroup):
            continue
        columns = sum(update.y.stop - update.y.start for update in group.updates)
        x = group.in_features if group.updates else 0
        total += BF16 * M * (columns + x if is_backward else x)
    return Cost(total)


def costs_of(model: Llama, shape: tuple[int, int], policies: Sequence[Policy]) -> dict[str, Cost]:
    """Count the bytes and FLOPs of every family that has a limit, in a step with all labels."""
    config: LlamaConfig = model.config
    num_samples, T = shape
    M, D, V = num_samples * T, config.hidden_size, config.vocab_size
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    scores = num_samples * heads[0] * T * T / 2 * heads[2]
    q_bytes, kv_bytes = (BF16 * M * count * heads[2] for count in heads[:2])
    mixing = Cost(2 * q_bytes + 2 * kv_bytes, 4 * scores)
    mixing_back = Cost(4 * q_bytes + 4 * kv_bytes, 10 * scores)
    norm, norm_added = (Cost(rms_norm.forward_bytes(M, D, BF16, added)) for added in (False, True))
    norm_back = Cost(rms_norm.backward_bytes(M, D, BF16))
    rotation = Cost(rope.forward_bytes(M, heads, BF16))
    rotation_back = Cost(rope.backward_bytes(M, heads, BF16))
    costs: dict[str, list[Cost]] = defaultdict(list)
    for layer, policy in zip(model.layers, policies, strict=True):
        groups = [layer.self_attn.qkv, layer.self_attn.o, layer.mlp.gate_up, layer.mlp.down]
        is_first, num_chosen, F = layer.index == 0, 1, config.intermediate_size
        to_experts = None
        if isinstance(layer.mlp, ExpertMLP) and config.experts:
            num_chosen, F = config.experts.num_chosen, config.experts.width
            to_experts = _ways_of_rows(M, num_chosen, D, F)
            costs["experts' rows"] += to_experts
        gating, gating_back = (
            Cost(glu_bytes(mode, M * num_chosen, F, BF16)) for mode in ("forward", "backward-h")
        )
        costs["base products, forward"].append(_products_of(groups, M, num_chosen))
        costs["base products, backward"].append(
            _products_of(groups[is_first:], M, num_chosen, is_backward=True)
        )
        costs["rows to E4M3"].append(_quantized(groups[is_first:], M))
        costs["norms"].append(_written_too(layer.mlp.gate_up, M))
        costs["gate"].append(_written_too(layer.mlp.down, M))
        costs["attention, forward"].append(mixing)
        costs["attention, backward"].append(mixing_back)
        if policy != "expand":
            for group in groups:
                N, K = group.num_rows, group.in_features
                for is_backward in (False, True):
                    num_bytes = nf4_bytes(N, K) + _itemsize(group, is_backward) * N * K
                    costs["dequantization"].append(Cost(num_bytes))
        for is_backward in (False, True):
            costs["low-rank updates"].append(_updates_of(groups, M, is_backward))
        # the first layer has nothing to add, and no gradient to pass on
        costs["norms"] += [norm if is_first else norm_added, norm_added]
        costs["norms"] += [norm if is_first else norm_back, norm_back]
        costs["rotation"] += [rotation, rotation_back]
        costs["gate"] += [gating, gating_back]
        if policy not in KEEPS_ACTIVATIONS:
            # all but down, and what comes right before it
            costs["base products, forward"].append(_products_of(groups[:3], M, num_chosen))
            costs["norms"].append(_written_too(layer.mlp.gate_up, M))
            costs["attention, forward"].append(mixing)
            costs["low-rank updates"].append(_updates_of(groups[:3], M, False))
            costs["norms"] += [norm, norm_added]
            costs["rotation"].append(rotation)
            if to_experts:
                # there alone
                costs["experts' rows"].append(_times(0.5, to_experts[0]))
    # the last norm, whose gradient is alone
    costs["norms"] += [norm_added, Cost(3 * M * D * BF16 + 4 * M)]
    num_targets = M - num_samples
    costs["loss, products"] = [Cost(0, 4 * num_targets * V * D)]
    costs["loss, cross-entropy"] = [Cost(cross_entropy_bytes("gradient", num_targets, V, BF16))]
    totals = {family: _times(1, *parts) for family, parts in costs.items()}
    return {family: total for family, total in totals.items() if any(total)}


def limit_ms(cost: Cost, gbps: float, tflops: float) -> float:
    """Compute the shortest time that bandwidth and arithmetic allow."""
    return max(cost.num_bytes / gbps / 1e6, cost.num_flops / tflops / 1e9)


def rows_of(
    kernels: Sequence[Kernel], costs: dict[str, Cost], gbps: float, tflops: float
) -> list[Row]:
    """Add up families, and the step."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[family_of(kernel)].append(kernel.ms)
    total = sum(sum(ms) for family, ms in times.items() if family != "host transfers")
    limits = {family: limit_ms(cost, gbps, tflops) for family, cost in costs.items()}

    def row(family: str, launches: int, ms: float, limit: float | None, has_share: bool) -> Row:
        percent = None if limit is None or not ms else round(100 * limit / ms, 1)
        return {
            "family": family,
            "launches": launches,
            "ms": round(ms, 4),
            "limit_ms": None if limit is None else round(limit, 4),
            "percent_of_limit": percent,
            "percent_of_step": round(100 * ms / total, 2) if has_share and total else None,
        }

    rows = [
        row(
            family, len(times[family]), sum(times[family]), limits.get(family), "host" not in family
        )
        for family in FAMILIES
        if family in times or family in limits
    ]
    launches = sum(len(ms) for family, ms in times.items() if family != "host transfers")
    return [*rows, row("all", launches, total, sum(limits.values()), True)]


def listed(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """List what took longest: launches of one kernel for one purpose together."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for kernel in kernels:
        sizes = [list(size) for size in kernel.sizes if size]
        key = (family_of(kernel), kernel.operation, json.dumps(sizes), kernel.name[:120])
        groups[key].append(kernel.ms)
    longest = sorted(groups.items(), key=lambda item: -sum(item[1]))[:NUM_LISTED]
    return [
        {
            "family": family,
            "operation": operation,
            "sizes": sizes,
            "kernel": name,
            "launches": len(ms),
            "ms": round(sum(ms), 4),
        }
        for (family, operation, sizes, name), ms in longest
    ]


def span_ms(events: Iterable[dict[str, Any]]) -> float:
    """Measure from the first kernel's start to the last one's end."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        return 0.0
    end = max(event["ts"] + event["dur"] for event in kernels)
    return (end - min(event["ts"] for event in kernels)) / 1e3


def profiled_events(
    model: Llama, policies: Sequence[Policy], shape: tuple[int, int]
) -> list[dict[str, Any]]:
    """Profile a micro-step after two that warm up."""
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    step = MicroStep(model, GradientArena(adapter), policies, captures=False)
    ids = random_ids(shape, model.config.vocab_size, 0)
    factor = torch.full((), 1 / ids.numel(), device=model.device)

    def call() -> None:
        step(Batch(ids, ids), factor)

    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            call()
        # the first trace of a process also records how the profiler starts
        trace_of(lambda: torch.ones(1, device=model.device) + 1, Path(folder))
        return trace_of(call, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description="Break a micro-step down into its kernels.")
    parser.add_argument("--shape", type=parse_shape, default="4x2048", help="SAMPLESxTOKENS")
    parser.add_argument("--model", choices=CONFIGS, default="llama-3-8b", help="a named shape")
    parser.add_argument("--policy", choices=get_args(Policy), default="keep")
    parser.add_argument("--base-compute", choices=BASE_COMPUTES, default="bf16")
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise RuntimeError("a benchmark needs a CUDA GPU: torch.cuda.is_available() is False")
    device = torch.device("cuda", torch.cuda.current_device())
    # as train.py does by default
    configure_torch(device, local_rank=0, is_deterministic=False)
    record = head("breakdown", arguments.commit)
    gbps, tflops = copy_gbps(device), matmul_tflops(device)
    torch.cuda.empty_cache()
    model = random_model(CONFIGS[arguments.model], device)
    if arguments.base_compute != "bf16":
        model.multiply_in_8_bits(FORWARD_FORMATS[arguments.base_compute])
    lora = LoRAConfig(RANK, 2 * RANK, 0.0, projections(model.config))
    model.attach_lora(lora, seed=0)
    policies: list[Policy] = [arguments.policy] * len(model.layers)
    events = profiled_events(model, policies, arguments.shape)
    kernels = kernels_of(events)
    rows = rows_of(kernels, costs_of(model, arguments.shape, policies), gbps, tflops)
    record |= {
        "model": arguments.model,
        "shape": "x".join(map(str, arguments.shape)),
        "policy": arguments.policy,
        "base_compute": arguments.base_compute,
        "copy_gbps": round(gbps, 1),
        "matmul_tflops": round(tflops, 1),
        "span_ms": round(span_ms(events), 3),
        "kernels": listed(kernels),
        "rows": rows,
    }
    shape, compute = record["shape"], arguments.base_compute
    print(f"\n{record['device']}, {shape}, {arguments.policy}, base products in {compute}")
    print(f"copy {gbps:,.0f} GB/s, product {tflops:,.0f} TFLOP/s; kernel by kernel, with the gaps")
    print(f"between launches that a captured step has not, {record['span_ms']:.1f} ms\n")
    print(aligned(*breakdown_table(rows)))
    if arguments.json:
        write(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
