"""kernels/lora_extension.py: value for value what is written by hand; compiles for each GPU."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import GPUS, CompiledLaunch, compile_launch
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.lora_extension_cases import (
    TINY_EXTENSIONS,
    ExtensionCase,
    extended,
    extended_by_hand,
    extension_cases,
    extension_inputs,
    parts_of,
    scaling_of,
)

from kernels import lora_extension as module
from kernels.lora_extension import Update, write_updates, write_updates_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA, META = torch.device("cuda"), torch.device("meta")
CPU_CASES = extension_cases([((5, 3), (0, 1), 37, 2, 4), ((7, 2, 3), (0, 2), 48, 3, 64)], DTYPES)
# of Llama-3-8B: rows of the members, in_features
GROUPS = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
RANKS = (16, 64)


def case_of(group: str, rank: int, dtype: torch.dtype, targets: Any = None) -> ExtensionCase:
    """A group with updates of some members, or of all; its tail is a multiple of 64."""
    rows, in_features = GROUPS[group]
    targets = tuple(range(len(rows))) if targets is None else targets
    num_ranks = rank * len(targets)
    tail = num_ranks + -num_ranks % 64
    return ExtensionCase(rows, targets, in_features, rank, tail, dtype)


@pytest.mark.parametrize("case", CPU_CASES + TINY_EXTENSIONS, ids=str)
def test_on_a_cpu_every_value_is_the_one_written_by_hand(case: ExtensionCase) -> None:
    assert_equal(extended(case, write_updates), extended_by_hand(case))


@pytest.mark.parametrize("case", TINY_EXTENSIONS, ids=str)
def test_interpreted_kernel_writes_what_the_reference_does(case: ExtensionCase) -> None:
    found = interpreted_results("lora_extension")[f"{case}/W_ext"]
    assert_equal(found, extended(case, write_updates_reference))


def test_a_member_without_an_update_has_rows_of_zeros() -> None:
    # q_proj and v_proj learn, k_proj does not
    case = ExtensionCase((7, 5, 3), (0, 2), 48, 4, 64, torch.float32)
    W_ext, lora_A, lora_B = extension_inputs(case)
    write_updates(*parts_of(W_ext, case), lora_A, lora_B, case.updates)
    q, k, v = W_ext[:15, 48:].split((7, 5, 3))
    assert not k.any()
    assert q[:, :4].all()
    assert v[:, 4:8].all()
    assert not q[:, 4:].any()
    assert not v[:, :4].any()
    assert not v[:, 8:].any()


GIVEN = {
    "A": torch.zeros(64, 48),
    "sB": torch.zeros(7, 64),
    "lora_A": torch.zeros(6, 48),
    "lora_B": torch.zeros(7, 3),
}
UPDATES = (
    Update(slice(0, 5), slice(0, 3), slice(0, 5), 2.0),
    Update(slice(5, 7), slice(3, 6), slice(5, 7), 2.0),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": ()}, "^A and s B must have room for the updates"),
        (
            {"A": torch.zeros(5, 48), "sB": torch.zeros(7, 5)},
            r"room for the updates .*: got \(5, 48\) and \(7, 5\) for \(6, 48\)",
        ),
        ({"sB": torch.zeros(7, 32)}, "^A and s B must have room"),
        ({"sB": torch.zeros(6, 64)}, "^A and s B must have room"),
        ({"A": torch.zeros(64, 47)}, "^A and s B must have room"),
        ({"lora_A": torch.zeros(3, 48)}, r"^A and s B must have room .* \(3, 48\) and \(7, 3\)$"),
        ({"lora_B": torch.zeros(8, 3)}, r"^A and s B must have room .* and \(8, 3\)$"),
        ({"lora_B": torch.zeros(7, 2)}, r"^A and s B must have room .* and \(7, 2\)$"),
        ({"lora_A": torch.zeros(6, 48).half()}, "^the updates must be float32: got torch.float16"),
        ({"lora_B": torch.zeros(7, 3).half()}, "^the updates must be float32: .* torch.float16$"),
        ({"sB": torch.zeros(7, 64).half()}, "^A and s B must share a dtype: got torch.float32"),
        ({"sB": torch.zeros(7, 64, device=META)}, "^A and s B must be on one device"),
        ({"lora_A": torch.zeros(6, 48, device=META)}, "updates' A must be on one device"),
        ({"lora_B": torch.zeros(7, 3, device=META)}, "updates' B must be on one device"),
        ({"A": torch.zeros(48, 64).T}, "^A must have contiguous rows"),
        ({"sB": torch.zeros(64, 7).T}, "^s B must have contiguous rows"),
        ({"lora_A": torch.zeros(48, 6).T}, r"^the updates' A must be contiguous: got strides"),
        ({"lora_B": torch.zeros(7, 6)[:, :3]}, r"^the updates' B must be contiguous: got strides"),
    ],
    ids=[
        "no update",
        "room too narrow",
        "rooms differ",
        "rows too few",
        "columns differ",
        "A too short",
        "B too long",
        "ranks differ",
        "A in 16 bit",
        "B in 16 bit",
        "dtypes differ",
        "s B elsewhere",
        "A elsewhere",
        "B elsewhere",
        "rows scattered",
        "s B scattered",
        "A scattered",
        "B scattered",
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = GIVEN | {"updates": UPDATES}
    with pytest.raises(ValueError, match=message):
        write_updates(**(given | changes))


def compile_kernel(case: ExtensionCase, capability: int) -> CompiledLaunch:
    # nothing is read, so nothing is drawn
    num_rows = sum(case.rows[member] for member in case.targets)
    shape = (case.num_rows + case.tail, case.in_features + case.tail)
    W_ext = torch.empty(shape, dtype=case.dtype, device=META)
    lora_A = torch.empty(case.rank * len(case.targets), case.in_features, device=META)
    lora_B = torch.empty(num_rows, case.rank, device=META)
    return compile_launch(
        module,
        "_write_updates_kernel",
        lambda: module._launch_write_updates(*parts_of(W_ext, case), lora_A, lora_B, case.updates),
        capability,
    )


# all for one GPU; for the others the widest tail and the usual one
COMPILED = [
    (case_of(group, rank, dtype), capability)
    for dtype in DTYPES
    for capability in GPUS[dtype]
    for rank in RANKS
    for group in GROUPS
    if capability == 90 or (group, rank) in (("qkv", 64), ("gate_up", 16))
]


@pytest.mark.parametrize(
    ("case", "capability"),
    COMPILED,
    ids=[f"{case}-sm{capability}" for case, capability in COMPILED],
)
def test_kernel_compiles_without_spilling(
    case: ExtensionCase, capability: int, record_property: Callable[[str, object], None]
) -> None:
    compiled = compile_kernel(case, capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert compiled.shared_bytes == 0
    # but for the tables, four numbers an update, all is moved in vectors of 16 bytes: a tile of s B
    # from each update's rows, or a piece of a row of A
    num_updates = len(case.updates)
    num_values = module.TILE_VALUES * num_updates + module.BLOCK_K
    accesses = Counter(compiled.find(r"(?:ld|st)\.global\S+"))
    values_per_store = 16 // case.dtype.itemsize * compiled.num_threads
    assert accesses == {
        "ld.global.b64": 3 * num_updates,
        "ld.global.b32": num_updates,
        "ld.global.v4.b32": num_values // (4 * compiled.num_threads),
        "st.global.v4.b32": (module.TILE_VALUES + module.BLOCK_K) // values_per_store,
    }


@pytest.mark.gpu
@pytest.mark.parametrize("case", TINY_EXTENSIONS + CPU_CASES, ids=str)
def test_gpu_kernel_writes_what_the_reference_does(case: ExtensionCase) -> None:
    found = extended(case, write_updates, CUDA).cpu()
    assert_equal(found, extended(case, write_updates_reference))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("group", GROUPS)
def test_gpu_kernel_writes_llama_groups(group: str, rank: int, dtype: torch.dtype) -> None:
    case = case_of(group, rank, dtype)
    # the reference on the GPU too: a product of float32 numbers rounds the same everywhere
    found = extended(case, write_updates, CUDA)
    assert_equal(found, extended(case, write_updates_reference, CUDA))


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernel_reaches_beyond_int32() -> None:
    case = ExtensionCase((524_290, 3), (0, 1), 4096, 16, 64, torch.bfloat16)
    assert (case.num_rows - 3) * (case.in_features + case.tail) > 2**31
    W_ext, lora_A, lora_B = extension_inputs(case, CUDA)
    write_updates(*parts_of(W_ext, case), lora_A, lora_B, case.updates)
    N, K = case.num_rows, case.in_features
    tails = torch.zeros(6, 64, device=CUDA)
    tails[:3, :16] = lora_B[-6:-3] * scaling_of(0)
    tails[3:, 16:32] = lora_B[-3:] * scaling_of(1)
    assert_equal(W_ext[N - 6 : N, K:], tails.bfloat16())
    assert_equal(W_ext[N : N + 32, :K], lora_A.bfloat16())
    assert not W_ext[N + 32 :, :K].any()
    assert (W_ext[N - 6 : N, :K] == 7).all()
