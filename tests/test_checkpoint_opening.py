"""checkpoint/opening.py: a start reads config.json and each header once; files stay as opened."""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from support.tiny_llama import FIELDS, random_tensors, write_checkpoint
from test_merge import make_adapter

import checkpoint.shard_reader
import merge
import quantize
import train
from checkpoint.files import INDEX_NAME
from checkpoint.loading import load_model
from checkpoint.merged_copy import write_merged_shards
from checkpoint.opening import Checkpoint, open_checkpoint
from checkpoint.quantized_copy import plan_quantized_copy, write_quantized_copy
from nf4.weight import Quantization
from prepare.job import BUNDLED

CPU = torch.device("cpu")
NF4 = Quantization(64, True)
SHARDS = ("model-1.safetensors", "model-2.safetensors")

# set while a test counts: an audit hook stays for the rest of the process
_opened: Counter[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        _opened[os.fspath(arguments[0])] += 1
    # a file that is copied as it is was not read
    if _opened is not None and event == "shutil.copyfile":
        _opened[os.fspath(arguments[0])] -= 1


sys.addaudithook(_note)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model in two shards."""
    folder = shutil.copytree(BUNDLED / "model", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = dict(zip(SHARDS, (sorted(tensors)[::2], sorted(tensors)[1::2]), strict=True))
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, names in parts.items() for name in names}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count how often each file is opened to be read, and how often a shard's header is parsed, by
    us as `header PATH` and by safetensors as `safetensors PATH`."""
    global _opened
    counts: Counter[str] = Counter()
    parse, safe_open = checkpoint.shard_reader.parse_json, safetensors.safe_open

    def counted_parse(text: bytes, what: str, advice: str = "") -> Any:
        counts[f"header {what.partition(' must ')[0]}"] += 1
        return parse(text, what, advice)

    def counted_open(path: Path, *arguments: Any, **options: Any) -> Any:
        counts[f"safetensors {path}"] += 1
        return safe_open(path, *arguments, **options)

    monkeypatch.setattr(checkpoint.shard_reader, "parse_json", counted_parse)
    for module in list(sys.modules.values()):
        if getattr(module, "safe_open", None) is safe_open:
            monkeypatch.setattr(module, "safe_open", counted_open)
    _opened = counts
    yield counts
    _opened = None


def assert_read_once(folder: Path, reads: Counter[str]) -> None:
    names = ("config.json", "generation_config.json", INDEX_NAME)
    expected = {str(folder / name): 1 for name in names if (folder / name).is_file()}
    expected |= {f"{kind} {folder / f}": 1 for kind in ("header", "safetensors") for f in SHARDS}
    assert {what: reads[what] for what in expected} == expected


def begin_training(folder: Path, output: Path, more: str = "") -> None:
    data = output.with_suffix(".jsonl")
    data.write_text("".join((BUNDLED / "eval.jsonl").read_text().splitlines(keepends=True)[:2]))
    few = f"--device cpu --max-steps 1 --batch-size 1 --output {output} --lora-r 2 {more}"
    train.main(f"--model {folder} --data {data} --eval-data {data} {few}".split())


def test_training_reads_each_header_once(tmp_path: Path, model: Path, reads: Counter[str]) -> None:
    begin_training(model, tmp_path / "out")
    assert_read_once(model, reads)
    # an adapter to begin with is held against the vocabulary
    reads.clear()
    begin_training(model, tmp_path / "again", f"--init-adapter {tmp_path / 'out'}")
    assert_read_once(model, reads)


def test_training_a_checkpoint_in_nf4_reads_each_header_once(
    tmp_path: Path, model: Path, reads: Counter[str]
) -> None:
    copy = tmp_path / "copy"
    quantize.main(f"--model {model} --output {copy} --device cpu".split())
    reads.clear()
    begin_training(copy, tmp_path / "out")
    path = copy / "model.safetensors"
    for what in (copy / "config.json", f"header {path}", f"safetensors {path}"):
        assert reads[str(what)] == 1, what


def test_quantizing_reads_each_header_once(
    tmp_path: Path, model: Path, reads: Counter[str]
) -> None:
    quantize.main(f"--model {model} --output {tmp_path / 'out'} --device cpu".split())
    assert_read_once(model, reads)


@pytest.mark.parametrize("base", ["original", "nf4"])
def test_merging_reads_each_header_once(
    tmp_path: Path, model: Path, base: str, reads: Counter[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((BUNDLED / "eval.jsonl").read_text()[:300])
    adapter = make_adapter(tmp_path / "adapter", run={})
    given = f"--model {model} --adapter {adapter} --output {tmp_path / 'out'} --base {base}"
    merge.main(f"{given} --device cpu --text {text}".split())
    assert_read_once(model, reads)


def load(opened: Checkpoint, folder: Path) -> None:
    load_model(opened, CPU, torch.float32, NF4)


def write_quantized(opened: Checkpoint, folder: Path) -> None:
    plan = plan_quantized_copy(opened, NF4, None)
    write_quantized_copy(plan, folder, CPU, lambda done, total: None)


def write_merged(opened: Checkpoint, folder: Path) -> None:
    write_merged_shards(opened.shards, {}, {}, None, CPU, folder)


def replace(path: Path) -> None:
    """Put another checkpoint's file of the same size in a file's place."""
    time = path.stat().st_mtime_ns + 1
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(time, time))


def shorten(path: Path) -> None:
    time = path.stat().st_mtime_ns
    os.truncate(path, path.stat().st_size - 4)
    os.utime(path, ns=(time, time))


@pytest.mark.parametrize("change", [replace, shorten])
@pytest.mark.parametrize("use", [load, write_quantized, write_merged])
def test_files_that_change_after_they_were_opened_are_refused(
    tmp_path: Path, use: Callable[[Checkpoint, Path], None], change: Callable[[Path], None]
) -> None:
    folder = write_checkpoint(tmp_path / "model", FIELDS, random_tensors(FIELDS), num_shards=2)
    opened = open_checkpoint(folder)
    last = opened.shards[-1].path
    change(last)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=f"^{last} must not change while it is in use"):
        use(opened, tmp_path / "out")


def test_a_dropout_of_the_base_is_named_and_not_applied(tmp_path: Path) -> None:
    tensors = random_tensors(FIELDS, torch.float32)
    plain = open_checkpoint(write_checkpoint(tmp_path / "plain", FIELDS, tensors))
    fields = FIELDS | {"attention_dropout": 0.1, "resid_pdrop": 0.0}
    dropped = open_checkpoint(write_checkpoint(tmp_path / "dropped", fields, tensors))
    assert plain.remarks == []
    (remark,) = dropped.remarks
    assert "has attention_dropout 0.1: it is not applied" in remark
    ids = torch.arange(8)[None]
    logits = [load_model(each, CPU, torch.float32, None).logits(ids) for each in (plain, dropped)]
    assert torch.equal(*logits)
