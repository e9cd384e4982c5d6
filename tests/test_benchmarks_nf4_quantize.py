"""benchmarks/nf4_quantize.py: its byte model, and a run over a tiny layer."""

import pytest
import torch
from support.stand_in_gpu import install
from torch import Tensor

from benchmarks import nf4_quantize as module
from benchmarks.command import Machine
from benchmarks.nf4_quantize import quantize_bytes, shapes
from nf4.weight import NF4Weight, quantize, quantize_member

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def test_bytes_are_those_of_the_matrix_and_of_the_weight() -> None:
    # the mean that a weight holds besides is 4 bytes
    held = quantize(torch.randn(256, 256)).num_bytes - 4
    assert quantize_bytes(256, 256, 4) == held + 256 * 256 * 4


def test_every_layer_is_measured() -> None:
    assert len({layer for layer, _ in shapes()}) == 4
    assert {dtype for _, dtype in shapes()} == {torch.bfloat16, torch.float16, torch.float32}


def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(target: NF4Weight, matrix: Tensor) -> None:
        quantize_member(target, 0, matrix, "weight")

    install(monkeypatch).tick_ms = 8.0
    monkeypatch.setattr(module, "_launch_nf4_quantize", launch)
    monkeypatch.setattr(module, "LAYERS", {"tiny.q_proj": (3, 64)})
    monkeypatch.setattr(module, "shapes", lambda: [("tiny.q_proj", torch.bfloat16)])
    result = module.run(MACHINE)
    assert [(row["provider"], row["timing"]) for row in result.rows] == [
        ("limit", "model"),
        ("ours", "graph"),
        ("ours-checked", "eager"),
        ("torch", "eager"),
    ]
    assert "checked" in result.text.splitlines()[0].split()


def test_the_public_function_and_the_reference_quantize_alike() -> None:
    matrix = torch.randn(4, 64)
    expected = quantize(matrix).packed
    for weight in (module.quantize_checked(matrix), module.quantize_reference(matrix)):
        assert torch.equal(weight.packed, expected)
