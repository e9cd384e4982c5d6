"""benchmarks/nf4_dequantize.py: its byte model, and a run over tiny layers."""

import pytest
import torch
from support.stand_in_gpu import install

from benchmarks import nf4_dequantize as module
from benchmarks.command import Machine
from benchmarks.layers import nf4_bytes
from benchmarks.nf4_dequantize import Shape, dequantize_bytes, shapes
from nf4.weight import quantize

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def test_bytes_are_those_that_a_weight_holds() -> None:
    # the mean that a weight holds besides is 4 bytes
    held = quantize(torch.randn(256, 256)).num_bytes - 4
    assert nf4_bytes(256, 256) == held
    assert dequantize_bytes(256, 256, 2) == held + 256 * 256 * 2


def test_every_layer_and_group_is_measured() -> None:
    names = [shape.layer for shape in shapes()]
    assert len(names) == 8
    assert {sum(shape.rows) for shape in shapes()} == {4096, 1024, 14336, 6144, 28672}
    gate = {shape.dtype for shape in shapes() if shape.layer.endswith(".gate_proj")}
    assert gate == {torch.bfloat16, torch.float16, torch.float32}


def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch)
    tiny = [
        Shape("tiny.q_proj", (4,), 64, torch.float16),
        Shape("tiny.qkv", (2, 1), 64, torch.float32),
    ]
    monkeypatch.setattr(module, "shapes", lambda: tiny)
    clock.tick_ms = 8.0
    result = module.run(MACHINE)
    assert [(row["layer"], row["provider"]) for row in result.rows] == [
        (layer, provider)
        for layer in ("tiny.q_proj", "tiny.qkv")
        for provider in ("limit", "ours", "torch")
    ]
    assert [row["timing"] for row in result.rows[:3]] == ["model", "graph", "eager"]
    assert result.rows[0]["percent_of_copy"] == 100
    assert result.text.splitlines()[0].split()[0] == "layer"
    assert "q_proj" in result.text
