"""train.py with nothing but hub ids, as a process, against a hub on 127.0.0.1."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import TOKEN, Repository, files_of, serving

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
        assert f"pushed it: {hub.url}/owner/adapter/commit/{pushed.sha}" in done.stdout
        fetched = hub.downloads()
        assert sorted(fetched) == sorted([*files_of(BUNDLED / "model"), "train.jsonl"])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= pushed.files.keys()
    assert not {"metrics.jsonl", "config.json"} & pushed.files.keys()
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
        assert hub.downloads() == ["quotes.jsonl"]
    assert "[[Say 0 before 1." in done.stdout
    facts = json.loads((output / "data.json").read_bytes())
    assert facts["train"]["samples"] + facts["eval"]["samples"] == 30
    assert facts["train"]["format"] == "text"


def test_a_data_set_of_parquet_files_is_read_split_by_split(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = {"README.md": b"# a card"}
    for name, texts in {
        "train-00000-of-00002": ["one", "two"],
        "train-00001-of-00002": ["three"],
        "test-00000-of-00001": ["four"],
    }.items():
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({"text": texts}), buffer)
        files[f"data/{name}.parquet"] = buffer.getvalue().to_pybytes()
    with serving(datasets__owner__name=Repository(files)) as hub:
        flags = "--data owner/name --eval-data owner/name --inspect 9 --device cpu"
        done = hub.run(["train.py", "--model", str(BUNDLED / "model"), *flags.split()], tmp_path)
        assert done.returncode == 0, done.stderr
        assert sorted(hub.downloads()) == sorted(set(files) - {"README.md"})
    shown = [line.partition("[[")[2] for line in done.stdout.splitlines() if "[[" in line]
    texts = [text.partition("<")[0] for text in shown if not text.startswith("what is learned")]
    assert texts == ["one", "two", "three", "four"]
