"""run/privacy.py: what is made of private files is private, and nothing else is."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
import quantize
import train
from optim.adamw import AdamW
from prepare.job import BUNDLED
from run.atomic import new_files, new_folder, write_text
from run.metrics import ANSWERS_FILE, StepRows, has_answer
from run.privacy import as_private_as, shared_mode

# that hold text of the data
OF_DATA = {"data.json", "samples.jsonl", "bad-step-2.json"}


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def file_of(mode: int, path: Path) -> Path:
    path.write_text("x")
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ([0o644], 0o644),
        ([0o666, 0o644], 0o644),
        ([0o644, 0o600], 0o600),
        ([0o640, 0o604], 0o600),
        # its owner writes what is made of it
        ([0o444], 0o644),
        ([0o755], 0o644),
    ],
)
def test_what_is_made_of_files_is_for_those_who_may_read_all_of_them(
    tmp_path: Path, modes: list[int], expected: int
) -> None:
    files = [file_of(each, tmp_path / str(i)) for i, each in enumerate(modes)]
    assert shared_mode(files) == expected
    with as_private_as(files):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "file").write_text("x")
    # the umask takes its part
    assert mode(tmp_path / "made" / "file") == expected & ~0o022
    executable = (expected & 0o444) >> 2
    assert mode(tmp_path / "made") == (expected | executable) & ~0o022
    (tmp_path / "after").write_text("x")
    assert mode(tmp_path / "after") == 0o644


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_what_is_written_at_once_follows_the_umask(tmp_path: Path, umask: int) -> None:
    os.umask(umask)
    for name, new in (("folder", new_folder), ("files", new_files)):
        with new(tmp_path / name) as partial:
            save_file({"x": torch.zeros(1)}, partial / "x.safetensors")
            (partial / "more").mkdir()
            save_file({"x": torch.zeros(1)}, partial / "more" / "y.safetensors")
        for path in ("x.safetensors", "more/y.safetensors"):
            assert mode(tmp_path / name / path) == 0o666 & ~umask
    write_text(tmp_path / "text", "x")
    assert mode(tmp_path / "text") == 0o666 & ~umask
    write_text(tmp_path / "private", "x", 0o600)
    assert mode(tmp_path / "private") == 0o600


def test_a_text_is_never_for_more_than_it_may_be(tmp_path: Path) -> None:
    # left by a killed process
    file_of(0o644, tmp_path / "text.quatrain.partial")
    file_of(0o644, tmp_path / "text")
    write_text(tmp_path / "text", "x", 0o600)
    assert mode(tmp_path / "text") == 0o600


def test_a_file_system_without_permissions_takes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, mode: int) -> None:
        raise PermissionError("no such thing")

    monkeypatch.setattr(Path, "chmod", refuse)
    with new_folder(tmp_path / "folder") as partial:
        (partial / "x").write_text("x")
    assert (tmp_path / "folder" / "x").is_file()


def test_rows_that_others_could_read_are_closed_when_the_run_goes_on(tmp_path: Path) -> None:
    row = {"step": 1, "prompt": "a", "answer": "b"}
    path = tmp_path / ANSWERS_FILE
    StepRows(path, 1, has_answer).append(row)
    assert mode(path) == 0o644
    rows = StepRows(path, 1, has_answer, 0o600)
    assert (mode(path), rows.rows) == (0o600, [row])
    rows.append(row)
    # and a damaged one that is kept
    path.write_text("damaged\n" + path.read_text())
    StepRows(path, 1, has_answer, 0o600)
    assert {mode(each) for each in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 2


def data_of(folder: Path, name: str, mode: int) -> Path:
    path = folder / f"{name}.jsonl"
    lines = (BUNDLED / "data.jsonl").read_text().splitlines()[: 8 if name == "train" else 2]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("train_mode", "eval_mode", "expected"),
    [(0o644, 0o644, 0o644), (0o600, 0o644, 0o600), (0o644, 0o640, 0o640)],
    ids=["open", "private", "private-evaluation"],
)
def test_a_run_leaves_text_of_its_data_to_those_who_may_read_the_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_mode: int,
    eval_mode: int,
    expected: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # the second step is one that cannot be learned from
    take, steps = AdamW.step, []

    def spoiled(self: AdamW, *given: Any) -> torch.Tensor:
        steps.append(None)
        if len(steps) == 2:
            self.gradients.values.fill_(float("nan"))
        return take(self, *given)

    monkeypatch.setattr(AdamW, "step", spoiled)
    files = {"--data": data_of(tmp_path, "train", train_mode)}
    files["--eval-data"] = data_of(tmp_path, "eval", eval_mode)
    flags = "--device cpu --batch-size 2 --gradient-accumulation-steps 1 --lora-r 2 --max-steps 2"
    flags += " --save-steps 1 --max-bad-steps 1 --sample-prompt hello"
    given = [text for flag, path in files.items() for text in (flag, str(path))]
    output = tmp_path / "out"
    model = ["--model", str(BUNDLED / "model"), "--output", str(output)]
    with pytest.raises(train.CannotGoOn, match="gradients must be finite"):
        train.main([*model, *given, *flags.split()])
    written = [path for path in output.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= OF_DATA | {"adapter_model.safetensors"}
    for path in written:
        assert mode(path) == (expected if path.name in OF_DATA else 0o644), path
    tokens = (tmp_path / "cache" / "quatrain" / "tokens").iterdir()
    assert [mode(path) for path in tokens if path.is_dir()] == [0o700] * 2


@pytest.mark.draws
def test_a_finished_adapter_follows_the_umask(tmp_path: Path) -> None:
    os.umask(0o002)
    flags = "--device cpu --batch-size 2 --gradient-accumulation-steps 1 --lora-r 2 --max-steps 1"
    data = data_of(tmp_path, "train", 0o600)
    given = ["--model", str(BUNDLED / "model"), "--data", str(data)]
    train.main([*given, "--output", str(tmp_path / "out"), *flags.split()])
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"):
        assert mode(tmp_path / "out" / name) == 0o664, name


@pytest.mark.parametrize("base_mode", [0o600, 0o644])
def test_a_copy_of_a_private_model_is_private(tmp_path: Path, base_mode: int) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED / "model", model)
    (model / "model.safetensors").chmod(base_mode)
    output = tmp_path / "copy"
    quantize.main(["--model", str(model), "--output", str(output), "--device", "cpu"])
    assert {mode(path) for path in output.iterdir()} == {base_mode}
    assert mode(output) == (0o700 if base_mode == 0o600 else 0o755)


@pytest.mark.parametrize("private", ["base", "adapter", "neither"])
def test_a_merge_is_as_private_as_what_goes_into_it(tmp_path: Path, private: str) -> None:
    model, adapter, output = tmp_path / "model", tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(BUNDLED / "model", model)
    adapter.mkdir()
    name = "model.layers.0.self_attn.q_proj"
    weight = load_file(model / "model.safetensors")[f"{name}.weight"]
    prefix = f"base_model.model.{name}."
    tensors = {
        f"{prefix}lora_A.weight": torch.ones(1, weight.shape[1]),
        f"{prefix}lora_B.weight": torch.ones(weight.shape[0], 1),
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": name}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    (model / "model.safetensors").chmod(0o600 if private == "base" else 0o644)
    (adapter / "adapter_model.safetensors").chmod(0o600 if private == "adapter" else 0o644)
    given = ["--model", str(model), "--adapter", str(adapter), "--output", str(output)]
    merge.main([*given, "--device", "cpu"])
    assert {mode(path) for path in output.iterdir()} == {0o644 if private == "neither" else 0o600}
