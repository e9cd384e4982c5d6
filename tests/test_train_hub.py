"""train.py with nothing but hub ids, as a process, against a hub on 127.0.0.1; and what leaves for
the hub of a run with a base from the disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from support.hub_server import TOKEN, Repository, files_of, serving

import train

BUNDLED = ROOT / "bundled"
FEW = "--device cpu --batch-size 2 --gradient-accumulation-steps 1 --max-steps 2 --lora-r 4"


def test_model_and_data_come_from_the_hub_and_the_adapter_goes_there(tmp_path: Path) -> None:
    model = files_of(BUNDLED / "model") | {"pytorch_model.bin": b"", "original/weights.pth": b""}
    lines = (BUNDLED / "data.jsonl").read_bytes().splitlines()[:20:5]
    data = {"train.jsonl": b"\n".join(lines), "test.jsonl": b"{}", "README.md": b"a card"}
    output = tmp_path / "out"
    with serving(
        models__owner__base=Repository(model, branches=("main", "v1")),
        datasets__owner__verses=Repository(data, needs_token=True),
    ) as hub:
        ids = "--model owner/base@v1 --data owner/verses --push-to-hub owner/adapter"
        done = hub.run(
            ["train.py", *f"{ids} --output {output} {FEW}".split()], tmp_path, HF_TOKEN=TOKEN
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        pushed = hub.repositories["models/owner/adapter"]
        assert f"pushed the adapter: {hub.url}/owner/adapter/commit/{pushed.sha}" in done.stdout
        assert f"vllm serve owner/base --revision v1 --tokenizer {output} --" in done.stdout
        fetched = hub.downloads()
        of_data = ["README.md", "train.jsonl"]
        assert sorted(fetched) == sorted([*files_of(BUNDLED / "model"), *of_data])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= pushed.files.keys()
    # what the card names, and nothing else
    card = pushed.files["README.md"].decode()
    named = card.partition("The adapter's files are\n")[2].partition(" and this card")[0]
    assert sorted([*named.split(", "), "README.md"]) == sorted(pushed.files)
    assert hub.messages == ["LoRA of owner/base@v1 after 2 steps"]
    assert not (output / "hub").exists()
    for name, content in pushed.files.items():
        assert (output / name).read_bytes() == content, name
    # and back
    with serving(
        models__owner__base=Repository(model, branches=("main", "v1")),
        models__owner__adapter=Repository(pushed.files | {"checkpoint.bin": b""}),
        models__owner__old=Repository({"adapter_config.json": b"", "adapter_model.bin": b""}),
    ) as hub:
        code = "import sys; from lora.adapter_file import find_adapter as f; f(sys.argv[1], '')"
        done = hub.run(["-c", code, "owner/adapter"], tmp_path / "other")
        assert done.returncode == 0, done.stderr
        assert sorted(hub.downloads()) == ["adapter_config.json", "adapter_model.safetensors"]
        done = hub.run(["-c", code, "owner/old"], tmp_path / "other")
        assert "adapter_model.bin is pickled, which is never read" in done.stderr
    described = json.loads(pushed.files["adapter_config.json"])
    assert described["base_model_name_or_path"] == "owner/base"
    assert described["revision"] == "v1"
    assert b"\nbase_model: owner/base\n" in pushed.files["README.md"]
    for path in output.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_nothing_is_fetched_for_a_push_that_cannot_be(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with serving() as hub:
        flags = f"--push-to-hub owner/adapter --output {output} {FEW}"
        done = hub.run(["train.py", *flags.split()], tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: --push-to-hub must find a token that may write")
        assert not output.exists()


QUOTES = "".join(
    json.dumps({"quote": f"Say {i} before {i + 1}.", "author": "Ember", "tags": ["numbers"]}) + "\n"
    for i in range(30)
)


def test_the_recipe_of_quotes_trains_from_a_hub_id_and_a_field(tmp_path: Path) -> None:
    quotes = {"quotes.jsonl": QUOTES.encode(), "README.md": b"# quotes", ".gitattributes": b""}
    output = tmp_path / "out"
    with serving(datasets__Abirate__english_quotes=Repository(quotes)) as hub:
        flags = f"--data Abirate/english_quotes --text-field quote --model {BUNDLED / 'model'}"
        flags += f" --eval-fraction 0.3 --output {output} {FEW}"
        done = hub.run(["train.py", *flags.split()], tmp_path)
        assert done.returncode == 0, done.stderr
        assert sorted(hub.downloads()) == ["README.md", "quotes.jsonl"]
    assert "[[Say 0 before 1." in done.stdout
    facts = json.loads((output / "data.json").read_bytes())
    assert facts["train"]["samples"] + facts["eval"]["samples"] == 30
    assert facts["train"]["format"] == "text"


# as that of HuggingFaceH4/ultrachat_200k
CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train_sft, path: data/train_sft-*}
  - {split: train_gen, path: data/train_gen-*}
  - {split: test_sft, path: data/test_sft-*}
  - {split: test_gen, path: data/test_gen-*}
---
# A card
"""


