"""Towers against transformers, PEFT and bitsandbytes, and the fields of their config.json."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.equality import assert_equal
from support.llama_peers import CPU
from support.micro_steps import KEEP, adapter_gradients, gradients_of, step_of
from support.tiny_llama import float32_error
from support.tower_cases import (
    OUR_LORA,
    PROCESSOR_FILES,
    QUANTIZATION,
    TEXT,
    TOWERS,
    TowerPeer,
    tower_peer,
)
from torch import Tensor

from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from generation.generator import generate_greedy
from llama.config import LlamaConfig, read_config
from llama.model import Llama
from lora.adapter_file import load_adapter, read_adapter_config
from nf4.weight import Quantization

PROMISED = 1e-4
# an encoder's tensors, as the files name them
OF_IMAGES = ("vision_tower.", "multi_modal_projector.", "visual.", "model.visual.")
OF_IMAGES += tuple(
    f"model.{name}." for name in ("vision_tower", "embed_vision", "embed_audio", "vision_embedder")
)


@pytest.fixture(params=TOWERS)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TowerPeer:
    return tower_peer(tmp_path_factory, request.param)


def load(folder: Path, quantization: Quantization | None = None) -> Llama:
    return load_model(open_checkpoint(folder), CPU, torch.float32, quantization)


def with_adapter(folder: Path, adapter: Path) -> Llama:
    model = load(folder)
    model.attach_lora(read_adapter_config(adapter), seed=0)
    load_adapter(adapter, model.adapter_tensors())
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= PROMISED


def of_images(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(OF_IMAGES)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(expected) >= 10
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, name)


def test_logits_and_greedy_tokens_equal_transformers(peer: TowerPeer) -> None:
    model = load(peer.checkpoint)
    assert_close(model.logits(peer.inputs["input_ids"]), peer.outputs["logits"])
    tokens = peer.outputs["greedy"][0].tolist()
    assert generate_greedy(model, tokens[:12], 12, ()) == tokens[12:]


def test_an_adapter_of_peft_for_the_whole_model_trains_on(peer: TowerPeer) -> None:
    model = with_adapter(peer.checkpoint, peer.folder / "peft_adapter")
    input_ids, labels = peer.inputs["input_ids"], peer.inputs["labels"]
    assert_close(model.logits(input_ids), peer.outputs["peft_adapter_logits"])
    gradients_of(step_of(model, KEEP[:1] * len(model.layers)), input_ids, labels)
    actual = {f"grad.{name}": grad for name, grad in adapter_gradients(model).items()}
    assert actual.keys() == {name for name in peer.outputs if name.startswith("grad.")}
    for name, grad in actual.items():
        # two layers forward and back, about 20 sums each way
        expected = peer.outputs[name]
        assert (grad - expected).abs().max() <= float32_error(expected, 80), name


def test_peft_finds_the_language_model_alone_in_our_adapter(peer: TowerPeer) -> None:
    ours, pefts = (
        load_file(peer.folder / name / "adapter_model.safetensors")
        for name in ("our_adapter", "peft_adapter")
    )
    assert ours.keys() == pefts.keys()
    model = load(peer.checkpoint)
    assert sorted(peer.facts["adapted"]) == sorted(
        prefix + name for prefix, group in model.groups() for name in group.names
    )
    assert not [line for line in peer.facts["warnings"] if "deprecated" not in line]
    adapted = with_adapter(peer.checkpoint, peer.folder / "our_adapter")
    logits = adapted.logits(peer.inputs["input_ids"])
    assert_close(logits, peer.outputs["our_adapter_logits"])
    assert (logits - peer.outputs["logits"]).abs().max() > 0.1


def test_a_merged_copy_is_the_whole_model(peer: TowerPeer) -> None:
    merged = peer.folder / "merged"
    assert not any(peer.facts["merged"].values())
    assert_close(peer.outputs["merged_logits"], peer.outputs["our_adapter_logits"])
    assert_close(load(merged).logits(peer.inputs["input_ids"]), peer.outputs["merged_logits"])
    names = (load_file(f / "model.safetensors").keys() for f in (merged, peer.checkpoint))
    assert next(names) == next(names)
    assert_same(of_images(merged), of_images(peer.checkpoint))


def test_a_quantized_copy_leaves_the_encoder_as_it_is(peer: TowerPeer) -> None:
    quantized = peer.folder / "quantized"
    assert not any(peer.facts["quantized"].values())
    assert sorted(peer.facts["in_4_bits"]) == sorted(peer.facts["adapted"])
    assert_same(of_images(quantized), of_images(peer.checkpoint))
    logits = load(quantized, QUANTIZATION).logits(peer.inputs["input_ids"])
    assert_close(logits, peer.outputs["quantized_logits"])
    model = load(peer.checkpoint, QUANTIZATION)
    assert_equal(model.logits(peer.inputs["input_ids"]), logits)
    assert (logits - peer.outputs["logits"]).abs().max() > 0.01


def test_tensors_for_images_are_counted_and_left_alone(peer: TowerPeer) -> None:
    checkpoint = open_checkpoint(peer.checkpoint)
    images = of_images(peer.checkpoint)
    (line,) = checkpoint.remarks
    assert f"{len(images)} tensors for images, 0.00 GiB, are neither trained nor loaded" in line
    needed = sum(tensor.num_bytes for tensor in checkpoint.needed())
    total = (peer.checkpoint / "model.safetensors").stat().st_size
    assert 0 < needed <= total - sum(tensor.nbytes for tensor in images.values())
    trainable, every = load(peer.checkpoint).num_parameters()
    assert (trainable, 4 * every) == (0, needed)


def test_the_vocabulary_of_a_tower_gets_no_update(peer: TowerPeer) -> None:
    model = load(peer.checkpoint)
    for name in ("lm_head", "embed_tokens"):
        lora = replace(OUR_LORA, target_modules=rf".*(q_proj|{name})")
        with pytest.raises(ValueError, match="head and embeddings stay as they are"):
            model.attach_lora(lora, seed=0)


def test_embeddings_that_peft_saves_with_an_adapter_must_be_the_towers(
    peer: TowerPeer, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(peer.checkpoint)
    name = "model.language_model.embed_tokens.weight"
    embeddings = checkpoint.vocabulary_tensors()[name]
    model = load(peer.checkpoint)
    model.attach_lora(read_adapter_config(peer.folder / "peft_adapter"), seed=0)
    saved = load_file(peer.folder / "peft_adapter" / "adapter_model.safetensors")
    path = tmp_path / "adapter_model.safetensors"
    save_file(saved | {f"base_model.model.{name}": embeddings}, path)
    load_adapter(tmp_path, model.adapter_tensors(), checkpoint.vocabulary_tensors)
    save_file(saved | {f"base_model.model.{name}": embeddings + 1}, path)
    with pytest.raises(ValueError, match=f"{name} must equal the base's"):
        load_adapter(tmp_path, model.adapter_tensors(), checkpoint.vocabulary_tensors)


@pytest.mark.parametrize("copy", ["merged", "quantized"])
def test_a_copy_has_the_processors_files(peer: TowerPeer, copy: str) -> None:
    for name in PROCESSOR_FILES:
        assert (peer.folder / copy / name).read_text() == name


def write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


ARCHITECTURES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "ministral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def read(
    folder: Path, tower: str, text: dict[str, Any] | None = None, **around: Any
) -> LlamaConfig:
    fields: dict[str, Any] = TOWERS[tower] | {"architectures": [ARCHITECTURES[tower]]}
    fields |= {"text_config": fields["text_config"] | (text or {})} | around
    return read_config(write(folder, {k: v for k, v in fields.items() if v is not ...}))


@pytest.mark.parametrize(
    ("tower", "text", "message"),
    [
        ("mistral3", {"hidden_size": -1}, ": hidden_size must be a positive integer: got -1"),
        ("mistral3", {"hidden_size": None}, " must give hidden_size: the key is missing"),
        ("qwen3_vl", {"mystery": 1}, " must hold fields that Qwen3VL.* has: got mystery = 1"),
        ("llava", {"is_causal": False}, ": is_causal must be true or absent: got false"),
        ("llava", {"hidden_act": "relu"}, ": hidden_act must be one of .*: got 'relu'"),
        ("llava", {"model_type": "phi"}, ": model_type must be llama or mistral .*: got 'phi'"),
    ],
)
def test_a_field_of_the_language_model_is_named_with_its_place(
    tmp_path: Path, tower: str, text: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"/config\.json, text_config{message}"):
        read(tmp_path, tower, text)


@pytest.mark.parametrize(
    ("around", "message"),
    [
        ({"mystery": 1}, " must hold fields that Llava.* has: got mystery = 1"),
        ({"text_config": ...}, ": text_config must be an object, .*: got None"),
        ({"model_type": "llama"}, ": model_type must be 'llava' with Llava.*: got 'llama'"),
        ({"is_causal": False}, ": is_causal must be true or absent: got false"),
    ],
)
def test_a_field_around_the_language_model_is_named(
    tmp_path: Path, around: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"/config\.json{message}"):
        read(tmp_path, "llava", **around)


def test_three_rotary_positions_are_of_towers_that_have_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rope_scaling must be absent, .*: got 'mrope'"):
        read(tmp_path, "mistral3", {"rope_scaling": {"type": "mrope"}})


@pytest.mark.parametrize(
    ("tower", "around", "text", "is_tied"),
    [
        ("mistral3", True, False, True),
        ("mistral3", False, True, False),
        # the files have a head of their own, which transformers keeps
        ("mistral3", ..., ..., False),
        # Ministral-3 3B and 8B
        ("ministral3", ..., True, True),
        ("ministral3", ..., False, False),
        ("llava", False, True, True),
        ("qwen2_5_vl", ..., True, True),
        ("qwen3_vl", False, True, False),
        ("qwen3_vl", True, ..., True),
    ],
)
def test_the_head_is_tied_where_transformers_looks(
    tmp_path: Path, tower: str, around: Any, text: Any, is_tied: bool
) -> None:
    own = {} if text is ... else {"tie_word_embeddings": text}
    config = read(tmp_path, tower, own, tie_word_embeddings=around)
    assert config.tie_word_embeddings == is_tied


def test_tokens_that_end_an_answer_are_those_around_the_text_first(tmp_path: Path) -> None:
    assert read(tmp_path, "llava").eos_token_ids == (2,)
    assert read(tmp_path, "llava", eos_token_id=[1, 106]).eos_token_ids == (1, 106)


def test_fields_of_qwen2_5_vl_may_lie_side_by_side(tmp_path: Path) -> None:
    nested = read(tmp_path, "qwen2_5_vl")
    flat = read(tmp_path, "qwen2_5_vl", **TOWERS["qwen2_5_vl"]["text_config"], text_config=...)
    assert flat == nested
    assert flat.hidden_size == TEXT["hidden_size"]
    assert flat.is_tower
    with pytest.raises(ValueError, match=r"must hold fields that Qwen2_5_VL.* mystery = 1"):
        read(tmp_path, "qwen2_5_vl", text_config=..., mystery=1, **TEXT)
