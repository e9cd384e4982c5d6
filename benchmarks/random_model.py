"""A model of a real shape with random weights, made on the device without a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.layers import BLOCK_SIZE, WEIGHT_STD
from foreign.json_fields import JsonFields
from llama.config import LlamaConfig, check_config
from llama.family import LLAMA_NORMS
from llama.layer_experts import Experts
from llama.model import Llama
from llama.rope_scaling import Rope
from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight, Quantization

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    ropes=(Rope(500000.0),) * 32,
    rotary_dim=128,
    is_interleaved=False,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    is_fused=False,
    is_mlp_fused=False,
    activation="silu",
    qk_norm=False,
    has_joint_qk_norm=False,
    windows=(None,) * 32,
    query_pre_attn_scalar=128,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    norms=LLAMA_NORMS,
    norm_offset=0.0,
    has_centred_norms=False,
    is_parallel=False,
    embedding_scale=1.0,
    embedding_multiplier=None,
    residual_multiplier=None,
    attention_multiplier=None,
    logit_scale=None,
    eos_token_ids=(128001,),
)
CONFIGS = {
    "smollm2-135m": replace(
        LLAMA_3_8B,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rotary_dim=64,
        tie_word_embeddings=True,
        ropes=(Rope(100000.0),) * 30,
        windows=(None,) * 30,
        query_pre_attn_scalar=64,
    ),
    "llama-3.2-1b": replace(
        LLAMA_3_8B,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        rotary_dim=64,
        tie_word_embeddings=True,
        ropes=LLAMA_3_8B.ropes[:1] * 16,
        windows=(None,) * 16,
    ),
    "qwen2.5-3b": replace(
        LLAMA_3_8B,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        tie_word_embeddings=True,
        ropes=(Rope(1000000.0),) * 36,
        windows=(None,) * 36,
    ),
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": replace(
        LLAMA_3_8B,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        ropes=LLAMA_3_8B.ropes[:1] * 80,
        windows=(None,) * 80,
    ),
    "qwen3-30b-a3b": replace(
        LLAMA_3_8B,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        ropes=(Rope(1000000.0),) * 48,
        max_position_embeddings=40960,
        qk_norm=True,
        windows=(None,) * 48,
        experts=Experts(
            num_experts=128,
            num_chosen=8,
            width=768,
            is_normalized=True,
            is_stacked=False,
            has_experts=(True,) * 48,
        ),
        eos_token_ids=(151645,),
    ),
}
# of other families, as their config.json says it; without Phi-4-mini's factors of its frequencies,
# which change numbers and no times
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "gemma-3-12b": {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262208,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.75,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "smollm3-3b": {
        "architectures": ["SmolLM3ForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "max_position_embeddings": 65536,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}
HERE = Path(__file__).resolve().parent
CONFIGS |= {
    name: check_config(JsonFields(HERE / name, fields)) for name, fields in FAMILY_FIELDS.items()
}


def random_model(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Llama:
    """Draw NF4 weights code by code, about as large as a trained model's, and the rest in `dtype`.

    The codes are uniform, where those of a normal matrix are not quite; no kernel's time depends on
    it.
    """
    with torch.device("meta"):
        model = Llama(config, dtype)
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        # norms multiply by one
        is_vector, one = weight.dim() == 1, 1 - config.norm_offset
        weight = weight.fill_(one) if is_vector else weight.normal_(std=WEIGHT_STD)
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, nn.Parameter(weight, requires_grad=False))
    for _, group in model.frozen_groups():
        group.allocate(device, None, dtype, Quantization(BLOCK_SIZE, True))
        if group.bias is not None:
            group.bias.normal_(std=WEIGHT_STD)
        weight = group.weight
        assert isinstance(weight, NF4Weight)
        assert isinstance(weight.absmax, QuantizedAbsmax)
        weight.packed.random_(0, 256)
        # levels have a root mean square of 0.6, and scales lie around their mean
        weight.absmax.codes.random_(0, 256)
        weight.absmax.group_absmax.fill_(WEIGHT_STD / 2)
        weight.absmax.mean.fill_(1.6 * WEIGHT_STD)
    model.move_constants(device)
    return model.eval()
