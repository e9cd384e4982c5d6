"""train.py and the checkpoint it trains on: a run keeps its base, ranks share one, adapters name
theirs."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.short_model import short_model
from support.train_process import cut_off, train_ranks

import prepare.asked
import quantize
import train
from checkpoint.identity import Identity, identify
from checkpoint.opening import open_checkpoint
from generation.generator import generate_greedy
from llama.model import Llama
from prepare.job import BUNDLED
from run.checkpoint import MANIFEST_FILE, STATE_FILE

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


def flags(folder: Path, more: str = "", model: str = "model") -> list[str]:
    """Four steps with a checkpoint after the second."""
    data = folder / "data.jsonl"
    if not data.is_file():
        lines = (BUNDLED / "data.jsonl").read_text().splitlines()
        data.write_text("\n".join(lines[:80:10]) + "\n")
    given = f"--model {folder / model} --data {data} --device cpu --max-steps 4 --save-steps 2"
    return f"{given} --batch-size 1 --gradient-accumulation-steps 2 --lora-r 2 {more}".split()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(short_model(), tmp_path / "model")


@pytest.fixture
def output(tmp_path: Path, model: Path) -> Path:
    """A run that was stopped after its second step."""
    train.main([*flags(tmp_path), "--output", str(tmp_path / "out")])
    (tmp_path / "out" / ADAPTER).unlink()
    return tmp_path / "out"


def change(folder: Path, name: str = NORM) -> Path:
    """Change one number of one tensor, the metadata left as it is."""
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, path, metadata=metadata)
    return folder


def identity_of(folder: Path) -> Identity:
    return identify(open_checkpoint(folder))


def metadata_of(adapter: Path) -> dict[str, str]:
    with safe_open(adapter / ADAPTER, framework="pt") as file:
        return file.metadata()


def state_of(output: Path, step: int) -> dict[str, Any]:
    return json.loads((output / f"checkpoint-{step}" / STATE_FILE).read_text())


def resume(output: Path, more: str = "") -> None:
    train.main([*flags(output.parent, more), "--output", str(output), "--resume"])


def test_a_run_on_a_base_with_changed_weights_does_not_go_on(
    output: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(model)
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("loaded"))
    message = r"--resume must go on with the base .*model has other weights .*--init-adapter .*-2"
    with pytest.raises(ValueError, match=message):
        resume(output)
    assert not (output / ADAPTER).exists()


def test_a_run_on_a_base_with_another_function_does_not_go_on(output: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-5}))
    with pytest.raises(ValueError, match="--resume must go on with the base"):
        resume(output)


def test_a_run_goes_on_where_its_base_lies_in_other_shards(
    output: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    places = {name: f"shard-{len(name) % 3}.safetensors" for name in tensors}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, model / file, metadata={"format": "pt"})
    index = json.dumps({"weight_map": places})
    (model / "model.safetensors.index.json").write_text(index)
    resume(output)
    assert "checkpoint-2: 2 steps done" in capsys.readouterr().out
    assert (output / ADAPTER).is_file()


def test_a_state_without_a_base_goes_on_unchecked_and_says_so(
    output: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = output / "checkpoint-2"
    state = state_of(output, 2)
    assert state.pop("base") == identity_of(model).own
    (path / STATE_FILE).write_text(json.dumps(state))
    hashes = json.loads((path / MANIFEST_FILE).read_text())
    hashes[STATE_FILE] = hashlib.sha256((path / STATE_FILE).read_bytes()).hexdigest()
    (path / MANIFEST_FILE).write_text(json.dumps(hashes))
    resume(output, "--save-steps 3")
    said = capsys.readouterr().out
    assert f"{path} does not say what its base was: {model} is not checked" in said
    # from here on it is known
    assert state_of(output, 3)["base"] == identity_of(model).own


def test_a_base_in_fp8_is_evaluated_and_answers_as_it_is_served(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def generate(model: Llama, *rest: Any) -> list[int]:
        assert all(group.fp8_scale is None for _, group in model.groups())
        return generate_greedy(model, *rest)

    monkeypatch.setattr("training.answers.generate_greedy", generate)
    more = f"--eval-data {tmp_path / 'data.jsonl'} --sample-prompt Ember? --dtype bfloat16"
    rows, answers, said = {}, {}, {}
    for name in ("bf16", "fp8", "int8"):
        output = tmp_path / name
        given = [*flags(tmp_path, more), "--output", str(output), "--base-compute", name]
        train.main([*given, "--max-steps", "1"])
        rows[name] = [json.loads(line) for line in (output / "metrics.jsonl").open()]
        answers[name] = json.loads((output / "samples.jsonl").read_text().splitlines()[0])
        said[name] = capsys.readouterr().out
        card = (output / "README.md").read_text()
        assert ("a part of the base's products was in" in card) == (name != "bf16")
        assert ("products was in FP8 (E4M3). Evaluations" in card) == (name == "fp8")
        assert ("was in INT8 and FP8 (E4M3). Evaluations" in card) == (name == "int8")
        assert json.loads((output / "run.json").read_text())["base_compute"] == name
    assert "base products in FP8: 6 of 14 projections forward, 14 back; evaluati" in said["fp8"]
    assert "6 of 14 projections forward in INT8, 14 back in FP8; evaluations" in said["int8"]
    assert "FP8" not in said["bf16"]
    # before the first step the adapters are equal, and behind it another one is trained
    for name in ("fp8", "int8"):
        assert rows[name][0]["eval_loss"] == rows["bf16"][0]["eval_loss"]
        assert answers[name] == answers["bf16"]
    assert len({rows[name][1]["loss"] for name in rows}) == 3
    assert rows["fp8"][1]["loss"] == pytest.approx(rows["bf16"][1]["loss"], rel=0.02)
    # a run has one base compute from its first step to its last
    with pytest.raises(ValueError, match="--base-compute was 'bf16', now 'int8'"):
        train.main([*given, "--output", str(tmp_path / "bf16"), "--resume"])


def test_a_plan_reads_no_weight(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prepare.base.identify", lambda _: pytest.fail("read"))
    train.main([*flags(tmp_path, "--plan"), "--output", str(tmp_path / "out")])


def test_ranks_with_different_bases_do_not_begin(tmp_path: Path, model: Path) -> None:
    change(shutil.copytree(model, tmp_path / "model-of-rank-1"))
    ranks = train_ranks(tmp_path / "out", [flags(tmp_path)] * 2, find_another)
    ended = [rank.finish() for rank in ranks]
    assert [code for code, _ in ended] == [1, 1]
    assert "error: the model must be the same for all 2 ranks, and is not" in ended[0][1]
    assert "trainable" not in ended[0][1]
    assert not (tmp_path / "out").exists()


def find_another() -> None:
    """Let the second rank find other files under the same name."""
    if os.environ["RANK"] == "1":
        setattr(prepare.asked, "find_checkpoint", lambda model: Path(f"{model}-of-rank-1"))  # noqa: B010


def test_an_adapter_names_its_base(output: Path, model: Path) -> None:
    named = {"format": "pt", "base_identity": identity_of(model).own}
    assert metadata_of(output / "checkpoint-2") == named
    resume(output)
    assert metadata_of(output) == named


def test_a_run_on_a_quantized_copy_keeps_the_copy_and_names_its_source(
    tmp_path: Path, model: Path
) -> None:
    copy = tmp_path / "copy"
    quantize.main(f"--model {model} --output {copy} --device cpu".split())
    output = tmp_path / "out"
    given = [*flags(tmp_path, model="copy"), "--output", str(output)]
    train.main(given)
    assert metadata_of(output)["base_identity"] == identity_of(model).own
    assert state_of(output, 2)["base"] == identity_of(copy).own
    cut_off(output)
    change(copy, "model.layers.1.mlp.up_proj.weight")
    # the copy still names its source, and is another one all the same
    assert identity_of(copy).original == identity_of(model).own
    with pytest.raises(ValueError, match="--resume must go on with the base"):
        train.main([*given, "--resume"])


def test_an_adapter_of_a_copy_of_unknown_source_names_no_base(tmp_path: Path, model: Path) -> None:
    quantize.main(f"--model {model} --output {tmp_path / 'copy'} --device cpu".split())
    path = tmp_path / "copy" / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "pt"})
    train.main([*flags(tmp_path, model="copy"), "--output", str(tmp_path / "out")])
    assert metadata_of(tmp_path / "out") == {"format": "pt"}


@pytest.mark.parametrize("is_changed", [True, False])
def test_an_adapter_that_goes_on_with_another_base_is_said(
    output: Path, model: Path, is_changed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_changed:
        change(model)
    capsys.readouterr()
    more = f"--init-adapter {output / 'checkpoint-2'}"
    train.main([*flags(output.parent, more), "--output", str(output.parent / "second")])
    line = f"--init-adapter was trained on another base than {model}: going on"
    assert (line in capsys.readouterr().out) == is_changed
    named = metadata_of(output.parent / "second")["base_identity"]
    assert named == identity_of(model).own
