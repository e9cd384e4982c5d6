"""The doors on a checkpoint with a tower: what they do is what they do with the language model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.equality import assert_equal
from support.train_process import cut_off
from torch import Tensor

import generate
import merge
import train
from checkpoint.opening import open_checkpoint
from data.tokenizer import Tokenizer
from export.gguf_file import plan_gguf, write_gguf
from prepare.job import BUNDLED

FLAGS = "--device cpu --batch-size 2 --max-steps 4 --save-steps 2 --lora-r 4 --max-length 64"
PREFIX = "base_model.model."


def tensors_in(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def write_tower(folder: Path) -> Path:
    """Write the bundled model as the language model of a larger one."""
    shutil.copytree(BUNDLED / "model", folder)
    text = json.loads((folder / "config.json").read_text())
    fields = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    fields |= {"text_config": text, "vision_config": {"model_type": "clip_vision_model"}}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_in(folder).items()}
    tensors["vision_tower.layers.0.self_attn.q_proj.weight"] = torch.randn(16, 16)
    tensors["multi_modal_projector.linear_1.weight"] = torch.randn(128, 16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(model: Path, output: Path) -> list[float]:
    data = output.with_suffix(".jsonl")
    data.write_text("\n".join((BUNDLED / "data.jsonl").read_text().splitlines()[:12]))
    train.main(f"--model {model} --data {data} --output {output} {FLAGS}".split())
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in line]


def answer(adapter: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    asked = "--device cpu --dtype float32 --temperature 0 --max-new-tokens 8 --prompt Hello"
    generate.main(["--adapter", str(adapter), *asked.split()])
    return capsys.readouterr().out


def test_a_tower_is_trained_resumed_asked_and_merged_as_its_language_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, tower = tmp_path / "plain", tmp_path / "tower"
    model = write_tower(tmp_path / "model")
    expected = run(BUNDLED / "model", plain)
    capsys.readouterr()
    assert run(model, tower) == expected
    said = capsys.readouterr().out
    assert said.count("2 tensors for images, 0.00 GiB, are neither trained nor loaded") == 1
    shutil.rmtree(tower / "checkpoint-4", ignore_errors=True)
    cut_off(tower)
    described = json.loads((tower / "adapter_config.json").read_text())
    assert described["exclude_modules"] == r"(?!model\.language_model\.).*"
    train.main(["--resume", str(tower)])
    ours = {
        name.replace(".language_model.", "."): tensor
        for name, tensor in tensors_in(tower).items()
        if name.startswith(f"{PREFIX}model.language_model.layers.")
    }
    assert ours.keys() == tensors_in(plain).keys()
    for name, tensor in tensors_in(plain).items():
        assert_equal(ours[name], tensor, name)
    assert answer(tower, capsys) == answer(plain, capsys)

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a valley. " * 20)
    merge.main(f"--adapter {tower} --output {tower}-merged --text {text}".split())
    assert "2 tensors for images" in capsys.readouterr().out
    merged = tensors_in(tmp_path / "tower-merged")
    assert merged.keys() == tensors_in(model).keys()


def test_a_gguf_file_has_the_language_model_alone(tmp_path: Path) -> None:
    pytest.importorskip("gguf")

    def export(folder: Path) -> tuple[bytes, str]:
        checkpoint, path = open_checkpoint(folder), tmp_path / f"{folder.name}.gguf"
        plan = plan_gguf(checkpoint, Tokenizer.from_folder(folder), folder, "bf16")
        write_gguf(plan, checkpoint, path, "tiny", lambda done, total: None)
        return path.read_bytes(), "\n".join(plan.remarks)

    plain, tower = tmp_path / "plain", write_tower(tmp_path / "tower")
    shutil.copytree(BUNDLED / "model", plain)
    for folder in (plain, tower):
        names = json.loads((folder / "tokenizer_config.json").read_text())
        # its id is config.json's then
        del names["eos_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    expected, said = export(plain)
    assert "language model alone" not in said
    whole, said = export(tower)
    assert "the GGUF file has the language model alone, which answers text" in said
    assert whole == expected
