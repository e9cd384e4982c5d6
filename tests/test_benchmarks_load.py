"""benchmarks/load.py: the checkpoint that it writes, its rows, and a run over a tiny one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.micro_steps import NF4
from support.stand_in_gpu import install
from support.tiny_llama import FIELDS, shapes

from benchmarks import load as module
from benchmarks.load import (
    SHAPES,
    cut_into_shards,
    num_bytes,
    row_of,
    rows_of,
    tensor_shapes,
    write_checkpoint,
)
from benchmarks.tables import aligned, load_table
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint

CPU = torch.device("cpu")


def test_a_written_checkpoint_is_one_of_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # shorter than a matrix, so that it is repeated
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1000)
    folder = write_checkpoint(tmp_path, FIELDS, num_shards=3)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 3
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes(FIELDS)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.isfinite().all(), name
        assert tensor.dim() == 2 or bool((tensor == 1).all()), name
        assert tensor.dim() == 1 or tensor.unique().numel() > 8, name
    load_model(open_checkpoint(folder), CPU, torch.bfloat16, NF4)


def test_tensors_are_listed_layer_by_layer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    found = tensor_shapes(tmp_path)
    assert found == shapes(FIELDS)
    names = list(found)
    assert names[0] == "model.embed_tokens.weight"
    assert names[1].startswith("model.layers.0.")
    assert names[-2:] == ["lm_head.weight", "model.norm.weight"]


def test_the_8b_shape_is_llamas_and_cut_evenly() -> None:
    found = shapes(SHAPES["llama-3-8b"])
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 8_030_261_248
    shards = cut_into_shards(found, 4)
    assert [name for shard in shards for name in shard] == list(found)
    sizes = [sum(map(num_bytes, shard.values())) for shard in shards]
    assert max(sizes) - min(sizes) < max(map(num_bytes, found.values()))


def test_a_row_sets_the_first_time_apart() -> None:
    row = row_of("ours", "load-nf4", [5000.0, 2000.0, 1000.0, 3000.0], 16_000_000_000, 2**31)
    assert (row["ms_first"], row["ms_p50"], row["gbps"]) == (5000.0, 2000.0, 8.0)
    alone = row_of("limit", "copy", [300.0], 15_000_000_000, 0)
    assert [alone[key] for key in ("ms_first", "ms_p20", "ms_p50", "ms_p80")] == [300.0] * 4
    lines = aligned(*load_table([alone, row])).splitlines()
    assert lines[0].split()[:2] == ["provider", "mode"]
    assert lines[2].split() == ["ours", "load-nf4", "5.00", "2.00", "1.40", "2.60", "8.0", "2.00"]


def test_a_run_measures_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

    make_ring: Any = module.make_ring
    install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(module, "make_ring", lambda tensors, is_pinned: make_ring(tensors, False))
    write_checkpoint(tmp_path, FIELDS)
    rows = rows_of(tmp_path, CPU, limit_gbps=55.0, repetitions=3)
    assert [(row["provider"], row["mode"], row["repetitions"]) for row in rows] == [
        ("limit", "copy", 1),
        ("ours", "load-nf4", 3),
        ("ours", "load-as-stored", 3),
        ("ours", "read", 3),
        ("ours", "read-copy", 3),
        ("torch", "read-copy", 2),
    ]
    assert all(row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] for row in rows)
