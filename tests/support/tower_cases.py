"""Tiny checkpoints with a tower, and what transformers, PEFT and bitsandbytes make of them.

One process makes all, then the product writes an adapter, a merged and a quantized copy of each,
and another process reads these.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.llama_peers import CPU
from support.peer_process import run_peer
from torch import Tensor

import merge
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from checkpoint.quantized_copy import plan_quantized_copy, write_quantized_copy
from llama.model import PROJECTIONS
from lora.adapter_file import save_adapter
from lora.config import LoRAConfig
from nf4.weight import Quantization

SCRIPT = Path(__file__).with_name("tower_peer.py")

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    # rows of whole blocks: bitsandbytes may give others the wrong scales on a CPU
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 16}
_VISION |= {"patch_size": 4, "num_attention_heads": 2}
_QWEN_VISION = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2}
_QWEN_VISION |= {"patch_size": 4, "out_hidden_size": 64}

# the encoders of four have projections of the tower's names; windows are of 8, and tests of 40
TOWERS: dict[str, dict[str, Any]] = {
    "mistral3": {
        "model_type": "mistral3",
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 32, "sliding_window": 8},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False,
    },
    "ministral3": {
        "model_type": "mistral3",
        "text_config": TEXT
        | {
            "model_type": "ministral3",
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.7,
            },
        },
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3",
        "text_config": TEXT
        | {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": True,
    },
    # keys of the second layer are its values too, and a quarter of each head turns
    "gemma4": {
        "model_type": "gemma4",
        "text_config": TEXT
        | {
            "head_dim": 32,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": _VISION | {"head_dim": 8, "num_key_value_heads": 2},
        "audio_config": None,
    },
    # in place of an encoder it projects what an image is made of
    "gemma4_unified": {
        "model_type": "gemma4_unified",
        "text_config": TEXT
        | {
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {
            "patch_size": 2,
            "mm_embed_dim": 16,
            "mm_posemb_size": 8,
            "output_proj_dims": 16,
        },
        "audio_config": {"audio_embed_dim": 16},
    },
    "llava": {
        "model_type": "llava",
        "text_config": TEXT | {"model_type": "llama", "rope_theta": 500000.0},
        "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": TEXT
        | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1e6},
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]},
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": TEXT
        | {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        "vision_config": _QWEN_VISION
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "tie_word_embeddings": True,
    },
}

PROCESSOR_FILES = (
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
OUR_LORA = LoRAConfig(4, 6.0, 0.0, PROJECTIONS)
QUANTIZATION = Quantization(64, True)


@dataclass(frozen=True)
class TowerPeer:
    """A checkpoint with a tower, and what the peers made of it."""

    checkpoint: Path
    folder: Path  # holds our_adapter, peft_adapter and the copies merged and quantized
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    facts: dict[str, Any]


def write_ours(checkpoint: Path, folder: Path) -> None:
    """Write an adapter that changes the logits, and both copies, as the product does."""
    for name in PROCESSOR_FILES:
        (checkpoint / name).write_text(name)
    base = open_checkpoint(checkpoint)
    model = load_model(base, CPU, torch.float32, None)
    model.attach_lora(OUR_LORA, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in model.adapter_tensors().items():
        if name.endswith("lora_B.weight"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    adapter = folder / "our_adapter"
    lora = OUR_LORA.beneath(base.config.decoder)
    save_adapter(adapter, model.adapter_tensors(), lora, str(checkpoint))
    merge.main(["--adapter", str(adapter), "--output", str(folder / "merged"), "--device", "cpu"])
    (folder / "quantized").mkdir()
    copy = plan_quantized_copy(base, QUANTIZATION, None)
    write_quantized_copy(copy, folder / "quantized", CPU, lambda done, total: None)


@functools.cache
def _peers(base: Path) -> dict[str, TowerPeer]:
    base.mkdir()
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 96, (2, 40), generator=generator)
    labels = input_ids.masked_fill(torch.rand(2, 40, generator=generator) < 0.3, -100)
    inputs = {"input_ids": input_ids, "labels": labels}
    names = ("checkpoint", "our_adapter", "peft_adapter", "merged", "quantized")
    jobs = {
        tower: {"fields": fields} | {name: str(base / tower / name) for name in names}
        for tower, fields in TOWERS.items()
    }

    given = {"jobs": json.dumps(jobs)}
    outputs = run_peer(SCRIPT, base, inputs, given | {"step": "make"})
    for tower in TOWERS:
        write_ours(base / tower / "checkpoint", base / tower)
    outputs |= run_peer(SCRIPT, base, inputs, given | {"step": "read"})
    facts = json.loads((base / "facts.json").read_text())
    return {
        tower: TowerPeer(
            base / tower / "checkpoint",
            base / tower,
            inputs,
            {k.partition("/")[2]: v for k, v in outputs.items() if k.startswith(f"{tower}/")},
            facts[tower],
        )
        for tower in TOWERS
    }


def tower_peer(tmp_path_factory: pytest.TempPathFactory, tower: str) -> TowerPeer:
    """The peers on the tiny checkpoint of one of TOWERS."""
    return _peers(tmp_path_factory.getbasetemp() / "tower_peers")[tower]
