"""Adapters as PEFT writes them, for tiny checkpoints of several families, dtypes and shards,
written without the product's code."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint
from torch import Tensor

PREFIX = "base_model.model."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def paths_of(layer: int, *names: str) -> list[str]:
    modules = {n: "mlp" if n in (*MLP, "gate_up_proj") else "self_attn" for n in names}
    return [f"model.layers.{layer}.{module}.{name}" for name, module in modules.items()]


@dataclass(frozen=True)
class MergeCase:
    """A checkpoint, the fields of an adapter's config, and what PEFT's documentation makes of them.

    Attributes:
        sizes: rank and alpha of each projection with an update.
    """

    variant: str
    dtype: torch.dtype
    num_shards: int
    config: dict[str, Any]
    sizes: Mapping[str, tuple[int, float]] = field(hash=False)

    @property
    def scalings(self) -> dict[str, tuple[int, float]]:
        is_rslora = self.config.get("use_rslora", False)
        return {
            path: (rank, alpha / (math.sqrt(rank) if is_rslora else rank))
            for path, (rank, alpha) in self.sizes.items()
        }

    def write_checkpoint(self, folder: Path) -> Path:
        names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
        fields = FIELDS | VARIANTS[self.variant] | {"torch_dtype": names[self.dtype]}
        tensors = random_tensors(fields, self.dtype)
        return write_checkpoint(folder, fields, tensors, self.num_shards)

    def write_adapter(self, folder: Path, checkpoint: Path) -> Path:
        """Write an adapter whose updates are a tenth of the weights they change."""
        shapes = {name: t.shape for name, t in weights_of(checkpoint).items()}
        generator = torch.Generator().manual_seed(7)
        tensors = {}
        for path, (rank, scaling) in self.scalings.items():
            rows, columns = shapes[f"{path}.weight"]
            A = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            B = 0.1 * torch.randn(rows, rank, generator=generator) / (scaling * math.sqrt(rank))
            tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        write_adapter(folder, self.config, tensors, str(checkpoint))
        return folder


def write_adapter(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], base: str = "base"
) -> None:
    """Write an adapter's two files, its tensors named by the model's names."""
    folder.mkdir(parents=True)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(
        {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def adapter_of(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


CASES = {
    "plain list, rsLoRA, float32": MergeCase(
        "grouped-query",
        torch.float32,
        1,
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": [*ATTENTION, *MLP]},
        {path: (4, 6) for layer in (0, 1) for path in paths_of(layer, *ATTENTION, *MLP)},
    ),
    "norms behind the halves, biases, float16": MergeCase(
        "olmo2",
        torch.float16,
        2,
        {"r": 3, "lora_alpha": 6, "target_modules": ["k_proj", "o_proj", "gate_proj"]},
        {
            path: (3, 6)
            for layer in (0, 1)
            for path in paths_of(layer, "k_proj", "o_proj", "gate_proj")
        },
    ),
    "ranks and alphas by pattern, shards, biases, bfloat16": MergeCase(
        "qwen2",
        torch.bfloat16,
        3,
        {
            "r": 3,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            # the first that fits counts
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 2, r".*\.1\.mlp\..*": 1},
            "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 12, "v_proj": 2},
        },
        {
            "model.layers.0.self_attn.q_proj": (5, 8),
            "model.layers.1.self_attn.q_proj": (2, 8),
            "model.layers.0.self_attn.v_proj": (3, 2),
            "model.layers.1.self_attn.v_proj": (3, 12),
            "model.layers.0.mlp.down_proj": (3, 8),
            "model.layers.1.mlp.down_proj": (1, 8),
        },
    ),
    "an expression of fused projections, float16": MergeCase(
        "phi3",
        torch.float16,
        1,
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": r"model\.layers\.\d+\.(self_attn\.qkv_proj|mlp\.gate_up_proj)",
            "exclude_modules": r".*\.1\.mlp\..*",
            "alpha_pattern": {"qkv_proj": 2.5},
        },
        {
            "model.layers.0.self_attn.qkv_proj": (4, 2.5),
            "model.layers.1.self_attn.qkv_proj": (4, 2.5),
            "model.layers.0.mlp.gate_up_proj": (4, 4),
        },
    ),
    "some layers, one path, some excluded, bfloat16": MergeCase(
        "biases",
        torch.bfloat16,
        2,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "mlp.down_proj", "model.layers.1.self_attn.o_proj"],
            "layers_to_transform": 0,
            "layers_pattern": "layers",
            "exclude_modules": ["layers.0.mlp.down_proj"],
        },
        # a whole path is meant whatever its layer
        dict.fromkeys((*paths_of(0, "q_proj"), *paths_of(1, "o_proj")), (2, 4)),
    ),
    "attention of a mixture of experts, float16": MergeCase(
        "mixtral",
        torch.float16,
        2,
        {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]},
        {path: (2, 6) for layer in (0, 1) for path in paths_of(layer, "q_proj", "o_proj")},
    ),
    "all-linear, layers in a list, tied, float16": MergeCase(
        "tied",
        torch.float16,
        1,
        {
            "r": 2,
            "lora_alpha": 2,
            "target_modules": "all-linear",
            "exclude_modules": ["mlp.up_proj", "k_proj"],
            "init_lora_weights": "gaussian",
            "fan_in_fan_out": False,
        },
        {
            path: (2, 2)
            for layer in (0, 1)
            for path in paths_of(layer, "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
        },
    ),
    "fused projections by name, shards, bfloat16": MergeCase(
        "phi3",
        torch.bfloat16,
        2,
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            "layers_to_transform": [1],
            "rank_pattern": {"o_proj": 8},
        },
        dict.fromkeys(paths_of(1, "qkv_proj", "gate_up_proj", "down_proj"), (4, 8))
        | dict.fromkeys(paths_of(1, "o_proj"), (8, 8)),
    ),
}
