"""Measure the seconds from a checkpoint folder in the page cache to a ready model on the GPU.

    python -m benchmarks load --shape llama-3-8b --json benchmarks/results/load.h100.json
    python -m benchmarks load --model DIR

Rows, each the quantiles over some repetitions, and the first one beside them:

    limit       the checkpoint's bytes over the rate of a large copy from pinned memory
    read        the threads alone: shards -> ring
    read-copy   and the copies: shards -> ring -> device
    load        load_model: and the quantization, the headers, the allocations
    torch       safetensors' get_tensor(name).to(device), one tensor after the other, not quantized

Every repetition starts without cached device memory; pinned memory stays torch's after the first,
which also loads or compiles the kernels. Nothing empties the page cache: a repetition before the
measured ones fills it. Without --model a checkpoint of random weights is written to a temporary
folder; TMPDIR says where.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.command import run_tests
from benchmarks.layers import BLOCK_SIZE, WEIGHT_STD
from benchmarks.measure import measure, quantiles
from benchmarks.record import head, write
from benchmarks.tables import Row, aligned, load_table
from checkpoint.files import INDEX_NAME
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from checkpoint.shard_reader import StoredTensor, make_ring, stream
from llama.config import CONFIG_NAME, read_config
from llama.model import Llama
from nf4.weight import Quantization

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
}
SHAPES["llama-3.2-1b"] = SHAPES["llama-3-8b"] | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SHAPES["qwen2.5-3b"] = SHAPES["llama-3-8b"] | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
NUM_SHARDS = 4
# of random weights, repeated from shifted starts: drawing all of them would take minutes
BLOCK_ELEMENTS = 1 << 24
SHIFT_ELEMENTS = 999_983
NUM_WRITERS = 16


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """List the tensors that a folder's config.json implies, the layers in order."""
    with torch.device("meta"):
        model = Llama(read_config(folder), torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for prefix, group in model.groups():
        for name, rows in zip(group.names, group.rows, strict=True):
            shapes[f"{prefix}{name}.weight"] = (rows, group.in_features)
            if group.has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)

    def place(name: str) -> tuple[int, str]:
        ends = {"model.embed_tokens.weight": -1, "model.norm.weight": 1 << 30}
        ends["lm_head.weight"] = 1 << 30
        return ends[name] if name in ends else int(name.split(".")[2]), name

    return {name: shapes[name] for name in sorted(shapes, key=place)}


def num_bytes(shape: tuple[int, ...]) -> int:
    """Count the bytes of a bf16 tensor."""
    return torch.Size(shape).numel() * torch.bfloat16.itemsize


def cut_into_shards(
    shapes: Mapping[str, tuple[int, ...]], num_shards: int
) -> list[dict[str, tuple[int, ...]]]:
    """Cut a checkpoint into shards of about as many bytes."""
    total, done = sum(map(num_bytes, shapes.values())), 0
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(num_shards)]
    for name, shape in shapes.items():
        # by its middle
        middle = done + num_bytes(shape) / 2
        shards[min(int(num_shards * middle / total), num_shards - 1)][name] = shape
        done += num_bytes(shape)
    return shards


