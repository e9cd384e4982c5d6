"""kernels/masked_attention.py: no worse than torch, interpreted and on a GPU; compiles for each."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ahead_of_time import (
    SHARED_BYTES_LIMIT,
    TENSOR_CORE_INSTRUCTION,
    CompiledLaunch,
    compile_launch,
)
from support.attention_cases import (
    TINY_ATTENTIONS,
    AttentionCase,
    allowances,
    attention_cases,
    attention_inputs,
    attention_of_torch,
    attention_results,
)
from support.equality import assert_equal, assert_no_worse_than
from support.interpreter import interpreted_results
from torch import Tensor

from kernels import masked_attention as forward_module
from kernels import masked_attention_backward as backward_module
from kernels import masked_attention_reference as reference_module
from kernels.device import H200, meta_stands_for
from kernels.launch import MAX_LATER_AXIS
from kernels.masked_attention import masked_attention
from kernels.masked_attention_backward import masked_attention_backward
from kernels.masked_attention_mask import Samples
from kernels.masked_attention_tiles import check_head_dim

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
SCRIPT = "interpreted_attention.py"
CPU_CASES = attention_cases(
    [(2, 4, 2, 70, 70, 12, None), (1, 3, 1, 70, 70, 16, 9), (1, 2, 1, 70, 70, 1024, 9)], DTYPES
)
CPU_CASES += [replace(case, cap=None, lengths=(30, 39, 1)) for case in CPU_CASES]
CPU_CASES += [replace(case, has_sinks=True) for case in CPU_CASES]
# heads of real models, in windows shorter and longer than a tile, and a prime of tokens
GPU_CASES = attention_cases(
    [
        (1, 1, 1, 1, 1, 2, None),
        (2, 4, 2, 70, 70, 12, 9),
        (1, 4, 4, 257, 257, 64, 100),
        (2, 4, 1, 331, 331, 128, None),
        (1, 8, 4, 512, 512, 256, None),
        (2, 4, 2, 331, 331, 256, 120),
        (1, 4, 2, 331, 331, 256, 7),
        (2, 8, 4, 1, 331, 256, None),
        (2, 8, 4, 1, 331, 256, 120),
    ],
    DTYPES,
)
# windows and rows of several samples, where nothing is capped, of heads that torch serves else
GPU_CASES += [
    replace(case, cap=None, lengths=lengths)
    for case, lengths in zip(
        attention_cases(
            [
                (2, 4, 2, 331, 331, 128, None),
                (2, 4, 1, 331, 331, 64, 100),
                (3, 4, 2, 517, 517, 128, None),
                (1, 8, 1, 331, 331, 512, None),
            ],
            DTYPES,
        ),
        [(), (), (1, 200, 3, 64, 249), ()] * len(DTYPES),
        strict=True,
    )
    # refused
    if (case.head_dim, case.dtype) != (512, torch.float32)
]
GPU_CASES += [replace(case, lengths=(100, 231)) for case in GPU_CASES if case.num_queries == 331]
GPU_CASES += [
    replace(case, has_sinks=True) for case in GPU_CASES if case.head_dim == 64 or case.cap is None
]


def assert_as_good_as_torch(case: AttentionCase, actual: dict[str, Tensor]) -> None:
    truth, baseline = attention_of_torch(case, torch.float64), attention_of_torch(case, case.dtype)
    assert actual.keys() == truth.keys()
    allowed = allowances(case)
    for name, expected in truth.items():
        assert actual[name].shape == expected.shape, name
        assert_no_worse_than(
            actual[name], baseline[name], expected, what=name, allowance=allowed[name]
        )


@pytest.mark.parametrize("case", TINY_ATTENTIONS, ids=str)
def test_interpreted_kernels_are_as_good_as_torch(case: AttentionCase) -> None:
    prefix = f"{case}/"
    actual = {
        name.removeprefix(prefix): tensor
        for name, tensor in interpreted_results("masked_attention", SCRIPT).items()
        if name.startswith(prefix)
    }
    assert_as_good_as_torch(case, actual)


@pytest.mark.parametrize("case", [*TINY_ATTENTIONS, *CPU_CASES], ids=str)
def test_on_a_cpu_results_and_gradients_are_as_good_as_autograds(case: AttentionCase) -> None:
    results = attention_results(case, masked_attention, masked_attention_backward)
    assert_as_good_as_torch(case, results)


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_some_queries_at_a_time_give_what_all_do(
    monkeypatch: pytest.MonkeyPatch, case: AttentionCase
) -> None:
    # seven rows
    num_scores = 7 * case.batch * case.num_heads * case.num_keys
    monkeypatch.setattr(reference_module, "NUM_SCORES", num_scores)
    results = attention_results(case, masked_attention, masked_attention_backward)
    assert_as_good_as_torch(case, results)


ZEROS = torch.zeros(2, 3, dtype=torch.int32)
HEADS, KEYS = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 3, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": HEADS.int()}, "^query must be bfloat16, float16 or float32: got torch.int32"),
        ({"query": HEADS[0]}, r"^query and key must be heads of some tokens.* \(4, 3, 8\)"),
        ({"key": torch.ones(2, 3, 3, 8)}, "^heads must be shared evenly"),
        ({"query": torch.ones(2, 4, 5, 8)}, "there must be a key for each query"),
        (
            {"value": torch.ones(2, 2, 4, 8)},
            r"^value must be torch.float32 of shape \(2, 2, 3, 8\)",
        ),
        ({"value": KEYS.half()}, "^value must be torch.float32 .* got torch.float16"),
        ({"key": torch.ones(2, 2, 8, 3).mT}, "^key must have contiguous heads"),
        (
            {"value": torch.ones(2, 2, 3, 8, device="meta")},
            "^query and value must be on one device: got cpu and meta",
        ),
        ({"key": KEYS.clone().requires_grad_()}, "^nothing is recorded for autograd: got key"),
        (
            {"query": torch.ones(65_536, 1, 1, 1), "key": torch.ones(65_536, 1, 1, 1)},
            "^there must be at most 65,535 rows and as many heads: got 65,536 and 1",
        ),
        ({"cap": 0.0}, "^the cap must be a positive number: got 0"),
        ({"scale": math.nan}, "^the scale must be a positive number: got nan"),
        ({"window": -1}, "^the window must be a positive number: got -1"),
        ({"sinks": torch.ones(2)}, r"^sinks must be torch.float32 of shape \(4,\)"),
        ({"sinks": torch.ones(4).int()}, "^sinks must be bfloat16, float16 or float32"),
        ({"sinks": torch.ones(8)[::2]}, "^sinks must be contiguous"),
        ({"sinks": torch.ones(4, device="meta")}, "^query and sinks must be on one device"),
        ({"samples": Samples(ZEROS, ZEROS.long())}, "^the samples' remaining must be torch.int32"),
        ({"samples": Samples(ZEROS[:1], ZEROS)}, r"^the samples' positions must be .* \(2, 3\)"),
        (
            {
                "samples": Samples(ZEROS, ZEROS),
                "key": torch.ones(2, 2, 4, 8),
                "value": torch.ones(2, 2, 4, 8),
            },
            "^rows of several samples have no past: got 1 tokens",
        ),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": HEADS,
        "key": KEYS,
        "value": KEYS,
        "scale": 1.0,
        "cap": 5.0,
    }
    with pytest.raises(ValueError, match=message):
        masked_attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": HEADS.half()}, "^grad must be torch.float32 .* got torch.float16"),
        ({"out": HEADS[:, :2]}, "^out must be torch.float32 of shape"),
        ({"key": torch.ones(2, 2, 4, 8)}, r"^key must be torch.float32 of shape \(2, 2, 3, 8\)"),
        ({"lse": torch.ones(2, 4, 3).half()}, "^lse must be torch.float32 of shape"),
        ({"lse": torch.ones(2, 4, 1).expand(2, 4, 3)}, "^lse must be contiguous: got"),
    ],
    ids=str,
)
def test_gradients_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "grad": HEADS,
        "query": HEADS,
        "key": KEYS,
        "value": KEYS,
        "out": HEADS,
    }
    arguments |= {"lse": torch.ones(2, 4, 3), "scale": 1.0, "cap": 5.0}
    with pytest.raises(ValueError, match=message):
        masked_attention_backward(**(arguments | changes))


KERNELS = ["", "_grad_q", "_grad_kv"]


def compile_kernel(
    kernel: str, head_dim: int, dtype: torch.dtype, capability: int, mask: str = "capped"
) -> CompiledLaunch:
    """Compile for heads in a buffer of q, k and v: capped, of several samples, with sinks, or none
    of these."""
    buffer = torch.empty(1, 4097, 4 * head_dim, dtype=dtype, device="meta")
    heads = buffer.unflatten(-1, (4, head_dim)).transpose(1, 2)
    query, key, value = heads.split((2, 1, 1), dim=1)
    out = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
    lse = torch.empty(1, 2, 4097, device="meta")
    places = torch.empty(1, 4097, device="meta", dtype=torch.int32)
    samples = Samples(places, places) if mask == "packed" else None
    sinks = torch.empty(2, dtype=dtype, device="meta") if mask == "sinks" else None

    def launch() -> None:
        numbers = (0.0625, 50.0 if mask == "capped" else None, None, samples)
        with meta_stands_for(H200._replace(shared_bytes=SHARED_BYTES_LIMIT[capability])):
            forward_module._launch_masked_attention(query, key, value, *numbers, sinks)
            backward_module._launch_masked_attention_backward(
                out, query, key, value, out, lse, *numbers
            )

    module = backward_module if kernel else forward_module
    return compile_launch(module, f"_masked_attention{kernel}_kernel", launch, capability)


HALF, WIDE = torch.bfloat16, torch.float32
# both masks for the widest heads of real models on every generation, and for all on a GPU that has
# little shared memory; one mask for the others
COMPILED = [(256, HALF, gpu, mask) for gpu in (80, 89, 90, 100) for mask in ("capped", "packed")]
COMPILED += [
    (width, dtype, 89, mask)
    for width in (64, 128)
    for dtype in (HALF, WIDE)
    for mask in ("capped", "packed")
]
COMPILED += [(128, HALF, gpu, "causal") for gpu in (80, 90, 100)]
COMPILED += [(64, HALF, gpu, "sinks") for gpu in (80, 90, 100, 120)]
COMPILED += [(256, HALF, gpu, "packed") for gpu in (86, 121)]
COMPILED += [(width, HALF, 120, "packed") for width in (64, 128, 256)]
COMPILED += [(512, HALF, gpu, "packed") for gpu in (80, 89, 90, 100, 120)]
COMPILED += [(512, HALF, 90, "causal")]
COMPILED += [(512, torch.float16, 75, "packed")]
COMPILED += [(128, torch.float16, 120, "capped"), (128, WIDE, 90, "causal")]
COMPILED += [
    (width, dtype, 75, "capped" if width == 256 else "packed")
    for dtype in (torch.float16, WIDE)
    for width in (64, 128, 256)
]
# what does not fit the registers of a thread, in bytes at most: without tensor cores products are
# unrolled over the head, and sm_120 takes some registers more than sm_80 for the same tile
SPILLED_BYTES = {
    (256, HALF, 120, ""): 48,
    (256, HALF, 121, ""): 48,
    (128, torch.float16, 120, "_grad_kv"): 16,
    # Triton 3.6 only
    (64, HALF, 120, "_grad_kv"): 32,
    (128, HALF, 90, "_grad_kv"): 16,
    (256, torch.float16, 75, "_grad_q"): 400,
    (256, torch.float16, 75, "_grad_kv"): 400,
    (256, torch.float32, 75, "_grad_q"): 200,
    (512, torch.float16, 75, "_grad_q"): 3000,
    (512, torch.float16, 75, "_grad_kv"): 3000,
}


@pytest.mark.parametrize("kernel", KERNELS, ids="attention{}".format)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "mask"),
    COMPILED,
    ids=[f"E{width}-{str(dtype)[6:]}-sm{gpu}-{mask}" for width, dtype, gpu, mask in COMPILED],
)
def test_kernels_fit_and_spill_nothing_more_than_is_known(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    capability: int,
    mask: str,
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compile_kernel(kernel, head_dim, dtype, capability, mask)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability, SPILLED_BYTES.get((head_dim, dtype, capability, kernel), 0))
    instruction = TENSOR_CORE_INSTRUCTION[capability]
    if instruction and (head_dim == 512 or (head_dim, kernel) == (256, "_grad_kv")):
        # 32 rows are too few for a warpgroup
        instruction = TENSOR_CORE_INSTRUCTION[80]
    if dtype == WIDE:
        # not rounded to what tensor cores take
        instruction = None
    compiled.assert_multiplies_as(instruction)


@pytest.mark.parametrize("capability", SHARED_BYTES_LIMIT)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "complaint"),
    [
        (512, torch.float16, ""),
        (514, HALF, "at most 512 numbers wide in bfloat16 on this GPU: got 514; choose --device"),
        (256, WIDE, ""),
        (512, WIDE, "256 numbers wide in float32 on this GPU: got 512; choose --dtype float16 or"),
        (1024, WIDE, "256 numbers wide in float32 on this GPU: got 1,024; choose --device cpu$"),
    ],
    ids=str,
)
def test_heads_that_no_tile_of_a_gpu_has_room_for_are_refused(
    capability: int, head_dim: int, dtype: torch.dtype, complaint: str
) -> None:
    gpu = H200._replace(shared_bytes=SHARED_BYTES_LIMIT[capability])
    if not complaint:
        return check_head_dim(head_dim, dtype, gpu)
    with pytest.raises(ValueError, match=f"^the heads of attention must be .*{complaint}"):
        check_head_dim(head_dim, dtype, gpu)


@pytest.mark.gpu
def test_a_gpu_refuses_what_it_has_no_tiles_for() -> None:
    heads = torch.empty(1, 2, 5, 512, device=CUDA)
    lse = torch.empty(1, 2, 5, device=CUDA)
    with pytest.raises(ValueError, match="in float32 on this GPU: got 512"):
        masked_attention(heads, heads, heads, 1.0)
    with pytest.raises(ValueError, match="in float32 on this GPU: got 512"):
        masked_attention_backward(heads, heads, heads, heads, heads, lse, 1.0)


@pytest.mark.parametrize(("B", "H"), [(1024, 128), (2, 65_534), (65_535, 2)], ids=str)
def test_there_may_be_more_heads_in_all_than_an_axis_of_a_grid_has(B: int, H: int) -> None:
    heads = torch.empty(B, H, 2, 8, device="meta")
    assert B * H > MAX_LATER_AXIS
    out, lse = masked_attention(heads, heads, heads, 1.0)
    masked_attention_backward(out, heads, heads, heads, out, lse, 1.0)


@pytest.mark.parametrize("kernel", KERNELS, ids="attention{}".format)
def test_nothing_is_added_atomically(kernel: str) -> None:
    compiled = compile_kernel(kernel, 256, torch.bfloat16, 90)
    assert not compiled.find(r"\b(atom|red)\.")


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_are_as_good_as_torch_and_repeat_their_bits(case: AttentionCase) -> None:
    actual = attention_results(case, masked_attention, masked_attention_backward, CUDA)
    assert_as_good_as_torch(case, {name: tensor.cpu() for name, tensor in actual.items()})
    again = attention_results(case, masked_attention, masked_attention_backward, CUDA)
    for name, tensor in again.items():
        assert_equal(tensor, actual[name], name)


@pytest.mark.gpu
def test_gpu_kernels_serve_more_heads_in_all_than_an_axis_of_a_grid_has() -> None:
    case = AttentionCase(1100, 64, 32, 3, 3, 16, None, torch.bfloat16)
    assert case.batch * case.num_heads > MAX_LATER_AXIS
    actual = attention_results(case, masked_attention, masked_attention_backward, CUDA)
    assert_as_good_as_torch(case, {name: tensor.cpu() for name, tensor in actual.items()})


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernels_reach_beyond_int32() -> None:
    case = AttentionCase(1, 2, 1, 4096, 4096, 256, 64, torch.bfloat16)
    # tokens so far apart that the last ones lie beyond 2^31 values
    inputs = attention_inputs(case, CUDA)
    apart = {}
    for name, tensor in inputs.items():
        wide = torch.empty(4096, 2**19 + 2**10, dtype=tensor.dtype, device=CUDA)
        place = wide.as_strided(tensor.shape, (0, 256, wide.stride(0), 1))
        apart[name] = place.copy_(tensor)
    assert 4096 * apart["query"].stride(2) > 2**31

    def run(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q, k, v, grad = (given[name] for name in ("query", "key", "value", "grad"))
        out, lse = masked_attention(q, k, v, case.scale, case.cap, case.window)
        numbers = (case.scale, case.cap, case.window)
        return out, *masked_attention_backward(grad, q, k, v, out, lse, *numbers)

    for actual, expected in zip(run(apart), run(inputs), strict=True):
        assert_equal(actual, expected)
