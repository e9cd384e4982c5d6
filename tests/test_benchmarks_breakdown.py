"""benchmarks/breakdown.py: which family a kernel belongs to, and what each cannot do without."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.micro_steps import LORA, load_tiny

from benchmarks import breakdown as module
from benchmarks.breakdown import (
    FAMILIES,
    PRODUCTS,
    REGIONS,
    Cost,
    Kernel,
    costs_of,
    family_of,
    is_thin,
    kernels_of,
    limit_ms,
    listed,
    marked_regions,
    profiled_events,
    rows_of,
    span_ms,
)
from benchmarks.tables import breakdown_table
from kernels.fp8 import E4M3
from step.micro_step import Policy

SHAPE = (2, 6)
FORWARD, BACKWARD = "quatrain: group forward", "quatrain: group backward"


def kernel(
    name: str = "nvjet_tst",
    operation: str = "",
    sizes: tuple[tuple[int, ...], ...] = (),
    region: str = "",
    is_copy: bool = False,
) -> Kernel:
    return Kernel(name, 1.0, operation, sizes, region, is_copy)


# of Llama-3-8B, 8,192 tokens, rank 16: tails of 64 columns
SQUARE = ((8192, 4160), (4160, 4096), (8192, 4096))
DOWN_A = ((8192, 14336), (14336, 64), (8192, 64))
GRAD_B = ((4096, 16), (4096, 8192), (8192, 16), (), (), (4096, 16))
ROUTER = ((8192, 2048), (2048, 128))
LOGITS = ((512, 4096), (4096, 128256), (512, 128256))


@pytest.mark.parametrize(
    ("found", "family"),
    [
        (kernel("_nf4_dequantize_kernel", region=FORWARD), "dequantization"),
        (kernel("_nf4_to_fp8_transposed_kernel", region=BACKWARD), "dequantization"),
        (kernel("_quantize_rows_kernel", region=FORWARD), "rows to E4M3"),
        (kernel("_matmul_8bit_kernel", region=FORWARD), "base products, forward"),
        (kernel("_matmul_8bit_pointers_kernel", region=BACKWARD), "base products, backward"),
        (kernel("_write_updates_kernel", region=BACKWARD), "low-rank updates"),
        (kernel("_rms_norm_backward_kernel"), "norms"),
        (kernel("_rope_kernel_0d1d"), "rotation"),
        (kernel("_grouped_matmul_copied_kernel", region=FORWARD), "base products, forward"),
        (kernel("_grouped_matmul_kernel", region=BACKWARD), "base products, backward"),
        (kernel("_combine_expert_rows_kernel"), "experts' rows"),
        (kernel("gemm", "aten::mm", ROUTER, "quatrain: routing"), "routing"),
        (kernel("radix_sort", "aten::sort", (), "quatrain: routing"), "routing"),
        (kernel("_masked_attention_kernel"), "attention, forward"),
        (kernel("_masked_attention_grad_kv_kernel"), "attention, backward"),
        (kernel("_glu_backward_kernel"), "gate"),
        (kernel("_cross_entropy_kernel", region="quatrain: loss"), "loss, cross-entropy"),
        (kernel(operation="aten::mm", sizes=SQUARE, region=FORWARD), "base products, forward"),
        (kernel(operation="aten::mm", sizes=SQUARE, region=BACKWARD), "base products, backward"),
        (kernel(operation="aten::mm", sizes=DOWN_A, region=FORWARD), "low-rank updates"),
        (kernel(operation="aten::addmm", sizes=GRAD_B, region=BACKWARD), "low-rank updates"),
        (
            kernel(operation="aten::addmm", sizes=SQUARE, region="quatrain: update backward"),
            "low-rank updates",
        ),
        (kernel(operation="aten::mm", sizes=LOGITS, region="quatrain: loss"), "loss, products"),
        (kernel(operation="aten::mul", region="quatrain: loss"), "copies and other"),
        (
            kernel("cudnn_generated_fort_native_sdpa", region="quatrain: attention forward"),
            "attention, forward",
        ),
        (
            kernel(
                "dot_do_o", "aten::_cudnn_attention_backward", (), "quatrain: attention backward"
            ),
            "attention, backward",
        ),
        (kernel("Memcpy HtoD (Pinned -> Device)", is_copy=True), "host transfers"),
        (kernel("Memcpy DtoD (Device -> Device)", is_copy=True), "copies and other"),
        (kernel("vectorized_elementwise_kernel", "aten::copy_", (), FORWARD), "copies and other"),
        (kernel("unheard_of"), "copies and other"),
    ],
    ids=lambda value: value.replace(", ", "-") if isinstance(value, str) else value.name,
)
def test_a_kernel_belongs_to_a_family(found: Kernel, family: str) -> None:
    assert family in FAMILIES
    assert family_of(found) == family


def test_a_bias_is_no_factor() -> None:
    assert not is_thin("aten::addmm", ((4096,), (8192, 4096), (4096, 4096)))
    assert is_thin("aten::addmm", ((4096, 16), (4096, 8192), (8192, 16)))
    assert not is_thin("aten::mm", ())


def test_kernels_of_our_product_have_families_that_match_their_names() -> None:
    root = Path(module.__file__).parent.parent / "kernels"
    text = "".join(path.read_text() for path in root.glob("*.py"))
    for beginning in (*module.KERNELS, *module.BASE_PRODUCTS):
        assert f"def {beginning}" in text, beginning


def event(category: str, name: str, start: float, duration: float, **more: Any) -> dict[str, Any]:
    thread = more.pop("tid", 1)
    fields = {"cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}
    return fields | {"args": more}


def test_a_kernel_is_found_in_its_operation_and_region() -> None:
    region, back = REGIONS[0][2], REGIONS[4][2]
    dims = {"Input Dims": [[4, 8], [8, 3], [[1], [2]], []]}
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "ProfilerStep", 0, 1000),
        event("user_annotation", region, 10, 30),
        event("cpu_op", "aten::matmul", 12, 20),
        event("cpu_op", "aten::mm", 13, 10, **dims),
        event("cpu_op", "aten::view", 14, 1),
        event("cuda_runtime", "cudaLaunchKernel", 20, 1, correlation=7),
        # of a kernel of ours, between operations
        event("cuda_driver", "cuLaunchKernelEx", 35, 1, correlation=8),
        # autograd's thread, while the other waits in the region
        event("user_annotation", back, 50, 30),
        event("cpu_op", "aten::_cudnn_attention_backward", 55, 10, tid=2),
        event("cuda_runtime", "cudaLaunchKernel", 60, 1, tid=2, correlation=9),
        event("cpu_op", "aten::copy_", 90, 2, **{"External id": 5}),
        event("kernel", "backward", 400, 40, correlation=9),
        event("kernel", "gemm", 200, 100, correlation=7),
        event("kernel", "_rms_norm_kernel", 300, 50, correlation=8),
        event("gpu_memcpy", "Memcpy DtoH", 500, 10, correlation=99, **{"External id": 5}),
        event("kernel", "lost", 600, 10),
    ]
    assert kernels_of(events) == [
        Kernel("gemm", 0.1, "aten::mm", ((4, 8), (8, 3), (), ()), region),
        Kernel("_rms_norm_kernel", 0.05, "", (), region),
        Kernel("backward", 0.04, "aten::_cudnn_attention_backward", (), back),
        Kernel("Memcpy DtoH", 0.01, "aten::copy_", (), "", True),
        Kernel("lost", 0.01, "", (), ""),
    ]
    assert span_ms(events) == pytest.approx(0.41)
    assert span_ms([]) == 0


def with_kernels(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give a trace of the CPU a launch and a kernel for every product and every attention."""
    made = []
    for number, operation in enumerate(events):
        name = operation.get("name", "")
        if operation.get("cat") == "cpu_op" and (
            name in PRODUCTS or name.startswith("aten::_scaled_dot_product")
        ):
            # before the operations within: a machine that is busy may pause the process in any of
            # them, and then they cover whatever moment was chosen behind
            start = operation["ts"]
            launch = event("cuda_runtime", "cudaLaunchKernel", start, 0.0, correlation=number)
            made.append(launch | {"tid": operation["tid"]})
            made.append(event("kernel", "gemm", start + 1e6, 1.0, correlation=number))
    return events + made


