"""benchmarks/adamw.py: its byte model, the adapter's tensors, and a run over a tiny one."""

from collections.abc import Iterator

import pytest
import torch
from support.stand_in_gpu import install
from torch import Tensor

from benchmarks import adamw as module
from benchmarks.adamw import adapter_shapes, step_bytes
from benchmarks.command import Machine
from kernels.adamw_arenas import Arenas
from optim.arena import Layout
from optim.state_memory import OrdinaryMemory

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def test_the_adapter_is_that_of_rank_16_on_all_linear_layers() -> None:
    shapes = adapter_shapes()
    assert len(shapes) == 448
    assert sum(rows * columns for rows, columns in shapes.values()) == 41_943_040
    assert shapes["31.down_proj.lora_A"] == (16, 14336)


@pytest.mark.parametrize("is_8bit", [False, True])
def test_bytes_are_those_of_the_arenas(is_8bit: bool) -> None:
    shapes = {name: torch.Size(shape) for name, shape in adapter_shapes().items()}
    layout = Layout(shapes, is_8bit)
    arena = 4 * layout.num_elements
    expected = 3 * arena + 2 * layout.moment_bytes()
    assert step_bytes(41_943_040, is_8bit, clips=False) == expected
    assert step_bytes(41_943_040, is_8bit, clips=True) == expected + arena


def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class StandInMemory(OrdinaryMemory):
        def __init__(self, num_bytes: int, device: torch.device, is_host_resident: bool) -> None:
            super().__init__(num_bytes, device)
            self.is_host_resident = is_host_resident

        def pieces(self, arenas: Arenas) -> Iterator[Arenas]:
            launched.append(self.is_host_resident)
            return super().pieces(arenas)

    def plan(arenas: Arenas, rate: float, max_norm: float, scale: Tensor) -> None:
        launched.append("plan")

    install(monkeypatch).tick_ms = 8.0
    monkeypatch.setattr(module, "NUM_LAYERS", 1)
    monkeypatch.setattr(module, "PROJECTIONS", {"q_proj": (300, 256), "k_proj": (2, 3)})
    monkeypatch.setattr(module, "ManagedMemory", StandInMemory)
    monkeypatch.setattr(module, "_launch_adamw", lambda _: launched.append("update"))
    monkeypatch.setattr(module, "_launch_adamw_plan", plan)
    result = module.run(MACHINE)
    assert [(row["mode"], row["provider"], row["timing"]) for row in result.rows] == [
        ("32bit", "limit", "model"),
        ("32bit", "ours", "graph"),
        ("32bit", "torch-fused", "eager"),
        ("32bit", "torch-foreach", "eager"),
        ("32bit-clip", "limit", "model"),
        ("32bit-clip", "ours", "graph"),
        ("32bit-clip", "ours-step", "eager"),
        ("32bit-clip", "torch-fused", "eager"),
        ("32bit-clip", "torch-foreach", "eager"),
        ("32bit-clip", "ours-managed", "eager"),
        ("32bit-clip", "ours-host", "eager"),
        ("8bit", "limit", "model"),
        ("8bit", "ours", "graph"),
        ("8bit-clip", "limit", "model"),
        ("8bit-clip", "ours", "graph"),
        ("8bit-clip", "ours-step", "eager"),
        ("8bit-clip", "ours-managed", "eager"),
        ("8bit-clip", "ours-host", "eager"),
    ]
    assert {True, False, "plan", "update"} == set(launched)
    lines = result.text.splitlines()
    assert len(lines) == 5
    assert "paged" in lines[0].split()
