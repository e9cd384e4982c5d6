"""Fields of config.json by what they do to the function of a Llama-like model.

The lists are those of transformers' sources: `PretrainedConfig.__init__` of 4.57,
`PreTrainedConfig.__post_init__` of 5.24, and `GenerationConfig.__init__` of both, whose fields old
checkpoints carry in config.json too. `tests/test_llama_config_fields.py` holds the lists against
the version that is installed.
"""

from typing import Any

# fields of every family that decide what the model computes
COMPUTED = frozenset(
    {
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "tie_word_embeddings",
        "quantization_config",
        "layer_types",
        "eos_token_id",
    }
)

# shares of activations that transformers drops in training; the weights do not depend on them, and
# here nothing is dropped but an adapter's input
DROPOUTS = frozenset({"attention_dropout", "embd_pdrop", "resid_pdrop", "residual_dropout"})

# fields that transformers reads for every family and asks for their truth alone, and what the model
# here computes: `getattr(config, "is_causal", True)` makes null mean that it is not causal
ONE_VALUE: dict[str, Any] = {
    # create_causal_mask of masking_utils.py
    "is_causal": True,
    # Gemma's attention
    "use_bidirectional_attention": False,
    # PreTrainedModel.init_weights of transformers 4
    "pruned_heads": {},
    # PreTrainedConfig of transformers 5: fields of single layers
    "per_layer_config": None,
    # the file of the weights, in place of model.safetensors
    "transformers_weights": None,
}

# of the base class: labels, types and names, and what only encoder-decoders, classifiers,
# TorchScript and TensorFlow ask for
_BASE = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "_output_attentions",
        "add_cross_attention",
        "attn_implementation",
        # names classes that transformers prefers its own of this architecture to
        "auto_map",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "dtype",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "name_or_path",
        "num_labels",
        "prefix",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
    }
)

# of GenerationConfig: how tokens are chosen from the logits, and what generate() returns
_GENERATION = frozenset(
    {
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "constraints",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "diversity_penalty",
        "do_sample",
        "dola_layers",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_decoder_ids",
        "forced_eos_token_id",
        "generation_kwargs",
        "guidance_scale",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_length",
        "max_matching_ngram_size",
        "max_new_tokens",
        "max_time",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "penalty_alpha",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "return_dict_in_generate",
        "return_legacy_cache",
        "sequence_bias",
        "speculation_type",
        "stop_strings",
        "suppress_tokens",
        "target_lookbehind",
        "temperature",
        "token_healing",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
        "use_cache",
        "use_mtp",
        "watermarking_config",
    }
)

# of other programs and of the first versions of some families, which no class of transformers reads
_OTHERS = frozenset(
    {
        "attention_sink_size",
        "context_window_size",
        "is_composition",
        "is_llama_config",
        "model_max_length",
        "pretraining_tp",
        "rope_interleaved",
        "sliding_window_size",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        "use_mrope",
    }
)

WITHOUT_EFFECT = _BASE | _GENERATION | _OTHERS
