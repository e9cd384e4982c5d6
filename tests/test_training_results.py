"""training/results.py: other programs open the output folder of a run, as its card says."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SUPPORT
from support.equality import assert_equal, assert_no_worse_than
from support.merge_cases import write_adapter
from support.peer_process import run_peer

import train
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from data.prompt import encode_prompt
from data.tokenizer import Tokenizer
from generation.generator import Generator
from generation.sampling import Sampling
from llama.model import Llama
from lora.adapter_file import load_adapter, read_adapter_config
from prepare.job import BUNDLED
from run.config import CONFIG_FILE, OLD_CONFIG_FILE

FEW = "--device cpu --batch-size 2 --gradient-accumulation-steps 1 --max-steps 2"


def train_bundled(output: Path, flags: str = "") -> None:
    model, data = BUNDLED / "model", BUNDLED / "data.jsonl"
    given = f"--model {model} --data {data} --output {output} --learning-rate 1e-2 {FEW} {flags}"
    train.main(given.split())


def begun_by_an_earlier_version(output: Path) -> None:
    """A run that version 0.1 cut off after its first step, resumed."""
    train_bundled(output, "--save-steps 1")
    (output / CONFIG_FILE).rename(output / OLD_CONFIG_FILE)
    (output / "adapter_model.safetensors").unlink()
    train_bundled(output, "--resume")


def begun_from_patterns(output: Path) -> None:
    """A run that starts from an adapter of PEFT with rsLoRA and two ranks."""
    targets = {"self_attn.q_proj": (128, 128), "mlp.down_proj": (128, 320)}
    tensors = {}
    for path, (rows, columns) in targets.items():
        for layer in range(4):
            rank = 3 if path.endswith("q_proj") else 8
            name = f"model.layers.{layer}.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank) / 100
    fields = {"r": 8, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"q_proj": 3}}
    fields["target_modules"] = ["q_proj", "down_proj"]
    adapter = output.with_name("adapter")
    write_adapter(adapter, fields, tensors)
    train_bundled(output, f"--init-adapter {adapter}")


BEGUN: dict[str, Callable[[Path], None]] = {
    "new": train_bundled,
    "old": begun_by_an_earlier_version,
    "rslora": lambda output: train_bundled(output, "--use-rslora --lora-r 8 --lora-alpha 5"),
    "patterns": begun_from_patterns,
}


def our_model(adapter: Path | None, dtype: torch.dtype = torch.float32) -> Llama:
    checkpoint = open_checkpoint(BUNDLED / "model")
    model = load_model(checkpoint, torch.device("cpu"), dtype, None)
    if adapter:
        model.attach_lora(read_adapter_config(adapter), seed=0)
        load_adapter(adapter, model.adapter_tensors())
    return model


def test_transformers_opens_the_output_folder_of_a_run(tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in BEGUN}
    for name, begin in BEGUN.items():
        begin(tmp_path / name)
    input_ids = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    theirs = run_peer(
        SUPPORT / "output_peer.py",
        tmp_path,
        {"input_ids": input_ids},
        {"folders": json.dumps(folders)},
    )
    base = our_model(None).logits(input_ids)
    for name, folder in folders.items():
        ours, peer = our_model(Path(folder)).logits(input_ids), theirs[f"{name}/float32"]
        assert_no_worse_than(ours, peer, theirs[f"{name}/float64"], what=name)
        assert_equal(theirs[f"{name}/pipeline"], peer, name)
        assert (ours - base).abs().max() > 0.1
    # of rsLoRA, to the last bit where the rank is a power of two
    factor_of_8 = 5 / math.sqrt(8)
    assert set(theirs["rslora/scalings"].tolist()) == {factor_of_8}
    assert sorted(set(theirs["patterns/scalings"].tolist())) == [
        factor_of_8,
        pytest.approx(5 / math.sqrt(3), rel=2**-52),
    ]


def test_the_python_of_a_model_card_runs_as_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "path" / "to" / "this" / "folder"
    train_bundled(folder)
    said = capsys.readouterr().out
    assert f"\n\ntalk    python generate.py --adapter {folder} --chat\n" in said
    run_peer(SUPPORT / "card_peer.py", tmp_path, {"nothing": torch.zeros(1)})
    in_nf4, in_16_bits, with_peft = json.loads((tmp_path / "said.json").read_text())
    # transformers' pipelines draw their tokens
    assert in_nf4.strip()
    assert in_16_bits.strip()
    model, tokenizer = our_model(folder, torch.bfloat16), Tokenizer.from_folder(folder)
    prompt = "Write a verse about the sea."
    ids = encode_prompt(prompt, tokenizer, model.config.vocab_size)
    stop_ids = {*model.config.eos_token_ids, tokenizer.eos_token_id}
    generator = Generator(model, Sampling(), len(ids) + 200)
    ours = tokenizer.decode(list(generator.stream(ids, 200, stop_ids)))
    assert with_peft.strip() == ours.strip()


def test_who_would_misread_an_adapter_is_said_at_the_end_and_in_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun_from_patterns(tmp_path / "out")
    said = capsys.readouterr().out
    names = "llama.cpp and Ollama, vLLM and SGLang"
    for text in (said, (tmp_path / "out" / "README.md").read_text()):
        assert f"{names} would misread this adapter: its projections have ranks or" in text
    assert f"\nserve   vllm serve {tmp_path / 'out-merged'}\n" in said


def test_a_run_that_saved_no_adapter_names_no_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_bundled(tmp_path / "out", f"--max-steps 0 --eval-data {BUNDLED / 'eval.jsonl'}")
    assert "generate.py" not in capsys.readouterr().out
