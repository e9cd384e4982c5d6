"""benchmarks/rms_norm.py, benchmarks/rope.py and benchmarks/glu.py: byte models, tiny layers."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from support.stand_in_gpu import install
from torch import Tensor

from benchmarks import glu, layer_operations, rms_norm, rope
from benchmarks.command import Machine
from benchmarks.tables import Row, operation_table
from kernels.rms_norm import rms_norm_reference

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)
PROVIDERS = ["limit", "ours", "torch", "torch.compile"]


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_bytes_of_a_norm_are_those_of_its_tensors() -> None:
    x, rstd = torch.empty(7, 64, dtype=torch.bfloat16), torch.empty(7)
    assert rms_norm.forward_bytes(7, 64, 2, False) == bytes_of(x, x, rstd)
    assert rms_norm.forward_bytes(7, 64, 2, True) == bytes_of(x, x, x, x, rstd)
    assert rms_norm.backward_bytes(7, 64, 2) == bytes_of(x, x, x, x, x, rstd)


def test_bytes_of_a_rotation_are_those_of_its_tensors() -> None:
    q, k = torch.empty(7, 4, 16).half(), torch.empty(7, 2, 16).half()
    tables = [torch.empty(7, 8)] * 2
    assert rope.forward_bytes(7, (4, 2, 16), 2) == 2 * bytes_of(q, k) + bytes_of(*tables)
    assert rope.backward_bytes(7, (4, 2, 16), 2) == 2 * bytes_of(q, k, k) + bytes_of(*tables)


def test_bytes_of_a_gating_are_those_of_its_tensors() -> None:
    gate_up, h = torch.empty(7, 64).half(), torch.empty(7, 32).half()
    assert glu.glu_bytes("forward", 7, 32, 2) == bytes_of(gate_up, h)
    assert glu.glu_bytes("backward-h", 7, 32, 2) == bytes_of(gate_up, gate_up, h, h)


def test_backward_calls_give_the_gradients_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    x, weight, grad = torch.randn(3, 8, requires_grad=True), torch.rand(8), torch.randn(3, 8)
    arguments = (x, weight, 1e-5, None)
    (call,) = layer_operations.backward_calls(rms_norm_reference, [arguments], [(grad, grad)])
    y, r, _ = rms_norm_reference(*arguments)
    (expected,) = torch.autograd.grad((y, r), x, (grad, grad))
    for _ in range(2):
        assert torch.equal(call()[0], expected)


def stand_in_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put references in the kernels' place, and nothing in the compiler's."""

    def no_gradient(*arguments: Any) -> None:
        return None

    monkeypatch.setattr(rms_norm, "_launch_rms_norm", rms_norm_reference)
    monkeypatch.setattr(rms_norm, "_launch_rms_norm_backward", no_gradient)
    monkeypatch.setattr(rope, "_launch_rope", no_gradient)
    monkeypatch.setattr(rope, "_launch_rope_backward", no_gradient)
    monkeypatch.setattr(glu, "_launch_glu", glu.glu_reference)
    monkeypatch.setattr(glu, "_launch_glu_backward", no_gradient)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


@pytest.mark.parametrize(
    ("module", "measure", "modes"),
    [
        (
            rms_norm,
            lambda: [
                row
                for layer, m, dtype in rms_norm.shapes()
                for row in rms_norm.measure_norm(layer, m // 1024, dtype, MACHINE, 64)
            ],
            ["forward", "backward-y"] * 4,
        ),
        (
            rope,
            lambda: rope.measure_rope(3, torch.float16, MACHINE, (4, 2, 16)),
            ["forward", "backward"],
        ),
        (
            glu,
            lambda: glu.measure_glu(3, torch.float16, MACHINE, 32),
            ["forward", "backward-h"],
        ),
    ],
    ids=["rms_norm", "rope", "glu"],
)
def test_a_run_measures_every_provider(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    measure: Callable[[], list[Row]],
    modes: list[str],
) -> None:
    clock = install(monkeypatch)
    stand_in_launches(monkeypatch)
    clock.tick_ms = 8.0
    rows = measure()
    assert [(row["mode"], row["provider"]) for row in rows] == [
        (mode, provider) for mode in modes for provider in PROVIDERS
    ]
    assert all(row["percent_of_copy"] == 100 for row in rows if row["provider"] == "limit")
    header, lines = operation_table(rows)
    assert header[4:] == PROVIDERS
    assert len(lines) == len(modes)
    assert {m for *_, m, _ in module.shapes()} == {2048, 8192}
