"""merging/ and checkpoint/adapter_base.py: a merge from an adapter alone, the files that come
along, the report on data, and --gguf."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from gguf import GGUFReader, GGUFWriter, dequantize
from safetensors.torch import save_file
from support.hub_server import Repository, files_of, serving
from support.merge_cases import weights_of, write_adapter

import merge
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from data.dataset import load_dataset
from data.tokenizer import Tokenizer
from run.config import CONFIG_FILE, TrainConfig, to_json

MODEL = ROOT / "bundled" / "model"
CPU = torch.device("cpu")
# forms of the tokenizer that only other programs read
OTHER_FORMS = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def make_adapter(folder: Path, base: object = MODEL, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(4, 128, generator=generator)
    B = 0.1 * torch.randn(128, 4, generator=generator)
    path = "model.layers.0.self_attn.q_proj"
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    tensors = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    write_adapter(folder, fields | config, tensors, str(base))
    return folder


def run(adapter: Path, *flags: object) -> Path:
    output = adapter.parent / "merged"
    given = ["--adapter", adapter, "--output", output, "--device", "cpu", *flags]
    merge.main([str(flag) for flag in given])
    return output


def test_the_base_is_what_the_adapter_says_and_model_overrides_it(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    merged = weights_of(run(adapter))
    shutil.rmtree(tmp_path / "merged")
    other = make_adapter(tmp_path / "other", base="/gone")
    again = weights_of(run(other, "--model", MODEL))
    assert merged.keys() == again.keys()
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    changed = [n for n, w in weights_of(MODEL).items() if not torch.equal(w, merged[n])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"base_model_name_or_path": "/gone"},
            FileNotFoundError,
            r"the base of .*adapter must be a folder or a hub id .*: got '/gone'; or give the base "
            "with --model",
        ),
        (
            {"base_model_name_or_path": None},
            ValueError,
            "--model must be given: .*adapter does not say which model it was trained on",
        ),
        ({"base_model_name_or_path": 3}, ValueError, "base_model_name_or_path must be a text"),
        ({"revision": ["v1"]}, ValueError, "revision must be a text"),
    ],
    ids=["gone", "none", "a number", "a list"],
)
def test_a_base_that_is_not_there_is_named(
    tmp_path: Path, fields: dict[str, Any], kind: type[Exception], message: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(kind, match=message):
        run(adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_on_the_hub_comes_in_its_revision_with_all_forms_of_its_tokenizer(
    tmp_path: Path,
) -> None:
    files = files_of(MODEL) | {name: name.encode() for name in OTHER_FORMS}
    files |= {"pytorch_model.bin": b"", "original/weights.pth": b"", "README.md": b""}
    adapter = make_adapter(tmp_path / "adapter", "owner/base", revision="v1")
    flags = ["merge.py", "--adapter", str(adapter), "--device", "cpu", "--output"]
    base, elsewhere = Repository(files, branches=("v1",)), Repository(files)
    with serving(models__owner__base=base) as hub:
        done = hub.run([*flags, str(tmp_path / "merged")], tmp_path)
    assert done.returncode == 0, done.stderr
    written = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    assert written.keys() == {*files_of(MODEL), *OTHER_FORMS}
    assert all(written[name] == name.encode() for name in OTHER_FORMS)
    with serving(models__owner__base=elsewhere) as hub:
        done = hub.run([*flags, str(tmp_path / "again")], tmp_path / "home")
    assert done.stderr.startswith(f"error: the base of {adapter}: owner/base must have the revisi")
    assert "or give the base with --model" in done.stderr
    with serving(models__owner__base=Repository(files, ("v1",), is_gated=True)) as hub:
        done = hub.run([*flags, str(tmp_path / "again")], tmp_path / "home")
    assert f"error: the base of {adapter}: owner/base@v1 is gated: accept its" in done.stderr
    assert not (tmp_path / "again").exists()


def test_tokenizer_and_template_are_the_runs_and_the_other_forms_the_models(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    for name in (*OTHER_FORMS, "chat_template.jinja", "special_tokens_map.json"):
        (model / name).write_text(f'"{name}"')
    folder = make_adapter(tmp_path / "run", model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    output = run(folder)
    for name in (*OTHER_FORMS, "generation_config.json", "config.json"):
        assert (output / name).read_bytes() == (model / name).read_bytes(), name
    # the run's tokenizer has neither
    assert not (output / "chat_template.jinja").exists()
    assert not (output / "special_tokens_map.json").exists()
    assert (output / "additional_chat_templates" / "rag.jinja").read_text() == "{{ documents }}"


@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_data_are_read_as_the_run_read_its_own(
    tmp_path: Path, train_on: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join((ROOT / "bundled" / "eval.jsonl").read_text().splitlines()[:3]))
    adapter = make_adapter(tmp_path / "adapter")
    own = {"eval_fraction": 0.5, "subset": "main", "split": "train_sft"}
    settings = TrainConfig(quant="none", train_on=train_on, max_length=60, **own)
    (adapter / CONFIG_FILE).write_text(to_json(settings))
    run(adapter, "--data", data)
    said = capsys.readouterr().out
    samples = load_dataset(
        [data],
        Tokenizer.from_folder(MODEL),
        max_length=60,
        train_on=train_on,
        vocab_size=768,
    ).samples
    model = load_model(open_checkpoint(MODEL), CPU, torch.float32, None)
    losses, num_tokens = [], 0
    for sample in samples:
        num_tokens += len(sample.input_ids)
        logits = model.logits(torch.tensor([sample.input_ids]))[0].double().log_softmax(-1)
        losses += [
            -float(logits[i - 1, label])
            for i, label in enumerate(sample.labels)
            if i and label != -100
        ]
    perplexity = math.exp(sum(losses) / len(losses))
    row = next(line for line in said.splitlines() if line.startswith("base  "))
    assert float(row.split()[1]) == pytest.approx(perplexity, rel=1e-4)
    assert f"{data}, the first 3 samples with {num_tokens:,} tokens; perplexity of the" in said


def test_text_and_data_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    with pytest.raises(SystemExit):
        run(adapter, "--text", "x", "--data", "y")
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_gguf_file_and_a_modelfile_lie_in_the_merged_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(make_adapter(tmp_path / "adapter"), "--gguf", "bf16")
    said = capsys.readouterr().out
    assert f"ollama create NAME -f {output / 'Modelfile'}" in said
    tensors = {t.name: t for t in GGUFReader(output / "model-bf16.gguf").tensors}
    merged = weights_of(output)
    for name in ("v_proj", "o_proj"):
        target = {"v_proj": "blk.0.attn_v.weight", "o_proj": "blk.0.attn_output.weight"}[name]
        expected = merged[f"model.layers.0.self_attn.{name}.weight"].float()
        data = tensors[target]
        assert torch.equal(torch.from_numpy(dequantize(data.data, data.tensor_type)), expected)
    # the update is in it: rows of both halves of each head in turn
    q = merged["model.layers.0.self_attn.q_proj.weight"].float()
    assert not torch.equal(q, weights_of(MODEL)["model.layers.0.self_attn.q_proj.weight"].float())
    expected = q.view(4, 2, 16, 128).transpose(1, 2).reshape(128, 128)
    data = tensors["blk.0.attn_q.weight"]
    assert torch.equal(torch.from_numpy(dequantize(data.data, data.tensor_type)), expected)
    text = (output / "Modelfile").read_text()
    assert text.startswith('FROM ./model-bf16.gguf\nTEMPLATE """')
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    names = {path.name for path in output.iterdir()}
    assert names == {*files_of(MODEL), "model-bf16.gguf", "Modelfile"}


