"""train.py with nothing but hub ids, as a process, against a hub on 127.0.0.1."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import TOKEN, Repository, files_of, serving

from data.sources import find_data

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


@pytest.mark.parametrize("place", ["data.jsonl", "no/such.csv", "no-such-data", "a/b/c"])
def test_a_path_is_no_hub_id(place: str) -> None:
    assert find_data(place, "--data") == Path(place)


def test_a_data_set_of_many_files_is_refused(tmp_path: Path) -> None:
    code = "import sys; from data.sources import find_data; find_data(sys.argv[1], '--data')"
    with serving(
        datasets__owner__many=Repository({"a.json": b"", "b.json": b"", "README.md": b""}),
        datasets__owner__parquet=Repository({"train.parquet": b""}),
    ) as hub:
        done = hub.run(["-c", code, "owner/many"], tmp_path)
        assert "owner/many has 2 (a.json, b.json); download the file that you want" in done.stderr
        done = hub.run(["-c", code, "owner/parquet"], tmp_path)
        assert "owner/parquet has 0 (others: train.parquet)" in done.stderr
        assert not hub.downloads()