def header_of(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Make the beginning of a safetensors file: the length of its header, and that."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_checkpoint(folder: Path, fields: dict[str, Any], num_shards: int = NUM_SHARDS) -> Path:
    """Write a checkpoint of random bf16 weights, norms of ones, several tensors at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(fields))
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(BLOCK_ELEMENTS, generator=generator) * WEIGHT_STD).bfloat16()
    random = block.view(torch.uint8).numpy().data
    ones = torch.ones_like(block).view(torch.uint8).numpy().data
    places: dict[str, str] = {}

    def write_tensor(file: int, start: int, shape: tuple[int, ...], index: int) -> None:
        size, content = num_bytes(shape), ones if len(shape) == 1 else random
        shift = index * SHIFT_ELEMENTS % BLOCK_ELEMENTS * torch.bfloat16.itemsize
        done = 0
        while done < size:
            first = (shift + done) % len(content)
            done += os.pwrite(file, content[first : first + size - done], start + done)

    for number, shapes in enumerate(cut_into_shards(tensor_shapes(folder), num_shards), 1):
        name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        with (
            (folder / name).open("wb", buffering=0) as file,
            ThreadPoolExecutor(NUM_WRITERS) as pool,
        ):
            start = file.write(header_of(shapes))
            writes = []
            for shape in shapes.values():
                index = len(places) + len(writes)
                writes.append(pool.submit(write_tensor, file.fileno(), start, shape, index))
                start += num_bytes(shape)
            for done in writes:
                done.result()
        places |= dict.fromkeys(shapes, name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


class Dropping:
    """A sink that takes nothing: what is left is the reading."""

    def begin(self, stored: StoredTensor) -> None:
        pass

    def copy(self, start: int, piece: Tensor) -> Callable[[], None]:
        return lambda: None

    def finish(self, stored: StoredTensor) -> None:
        pass


class Copying(Dropping):
    """A sink that copies every piece to the same device memory."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.target = torch.empty(size, dtype=torch.uint8, device=device)

    def copy(self, start: int, piece: Tensor) -> Callable[[], None]:
        self.target[: len(piece)].copy_(piece, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        return copied.synchronize


def read(tensors: list[StoredTensor]) -> None:
    stream(tensors, make_ring(tensors, is_pinned=torch.cuda.is_available()), Dropping())


def read_and_copy(tensors: list[StoredTensor], device: torch.device) -> None:
    ring = make_ring(tensors, is_pinned=True)
    stream(tensors, ring, Copying(device, ring.shape[1]))


def get_one_at_a_time(tensors: list[StoredTensor], device: torch.device) -> None:
    for path in dict.fromkeys(stored.file for stored in tensors):
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                file.get_tensor(name).to(device)


def pinned_copy_gbps(device: torch.device, size: int = 1 << 28) -> float:
    """Measure what a large copy from pinned memory to the device moves, in GB/s."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True).random_(256)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    copy = partial(target.copy_, source, non_blocking=True)
    return size / measure([copy], captured=False).ms_p50 / 1e6


def row_of(provider: str, mode: str, times_ms: list[float], size: int, peak_bytes: int) -> Row:
    """Record a load's times; the first one stands alone where there are others."""
    later = times_ms[1:] or times_ms
    times = quantiles(later) if len(later) > 1 else (later[0],) * 3
    return {
        "provider": provider,
        "mode": mode,
        "ms_first": round(times_ms[0], 1),
        **{f"ms_p{p}": round(ms, 1) for p, ms in zip((20, 50, 80), times, strict=True)},
        "gbps": round(size / times[1] / 1e6, 2),
        "repetitions": len(times_ms),
        "peak_bytes": peak_bytes,
    }


def measured_row(
    provider: str, mode: str, call: Callable[[], object], size: int, repetitions: int
) -> Row:
    """Time a call, each time to the end of all that it put on the device."""
    times_ms, peak = [], 0
    for _ in range(repetitions):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        # lives until the clock has stopped
        result = call()
        torch.cuda.synchronize()
        times_ms.append(1e3 * (time.perf_counter() - start))
        peak = max(peak, torch.cuda.max_memory_allocated() - before)
        del result
    row = row_of(provider, mode, times_ms, size, peak)
    print(f"measured {provider} {mode}: {row['ms_p50'] / 1e3:.2f} s", flush=True)
    return row


def load(folder: Path, device: torch.device, quantization: Quantization | None) -> Llama:
    """Load a checkpoint's model, from its headers on."""
    return load_model(open_checkpoint(folder), device, torch.bfloat16, quantization)


def rows_of(folder: Path, device: torch.device, limit_gbps: float, repetitions: int) -> list[Row]:
    """Measure every way to bring a folder's tensors to the device."""
    tensors = list(open_checkpoint(folder).stored.values())
    size = sum(stored.num_bytes for stored in tensors)
    # fills the page cache
    read(tensors)
    nf4 = partial(load, folder, device, Quantization(BLOCK_SIZE, True))
    as_stored = partial(load, folder, device, None)
    return [
        row_of("limit", "copy", [size / limit_gbps / 1e6], size, 0),
        measured_row("ours", "load-nf4", nf4, size, repetitions),
        measured_row("ours", "load-as-stored", as_stored, size, repetitions),
        measured_row("ours", "read", partial(read, tensors), size, repetitions),
        measured_row(
            "ours", "read-copy", partial(read_and_copy, tensors, device), size, repetitions
        ),
        # slow, and no other way to do it is measured against it
        measured_row("torch", "read-copy", partial(get_one_at_a_time, tensors, device), size, 2),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the loading of a checkpoint.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="checkpoint folder")
    source.add_argument("--shape", choices=SHAPES, help="of random weights, written first")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise RuntimeError("a benchmark needs a CUDA GPU: torch.cuda.is_available() is False")
    run_tests("loading", room="checkpoint")
    record = head("load", arguments.commit)
    device = torch.device("cuda", torch.cuda.current_device())
    limit_gbps = pinned_copy_gbps(device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model
        if folder is None:
            start = time.monotonic()
            folder = write_checkpoint(Path(temporary), SHAPES[arguments.shape])
            print(f"wrote {arguments.shape} in {time.monotonic() - start:.0f} s", flush=True)
        rows = rows_of(folder, device, limit_gbps, arguments.repetitions)
        num_file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    record |= {
        "model": arguments.shape or folder.name,
        "checkpoint_bytes": num_file_bytes,
        "pinned_copy_gbps": round(limit_gbps, 1),
        "num_cores": os.cpu_count(),
        "rows": rows,
    }
    print(f"\n{record['device']}, {record['num_cores']} cores, {num_file_bytes / 1e9:.1f} GB\n")
    print(aligned(*load_table(rows)))
    if arguments.json:
        write(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