def test_a_template_without_turns_is_left_to_ollama_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    text = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(text)
    output = run(make_adapter(tmp_path / "adapter", model), "--gguf", "q8_0", "--other-base")
    assert "Modelfile has no TEMPLATE, because the chat template is not made of" in (
        capsys.readouterr().out
    )
    written = (output / "Modelfile").read_text()
    assert written == 'FROM ./model-q8_0.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_gguf_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    output = tmp_path / "merged"
    output.mkdir()
    (output / "model-f16.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"new or empty folder: .* holds model-f16\.gguf"):
        run(adapter, "--gguf", "f16")
    assert (output / "model-f16.gguf").read_bytes() == b"GGUF"
    shutil.rmtree(output)
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="--gguf must be for a tokenizer that GGUF can hold"):
        run(adapter, "--gguf", "f16", "--model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_pytorch_tanh"}))
    with pytest.raises(ValueError, match="--gguf must compute what"):
        run(adapter, "--gguf", "f16", "--model", model)
    monkeypatch.setattr("export.gguf_file.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--gguf must find the gguf package"):
        run(adapter, "--gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_a_disk_must_have_room_for_the_gguf_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    num_bytes = sum(path.stat().st_size for path in MODEL.iterdir())
    usage = shutil.disk_usage(ROOT)._replace(free=num_bytes + 1_000_000)
    monkeypatch.setattr("run.room.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"--output must have room for 3\.2 MB"):
        run(adapter, "--gguf", "f16")
    run(adapter)


@pytest.mark.parametrize("fault", ["full", "overflow"])
def test_a_gguf_file_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    if fault == "overflow":
        tensors = weights_of(model)
        tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = 1e6
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        message, kind = r"layers\.3\.mlp\.up_proj\.weight must fit --gguf f16", ValueError
    else:
        written = GGUFWriter.write_tensor_data

        def write(self: GGUFWriter, tensor: Any) -> None:
            if len(self.tensors[0]) < 10:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written(self, tensor)

        monkeypatch.setattr(GGUFWriter, "write_tensor_data", write)
        message, kind = "No space left on device", OSError
    adapter = make_adapter(tmp_path / "adapter", model)
    with pytest.raises(kind, match=message):
        run(adapter, "--gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]
