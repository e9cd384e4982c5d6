"""Plan which models fit on which GPU: the memory of a run, and the smallest GPU that has as much.

    python -m benchmarks fits            # the table, in Markdown
    python -m benchmarks fits --write    # into README.md

A plan walks the training step's own code on the meta device (`step/memory_plan.py`), so the table
takes seconds, and no GPU. The settings are train.py's defaults: NF4 with double quantization,
bfloat16, rank 16 on all linear layers, AdamW in 32 bits. The leanest policy offloads the input of
every layer to the host and computes the layer again; the last case keeps all activations.
"""

import argparse
import sys
from dataclasses import replace

import torch

from benchmarks.random_model import CONFIGS, LLAMA_3_8B, random_model
from benchmarks.record import ROOT
from benchmarks.report import with_section
from benchmarks.tables import markdown
from llama.config import LlamaConfig
from llama.model import PROJECTIONS
from lora.config import LoRAConfig
from step.memory_plan import GIB, plan_memory
from step.micro_step import Policy
from step.workload import Workload

README = ROOT / "README.md"
MODELS: dict[str, LlamaConfig] = {
    "Llama-3.2-1B": CONFIGS["llama-3.2-1b"],
    "Llama-3.2-3B": replace(
        LLAMA_3_8B,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
        windows=(None,) * 28,
    ),
    "Llama-3.1-8B": LLAMA_3_8B,
    "Llama-3.1-70B": CONFIGS["llama-3-70b"],
}
# GB on the label of a GPU, and the share of it that a run may take: the driver and other programs
# have the rest
MEMORIES = (6, 8, 12, 16, 24, 32, 40, 48, 80, 96, 141)
SHARE = 0.95
# what is planned: rows and tokens of a micro-batch, and what every layer does
CASES: dict[str, tuple[int, int, Policy]] = {
    "1 x 2,048 tokens, leanest": (1, 2048, "offload"),
    "4 x 2,048 tokens, leanest": (4, 2048, "offload"),
    "4 x 2,048 tokens, activations kept": (4, 2048, "keep"),
}


def smallest_gpu(num_bytes: int) -> str:
    """Name the memory of the smallest GPU that a run fits on."""
    fitting = [memory for memory in MEMORIES if num_bytes <= SHARE * memory * GIB]
    return f"{fitting[0]} GB" if fitting else f"over {MEMORIES[-1]} GB"


def cells(config: LlamaConfig) -> list[str]:
    """Plan what a model's runs take, and name the GPUs that have as much."""
    model = random_model(config, torch.device("meta"))
    model.attach_lora(LoRAConfig(16, 32.0, 0.0, PROJECTIONS), seed=0)
    found = []
    for batch, tokens, policy in CASES.values():
        work = Workload(model, moment_bytes=8, batch=batch, tokens=tokens)
        needed = plan_memory(work, (policy,) * config.num_hidden_layers).device
        found.append(f"{needed / GIB:.1f} GiB, {smallest_gpu(needed)}")
    return found


def table() -> str:
    """Tabulate what runs take: models over micro-batches."""
    lines = [[name, *cells(config)] for name, config in MODELS.items()]
    return markdown(["model", *CASES], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plan which models fit on which GPU.")
    parser.add_argument("--write", action="store_true", help="into README.md")
    is_written = parser.parse_args().write
    text = table()
    print(text)
    if is_written:
        README.write_text(with_section(README.read_text(), "fits", text))
        print(f"wrote {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
