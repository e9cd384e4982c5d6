"""Trains for a few steps in configurations drawn from a seed, and prints what a GPU held for each
and what was planned: bytes that torch reserved, and bytes of the device."""

import gc
import json
import random
import sys
from dataclasses import replace
from typing import Any

import torch

from benchmarks.random_model import LLAMA_3_8B, random_model
from generation.generator import generate_greedy
from kernels.fp8 import E4M3
from llama.config import LlamaConfig
from llama.families import FAMILIES
from llama.model import PROJECTIONS
from llama.served import as_served
from lora.config import LoRAConfig
from optim.arena import GradientArena
from rows.batch import Batch
from step.memory_plan import CONTEXT_BYTES, plan_memory
from step.micro_step import POLICIES, MicroStep, Policy
from step.workload import Workload

CUDA, META = torch.device("cuda"), torch.device("meta")
DTYPES = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
NEW_TOKENS = 4
# widths of real models, of few layers
CONFIGS: dict[str, LlamaConfig] = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-3.2-1b": replace(
        LLAMA_3_8B,
        hidden_size=2048,
        intermediate_size=8192,
        head_dim=64,
        rotary_dim=64,
        tie_word_embeddings=True,
    ),
    "mistral-7b": replace(LLAMA_3_8B, vocab_size=32768, windows=(1024,) * 32),
    "qwen2.5-7b": replace(
        LLAMA_3_8B,
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        qkv_bias=True,
    ),
    "qwen3-0.6b": replace(
        LLAMA_3_8B,
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        qk_norm=True,
        tie_word_embeddings=True,
    ),
    "gemma-2-2b": replace(
        LLAMA_3_8B,
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        rotary_dim=256,
        activation="gelu_tanh",
        norms=FAMILIES["Gemma2ForCausalLM"].norms,
        norm_offset=1.0,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        windows=(1024, None) * 16,
    ),
    "llama-2-7b": replace(
        LLAMA_3_8B, vocab_size=32000, intermediate_size=11008, num_key_value_heads=32
    ),
}


def draw(generator: random.Random) -> dict[str, Any]:
    """Draw a configuration."""
    num_layers = generator.randint(2, 5)
    name = generator.choice(list(CONFIGS))
    is_packed = generator.random() < 0.4
    tokens = generator.choice((512, 1024, 2048, 4096))
    return {
        "model": name,
        "policies": [generator.choice(list(POLICIES.values())) for _ in range(num_layers)],
        "dtype": generator.choice(DTYPES),
        "batch": generator.randint(1, max(1, 8192 // tokens)),
        "tokens": tokens,
        "is_packed": is_packed,
        "rank": generator.choice((8, 16, 64)),
        "dropout": generator.choice((0.0, 0.0, 0.05)),
        "noise": generator.choice((0.0, 0.0, 5.0)),
        "targets": generator.choice((PROJECTIONS, PROJECTIONS, ("q_proj", "v_proj"))),
        "evaluation": generator.choice((None, None, (1, 4096), (4, 1536))),
        "prompt": generator.choice((0, 0, 0, 700)),
        "is_fp8": generator.random() < 0.4,
    }


def run(given: dict[str, Any]) -> dict[str, Any]:
    """Train in a configuration on the GPU, and compare with its plan."""
    policies: tuple[Policy, ...] = tuple(given["policies"])
    config = CONFIGS[given["model"]]
    windows = config.windows[: len(policies)]
    config = replace(config, num_hidden_layers=len(policies), windows=windows)
    lora = LoRAConfig(given["rank"], 32.0, given["dropout"], given["targets"])
    is_fp8 = given["is_fp8"] and given["dtype"] != torch.float32
    sizes = random_model(config, META, given["dtype"])
    if is_fp8:
        sizes.multiply_in_8_bits(E4M3)
    sizes.attach_lora(lora, seed=0)
    work = Workload(
        sizes,
        moment_bytes=0,
        batch=given["batch"],
        tokens=given["tokens"],
        sample_tokens=256.0 if given["is_packed"] else None,
        has_noise=given["noise"] > 0,
        evaluation=given["evaluation"],
        num_evaluated_shapes=int(given["evaluation"] is not None),
        prompt_tokens=given["prompt"] + NEW_TOKENS if given["prompt"] else 0,
        device=CUDA,
    )
    plan = plan_memory(work, policies)

    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    reserved_before, used_before = torch.cuda.memory_reserved(), used()
    model = random_model(config, CUDA, given["dtype"])
    if is_fp8:
        model.multiply_in_8_bits(E4M3)
    model.attach_lora(lora, seed=0)
    gradients = GradientArena({n: p for n, p in model.named_parameters() if p.requires_grad})
    factor = torch.tensor(1.0, device=CUDA)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = MicroStep(model, gradients, policies, given["noise"], captures=True)
    for _ in range(3):
        ids, positions = batch(given["batch"], given["tokens"], given["is_packed"])
        lengths = torch.full_like(ids, given["tokens"])
        step(Batch(ids, ids, positions, lengths), factor)
    if given["evaluation"]:
        num_rows, num_tokens = given["evaluation"]
        ids, positions = batch(num_rows, num_tokens, given["is_packed"])
        for _ in range(3):
            step.evaluate(Batch(ids, ids, positions))
    if given["prompt"]:
        with as_served(model):
            generate_greedy(model, [1] * given["prompt"], NEW_TOKENS, ())
    torch.cuda.synchronize()
    found = {
        "reserved": torch.cuda.max_memory_reserved() - reserved_before,
        "planned": plan.reserved,
        "used": used() - used_before,
        "used_planned": plan.device - CONTEXT_BYTES,
    }
    return found | {"given": " ".join(str(value) for value in given.values())}


def batch(
    num_rows: int, num_tokens: int, is_packed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = torch.randint(1000, (num_rows, num_tokens))
    positions = torch.arange(num_tokens).expand_as(ids) % 256
    return ids, positions if is_packed else None


def used() -> int:
    """Bytes of the device that are taken, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    generator = random.Random(int(sys.argv[1]))
    # what a process takes once, and the kernels that every configuration has
    run(draw(random.Random(0)) | {"dtype": torch.bfloat16})
    for _ in range(int(sys.argv[2])):
        print(json.dumps(run(draw(generator))), flush=True)


if __name__ == "__main__":
    main()