def test_a_data_set_of_parquet_files_is_read_split_by_split(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = {"README.md": CARD}
    for name, texts in {
        "train_sft-00000-of-00002": ["one", "two"],
        "train_sft-00001-of-00002": ["three"],
        "train_gen-00000-of-00001": ["five"],
        "test_sft-00000-of-00001": ["four"],
        "test_gen-00000-of-00001": ["six"],
    }.items():
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({"text": texts}), buffer)
        files[f"data/{name}.parquet"] = buffer.getvalue().to_pybytes()
    with serving(datasets__owner__name=Repository(files)) as hub:
        flags = "--data owner/name --eval-data owner/name --inspect 9 --device cpu"
        command = ["train.py", "--model", str(BUNDLED / "model"), *flags.split()]
        done = hub.run(command, tmp_path)
        assert "there are train_sft, train_gen; choose with --split train_sft" in done.stderr
        assert hub.downloads() == ["README.md"]
        # as TRL's users name it
        done = hub.run([*command, "--dataset_train_split", "train_sft"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert sorted(hub.downloads()) == sorted(name for name in files if "_gen" not in name)
    assert "--eval-data: split test_sft, reading " in done.stdout
    shown = [line.partition("[[")[2] for line in done.stdout.splitlines() if "[[" in line]
    texts = [text.partition("<")[0] for text in shown if not text.startswith("what is learned")]
    assert texts == ["one", "two", "three", "four"]


def train_and_push(
    monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path, *flags: str, refused: bool = False
) -> tuple[dict[str, bytes], str]:
    """Run with data that lies in a folder: what would be pushed, and the commit's message."""
    sent: list[tuple[dict[str, bytes], str]] = []

    def push(pushed: Path, repository: str, message: str) -> str:
        sent.append((files_of(pushed), message))
        if refused:
            raise ConnectionError("the hub refused")
        return "an address"

    monkeypatch.setattr("prepare.job.check_push", lambda repository: None)
    monkeypatch.setattr("training.results.push_folder", push)
    data = folder / "data.jsonl"
    shutil.copyfile(BUNDLED / "eval.jsonl", data)
    given = ["--model", str(model), "--data", str(data), "--output", str(folder / "out")]
    train.main([*given, "--push-to-hub", "owner/adapter", *FEW.split(), *flags])
    (found,) = sent
    return found


@pytest.fixture
def private_base(tmp_path: Path) -> Path:
    base = tmp_path / "private" / "my base"
    shutil.copytree(BUNDLED / "model", base)
    return base


@pytest.mark.draws
def test_no_path_of_the_disk_leaves_with_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_base: Path
) -> None:
    template = tmp_path / "mine.jinja"
    shutil.copyfile(ROOT / "data" / "chat" / "templates" / "chatml.jinja", template)
    monkeypatch.chdir(private_base.parent)
    flags = ("--eval-data", str(tmp_path / "data.jsonl"), "--chat-template", str(template))
    files, message = train_and_push(monkeypatch, tmp_path, Path("my base"), *flags)
    assert message == "LoRA of my base after 2 steps"
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
        assert b"private" not in content, name
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "my base"
    # but here PEFT finds the base from any folder, and Quatrain reads the rest as it is
    output = tmp_path / "out"
    kept = json.loads((output / "adapter_config.json").read_bytes())
    assert kept["base_model_name_or_path"] == str(private_base)
    assert kept | {"base_model_name_or_path": "my base"} == json.loads(files["adapter_config.json"])
    for name in files.keys() - {"adapter_config.json"}:
        assert (output / name).read_bytes() == files[name]


def test_a_base_that_lies_in_the_hubs_cache_leaves_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_base: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--owner--base" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    private_base.rename(snapshot)
    files, message = train_and_push(monkeypatch, tmp_path, snapshot)
    described = json.loads(files["adapter_config.json"])
    assert described["base_model_name_or_path"] == "owner/base"
    assert described["revision"] == "0123abcd"
    assert message == "LoRA of owner/base@0123abcd after 2 steps"
    assert b"\nbase_model: owner/base\n" in files["README.md"]


def test_a_base_that_is_gone_at_the_end_does_not_become_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_base: Path
) -> None:
    save = train.save_results
    # a relative path that is written like an id
    base = private_base.rename(private_base.parent / "base")

    def save_then_lose(*given: Any) -> list[str]:
        names = save(*given)
        shutil.rmtree(base)
        return names

    monkeypatch.setattr("train.save_results", save_then_lose)
    monkeypatch.chdir(tmp_path)
    files, _ = train_and_push(monkeypatch, tmp_path, Path("private/base"))
    assert b"base_model:" not in files["README.md"]
    assert b"private" not in files["README.md"] + files["adapter_config.json"]


def test_a_refused_push_leaves_its_files_alone_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_base: Path
) -> None:
    files, _ = train_and_push(monkeypatch, tmp_path, private_base, refused=True)
    left = files_of(tmp_path / "out" / "hub")
    assert left == files
    assert not {"data.json", "metrics.jsonl", "run.json", "samples.jsonl"} & left.keys()
    assert not any("checkpoint" in name for name in left)


@pytest.mark.parametrize("is_there", [True, False], ids=["listening", "closed"])
def test_a_password_in_the_hubs_address_is_not_printed(tmp_path: Path, is_there: bool) -> None:
    with serving(models__owner__gated=Repository({}, is_gated=True)) as hub:
        address = hub.url if is_there else "http://127.0.0.1:9"
        secret = {"HF_ENDPOINT": address.replace("//", "//me:pa%40ssword@"), "HF_TOKEN": TOKEN}
        flags = f"--model owner/gated --data owner/verses {FEW}"
        done = hub.run(["train.py", *flags.split()], tmp_path, **secret)
    assert done.returncode == 1
    assert "http://***@127.0.0.1" in done.stderr
    for word in ("pa%40ssword", "pa@ssword", TOKEN):
        assert word not in done.stdout + done.stderr
