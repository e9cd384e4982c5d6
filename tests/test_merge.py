"""merge.py: what it writes, says and refuses; killed, it leaves nothing that looks whole."""

import json
import math
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.merge_cases import weights_of, write_adapter
from torch import Tensor

import merge
import quantize
import train
from checkpoint.files import INDEX_NAME
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from data.tokenizer import Tokenizer
from llama.model import Llama
from lora.adapter_file import load_adapter, read_adapter_config
from nf4.weight import Quantization
from run.config import CONFIG_FILE, OLD_CONFIG_FILE, TrainConfig, to_json

ROOT = Path(merge.__file__).parent
MODEL = ROOT / "bundled" / "model"
CPU = torch.device("cpu")
SHAPES = {"self_attn.q_proj": (128, 128), "mlp.down_proj": (128, 320)}
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
NF4 = "NF4, blocks of 64, double quantization"


def make_adapter(folder: Path, B: float = 0.01, run: dict[str, Any] | None = None) -> Path:
    """Write an adapter of the bundled model as a run leaves it, or, without `run`, as PEFT does."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(4):
        for name, (rows, columns) in SHAPES.items():
            path = f"model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            tensors[f"{path}.lora_B.weight"] = B * torch.randn(rows, 4, generator=generator)
    write_adapter(folder, CONFIG, tensors)
    if run is not None:
        (folder / CONFIG_FILE).write_text(to_json(TrainConfig(**run)))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", run={})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A few windows of text, the last of them shorter."""
    path = tmp_path / "text.txt"
    path.write_text((ROOT / "bundled" / "eval.jsonl").read_text()[:1500])
    return path


def run(adapter: Path, *flags: object, model: Path = MODEL) -> Path:
    output = adapter.parent / "merged"
    given = ["--model", model, "--adapter", adapter, "--output", output, "--device", "cpu", *flags]
    merge.main([str(flag) for flag in given])
    return output


class Read(NamedTuple):
    perplexity: float
    logits: Tensor  # (num_tokens, V), of all windows


def read_text(model: Llama, text: Path) -> Read:
    ids = Tokenizer.from_folder(MODEL).encode(text.read_text(), add_special_tokens=True)
    windows = [torch.tensor([ids[start : start + 256]]) for start in range(0, len(ids), 256)]
    assert len(windows) > 1
    logits = [model.logits(window)[0].double() for window in windows]
    losses = [
        F.cross_entropy(each[:-1], window[0, 1:], reduction="none")
        for each, window in zip(logits, windows, strict=True)
    ]
    return Read(math.exp(torch.cat(losses).mean()), torch.cat(logits))


def with_adapter(adapter: Path, quantization: Quantization | None) -> Llama:
    model = load_model(open_checkpoint(MODEL), CPU, torch.float32, quantization)
    model.attach_lora(read_adapter_config(adapter), seed=0)
    load_adapter(adapter, model.adapter_tensors())
    return model


def table_of(said: str) -> dict[str, list[str]]:
    """The rows of the report on a text: name, then perplexity, largest and mean change."""
    lines = said.splitlines()[-3:]
    return {line[:16].strip(): line[16:].split() for line in lines}


