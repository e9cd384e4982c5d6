"""Our generation in a process of its own; `benchmarks/decode.py` starts it.

Beside the prompts' pass it times the forward pass of training over as many tokens, captured, as a
row of the provider `forward`.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decode_timing import Shape, measure, parse_shape, print_row, seconds
from benchmarks.layers import BLOCK_SIZE
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from generation.generator import Generator
from generation.sampling import Sampling
from llama.model import PROJECTIONS, Llama
from lora.config import LoRAConfig
from nf4.weight import Quantization
from optim.arena import GradientArena
from rows.batch import Batch
from run.machine import configure_torch
from step.micro_step import MicroStep


def measure_generation(model: Llama, shape: Shape) -> None:
    """Time a shape through one generator, as a conversation has it."""
    capacity = shape.num_tokens + shape.num_new
    generator = Generator(model, Sampling(), capacity, shape.num_sequences)

    def generate(prompts: Tensor, num_new: int) -> None:
        for _ in generator.complete(prompts.tolist(), num_new, ()):
            pass

    measure({"provider": "ours"}, generate, shape, model.config.vocab_size)


def measure_forward(model: Llama, shape: Shape) -> None:
    """Time the forward pass of training, all of whose activations are kept."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    policies = ("keep",) * model.config.num_hidden_layers
    step = MicroStep(model, GradientArena(parameters), policies, captures=True)
    ids = torch.zeros(shape.num_sequences, shape.num_tokens, dtype=torch.int64)
    factor = torch.zeros((), device=model.device)
    # launched, then captured
    for _ in range(2):
        step(Batch(ids, ids), factor)
    (captured,) = step._trained._captured.values()
    times = sorted(seconds(lambda *_: captured.forward.replay(), ids, 1) for _ in range(5))
    print_row({"provider": "forward", "shape": str(shape), "prompt_ms": round(times[2] * 1e3, 2)})


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure our generation.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--rank", type=int, required=True)
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    configure_torch(device, 0, False)
    dtype = torch.bfloat16 if has_gpu else torch.float32
    model = load_model(
        open_checkpoint(arguments.model), device, dtype, Quantization(BLOCK_SIZE, True)
    )
    model.attach_lora(LoRAConfig(arguments.rank, 2 * arguments.rank, 0.0, PROJECTIONS), seed=0)
    for shape in map(parse_shape, arguments.shapes.split(",")):
        measure_generation(model, shape)
        if shape.num_new == 1 and has_gpu:
            measure_forward(model, shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
