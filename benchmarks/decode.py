"""Measure generation with an adapter beside the peers': tokens per second, and the prompts' pass.

    python -m benchmarks decode --json benchmarks/results/decode.h200.json

Llama-3-8B's shape with random weights, NF4 with double quantization, bf16, rank 16 on all linear
layers. Every provider is a process of its own on the same GPU, one after the other, and all load
the same checkpoint folder (--model; written where there is none, or into a temporary folder).

`limit` rows are the time that the bytes take which a token must read, at the bandwidth of a copy:
the packed weights, the head, and the keys and values of all sequences at the middle of their
answers. `forward` rows are the forward pass of training over the prompts' tokens.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_timing import Shape, parse_shape
from benchmarks.measure import copy_gbps
from benchmarks.random_model import LLAMA_3_8B
from benchmarks.record import ROOT, head, write
from benchmarks.tables import Row, aligned, decode_table
from benchmarks.train_step import (
    FIELDS,
    Outcome,
    prepare_checkpoint,
    run_process,
    some_of,
    without_checkout,
)
from benchmarks.train_step_limit import group_shapes
from llama.cache import KeyValueCache
from llama.config import LlamaConfig

HERE = Path(__file__).resolve().parent
SHAPES = "1x320+128,8x320+128,1x2048+1"
PEERS = ("hf", "unsloth")
# of a weight in NF4: half a byte, a code of its block of 64, two numbers of 256 blocks
BYTES_PER_WEIGHT = 0.5 + (1 + 4 / 256) / 64


def limit_row(config: LlamaConfig, shape: Shape, gbps: float) -> Row:
    """Work out the time of a token from the bytes that it must read."""
    layers = [config.heads(layer) for layer in range(config.num_hidden_layers)]
    groups = [shape for heads in layers for shape in group_shapes(config, heads).values()]
    num_bytes = sum(rows * columns for rows, columns in groups) * BYTES_PER_WEIGHT
    num_bytes += config.vocab_size * config.hidden_size * 2
    middle = shape.num_tokens + shape.num_new // 2
    num_bytes += KeyValueCache.num_bytes(config, shape.num_sequences, middle, torch.bfloat16)
    ms = num_bytes / gbps / 1e6
    return {
        "provider": "limit",
        "shape": str(shape),
        "ms_p50": round(ms, 4),
        "tokens_per_second": round(shape.num_sequences / ms * 1e3, 1),
    }


def run_provider(
    provider: str, model: str, shapes: list[str], rank: int, time_limit: float
) -> Outcome:
    """Run a provider's process over all shapes."""
    flags = ["--model", model, "--shapes", ",".join(shapes), "--rank", str(rank)]
    if provider == "ours":
        command = [sys.executable, "-m", "benchmarks.decode_ours", *flags]
        return run_process(command, ROOT, os.environ, time_limit)
    environment = os.environ | {
        "PYTHONPATH": without_checkout(os.environ.get("PYTHONPATH", "")),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("decode_peer.py", "decode_timing.py"):
            shutil.copy(HERE / name, folder)
        command = [sys.executable, str(folder / "decode_peer.py"), "--provider", provider, *flags]
        return run_process(command, folder, environment, time_limit)


def measure_all(
    providers: list[str],
    model: str,
    shapes: list[str],
    rank: int,
    time_limit: float,
    record: dict[str, Any],
    path: Path | None,
) -> None:
    """Measure one provider after the other, writing the file after each."""
    for provider in providers:
        outcome = run_provider(provider, model, shapes, rank, time_limit)
        record["versions"] |= outcome.versions
        record["rows"] += outcome.rows
        done = {row["shape"] for row in outcome.rows}
        error = outcome.error or "no figures"
        record["rows"] += [
            {"provider": provider, "shape": shape, "error": error}
            for shape in shapes
            if shape not in done
        ]
        print(f"measured {provider}: {len(done)} of {len(shapes)} shapes", flush=True)
        if path:
            write(path, record)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure generation.")
    parser.add_argument("--shapes", default=SHAPES, help="PROMPTSxTOKENS+NEW with commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="hf and unsloth, with a comma")
    parser.add_argument("--model", type=Path, help="checkpoint folder, written if it is not there")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--time-limit", type=float, default=240, help="of a process, seconds")
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    arguments = parser.parse_args()
    shapes = arguments.shapes.split(",")
    parsed = [parse_shape(text) for text in shapes]
    peers = some_of(arguments.peers, PEERS, "--peers")
    if not torch.cuda.is_available():
        raise RuntimeError("a benchmark needs a CUDA GPU: torch.cuda.is_available() is False")
    bandwidth = copy_gbps(torch.device("cuda"))
    record = head("decode", arguments.commit) | {
        "model": "llama-3-8b",
        "rank": arguments.rank,
        "copy_gbps": round(bandwidth, 1),
        "versions": {},
    }
    limits = [limit_row(LLAMA_3_8B, shape, bandwidth) for shape in parsed if shape.num_new > 1]
    record["rows"] = limits
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or Path(temporary) / "llama-3-8b"
        model = str(prepare_checkpoint(folder, FIELDS).resolve())
        measure_all(
            ["ours", *peers],
            model,
            shapes,
            arguments.rank,
            arguments.time_limit,
            record,
            arguments.json,
        )
    print(f"\n{record['device']}, torch {record['torch']}, triton {record['triton']}\n")
    print(aligned(*decode_table(record["rows"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