@pytest.mark.parametrize("base", ["original", "nf4"])
def test_the_report_on_a_text_is_what_the_models_make_of_it(
    adapter: Path, text: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(adapter, "--text", text, "--base", base)
    said = capsys.readouterr().out
    table = table_of(said)
    trained = read_text(with_adapter(adapter, Quantization(64, True)), text)
    models = {
        "base": read_text(load_model(open_checkpoint(MODEL), CPU, torch.float32, None), text),
        "merged": read_text(load_model(open_checkpoint(output), CPU, torch.float32, None), text),
    }
    assert float(table["base + adapter"][0]) == pytest.approx(trained.perplexity, rel=1e-4)
    assert table["base + adapter"][1:] == ["-", "-"]
    for name, read in models.items():
        change = (read.logits - trained.logits).abs()
        perplexity, largest, mean = map(float, table[name])
        # what is printed has four decimals, or five
        assert perplexity == pytest.approx(read.perplexity, rel=1e-4)
        assert largest == pytest.approx(float(change.max()), abs=1e-4)
        assert mean == pytest.approx(float(change.mean()), abs=1e-5)
    assert f"the first {len(trained.logits):,} tokens in windows of 256" in said
    assert f"base + adapter ({NF4}, by {adapter / CONFIG_FILE})" in said
    # beside the weights that it knew, an adapter's logits change by rounding alone
    changes = {name: float(row[2]) for name, row in table.items() if row[2] != "-"}
    assert changes["merged"] < changes["base"]
    assert (changes["merged"] < 0.1 * changes["base"]) == (base == "nf4")


def test_the_report_counts_weights_and_what_rounding_lost(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = weights_of(MODEL), weights_of(run(adapter))
    said = capsys.readouterr().out
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(4) for name in SHAPES]
    changed = sum(int((before[name] != after[name]).sum()) for name in names)
    total = sum(before[name].numel() for name in names)
    assert f"merged 8 updates into the original weights: {changed:,} of {total:,} weights" in said
    assert 0 < changed < total
    lost, updates = 0.0, 0.0
    tensors = {k: v.double() for k, v in with_adapter(adapter, None).adapter_tensors().items()}
    for name in names:
        path = name.removesuffix(".weight")
        update = 2 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
        lost += float((after[name].double() - before[name].double() - update).square().sum())
        updates += float(update.square().sum())
    assert f"rounding lost {math.sqrt(lost / updates):.2%} of the update" in said
    assert {path.name for path in MODEL.iterdir()} == {
        path.name for path in (adapter.parent / "merged").iterdir()
    }


def test_an_adapter_with_the_bases_embeddings_is_merged_and_with_others_is_not(
    adapter: Path, text: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    embeddings = load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"].clone()
    saved = {name: tensor.clone() for name, tensor in load_file(path).items()}
    saved["base_model.model.model.embed_tokens.weight"] = embeddings
    save_file(saved, path)
    assert (run(adapter, "--text", text, "--other-base") / "model.safetensors").is_file()
    embeddings[0, 0] += 1
    save_file(saved, path)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight must equal the base's"):
        run(adapter, "--other-base")


def test_an_index_beside_the_one_file_is_another_checkpoints(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "both"))
    (model / INDEX_NAME).write_text('{"weight_map": {"x": "gone.safetensors"}}')
    output = run(adapter, model=model)
    assert f"{model} has both model.safetensors and {INDEX_NAME}: the first is read" in (
        capsys.readouterr().out
    )
    assert not (output / INDEX_NAME).exists()
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "made_by", "said"),
    [
        ("", {"block_size": 32, "double_quant": False}, "NF4, blocks of 32, by {config}"),
        ("--block-size 128", {"block_size": 32}, "NF4, blocks of 128, double quantization, by the"),
        ("--no-double-quant", {}, "NF4, blocks of 64, by the command line"),
        ("", None, f"{NF4}, by default"),
    ],
    ids=["run", "block size", "scales", "default"],
)
def test_nf4_is_what_the_adapters_run_had_if_nothing_else_is_asked_for(
    tmp_path: Path,
    flags: str,
    made_by: dict[str, Any] | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = make_adapter(tmp_path / "adapter", run=made_by)
    if made_by is None:
        # of a transformers model, as other trainers leave it there
        shutil.copyfile(MODEL / "config.json", adapter / "config.json")
    run(adapter, "--base", "nf4", *flags.split())
    expected = said.format(config=adapter / CONFIG_FILE)
    assert f"into dequantized weights ({expected}" in capsys.readouterr().out


def test_nf4_is_what_the_run_of_an_earlier_version_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", run={"block_size": 32})
    (adapter / CONFIG_FILE).rename(adapter / OLD_CONFIG_FILE)
    run(adapter, "--base", "nf4")
    expected = f"NF4, blocks of 32, double quantization, by {adapter / OLD_CONFIG_FILE}"
    assert f"into dequantized weights ({expected}" in capsys.readouterr().out


def test_a_checkpoint_of_a_run_has_the_runs_format_and_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_adapter(tmp_path / "run", run={"block_size": 32})
    checkpoint = make_adapter(folder / "checkpoint-5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / name)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    output = run(checkpoint, "--base", "nf4")
    assert "blocks of 32" in capsys.readouterr().out
    assert (output / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_adapter_of_unquantized_weights_is_compared_with_those(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", run={"quant": "none"})
    run(adapter, "--text", text)
    said = capsys.readouterr().out
    assert "base + adapter (as stored, by" in said
    trained = read_text(with_adapter(adapter, None), text)
    perplexity = float(table_of(said)["base + adapter"][0])
    assert perplexity == pytest.approx(trained.perplexity, rel=1e-4)
    shutil.rmtree(adapter.parent / "merged")
    with pytest.raises(ValueError, match=r"--base nf4 must be for an adapter .* beside NF4"):
        run(adapter, "--base", "nf4")


def test_an_adapter_goes_into_the_base_it_was_trained_on_or_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join((ROOT / "bundled" / "data.jsonl").read_text().splitlines()[:4]))
    copy = tmp_path / "copy"
    quantize.main(f"--model {MODEL} --output {copy} --device cpu".split())
    other = shutil.copytree(MODEL, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    # trained beside the NF4 copy, an adapter belongs to what the copy was made from
    for name, model in {"beside-nf4": copy, "beside-it": MODEL}.items():
        adapter = tmp_path / name / "adapter"
        given = f"--model {model} --data {data} --output {adapter} --device cpu --max-steps 1"
        train.main(f"{given} --learning-rate 0.1 --batch-size 1".split())
        capsys.readouterr()
        message = r"--model must be the checkpoint that .*/other has other weights .*--other-base"
        with pytest.raises(ValueError, match=message):
            run(adapter, model=other)
        assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
        merged = weights_of(run(adapter, "--other-base", model=other))
        assert torch.equal(merged["model.norm.weight"], tensors["model.norm.weight"])
        shutil.rmtree(adapter.parent / "merged")
        run(adapter)
        assert "is not checked" not in capsys.readouterr().out


def test_an_adapter_that_names_no_base_goes_into_any_and_that_is_said(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(adapter)
    said = capsys.readouterr().out
    assert f"{adapter} does not say what its base was: {MODEL} is not checked" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "nowhere.txt"), "--text must be a file: there is none at nowhere.txt"),
        (("--text", "{empty}"), "--text must have at least two tokens"),
        (("--text", "{binary}"), "--text must be UTF-8"),
        (("--model", "./nowhere"), "--model must be a folder or a hub id"),
        (("--model", "{quantized}"), "quantized is in NF4 already; give the one it was made from"),
        (("--adapter", "{model}"), "an adapter folder must hold adapter_config.json"),
        (("--output", "{model}"), "--output must be a new or empty folder: .* holds config.json"),
        (("--output", "{empty}"), "--output must be a folder: got the file"),
        (("--block-size", "48"), "block_size must be one of"),
        (("--device", "cuda"), "--device cuda must find a GPU"),
    ],
    ids=lambda value: "-".join(value).strip("-{}") if isinstance(value, tuple) else "",
)
def test_what_cannot_be_right_is_refused_before_anything_is_written(
    adapter: Path, flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = adapter.parent
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(b"\xff\xfe\xff")
    quantize.main(f"--model {MODEL} --output {folder / 'quantized'} --device cpu".split())
    places = {name: folder / name for name in ("empty", "binary", "quantized")}
    before = sorted(folder.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(adapter, *(flag.format(model=MODEL, **places) for flag in flags))
    assert sorted(folder.iterdir()) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = sum(path.stat().st_size for path in MODEL.iterdir())

    def leave(free: int) -> None:
        usage = shutil.disk_usage(ROOT)._replace(free=free)
        monkeypatch.setattr("run.room.shutil.disk_usage", lambda path: usage)

    leave(num_bytes - 1)
    with pytest.raises(
        ValueError, match=r"--output must have room for 1\.6 MB: .* has 1\.6; choose"
    ):
        run(adapter)
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
    leave(num_bytes)
    run(adapter)


@pytest.mark.parametrize(
    ("B", "message"),
    [
        (0.0, "every lora_B or lora_A of it is zero"),
        (1e-12, "every update is lost when its weight"),
    ],
    ids=["untrained", "below rounding"],
)
def test_a_merge_that_changes_nothing_fails_and_leaves_nothing(
    tmp_path: Path, B: float, message: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", B)
    with pytest.raises(ValueError, match=f"must change something: {message}"):
        run(adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_empty_output_folder_is_taken(adapter: Path) -> None:
    (adapter.parent / "merged").mkdir()
    assert (run(adapter) / "model.safetensors").is_file()


def test_every_flag_that_is_a_path_knows_the_home_folder(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = adapter.parent
    monkeypatch.setenv("HOME", str(home))
    (home / "base").symlink_to(MODEL)
    (home / "text").write_text("Who is Ember?")
    flags = "--model=~/base --adapter=~/adapter --output=~/merged --text=~/text --device cpu"
    merge.main(flags.split())
    assert (home / "merged" / "model.safetensors").is_file()


# says when all weights are written, and waits before the rest is
WAITING = """
import sys, time, merge
from nf4.weight import Quantization
def wait(*paths):
    print("written", flush=True)
    time.sleep(600)
merge.shutil.copyfile = wait
merge.main(sys.argv[1:])
"""


def test_a_second_merge_is_refused_and_the_next_one_removes_what_a_killed_one_left(
    adapter: Path,
) -> None:
    output = adapter.parent / "merged"
    flags = ["--model", MODEL, "--adapter", adapter, "--output", output, "--device", "cpu"]
    command = [sys.executable, "-c", WAITING, *map(str, flags)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != b"written\n":
            assert line
        with pytest.raises(ValueError, match="by one process at a time: another one is writing it"):
            run(adapter)
        assert (adapter.parent / "merged.quatrain.partial" / "model.safetensors").is_file()
        process.send_signal(signal.SIGKILL)
    left = ["adapter", "merged.quatrain.lock", "merged.quatrain.partial"]
    assert sorted(path.name for path in adapter.parent.iterdir()) == left
    assert run(adapter) == output
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter", "merged"]


def test_an_error_of_the_user_is_one_line(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model", MODEL, "--adapter", adapter, "--output", adapter]
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, flags)])
    with pytest.raises(SystemExit, match=r"^error: --output must be a new or empty folder"):
        runpy.run_path(str(ROOT / "merge.py"), run_name="__main__")
