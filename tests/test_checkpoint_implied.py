"""checkpoint/implied.py: config.json alone describes the checkpoint that its folder holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint

import quantize
from checkpoint.files import find_description
from checkpoint.implied import has_weights, implied_checkpoint
from checkpoint.opening import Checkpoint, open_checkpoint
from checkpoint.untrained_rows import untrained_rows
from nf4.weight import Quantization

CONFIG = "config.json"


def layout(checkpoint: Checkpoint) -> dict[str, tuple[Any, ...]]:
    """The tensors that a model is loaded from."""
    return {
        t.name: (t.shape, t.dtype, t.num_bytes)
        for t in sorted(checkpoint.needed(), key=lambda tensor: tensor.name)
    }


def alone(folder: Path, **changes: Any) -> Path:
    """Copy a folder's config.json, and nothing else, into a new folder."""
    fields = json.loads((folder / CONFIG).read_text()) | changes
    (folder / "alone").mkdir(exist_ok=True)
    (folder / "alone" / CONFIG).write_text(json.dumps(fields))
    return folder / "alone"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_implies_the_tensors_of_its_family(
    tmp_path: Path, variant: str, dtype: torch.dtype, key: str
) -> None:
    fields = FIELDS | VARIANTS[variant] | {key: str(dtype).removeprefix("torch.")}
    write_checkpoint(tmp_path, fields, random_tensors(fields, dtype))
    opened, implied = open_checkpoint(tmp_path), implied_checkpoint(alone(tmp_path), 64)
    assert layout(implied) == layout(opened)
    assert implied.config == opened.config
    assert implied.quantization is None
    assert implied.remarks == []


def test_a_config_without_a_dtype_implies_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FIELDS, random_tensors(FIELDS))
    assert layout(implied_checkpoint(alone(tmp_path), 64)) == layout(open_checkpoint(tmp_path))


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(("variant", "block_size"), [("tied", 64), ("phi3", 64), ("biases", 128)])
def test_a_copy_in_nf4_is_known_by_its_config(
    tmp_path: Path, variant: str, block_size: int, double_quant: bool
) -> None:
    fields = FIELDS | VARIANTS[variant] | {"torch_dtype": "bfloat16"}
    write_checkpoint(tmp_path / "a", fields, random_tensors(fields, torch.bfloat16))
    flags = f"--block-size {block_size} --{'' if double_quant else 'no-'}double-quant --device cpu"
    quantize.main(f"--model {tmp_path / 'a'} --output {tmp_path / 'b'} {flags}".split())
    opened = open_checkpoint(tmp_path / "b")
    implied = implied_checkpoint(alone(tmp_path / "b"), block_size)
    assert implied.quantization == opened.quantization == Quantization(block_size, double_quant)
    assert layout(implied) == layout(opened)


def test_another_number_format_or_dtype_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FIELDS, {"x": torch.zeros(1)})
    for described, name in (({"quant_method": "gptq"}, "gptq"), ("fp8", "fp8")):
        with pytest.raises(ValueError, match=f"16 or 32 bits, .* says {name}; use the original"):
            implied_checkpoint(alone(tmp_path, quantization_config=described), 64)
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*: got 'float8'"):
        implied_checkpoint(alone(tmp_path, dtype="float8"), 64)


def test_members_of_a_group_are_in_nf4_together_or_not_at_all(tmp_path: Path) -> None:
    described = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    write_checkpoint(tmp_path, FIELDS, {"x": torch.zeros(1)})

    def implied(*skipped: Any) -> Checkpoint:
        quantization = described | {"llm_int8_skip_modules": skipped}
        return implied_checkpoint(alone(tmp_path, quantization_config=quantization), 64)

    first = "model.layers.0.mlp."
    names = {f"{first}{name}_proj.weight" for name in ("gate", "up", "down")}
    num_all = len(implied("lm_head").nf4.states)
    assert num_all == 14
    found = implied(f"{first[:-1]}", "layers.1").nf4.states
    assert len(found) == 4
    assert not any(name in found or "layers.1" in name for name in names)
    assert len(implied("down_proj").nf4.states) == num_all - 2
    with pytest.raises(ValueError, match="share a buffer and must all be in NF4 or none: up_proj"):
        implied("up_proj")


@pytest.mark.parametrize(
    ("has_tokenizer", "fetched"),
    [(False, {"config.json"}), (True, {"config.json", "tokenizer.json", "chat_template.jinja"})],
)
def test_no_weights_are_fetched_for_a_description(
    monkeypatch: pytest.MonkeyPatch, has_tokenizer: bool, fetched: set[str]
) -> None:
    others = {"model.safetensors", "model.safetensors.index.json", "vocab.json", "README.md"}
    names = others | {"config.json", "tokenizer.json", "chat_template.jinja"}
    chosen = []

    def find_folder(place: str, what: str, kind: str, choose: Any) -> Path:
        chosen.append(choose(names, lambda name: pytest.fail(f"{name} is fetched")))
        return Path(place)

    monkeypatch.setattr("checkpoint.files.find_folder", find_folder)
    assert find_description("owner/name", has_tokenizer=has_tokenizer) == Path("owner/name")
    assert chosen == [fetched]
    names.remove("config.json")
    with pytest.raises(ValueError, match=r"--model must have config\.json: owner/name has README"):
        find_description("owner/name", has_tokenizer=has_tokenizer)


def test_nothing_is_read_where_there_is_no_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FIELDS, random_tensors(FIELDS))
    assert has_weights(tmp_path)
    folder = alone(tmp_path)
    assert not has_weights(folder)
    implied = implied_checkpoint(folder, 64)
    implied.check_unchanged()
    assert untrained_rows(implied, [3, 4], [5]) == set()
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        implied_checkpoint(folder, 64)
