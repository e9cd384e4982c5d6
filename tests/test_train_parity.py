"""Twenty steps of train.py against transformers, PEFT, bitsandbytes and torch's AdamW."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import SUPPORT
from support.micro_steps import NF4
from support.peer_process import run_peer
from torch import Tensor

import train
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from llama.model import PROJECTIONS, Llama
from lora.adapter_file import load_adapter, save_adapter
from lora.config import LoRAConfig
from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight, member
from prepare.job import BUNDLED

SCRIPT = SUPPORT / "qlora_peer.py"
NUM_STEPS, NUM_MICRO, BATCH_SIZE = 20, 2, 2
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.01, 1.0
LORA = LoRAConfig(8, 16.0, 0.0, PROJECTIONS)


def quantized_model(checkpoint: Path) -> Llama:
    model = load_model(open_checkpoint(checkpoint), torch.device("cpu"), torch.float32, NF4)
    model.attach_lora(LORA, seed=7)
    return model


@dataclass(frozen=True)
class Parity:
    rows: list[dict[str, float]]  # of our metrics.jsonl
    peer: dict[str, Tensor]
    logits: Tensor  # ours, with our trained adapter
    num_targets: list[int]  # of every step
    codes: dict[str, Tensor]  # of our double-quantized scales


def make_samples(checkpoint: Path, text: str, count: int) -> list[dict[str, list[int]]]:
    """A text cut to different lengths, the first tokens of each piece not learned."""
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    # each piece gets the one BOS that it may have
    ids = tokenizer.encode(text[:60000], add_special_tokens=False).ids
    # what is past the end would be an empty sample
    assert len(ids) >= 100 * count
    samples = []
    for i in range(count):
        length, num_masked = 40 + 7 * (i % 5), 3 + i % 11
        start = 100 * i
        piece = [1, *ids[start : start + length]]
        samples.append({"input_ids": piece, "labels": [-100] * num_masked + piece[num_masked:]})
    return samples


def as_batches(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    tensors = {}
    for index in range(0, len(samples), BATCH_SIZE):
        step, micro = divmod(index // BATCH_SIZE, NUM_MICRO)
        part = samples[index : index + BATCH_SIZE]
        width = max(len(sample["input_ids"]) for sample in part)
        for name, filler in (("input_ids", 0), ("labels", -100)):
            rows = [sample[name] + [filler] * (width - len(sample[name])) for sample in part]
            tensors[f"step/{step}/micro/{micro}/{name}"] = torch.tensor(rows)
    return tensors


def scale_codes(model: Llama) -> dict[str, Tensor]:
    codes = {}
    for prefix, group in model.groups():
        for index, name in enumerate(group.names):
            assert isinstance(group.weight, NF4Weight)
            absmax = member(group.weight, index).absmax
            assert isinstance(absmax, QuantizedAbsmax)
            codes[f"codes/{prefix}{name}"] = absmax.codes.clone()
    return codes


@pytest.fixture(scope="module", params=["bundled", "stories260K"])
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    base = tmp_path_factory.mktemp("parity")
    if request.param == "bundled":
        checkpoint, text_file = BUNDLED / "model", BUNDLED / "data.jsonl"
    else:
        assets: Path = request.getfixturevalue("assets")
        checkpoint, text_file = assets / "stories260K", assets / "data" / "tinystories_val.txt"
    initial, output = base / "initial", base / "ours"
    model = quantized_model(checkpoint)
    save_adapter(initial, model.adapter_tensors(), LORA, str(checkpoint))
    text = text_file.read_text(encoding="utf-8")
    samples = make_samples(checkpoint, text, NUM_STEPS * NUM_MICRO * BATCH_SIZE)
    data = base / "data.jsonl"
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    train.main(
        f"--model {checkpoint} --data {data} --data-format tokenized --no-shuffle --output {output}"
        f" --init-adapter {initial} --lora-r {LORA.r} --lora-alpha {LORA.lora_alpha}"
        f" --device cpu --dtype float32 --lr-scheduler constant --warmup-ratio 0"
        f" --learning-rate {LEARNING_RATE} --weight-decay {WEIGHT_DECAY}"
        f" --max-grad-norm {MAX_GRAD_NORM} --batch-size {BATCH_SIZE}"
        f" --gradient-accumulation-steps {NUM_MICRO}".split()
    )
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    load_adapter(output, model.adapter_tensors())
    final_ids = torch.tensor([samples[0]["input_ids"], samples[5]["input_ids"]])
    facts = {
        "checkpoint": str(checkpoint),
        "adapter": str(initial),
        "our_adapter": str(output),
        "num_steps": str(NUM_STEPS),
        "num_micro": str(NUM_MICRO),
        "learning_rate": str(LEARNING_RATE),
        "weight_decay": str(WEIGHT_DECAY),
        "max_grad_norm": str(MAX_GRAD_NORM),
    }
    tensors = as_batches(samples) | {"final/input_ids": final_ids} | scale_codes(model)
    peer = run_peer(SCRIPT, base, tensors, facts)
    with torch.no_grad():
        logits = model.logits(final_ids)
    window = NUM_MICRO * BATCH_SIZE
    targets = [len(s["labels"]) - s["labels"].count(-100) for s in samples]
    num_targets = [sum(targets[i : i + window]) for i in range(0, len(targets), window)]
    return Parity(rows, peer, logits, num_targets, scale_codes(model))


def test_every_loss_equals_the_peers_to_1e_4(parity: Parity) -> None:
    losses = torch.tensor([row["loss"] for row in parity.rows]).double()
    assert len(losses) == NUM_STEPS
    # training must do something, or equality says little
    assert losses[-4:].mean() < losses[:4].mean()
    relative = ((losses - parity.peer["losses"]) / parity.peer["losses"]).abs()
    assert relative.max() < 1e-4, relative


def test_every_gradient_norm_equals_the_peers_to_1e_3(parity: Parity) -> None:
    norms = torch.tensor([row["grad_norm"] for row in parity.rows]).double()
    relative = ((norms - parity.peer["grad_norms"]) / parity.peer["grad_norms"]).abs()
    assert relative.max() < 1e-3, relative


def test_the_trained_adapter_loads_in_peft_and_gives_the_same_logits(parity: Parity) -> None:
    # bitsandbytes' CPU backend looks second-level codes up in a table of 65,536 entries; its CUDA
    # kernel and we take the nearest, so the peer is given those for this comparison
    num_codes = sum(codes.numel() for codes in parity.codes.values())
    assert 0 < int(parity.peer["num_different_codes"]) < 0.005 * num_codes
    assert torch.isfinite(parity.logits).all()
    assert (parity.logits - parity.peer["loaded_logits"]).abs().max() < 1e-4


def test_tokens_are_counted_exactly(parity: Parity) -> None:
    totals = [sum(parity.num_targets[: i + 1]) for i in range(NUM_STEPS)]
    assert [row["target_tokens"] for row in parity.rows] == totals