@pytest.mark.parametrize("policy", ["expand", "keep", "recompute"])
def test_a_real_micro_steps_products_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    # tiny: ranks are 4, tails 64, and 32 is hidden_size
    monkeypatch.setattr(module, "LONGEST_RANK_SIDE", LORA.r)
    model = load_tiny(tmp_path)
    num_layers = len(model.layers)
    policies: list[Policy] = [policy] * num_layers
    events = profiled_events(model, policies, SHAPE)
    found = kernels_of(with_kernels(events))
    counts = Counter(family_of(kernel) for kernel in found)
    again = 1 if policy == "recompute" else 0
    assert counts["attention, forward"] == num_layers * (1 + again)
    assert counts["attention, backward"] == num_layers
    assert counts["loss, products"] == 2
    # h and y of every group; grad_h and grad_x, but of the first layer's qkv no grad_x. A tail is
    # longer than a rank, so here h and grad_h count as base products, but for o's h
    assert counts["base products, forward"] == num_layers * (2 * 4 - 1 + (2 * 3 - 1) * again)
    assert counts["base products, backward"] == 2 * num_layers * 4 - 1
    # of seven projections the gradients of B, of four groups those of A; o's h
    assert counts["low-rank updates"] == num_layers * (7 + 4 + 1 + again)
    assert set(counts) <= set(FAMILIES)
    assert all(kernel.region for kernel in found)


