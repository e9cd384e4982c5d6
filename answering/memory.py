"""Whether a model and its cache of keys and values fit the memory, before either is there."""

from pathlib import Path

import torch

from llama.cache import KeyValueCache
from llama.model import Llama
from step.memory_plan import GIB
from step.preflight import memory_budget


def weight_bytes(sizes: Llama) -> int:
    """Count the bytes of a model on the meta device, its adapter included."""
    adapter = sum(p.nbytes for p in sizes.trainable_parameters())
    return adapter + sum(tensor.nbytes for tensor in sizes.frozen_tensors())


def expanded_bytes(sizes: Llama, device: torch.device) -> int:
    """Count the bytes of expanded weights: a CPU keeps all of them, a GPU expands one group at a
    time."""
    itemsize = sizes.compute_dtype.itemsize
    found = [
        group.num_rows * group.in_features * itemsize
        for _, group in sizes.groups()
        if not isinstance(group.weight, torch.Tensor) or group.weight.dtype != sizes.compute_dtype
    ]
    return sum(found) if device.type == "cpu" else max(found, default=0)


def check_memory(sizes: Llama, device: torch.device, num_sequences: int, capacity: int) -> None:
    """Refuse a model and a cache that the device's free memory does not hold.

    Args:
        sizes: the model with its adapter, on the meta device.

    Raises:
        ValueError: they do not fit.
    """
    free = available_bytes(device)
    weights = weight_bytes(sizes) + expanded_bytes(sizes, device)
    cache = KeyValueCache.num_bytes(sizes.config, num_sequences, capacity, sizes.compute_dtype)
    if free is None or weights + cache <= free:
        return
    advice = "--max-length or --batch-size" if num_sequences > 1 else "--max-length"
    raise ValueError(
        f"the model and its context must fit the memory: weights of {weights / GIB:.2f} GiB and "
        f"keys and values of {cache / GIB:.2f} GiB for {num_sequences} x {capacity:,} tokens need "
        f"more than the {free / GIB:.2f} GiB that are free; "
        + (f"lower {advice}" if weights < free else "give it a smaller model, or --quant nf4")
    )


def available_bytes(device: torch.device) -> int | None:
    """Count the bytes that a process may take of a device; None where nothing says it."""
    if device.type == "cuda":
        return memory_budget(None)
    # Linux counts here what it can take back from the page cache
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) << 10 if found else None
