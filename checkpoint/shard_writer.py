"""A checkpoint's tensors on their way to the disk: shards that are laid out before the first byte.

    header | float32 tensors | 16-bit tensors | bytes          of one shard

Every tensor's place in its shard follows from the shapes, so a tensor is written as soon as it
exists, and none waits in memory for the others of its shard. safetensors' own writer takes all
tensors of a file at once. As there, tensors with more bytes a number come first: all are aligned,
without gaps.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.files import INDEX_NAME, SINGLE_NAME
from checkpoint.shard_reader import DTYPES

# decimal, as transformers' "5GB"
SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors pads its headers to multiples of it
_ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split_into_shards(
    units: Iterable[Sequence[PlannedTensor]], limit: int = SHARD_BYTES
) -> list[list[PlannedTensor]]:
    """Deal tensors out to shards in their order; a unit's tensors stay together.

    Args:
        limit: the most bytes of a shard; a unit that is larger has a shard of its own.
    """
    shards: list[list[PlannedTensor]] = [[]]
    num_bytes = 0
    for unit in units:
        more = sum(tensor.num_bytes for tensor in unit)
        if shards[-1] and num_bytes + more > limit:
            shards.append([])
            num_bytes = 0
        shards[-1] += unit
        num_bytes += more
    return shards


def _layout(
    shard: list[PlannedTensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Lay a shard out: its header with the length before it, and where each tensor begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    starts = {}
    end = 0
    for tensor in sorted(shard, key=lambda tensor: -tensor.dtype.itemsize):
        starts[tensor.name], end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (starts[tensor.name], end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(len(text) + -len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def write_shards(
    folder: Path,
    shards: list[list[PlannedTensor]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors on the CPU to their shards, in whatever order they come, and an index where
    there are several.

    Args:
        metadata: for the header of each shard.
    """
    planned = {tensor.name: tensor for shard in shards for tensor in shard}
    files = [SINGLE_NAME]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    with ExitStack() as stack:
        places = {}
        for name, shard in zip(files, shards, strict=True):
            file = stack.enter_context((folder / name).open("wb"))
            head, starts = _layout(shard, metadata)
            file.write(head)
            places |= {name: (file, start) for name, start in starts.items()}
        for name, tensor in tensors:
            file, start = places.pop(name)
            assert (tuple(tensor.shape), tensor.dtype) == (planned[name].shape, planned[name].dtype)
            file.seek(start)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            # gone before the next one is made
            del tensor
        assert not places, f"not written: {sorted(places)[:3]}"
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in planned.values())},
            "weight_map": {
                tensor.name: name
                for name, shard in zip(files, shards, strict=True)
                for tensor in shard
            },
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
