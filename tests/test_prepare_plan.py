"""prepare/plan.py: config.json alone gives the plan that the weights give, for GPUs elsewhere."""

import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint
from test_step_memory_plan import WORK

import prepare.plan
import quantize
from benchmarks.random_model import LLAMA_3_8B
from kernels.device import properties
from prepare.asked import ask
from prepare.job import BUNDLED, check
from prepare.plan import say_plan
from run.ranks import Ranks
from step.captured_shapes import MAX_GRAPHS
from step.duration import Rates
from step.gpus import find_gpu
from step.memory_plan import GIB, MemoryPlan, choose_policies
from step.workload import Workload

# as benchmarks/random_model.py has them
SHAPES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
FIELDS_8B = FIELDS | {name: getattr(LLAMA_3_8B, name) for name in SHAPES} | {"dtype": "bfloat16"}
DATA = BUNDLED / "data.jsonl"


class Planned:
    """What --plan found, before it was put in words."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work: Workload
        self.plan: MemoryPlan
        self.rates: Rates | None
        self.steps: tuple[int, float]
        monkeypatch.setattr(prepare.plan, "describe_plan", self._take)

    def _take(self, work: Workload, plan: MemoryPlan, rates: Any, *steps: Any) -> str:
        self.work, self.plan, self.rates, self.steps = work, plan, rates, steps
        return "the plan"

    def of(self, model: Path, flags: str, num_ranks: int = 1) -> MemoryPlan:
        arguments = ["--model", str(model), "--plan", *flags.split()]
        say_plan(ask(arguments, {}, Ranks()), num_ranks, datetime(2026, 1, 1))
        return self.plan


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    return Planned(monkeypatch)


def config_alone(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def config_8b(tmp_path: Path) -> Path:
    return config_alone(tmp_path / "8b", FIELDS_8B)


@pytest.mark.parametrize("flags", ["--gpu h200", "--gpu t4 --quant none --lora-r 4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_config_json_gives_the_plan_of_the_weights(
    tmp_path: Path, variant: str, flags: str, planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = FIELDS | VARIANTS[variant] | {"torch_dtype": "bfloat16"}
    full = write_checkpoint(tmp_path / "full", fields, random_tensors(fields, torch.bfloat16))
    flags += " --max-length 16 --no-packing"
    expected = planned.of(full, flags)
    assert "config.json" not in capsys.readouterr().out
    assert planned.of(config_alone(tmp_path / "alone", fields), flags) == expected
    assert "alone: planned from config.json alone, as stored in bfloat16" in capsys.readouterr().out


def test_a_copy_in_nf4_is_planned_as_it_is_stored(tmp_path: Path, planned: Planned) -> None:
    fields = FIELDS | {"torch_dtype": "bfloat16"}
    write_checkpoint(tmp_path / "a", fields, random_tensors(fields, torch.bfloat16))
    flags = "--block-size 128 --no-double-quant --device cpu"
    quantize.main(f"--model {tmp_path / 'a'} --output {tmp_path / 'b'} {flags}".split())
    stored = json.loads((tmp_path / "b" / "config.json").read_text())
    expected = planned.of(tmp_path / "b", "--gpu a10")
    alone = config_alone(tmp_path / "alone", stored)
    assert planned.of(alone, "--gpu a10 --block-size 128 --no-double-quant") == expected
    with pytest.raises(ValueError, match="must be those of a checkpoint that is in NF4 already"):
        planned.of(alone, "--gpu a10 --quant none")


def test_a_model_of_real_size_is_planned_for_the_gpu_that_is_named(
    config_8b: Path, planned: Planned
) -> None:
    plan = planned.of(config_8b, "--gpu 4090 --no-packing")
    work, gpu = planned.work, find_gpu("4090")
    assert (work.batch, work.tokens, work.dtype) == (4, 2048, torch.bfloat16)
    assert work.gpu == gpu.facts
    # two shapes: a full micro-batch, and the last of an epoch
    alike = replace(WORK, num_shapes=2, device=torch.device("cuda"), planned_gpu=gpu.facts)
    assert plan == choose_policies(alike, gpu.budget)
    assert 0.9 * gpu.budget < plan.device <= gpu.budget
    assert {"keep", "offload"} <= set(plan.policies)
    # one step of full rows
    assert planned.steps == (1, 16 * 2048)
    assert planned.rates is None


@pytest.mark.parametrize(
    ("gpu", "dtype", "is_packed"),
    [("t4", torch.float16, False), ("3090", torch.bfloat16, True), ("h200", torch.bfloat16, True)],
)
def test_defaults_are_those_of_the_gpu(
    config_8b: Path, planned: Planned, gpu: str, dtype: torch.dtype, is_packed: bool
) -> None:
    planned.of(config_8b, f"--gpu {gpu} --batch-size 1 --max-length 256")
    assert planned.work.dtype == dtype
    assert planned.work.sample_tokens == (256 if is_packed else None)
    assert (planned.rates is None) == (gpu != "h200")


def test_flags_decide_what_a_row_and_a_step_are(config_8b: Path, planned: Planned) -> None:
    flags = "--batch-size 2 --gradient-accumulation-steps 3 --max-length 200 --max-steps 7"
    planned.of(config_8b, f"--gpu h100 --epochs 9 {flags}", num_ranks=2)
    work = planned.work
    assert (work.batch, work.tokens, work.num_ranks) == (2, 256, 2)
    assert planned.steps == (7, 7 * 2 * 3 * 2 * 200)
    planned.of(config_8b, "--gpu h100 --epochs 9 --max-length 200")
    assert planned.steps == (1, 16 * 200)
    # products in 32 bits were not measured
    planned.of(config_8b, "--gpu h100 --max-length 200 --dtype float32 --quant none")
    assert planned.rates is None


def test_memory_alone_stands_for_a_gpu(
    config_8b: Path, planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--batch-size 1 --max-length 512"
    plan = planned.of(config_8b, f"--max-memory 8GiB {flags}")
    assert 7 * GIB < plan.device <= 8 * GIB
    assert planned.work.dtype == torch.bfloat16
    said = capsys.readouterr().out
    assert "no --data: every row is taken to have 512 tokens" in said
    assert "GPU: one as new as an H200, compute capability 9.0, 8.00 GiB for the run; b" in said
    assert said.endswith("the plan; no time: its rates were not measured here\n")
    # the lesser of the two
    for given, least in (("8", "8.00"), ("80", "22.81")):
        planned.of(config_8b, f"--gpu 4090 --max-memory {given} {flags}")
        assert f"compute capability 8.9, {least} GiB for the run" in capsys.readouterr().out


def test_a_cpu_is_planned_for_with_heads_that_no_gpu_has_room_for(
    tmp_path: Path, planned: Planned
) -> None:
    fields = json.loads((BUNDLED / "model" / "config.json").read_text()) | {"head_dim": 4096}
    folder = config_alone(tmp_path / "wide", fields)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / "model" / name, folder)
    flags = f"--device cpu --data {DATA} --sample-prompt Hello --target-modules q_proj"
    # with samples that share rows and with those that do not
    in_32_bits = planned.of(folder, f"{flags} --packing")
    assert in_32_bits.device > planned.of(folder, f"{flags} --dtype bfloat16").device > 0


def test_a_cpu_is_planned_for_as_it_was(
    config_8b: Path, planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned.of(config_8b, "--device cpu")
    assert plan.policies == ("keep",) * 32
    assert planned.work.dtype == torch.float32
    said = capsys.readouterr().out
    assert "GPU" not in said
    assert said.endswith("\nthe plan\n")
    with pytest.raises(ValueError, match="--max-memory must be given for a GPU"):
        planned.of(config_8b, "--device cpu --max-memory 24GiB")


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--gpu 4060 --batch-size 8", r"--batch-size 1 --max-length 2048 fits; .* is RTX 2080 Ti"),
        ("--gpu 4060 --quant none", r"fits beside the weights, 14\.\d\d GiB; .* is A10"),
        ("--max-memory 16 --quant none", r"fits beside the weights, 14\.\d\d GiB; .* is A10"),
    ],
)
def test_what_does_not_fit_is_answered_with_what_would(
    config_8b: Path, planned: Planned, flags: str, answer: str
) -> None:
    with pytest.raises(ValueError, match=rf"^the run must fit .*{answer}$") as refusal:
        planned.of(config_8b, flags)
    assert "; of GPUs with enough memory the smallest known here is" in str(refusal.value)


def test_what_fits_no_gpu_is_told_so(tmp_path: Path, planned: Planned) -> None:
    wide = {"hidden_size": 16384, "intermediate_size": 131072, "num_hidden_layers": 12}
    folder = config_alone(tmp_path / "wide", FIELDS_8B | wide | {"num_attention_heads": 128})
    with pytest.raises(ValueError, match=r"; of GPUs with enough memory none is known here$"):
        planned.of(folder, "--gpu h200 --quant none")


def test_with_data_samples_are_counted_for_the_gpu(
    planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--data {DATA} --eval-data {DATA} --sample-prompt Hello --gpu t4"
    planned.of(BUNDLED / "model", flags)
    work = planned.work
    # 94 tokens, with a GPU's padding
    assert (work.batch, work.tokens, work.dtype) == (4, 128, torch.float16)
    assert work.num_shapes <= MAX_GRAPHS
    assert work.evaluation is not None
    assert work.prompt_tokens > 100
    assert planned.steps == (36, 23_142)
    said = capsys.readouterr().out
    assert "576 samples, 23,142 tokens" in said
    assert "no --data" not in said


@pytest.mark.parametrize(
    "flag", ["--eval-data x", "--eval-fraction 0.1", "--sample-prompt x", "--inspect 2"]
)
def test_flags_that_need_a_tokenizer_need_data(
    config_8b: Path, planned: Planned, flag: str
) -> None:
    with pytest.raises(ValueError, match=f"^{flag.split()[0]} must be given with --data: got none"):
        planned.of(config_8b, f"--gpu 4090 {flag}")


@pytest.mark.gpu
def test_gpu_that_is_here_is_planned_for_as_a_run_does(tmp_path: Path, planned: Planned) -> None:
    arguments = f"--data {DATA} --device cuda --output {tmp_path / 'out'}"
    plan = planned.of(BUNDLED / "model", arguments)
    assert planned.work.gpu == properties(torch.device("cuda"))
    assert planned.rates is not None
    given = ["--model", str(BUNDLED / "model"), *arguments.split()]
    job = check(given, Ranks(), datetime(2026, 1, 1))
    assert job is not None
    assert job.plan == plan
    assert planned.steps[0] == job.num_steps
    # and another one, beside it
    planned.of(BUNDLED / "model", f"--data {DATA} --gpu t4")
    assert planned.work.gpu == find_gpu("t4").facts
    assert planned.work.dtype == torch.float16