def test_marks_are_taken_off_again() -> None:
    before = [getattr(owner, name) for owner, name, _ in REGIONS]

    def fail_while_marked() -> None:
        with marked_regions():
            during = [getattr(owner, name) for owner, name, _ in REGIONS]
            assert all(a is not b for a, b in zip(before, during, strict=True))
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_marked()
    assert [getattr(owner, name) for owner, name, _ in REGIONS] == before


def test_costs_are_those_of_the_shapes(tmp_path: Path) -> None:
    model = load_tiny(tmp_path)
    M, D, F, V = 12, 32, 72, 96
    keep = costs_of(model, SHAPE, ["keep", "keep"])
    assert set(keep) <= set(FAMILIES)
    weights = {"qkv": 64 * D, "o": D * D, "gate_up": 2 * F * D, "down": F * D}
    every = sum(weights.values())
    assert keep["base products, forward"].num_flops == 2 * 2 * M * every
    # the first layer's qkv has none
    expected = 2 * M * (2 * every - weights["qkv"])
    assert keep["base products, backward"].num_flops == expected
    assert keep["loss, products"].num_flops == 4 * (M - 2) * V * D
    # two samples of six tokens, half of the scores, four heads of eight
    assert keep["attention, forward"].num_flops == 2 * 2 * (2 * 4 * 6 * 6 // 2) * 2 * 8
    expand = costs_of(model, SHAPE, ["expand", "expand"])
    assert keep == expand | {"dequantization": keep["dequantization"]}
    assert "dequantization" not in expand
    recompute = costs_of(model, SHAPE, ["recompute", "recompute"])
    more = recompute["base products, forward"].num_flops - keep["base products, forward"].num_flops
    assert more == 2 * 2 * M * (every - weights["down"])
    for family in ("base products, backward", "gate", "dequantization", "loss, products"):
        assert recompute[family] == keep[family]
    # x of four groups forward, and back y of the members and x again
    columns = 64 + 32 + 2 * F + 32
    inputs = 3 * D + F
    assert keep["low-rank updates"].num_bytes == 2 * 2 * M * (2 * inputs + columns)


def test_costs_in_fp8_are_those_of_a_byte_a_number_and_half_a_flop(tmp_path: Path) -> None:
    M, D, F = 12, 32, 80
    model = load_tiny(tmp_path, dtype=torch.bfloat16, intermediate_size=F)
    others = costs_of(model, SHAPE, ["recompute", "recompute"])
    assert "rows to E4M3" not in others
    model.multiply_in_8_bits(E4M3)
    costs = costs_of(model, SHAPE, ["recompute", "recompute"])
    qkv, o, gate_up, down = 64 * D, D * D, 2 * F * D, F * D
    # of both layers: attention's forward stays, and both are computed again, but for down
    forward = 2 * M * (2 * (qkv + o) + (2 * gate_up + down) / 2)
    assert costs["base products, forward"].num_flops == 2 * forward
    # every gradient is read for that, but for the first layer's; norm and gate write theirs
    gradients = 64 + D + 2 * F + D
    assert costs["rows to E4M3"].num_bytes == 3 * M * (2 * gradients - 64)
    assert costs["norms"].num_bytes - others["norms"].num_bytes == 2 * 2 * M * D
    assert costs["gate"].num_bytes - others["gate"].num_bytes == 2 * M * F
    more = others["base products, forward"].num_bytes - costs["base products, forward"].num_bytes
    assert more == 2 * (2 * (gate_up + M * D) + down + M * F)
    more = others["base products, backward"].num_bytes - costs["base products, backward"].num_bytes
    assert more == 2 * (qkv + o + gate_up + down + M * gradients) - (qkv + M * 64)
    more = others["dequantization"].num_bytes - costs["dequantization"].num_bytes
    assert more == 2 * (qkv + o + 2 * (gate_up + down))


def test_costs_of_experts_are_those_of_a_tokens_experts(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, variant="mixtral")
    # two of four experts a token, 24 wide; queries of 48 numbers, keys and values of 24
    M, D, k, E, width = 12, 32, 2, 4, 24
    attention, of_one = (48 + 2 * 24) * D + D * 48, 3 * D * width
    keep = costs_of(model, SHAPE, ["keep", "keep"])
    assert set(keep) <= set(FAMILIES)
    assert keep["base products, forward"].num_flops == 2 * 2 * M * (attention + k * of_one)
    recompute = costs_of(model, SHAPE, ["recompute", "recompute"])
    more = recompute["base products, forward"].num_flops - keep["base products, forward"].num_flops
    assert more == 2 * 2 * M * (attention + k * 2 * D * width)
    # all experts are expanded, there and back
    written = 2 * 2 * 2 * (attention + E * of_one)
    assert written < keep["dequantization"].num_bytes < 1.5 * written
    # a row of each token is read or written, and one of each of its experts: twice each way
    way = 2 * M * (1 + k) * D
    back = 2 * way + 4 * M * D + 2 * 3 * M * k * width
    assert keep["experts' rows"].num_bytes == 2 * (2 * way + back)
    assert recompute["experts' rows"].num_bytes == keep["experts' rows"].num_bytes + 2 * way


def test_rows_add_up() -> None:
    kernels = [
        kernel("_glu_kernel"),
        kernel("_glu_kernel"),
        kernel("_rope_kernel"),
        kernel("Memcpy HtoD", is_copy=True),
    ]
    costs = {"gate": Cost(3e9, 0), "norms": Cost(0, 400e9)}
    rows = {row["family"]: row for row in rows_of(kernels, costs, 3000, 800)}
    assert list(rows) == ["norms", "rotation", "gate", "host transfers", "all"]
    assert rows["gate"] == {
        "family": "gate",
        "launches": 2,
        "ms": 2.0,
        "limit_ms": 1.0,
        "percent_of_limit": 50.0,
        "percent_of_step": 66.67,
    }
    assert rows["norms"]["percent_of_limit"] is None
    assert rows["host transfers"]["percent_of_step"] is None
    assert (rows["all"]["launches"], rows["all"]["ms"], rows["all"]["limit_ms"]) == (3, 3.0, 1.5)
    lines = breakdown_table(rows.values())[1]
    assert lines[2] == ["gate", "2", "2.00", "1.00", "50 %", "66.7 %"]
    assert lines[3] == ["host transfers", "1", "1.00", "-", "-", "-"]
    assert limit_ms(Cost(3e9, 1600e9), 3000, 800) == pytest.approx(2)


def test_the_longest_are_listed_together() -> None:
    found = listed([kernel("a"), kernel("_rope_kernel"), kernel("_rope_kernel")])
    assert [(entry["kernel"], entry["launches"], entry["ms"]) for entry in found] == [
        ("_rope_kernel", 2, 2.0),
        ("a", 1, 1.0),
    ]
