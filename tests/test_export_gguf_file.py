"""export/gguf_file.py and export/gguf_tensors.py: a GGUF file, read back with the gguf package, has
the checkpoint's numbers under llama.cpp's names and in its layout."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFValueType, dequantize
from safetensors.torch import load_file, save_file
from support.gguf_cases import NUM_ROWS, write_model, write_sentencepiece
from support.tiny_llama import FIELDS, VARIANTS
from torch import Tensor

from checkpoint.opening import open_checkpoint
from data.tokenizer import Tokenizer
from export.gguf_architecture import ARCHITECTURES
from export.gguf_file import check_installed, plan_gguf, write_gguf

# the names of llama.cpp
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
BLOCK_OF_GEMMA = BLOCK | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FAMILIES = {"mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"} | {
    "gemma2": "gemma2"
}
# of the others, YaRN alone is refused for a scaling
EXPORTED = [
    variant
    for variant, fields in sorted(VARIANTS.items())
    if (FIELDS | fields)["architectures"][0] in ARCHITECTURES and variant != "yarn"
]
# tensors that the checkpoint does not have
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def export(folder: Path, type: str) -> tuple[GGUFReader, list[str]]:
    checkpoint = open_checkpoint(folder)
    plan = plan_gguf(checkpoint, Tokenizer.from_folder(folder), folder, type)
    path = folder / f"model-{type}.gguf"
    done = []
    write_gguf(plan, checkpoint, path, "tiny", lambda *numbers: done.append(numbers))
    assert done == [(i, len(plan.tensors)) for i in range(1, len(plan.tensors) + 1)]
    assert 0.9 < plan.num_bytes / path.stat().st_size < 1.1
    return GGUFReader(path), list(plan.remarks)


def values_of(reader: GGUFReader) -> dict[str, Tensor]:
    """The numbers of all tensors, in float32; GGUF lists dimensions the other way round."""
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        numbers = dequantize(tensor.data, tensor.tensor_type).copy()
        found[tensor.name] = torch.from_numpy(numbers).float().reshape(shape)
    return found


def fields_of(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def expected_of(folder: Path, variant: str) -> dict[str, Tensor]:
    """The checkpoint's tensors by llama.cpp's names, in its layout."""
    fields = FIELDS | VARIANTS[variant]
    expected = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float()
        if name not in TOP:
            _, _, layer, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            names = BLOCK_OF_GEMMA if variant == "gemma2" else BLOCK
            if FAMILIES.get(variant, "llama") == "llama" and part[-6:] in ("q_proj", "k_proj"):
                is_query = part.endswith("q_proj")
                heads = fields["num_attention_heads" if is_query else "num_key_value_heads"]
                heads = 2 if variant == "llama3-rope" and not is_query else heads
                width = len(values) // heads
                order = [
                    head * width + half * (width // 2) + i
                    for head in range(heads)
                    for i in range(width // 2)
                    for half in (0, 1)
                ]
                values = values[order]
            target = f"blk.{layer}.{names[part]}.{kind}"
        else:
            target = TOP[name]
        if variant == "gemma2" and name.endswith("norm.weight"):
            values = values + 1
        expected[target] = values
    return expected


@pytest.mark.parametrize("variant", EXPORTED)
def test_every_tensor_is_the_checkpoints_in_llama_cpps_layout(tmp_path: Path, variant: str) -> None:
    folder = write_model(tmp_path / variant, variant)
    expected = expected_of(folder, variant)
    rounded = {"bf16": lambda x: x, "f16": lambda x: x.half().float()}
    for type, rounding in rounded.items():
        reader, _ = export(folder, type)
        actual = values_of(reader)
        assert set(actual) - set(FACTORS) == set(expected)
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        for name, values in expected.items():
            is_matrix = values.dim() == 2
            assert types[name] == (type.upper() if is_matrix else "F32"), name
            assert torch.isfinite(actual[name]).all()
            assert torch.equal(actual[name], rounding(values) if is_matrix else values), name


def test_tied_embeddings_that_are_stored_as_the_head_are_the_embeddings(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "tied")
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": embeddings}, folder / "model.safetensors")
    actual = values_of(export(folder, "bf16")[0])
    assert torch.equal(actual["token_embd.weight"], embeddings.float())
    assert "output.weight" not in actual


@pytest.mark.parametrize("variant", ["grouped-query", "qwen3", "phi3", "gemma2"])
def test_q8_0_errs_by_half_a_step_at_most(tmp_path: Path, variant: str) -> None:
    folder = write_model(tmp_path / variant, variant)
    reader, remarks = export(folder, "q8_0")
    actual, num_kept = values_of(reader), 0
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    for name, values in expected_of(folder, variant).items():
        if values.dim() == 1:
            assert types[name] == "F32"
            assert torch.equal(actual[name], values)
        elif values.shape[1] % 32:
            assert types[name] == "F16"
            assert torch.equal(actual[name], values.half().float())
            num_kept += 1
        else:
            assert types[name] == "Q8_0"
            blocks, stored = values.view(-1, 32), actual[name].view(-1, 32)
            # the scale is a float16: 2^-11 of it is lost, 127 times at most
            step = blocks.abs().amax(1, keepdim=True) / 127
            assert bool(((stored - blocks).abs() <= step * (0.5 + 127 * 2**-11)).all()), name
            assert not torch.equal(stored, blocks)
    assert num_kept
    assert f"{num_kept} matrices stay in f16: their rows are no whole blocks of q8_0" in remarks


def test_the_factors_of_llama_3_divide_the_frequencies(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama3-rope")
    factors = values_of(export(folder, "f16")[0])["rope_freqs.weight"]
    expected = []
    for i in range(4):
        length = 2 * math.pi * 500000.0 ** (2 * i / 8)
        if length < 16 / 4:
            expected.append(1.0)
        elif length > 16 / 1:
            expected.append(8.0)
        else:
            smooth = (16 / length - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    # one between, the others beyond
    assert 1 < expected[0] < 8 == expected[1]
    # three roundings of float32
    assert torch.allclose(factors, torch.tensor(expected), rtol=3 * 2**-23, atol=0)


def test_long_rope_has_two_tensors_of_factors(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "phi3")
    values = values_of(export(folder, "q8_0")[0])
    assert values["rope_factors_long.weight"].tolist() == [1.0, 2.0, 3.0, 4.0]
    short = torch.tensor([1.0, 1.1, 1.2, 1.5])
    assert torch.equal(values["rope_factors_short.weight"], short)


COMMON = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 32,
    "feed_forward_length": 72,
    "vocab_size": NUM_ROWS,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
}
WIDE = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), 12)


@pytest.mark.parametrize(
    ("variant", "name", "fields"),
    [
        ("tied", "llama", {"attention.head_count_kv": 4}),
        ("llama3-rope", "llama", {"rope.freq_base": 500000.0}),
        ("linear-rope", "llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ("mistral", "llama", {}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", WIDE),
        (
            "phi3",
            "phi3",
            {
                "attention.sliding_window": 8,
                "rope.scaling.original_context_length": 16,
                "rope.scaling.attn_factor": pytest.approx(
                    math.sqrt(1 + math.log(128 / 16) / math.log(16)), rel=2**-23
                ),
            },
        ),
        (
            "gemma2",
            "gemma2",
            WIDE
            | {
                "attention.sliding_window": 8,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_fields_are_those_of_the_function(
    tmp_path: Path, variant: str, name: str, fields: dict[str, Any]
) -> None:
    folder = write_model(tmp_path / "model", variant)
    found = fields_of(export(folder, "q8_0")[0])
    epsilon = {"attention.layer_norm_rms_epsilon": pytest.approx(1e-5, rel=2**-23)}
    prefix = f"{name}."
    own = {key.removeprefix(prefix): v for key, v in found.items() if key.startswith(prefix)}
    assert own == COMMON | epsilon | fields
    assert found["general.architecture"] == name
    assert found["general.name"] == "tiny"
    # MOSTLY_Q8_0 of llama.cpp's enum
    assert found["general.file_type"] == 7
    assert found["general.quantization_version"] == 2


def test_numbers_have_the_types_that_llama_cpp_reads(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "gemma2")
    write_sentencepiece(folder)
    reader, _ = export(folder, "bf16")
    types = {name: field.types for name, field in reader.fields.items()}
    assert types["gemma2.context_length"] == [GGUFValueType.UINT32]
    assert types["gemma2.rope.freq_base"] == [GGUFValueType.FLOAT32]
    assert types["gemma2.attn_logit_softcapping"] == [GGUFValueType.FLOAT32]
    assert types["tokenizer.ggml.add_bos_token"] == [GGUFValueType.BOOL]
    assert types["tokenizer.ggml.scores"] == [GGUFValueType.ARRAY, GGUFValueType.FLOAT32]
    assert types["tokenizer.ggml.token_type"] == [GGUFValueType.ARRAY, GGUFValueType.INT32]
    assert types["tokenizer.ggml.bos_token_id"] == [GGUFValueType.UINT32]


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_a_weight_beyond_float16_is_refused_and_bf16_holds_it(tmp_path: Path, type: str) -> None:
    folder = write_model(tmp_path / "model", "grouped-query")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = 1e5
    if type == "q8_0":
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name][3, 5] = 1e7
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} must fit --gguf {type}: .* use --gguf bf16"):
        export(folder, type)
    assert float(values_of(export(folder, "bf16")[0])["blk.1.ffn_down.weight"][3, 5]) > 9e4


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--gguf must find the gguf package: .*'gguf>=0\.19'$"):
        check_installed()
