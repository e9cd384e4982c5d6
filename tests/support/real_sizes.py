"""Sizes that the families are published in, as the fields of config.json that count for a plan."""

from typing import Any

from support.tiny_llama import VARIANTS


def _size(
    architecture: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **more,
    }


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_WIDE = {"head_dim": 128}
_MINISTRAL3 = _WIDE | {"rope_parameters": VARIANTS["ministral3"]["rope_parameters"]}
_GEMMA4 = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
_EXPERTS = {"num_experts_per_tok": 8}
_FOUR = {"num_experts_per_tok": 4}

# of those that read images, the language models alone
REAL: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _size("LlamaForCausalLM", 2048, 8192, 16, 32, 8, 128256, **_TIED),
    "Llama-3.1-8B": _size("LlamaForCausalLM", 4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-70B": _size("LlamaForCausalLM", 8192, 28672, 80, 64, 8, 128256),
    "InternLM3-8B": _size("InternLM3ForCausalLM", 4096, 10240, 48, 32, 2, 128512),
    "Seed-OSS-36B": _size("SeedOssForCausalLM", 5120, 27648, 64, 80, 8, 155136),
    "ERNIE-4.5-0.3B": _size("Ernie4_5ForCausalLM", 1024, 3072, 18, 16, 2, 103424, **_TIED, **_WIDE),
    "Mistral-7B": _size("MistralForCausalLM", 4096, 14336, 32, 32, 8, 32768),
    "Mistral-Small-24B": _size("MistralForCausalLM", 5120, 32768, 40, 32, 8, 131072, **_WIDE),
    "Ministral-8B": _size("MinistralForCausalLM", 4096, 12288, 36, 32, 8, 131072),
    "Ministral-3-3B": _size(
        "Ministral3ForCausalLM", 3072, 9216, 26, 32, 8, 131072, **_TIED, **_MINISTRAL3
    ),
    "Ministral-3-14B": _size(
        "Ministral3ForCausalLM", 5120, 16384, 40, 32, 8, 131072, **_MINISTRAL3
    ),
    "Qwen2.5-7B": _size("Qwen2ForCausalLM", 3584, 18944, 28, 28, 4, 152064),
    "Qwen2.5-72B": _size("Qwen2ForCausalLM", 8192, 29568, 80, 64, 8, 152064),
    "Qwen3-8B": _size("Qwen3ForCausalLM", 4096, 12288, 36, 32, 8, 151936),
    "Qwen3-32B": _size("Qwen3ForCausalLM", 5120, 25600, 64, 64, 8, 151936),
    "Phi-4-mini": _size("Phi3ForCausalLM", 3072, 8192, 32, 24, 8, 200064, **_TIED),
    "Phi-4": _size("Phi3ForCausalLM", 5120, 17920, 40, 40, 10, 100352),
    "OLMo-2-7B": _size("Olmo2ForCausalLM", 4096, 11008, 32, 32, 32, 100352),
    "OLMo-3-32B": _size("Olmo3ForCausalLM", 5120, 27648, 64, 40, 8, 100278),
    "EXAONE-4.0-32B": _size("Exaone4ForCausalLM", 5120, 27392, 64, 40, 8, 102400),
    "Command-R-35B": _size("CohereForCausalLM", 8192, 22528, 40, 64, 64, 256000, **_TIED),
    "Command-R7B": _size("Cohere2ForCausalLM", 4096, 14336, 32, 32, 8, 256000, **_TIED),
    "Granite-3.3-8B": _size("GraniteForCausalLM", 4096, 12800, 40, 32, 8, 49159),
    "Gemma-7B": _size("GemmaForCausalLM", 3072, 24576, 28, 16, 16, 256000, **_TIED),
    "Gemma-2-9B": _size("Gemma2ForCausalLM", 3584, 14336, 42, 16, 8, 256000, **_TIED),
    "Gemma-2-27B": _size("Gemma2ForCausalLM", 4608, 36864, 46, 32, 16, 256000, **_TIED, **_WIDE),
    "Gemma-3-4B": _size("Gemma3ForCausalLM", 2560, 10240, 34, 8, 4, 262208, **_TIED),
    "Gemma-3-12B": _size("Gemma3ForCausalLM", 3840, 15360, 48, 16, 8, 262208, **_TIED),
    "Gemma-3-27B": _size("Gemma3ForCausalLM", 5376, 21504, 62, 32, 16, 262208, **_TIED, **_WIDE),
    "Gemma-4-12B": _size(
        "Gemma4ForCausalLM",
        *(3840, 15360, 48, 16, 8, 262144),
        **_TIED,
        **_GEMMA4,
        num_global_key_value_heads=1,
    ),
    "Gemma-4-31B": _size(
        "Gemma4ForCausalLM",
        *(5376, 21504, 60, 32, 16, 262144),
        **_TIED,
        **_GEMMA4,
        num_global_key_value_heads=4,
    ),
    "GLM-4-9B-Chat": _size("GlmForCausalLM", 4096, 13696, 40, 32, 2, 151552),
    "GLM-4-32B": _size("Glm4ForCausalLM", 6144, 23040, 61, 48, 2, 151552),
    "SmolLM3-3B": _size("SmolLM3ForCausalLM", 2048, 11008, 36, 16, 4, 128256, **_TIED),
    "Qwen3-30B-A3B": _size(
        "Qwen3MoeForCausalLM",
        *(2048, 6144, 48, 32, 4, 151936),
        **_WIDE,
        **_EXPERTS,
        num_experts=128,
        moe_intermediate_size=768,
    ),
    "OLMoE-1B-7B": _size(
        "OlmoeForCausalLM", 2048, 1024, 16, 16, 16, 50304, **_EXPERTS, num_experts=64
    ),
    "Mixtral-8x7B": _size("MixtralForCausalLM", 4096, 14336, 32, 32, 8, 32000),
    "Granite-3.1-3B-A800M": _size(
        "GraniteMoeForCausalLM",
        *(1536, 512, 32, 24, 8, 49155),
        **_TIED,
        **_EXPERTS,
        num_local_experts=40,
    ),
    "gpt-oss-20b": _size(
        "GptOssForCausalLM", *(2880, 2880, 24, 64, 8, 201088), **_FOUR, num_local_experts=32
    ),
    "gpt-oss-120b": _size(
        "GptOssForCausalLM",
        *(2880, 2880, 36, 64, 8, 201088),
        **_FOUR,
        num_local_experts=128,
    ),
}
