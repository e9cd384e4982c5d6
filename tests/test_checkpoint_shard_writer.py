"""checkpoint/shard_writer.py: what it writes, safetensors reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.equality import assert_equal
from torch import Tensor

from checkpoint.files import INDEX_NAME, SINGLE_NAME
from checkpoint.shard_reader import read_header
from checkpoint.shard_writer import PlannedTensor, split_into_shards, write_shards


def tensors() -> dict[str, Tensor]:
    return {
        "bytes": torch.randint(0, 256, (7, 1), dtype=torch.uint8),
        "bf16": torch.randn(3, 5).bfloat16(),
        "odd": torch.randint(0, 256, (5,), dtype=torch.uint8),
        "fp32": torch.randn(11),
        "fp16": torch.randn(1, 9).half(),
    }


def planned(name: str, tensor: Tensor) -> PlannedTensor:
    return PlannedTensor(name, tuple(tensor.shape), tensor.dtype)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_safetensors_reads_what_is_written_in_any_order(tmp_path: Path, num_shards: int) -> None:
    given = tensors()
    plan = [planned(name, tensor) for name, tensor in given.items()]
    shards = [plan[i::num_shards] for i in range(num_shards)]
    write_shards(tmp_path, shards, reversed(given.items()), {"made_from": "elsewhere"})
    places = {SINGLE_NAME: list(given)}
    if num_shards > 1:
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in given.values())
        assert index["weight_map"].keys() == given.keys()
        files = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
        places = {
            file: [name for name, place in index["weight_map"].items() if place == file]
            for file in files
        }
    written = {path.name for path in tmp_path.iterdir()} - {INDEX_NAME}
    assert written == set(places)
    for file, names in places.items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt", "made_from": "elsewhere"}
            assert sorted(shard.keys()) == sorted(names)
            for name in names:
                assert_equal(shard.get_tensor(name), given[name], name)
        for stored in read_header(tmp_path / file).tensors:
            assert stored.start % stored.dtype.itemsize == 0, stored


def test_a_unit_stays_in_one_shard_and_the_limit_holds() -> None:
    sizes = [[40, 10], [60], [30, 30], [500], [1], [99]]
    units = [
        [PlannedTensor(f"{i}.{j}", (n,), torch.uint8) for j, n in enumerate(unit)]
        for i, unit in enumerate(sizes)
    ]
    shards = split_into_shards(units, limit=110)
    assert [[tensor.num_bytes for tensor in shard] for shard in shards] == [
        [40, 10, 60],
        [30, 30],
        [500],
        [1, 99],
    ]
    assert [tensor for shard in shards for tensor in shard] == [t for unit in units for t in unit]
