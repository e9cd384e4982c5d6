"""checkpoint/tensor_names.py: the names that files give to a tower's tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.equality import assert_equal
from support.llama_peers import CPU
from support.tiny_llama import FIELDS, random_tensors, write_checkpoint
from torch import Tensor

from checkpoint.identity import identify
from checkpoint.implied import implied_checkpoint
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from checkpoint.quantized_copy import plan_quantized_copy
from checkpoint.tensor_names import modules_of
from nf4.weight import Quantization

TEXT = {"architectures": None, "model_type": "llama"}
FIELDS_OF_TOWER = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": FIELDS | TEXT,
    "vision_config": {"model_type": "clip_vision_model"},
    "dtype": "float32",
}
# of the decoder and the head, and the module of the encoder
LAYOUTS = {
    "transformers 5": ("model.language_model.", "lm_head.", "model.vision_tower."),
    "transformers 4": ("language_model.model.", "language_model.lm_head.", "vision_tower."),
    "Qwen2.5-VL": ("model.", "lm_head.", "visual."),
}


def tensors_of(layout: str) -> dict[str, Tensor]:
    decoder, head, encoder = LAYOUTS[layout]
    images = {f"{encoder}layers.0.self_attn.q_proj.weight": torch.ones(3, 3)}
    return images | {
        name.replace("lm_head.", head) if name.startswith("lm_head.") else decoder + name[6:]: value
        for name, value in random_tensors(FIELDS).items()
    }


def write(folder: Path, layout: str, num_shards: int = 1) -> Path:
    return write_checkpoint(folder, FIELDS_OF_TOWER, tensors_of(layout), num_shards)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tower_is_found_by_its_names(tmp_path: Path, layout: str, num_shards: int) -> None:
    plain = write_checkpoint(tmp_path / "plain", FIELDS, random_tensors(FIELDS))
    checkpoint = open_checkpoint(write(tmp_path / "tower", layout, num_shards))
    ids = torch.arange(12)[None]
    logits = load_model(checkpoint, CPU, torch.float32, None).logits(ids)
    assert_equal(logits, load_model(open_checkpoint(plain), CPU, torch.float32, None).logits(ids))
    in_files = {checkpoint.names.in_files(name) for name in checkpoint.stored}
    assert in_files == tensors_of(layout).keys()
    assert [tensor.num_bytes for tensor in checkpoint.encoders] == [36]


def test_the_names_in_the_files_change_no_identity(tmp_path: Path) -> None:
    own = {identify(open_checkpoint(write(tmp_path / each, each))).own for each in LAYOUTS}
    assert len(own) == 1


def test_config_json_alone_implies_the_same_language_model(tmp_path: Path) -> None:
    folder = write(tmp_path, "transformers 4")
    known = {tensor.name: tensor.shape for tensor in open_checkpoint(folder).needed()}
    implied = implied_checkpoint(folder, 64).needed()
    assert {tensor.name: tensor.shape for tensor in implied} == known
    assert {tensor.dtype for tensor in implied} == {torch.float32}


@pytest.mark.parametrize(
    ("layouts", "came"),
    [
        ([], "none of them"),
        (["transformers 5", "transformers 4"], "model.language_model.layers and language_model.mo"),
    ],
    ids=["none", "two"],
)
def test_other_names_are_refused(tmp_path: Path, layouts: list[str], came: str) -> None:
    tensors = {"text_model.layers.0.weight": torch.ones(1)}
    for layout in layouts:
        tensors |= tensors_of(layout)
    folder = write_checkpoint(tmp_path, FIELDS_OF_TOWER, tensors)
    with pytest.raises(ValueError, match=f"must hold the layers of its .*: got {came}"):
        open_checkpoint(folder)


def test_a_missing_tensor_and_a_wrong_shape_are_named_as_in_the_files(tmp_path: Path) -> None:
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors = tensors_of("transformers 4")
    weight = tensors.pop(name)
    folder = write_checkpoint(tmp_path, FIELDS_OF_TOWER, tensors)
    with pytest.raises(ValueError, match=f"missing are {name}; unknown are none"):
        open_checkpoint(folder)
    save_file(tensors | {name: weight[1:].contiguous()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        open_checkpoint(folder)


def test_a_tied_head_that_differs_is_named_as_in_the_files(tmp_path: Path) -> None:
    fields = FIELDS_OF_TOWER | {"tie_word_embeddings": True}
    tensors = tensors_of("transformers 4")
    head, embeddings = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "other", fields, tensors))
    assert "lm_head.weight" in checkpoint.left_alone
    assert [tensor.num_bytes for tensor in checkpoint.encoders] == [36]
    with pytest.raises(ValueError, match=f"{head} must equal {embeddings}: they differ"):
        load_model(checkpoint, CPU, torch.float32, None)
    # tied embeddings may be stored as the head alone
    tensors[head] = tensors.pop(embeddings)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "head", fields, tensors))
    model = load_model(checkpoint, CPU, torch.bfloat16, None)
    assert_equal(model.head.detach(), tensors[head].bfloat16())


def test_an_encoder_may_be_in_a_number_format_of_its_own(tmp_path: Path) -> None:
    codes = {
        "vision_tower.a.weight": torch.ones(8, 1, dtype=torch.uint8),
        "vision_tower.a.weight.absmax": torch.ones(1),
        "vision_tower.a.weight.quant_state.bitsandbytes__nf4": torch.ones(4, dtype=torch.uint8),
    }
    tensors = tensors_of("transformers 4") | codes
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, FIELDS_OF_TOWER, tensors))
    assert codes.keys() < checkpoint.left_alone


def test_a_quantized_encoder_is_not_copied(tmp_path: Path) -> None:
    codes = {"vision_tower.a.weight": torch.zeros(32, 1, dtype=torch.uint8)}
    tensors = tensors_of("transformers 4") | codes
    source = open_checkpoint(write_checkpoint(tmp_path, FIELDS_OF_TOWER, tensors))
    with pytest.raises(ValueError, match=r"vision_tower\.a\.weight is in uint8"):
        plan_quantized_copy(source, Quantization(64, True), None)


def test_a_module_of_the_whole_model_is_named_as_transformers_5_does() -> None:
    names = ["vision_tower.a.weight", "model.vision_tower.b.weight", "multi_modal_projector.c.bias"]
    assert modules_of(names) == ["model.multi_modal_projector", "model.vision_tower"]


def test_an_encoder_of_a_plain_model_is_no_tower(tmp_path: Path) -> None:
    tensors = random_tensors(FIELDS) | {"vision_tower.a.weight": torch.ones(1)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, FIELDS, tensors))
    assert not checkpoint.encoders
    (line,) = checkpoint.remarks
    assert "tensors that the model does not need; left alone: vision_tower.a.weight" in line
    assert json.loads((tmp_path / "config.json").read_text()) == FIELDS
