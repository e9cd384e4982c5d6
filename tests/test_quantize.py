"""quantize.py: what it writes, how much it holds meanwhile, and what it refuses.

That bitsandbytes reads its weights is tested in test_checkpoint_stored_nf4.py.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.equality import assert_equal
from support.live_bytes import LiveBytes
from support.llama_peers import CPU
from support.micro_steps import NF4
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint, write_variant

import checkpoint.quantized_copy
import quantize
import train
from checkpoint.files import INDEX_NAME
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from checkpoint.quantized_copy import plan_quantized_copy, write_quantized_copy
from checkpoint.shard_writer import PlannedTensor, split_into_shards
from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight, Quantization
from prepare.job import BUNDLED
from prepare.quantization import follow_checkpoint, quantization_of
from run.config import CONFIG_FILE, make_config, read_given
from run.folder import new_output

MODEL = BUNDLED / "model"


def run(source: Path, output: Path, flags: str = "") -> Path:
    quantize.main(f"--model {source} --output {output} --device cpu {flags}".split())
    return output


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_copy_has_all_that_its_source_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(MODEL, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "special_tokens_map.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "notes.txt").write_text("not part of a checkpoint")
    output = run(source, tmp_path / "parent" / "copy")
    assert {path.name for path in output.parent.iterdir()} == {"copy"}
    rewritten = {"config.json", "model.safetensors"}
    assert files_of(output) == files_of(source) - {"notes.txt"}
    assert "additional_chat_templates/tools.jinja" in files_of(output)
    for name in files_of(output) - rewritten:
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    config = json.loads((output / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["quant_method"] == "bitsandbytes"
    assert quantization["bnb_4bit_compute_dtype"] == "bfloat16"
    # 28 matrices of 128 x 128 and the like; 4 + 8 / 64 bits and what lies beside each
    said = capsys.readouterr().out
    assert "quantized 688,128 weights of 28 matrices to NF4 in blocks of 64 with double" in said
    assert f"wrote {output}: 0.6 MB in 1 file from 1.6 MB" in said


def test_training_a_copy_is_training_its_source(tmp_path: Path) -> None:
    copy = run(MODEL, tmp_path / "copy", "--block-size 32 --no-double-quant")
    few = "--device cpu --batch-size 2 --gradient-accumulation-steps 1 --max-steps 3"
    data = f"--data {BUNDLED / 'eval.jsonl'}"
    flags = {"source": f"--model {MODEL} --block-size 32 --no-double-quant"}
    flags["copy"] = f"--model {copy}"
    losses, adapters = {}, {}
    for name, own in flags.items():
        output = tmp_path / f"{name}-out"
        train.main(f"{own} {data} --output {output} {few}".split())
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows]
        adapters[name] = load_file(output / "adapter_model.safetensors")
        settings = json.loads((output / CONFIG_FILE).read_text())
        assert (settings["block_size"], settings["double_quant"]) == Quantization(32, False), name
    assert losses["copy"] == losses["source"]
    for name, tensor in adapters["source"].items():
        assert_equal(adapters["copy"][name], tensor, name)


@pytest.mark.parametrize("variant", ["qwen3-moe", "mixtral"])
def test_each_expert_is_quantized_and_routers_are_not(
    tmp_path: Path, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_variant(tmp_path / "source", variant)
    copy = run(source, tmp_path / "copy")
    assert "transformers 5 does not load this copy" in capsys.readouterr().out
    opened = open_checkpoint(copy)
    names = load_file(copy / "model.safetensors").keys()
    half = "mlp" if variant == "qwen3-moe" else "block_sparse_moe"
    (down,) = {"qwen3-moe": ["down_proj"], "mixtral": ["w2"]}[variant]
    assert f"model.layers.1.{half}.experts.3.{down}.weight.absmax" in names
    skipped = opened.config_json["quantization_config"]["llm_int8_skip_modules"]
    routers = [name.removesuffix(".weight") for name in names if name.endswith(".gate.weight")]
    assert skipped == ["lm_head", *sorted(routers)]
    actual = load_model(opened, CPU, torch.float32, NF4)
    expected = load_model(open_checkpoint(source), CPU, torch.float32, NF4)
    ids = torch.arange(9)[None]
    assert_equal(actual.logits(ids), expected.logits(ids))


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    source = write_variant(tmp_path / "source", "granite-moe")
    with pytest.raises(ValueError, match=r"apart.*0\.block_sparse_moe\.input_linear\.weight has"):
        run(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--quant none", "--quant none"),
        ("--block-size 128", "--block-size 128 --double-quant"),
        ("--no-double-quant", "--block-size 64 --no-double-quant"),
    ],
)
def test_flags_that_contradict_a_copy_are_refused(tmp_path: Path, flags: str, said: str) -> None:
    copy = run(MODEL, tmp_path / "copy", "--block-size 32")
    data = BUNDLED / "eval.jsonl"
    with pytest.raises(ValueError, match=r"must be those of a checkpoint .* --block-size 32") as e:
        train.main(f"--model {copy} --data {data} --output {tmp_path / 'out'} {flags}".split())
    # a flag at its default is not asked for
    assert f"the flags say {said}; leave them out" in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--block-size 32", "--block-size 64", "--double-quant", ""])
def test_flags_that_agree_with_a_copy_are_accepted(tmp_path: Path, flags: str) -> None:
    copy = run(MODEL, tmp_path / "copy", "--block-size 32")
    config = make_config(read_given(f"--model {copy} --data x {flags}".split()), {})
    config = follow_checkpoint(config, open_checkpoint(copy))
    assert quantization_of(config) == Quantization(32, True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_that_of_what_is_not_quantized(tmp_path: Path, dtype: str) -> None:
    source = write_variant(tmp_path / "source", "biases", torch.float32)
    copy = run(source, tmp_path / "copy", f"--dtype {dtype}")
    config = json.loads((copy / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == dtype
    model = load_model(open_checkpoint(copy), CPU, getattr(torch, dtype), NF4)
    expected = load_model(open_checkpoint(source), CPU, torch.float32, NF4)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert_equal(ours.detach(), theirs.detach().to(getattr(torch, dtype)), name)
    for (prefix, ours), (_, theirs) in zip(model.groups(), expected.groups(), strict=True):
        assert isinstance(ours.weight, NF4Weight)
        assert isinstance(theirs.weight, NF4Weight)
        # quantized from what is stored, not from what is rounded
        assert_equal(ours.weight.packed, theirs.weight.packed, prefix)
        assert ours.bias is not None
        assert ours.bias.dtype == getattr(torch, dtype)


def test_a_large_copy_is_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoint.quantized_copy,
        "split_into_shards",
        lambda units: split_into_shards(units, 30_000),
    )
    source = write_checkpoint(tmp_path / "source", FIELDS, random_tensors(FIELDS), num_shards=3)
    copy = run(source, tmp_path / "copy")
    shards = list(copy.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert (copy / INDEX_NAME).is_file()
    assert open_checkpoint(copy).quantization == NF4
    ours = load_model(open_checkpoint(copy), CPU, torch.float32, NF4).logits(torch.arange(9)[None])
    theirs = load_model(open_checkpoint(source), CPU, torch.float32, NF4).logits(
        torch.arange(9)[None]
    )
    assert_equal(ours, theirs)


def test_writing_holds_a_tensor_at_a_time(tmp_path: Path) -> None:
    size = 128
    fields = FIELDS | {
        "vocab_size": size,
        "hidden_size": size,
        "intermediate_size": size,
        "num_hidden_layers": 12,
        "num_key_value_heads": 4,
    }
    source = write_checkpoint(tmp_path / "a", fields, random_tensors(fields, torch.bfloat16))
    copy = plan_quantized_copy(open_checkpoint(source), NF4, None)
    (tmp_path / "b").mkdir()
    with LiveBytes() as live:
        write_quantized_copy(copy, tmp_path / "b", CPU, lambda done, total: None)
    # as when it is loaded: the tensor mapped, one before it still, the quantizer's float32 and
    # int32 copies of it, and what is stored of it and of the one before
    one_tensor = size * size * (2 + 2 + 5 * 4 + 1) + 2 * (size * size + 2000)
    assert 0 < live.peak <= one_tensor
    assert one_tensor < copy.num_bytes


def not_finite(folder: Path) -> None:
    tensors = random_tensors(FIELDS)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = torch.nan
    write_checkpoint(folder, FIELDS, tensors)


def too_large_for_float16(folder: Path) -> None:
    tensors = random_tensors(FIELDS)
    tensors["model.norm.weight"][3] = 1e6
    write_checkpoint(folder, FIELDS, tensors)


def tied_to_another_head(folder: Path) -> None:
    fields = FIELDS | VARIANTS["tied"]
    tensors = random_tensors(fields)
    write_checkpoint(folder, fields, tensors | {"lm_head.weight": torch.ones(96, 32)})


REFUSED = {
    "not-finite": (not_finite, "", r"down_proj\.weight must hold finite weights only: 1 of"),
    "overflow": (too_large_for_float16, "--dtype float16", r"model\.norm\.weight must fit the"),
    "tied": (tied_to_another_head, "", r"lm_head\.weight must equal model\.embed_tokens\.weight"),
    "block-size": (lambda folder: write_variant(folder, "tied"), "--block-size 48", "must be one"),
    "no-model": (lambda folder: None, "", "--model must be a folder or a hub id"),
    "quantized": (lambda folder: run(MODEL, folder), "", "is in NF4 already; give the original"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    make, flags, message = REFUSED[name]
    make(tmp_path / "source")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "source", tmp_path / "copy", flags)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_a_source_that_is_cut_while_it_is_read_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_variant(tmp_path / "source", "grouped-query")
    copy = plan_quantized_copy(open_checkpoint(source), NF4, None)

    def cut(done: int, total: int) -> None:
        os.truncate(source / "model.safetensors", 1 << 14)

    with (
        pytest.raises(ValueError, match="it was truncated while it was read, download it again"),
        new_output(tmp_path / "copy") as partial,
    ):
        write_quantized_copy(copy, partial, CPU, cut)
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_with_anything_in_it_is_not_written_to(tmp_path: Path) -> None:
    output = tmp_path / "copy"
    output.mkdir()
    run(MODEL, output)
    before = (output / "model.safetensors").stat().st_mtime_ns
    for taken in (output, output / "config.json", MODEL):
        with pytest.raises(
            ValueError, match=r"--output must be a (new or empty folder|folder: got)"
        ):
            run(MODEL, taken)
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_a_copy_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    with new_output(tmp_path / "copy") as folder:
        (folder / "half").write_text("x")
        with pytest.raises(ValueError, match="by one process at a time: another one is writing it"):
            run(MODEL, tmp_path / "copy")
        assert (folder / "half").is_file()


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    monkeypatch.setattr(quantize, "write_quantized_copy", lambda *_: pytest.fail("too late"))
    with pytest.raises(
        ValueError, match=r"--output must have room for 6[78]\.\d MB: .* has 1\.0; choose"
    ):
        run(MODEL, tmp_path / "copy")
    assert not any(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda must find a GPU"):
        quantize.choose_device("cuda")
    assert quantize.choose_device("auto") == "cpu"


def test_the_size_is_known_before_a_weight_is_read(tmp_path: Path) -> None:
    source = write_variant(tmp_path / "source", "qwen2", torch.bfloat16)
    plan = plan_quantized_copy(open_checkpoint(source), NF4, None)
    copy = run(source, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    assert plan.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {PlannedTensor(n, tuple(t.shape), t.dtype) for n, t in tensors.items()} == {
        tensor for shard in plan.shards for tensor in shard
    }
    stored = {name for name in tensors if "_proj.weight" in name}
    assert plan.num_weight_bytes == sum(tensors[name].nbytes for name in stored)


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_quantizes_as_it_does_while_it_loads(
    tmp_path: Path, dtype: torch.dtype, double_quant: bool
) -> None:
    fields = FIELDS | {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 512}
    source = write_checkpoint(tmp_path / "source", fields, random_tensors(fields, dtype))
    flags = "--device cuda" + ("" if double_quant else " --no-double-quant")
    copy = run(source, tmp_path / "copy", flags)
    cuda, quantization = torch.device("cuda"), Quantization(64, double_quant)
    expected = load_model(open_checkpoint(source), cuda, dtype, quantization)
    for device in (CPU, cuda):
        actual = load_model(open_checkpoint(copy), device, dtype, quantization)
        for (prefix, ours), (_, theirs) in zip(actual.groups(), expected.groups(), strict=True):
            assert isinstance(ours.weight, NF4Weight)
            assert isinstance(theirs.weight, NF4Weight)
            for part, tensor in buffers(theirs.weight).items():
                assert_equal(buffers(ours.weight)[part].cpu(), tensor.cpu(), f"{prefix}{part}")


@pytest.mark.gpu
def test_cuda_trains_a_copy_as_its_source(tmp_path: Path) -> None:
    copy = run(MODEL, tmp_path / "copy", "--device cuda")
    few = "--device cuda --deterministic --batch-size 2 --gradient-accumulation-steps 1"
    losses = {}
    for name, model in {"source": MODEL, "copy": copy}.items():
        output = tmp_path / f"{name}-out"
        data = f"--data {BUNDLED / 'eval.jsonl'} --max-steps 3"
        train.main(f"--model {model} {data} --output {output} {few}".split())
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows]
    assert losses["copy"] == losses["source"]


def buffers(weight: NF4Weight) -> dict[str, torch.Tensor]:
    scales = weight.absmax
    if isinstance(scales, QuantizedAbsmax):
        found = {"codes": scales.codes, "group_absmax": scales.group_absmax, "mean": scales.mean}
        return found | {"packed": weight.packed}
    return {"packed": weight.packed, "absmax": scales}
