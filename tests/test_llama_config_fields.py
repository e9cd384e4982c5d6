"""llama/config_fields.py: the lists against the fields of the transformers that is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama.config_fields import COMPUTED, ONE_VALUE, WITHOUT_EFFECT
from llama.families import FAMILIES

# what the classes take, and what their objects write of it; as a script of its own, because
# transformers would find our `kernels`
SCRIPT = """
import dataclasses, json
from transformers import GenerationConfig, PretrainedConfig
base = {field.name for field in dataclasses.fields(PretrainedConfig)}
base |= set(PretrainedConfig().to_dict())
print(json.dumps({"base": sorted(base), "generation": sorted(vars(GenerationConfig()))}))
"""
# `PretrainedConfig().to_dict()` of transformers 4.57
BASE_OF_4 = """
    _name_or_path add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torchscript transformers_version typical_p
    use_bfloat16
"""


def test_a_field_has_one_list() -> None:
    of_families = frozenset[str]().union(*(family.fields for family in FAMILIES.values()))
    lists = (COMPUTED | of_families, ONE_VALUE.keys(), WITHOUT_EFFECT)
    assert sum(map(len, lists)) == len(frozenset[str]().union(*lists))


def test_every_base_field_of_transformers_4_is_known() -> None:
    assert set(BASE_OF_4.split()) <= COMPUTED | ONE_VALUE.keys() | WITHOUT_EFFECT


def test_every_base_and_generation_field_of_the_installed_transformers_is_known(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "-I", "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout.splitlines()[-1])
    known = COMPUTED | ONE_VALUE.keys() | WITHOUT_EFFECT
    assert len(fields["base"]) > 10
    assert len(fields["generation"]) > 40
    assert set(fields["base"] + fields["generation"]) - known == set()
