"""train.py under torchrun: two processes learn what one does, and end together.

Two ranks of k micro-batches take the steps of one process of 2 k: what differs is the order in
which float32 adds up.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.micro_steps import in_runs
from support.short_model import short_model
from support.train_process import ROOT, TrainProcess, cut_off, train_ranks

import train
from optim.adamw import AdamW
from run.checkpoint import list_checkpoints
from step.micro_step import MicroStep

ADAPTER = "adapter_model.safetensors"
CLOCK = ("tokens_per_second", "peak_memory_bytes")
# 2^-24 for each of the additions whose order differs, of which there are some hundreds at most; one
# step's rounding becomes the next one's input
ROUNDING = 300 * 2**-24
# in 16 bits another last bit of a sum may round a number to its neighbour
ROUNDING_IN_BF16 = 2**-8


def flags(folder: Path, accumulation: int, more: str = "") -> list[str]:
    """11 samples of unequal lengths; with 8 micro-batches a step every second step is short, and of
    its 3 two ranks have 2 and 1."""
    data = folder / "data.jsonl"
    if not data.is_file():
        lines = (ROOT / "bundled" / "data.jsonl").read_text().splitlines()
        data.write_text("\n".join(lines[:110:10]) + "\n")
    given = f"--model {short_model()} --data {data} --device cpu --batch-size 1"
    given += f" --gradient-accumulation-steps {accumulation} --lora-dropout 0.1 --lora-r 2"
    given += f" --dtype float32 --lr-scheduler constant --eval-data {data} --max-steps 4 {more}"
    return given.split()


def rows_of(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def run_ranks(output: Path, arguments: list[str], size: int = 2) -> list[str]:
    """Run to the end; what each rank said."""
    ended = [process.finish() for process in train_ranks(output, [arguments] * size)]
    assert [code for code, _ in ended] == [0] * size, ended
    return [said for _, said in ended]


def assert_close(output: Path, other: Path, rounding: float = ROUNDING) -> None:
    ours, theirs = rows_of(output), rows_of(other)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        for name in row:
            if name in ("loss", "eval_loss", "grad_norm"):
                assert row[name] == pytest.approx(expected[name], rel=rounding), (row, name)
            else:
                assert row[name] == expected[name], name


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--packing --max-length 100",
        "--group-by-length",
        "--neftune-noise-alpha 5",
        "--base-compute fp8 --dtype bfloat16 --max-steps 2",
    ],
)
def test_two_ranks_learn_what_one_process_does(tmp_path: Path, more: str) -> None:
    train.main(["--output", str(tmp_path / "one"), *flags(tmp_path, 8, more)])
    said = run_ranks(tmp_path / "two", flags(tmp_path, 4, more))
    rounding = ROUNDING_IN_BF16 if "bfloat16" in more else ROUNDING
    assert_close(tmp_path / "two", tmp_path / "one", rounding)
    assert "2 ranks x 4 micro-batches x 1 rows a step" in said[0]
    assert said[1] == ""


def test_a_rank_without_a_micro_batch_takes_the_step_too(tmp_path: Path) -> None:
    # of the 3 micro-batches of every second step the fourth rank has none
    train.main(["--output", str(tmp_path / "one"), *flags(tmp_path, 8)])
    run_ranks(tmp_path / "four", flags(tmp_path, 2), size=4)
    assert_close(tmp_path / "four", tmp_path / "one")


def test_torchrun_starts_it_and_its_sigterm_saves_it(tmp_path: Path) -> None:
    arguments = flags(tmp_path, 2, "--max-steps 20 --save-steps 0")
    run_ranks(tmp_path / "whole", arguments)
    output = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "train.py", "--output", str(output), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while "step 3/" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGTERM)
        said += process.stdout.read()
    (checkpoint,) = list_checkpoints(output)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < 20
    assert said.count(f"stopped by SIGTERM after step {step} of 20: {checkpoint} has") == 1
    # the same ranks go on, forked: each process of torchrun's own would import everything again
    run_ranks(output, [*arguments, "--resume"])
    assert rows_of(output) == rows_of(tmp_path / "whole")
    assert (output / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_the_first_rank_answers_and_all_stop_early_together(tmp_path: Path) -> None:
    more = "--sample-prompt Ember? --sample-steps 1 --eval-steps 1 --early-stopping-patience 2"
    # a rate that makes every evaluation after the first one worse
    more += " --learning-rate 10 --warmup-ratio 0 --max-steps 30"
    said = run_ranks(tmp_path / "out", flags(tmp_path, 2, more))
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0, 1, 2]
    answers = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    # before the first step, after each, and with the best adapter, that of step 0
    assert [json.loads(line)["step"] for line in answers] == [0, 1, 2, 2]
    assert "step 1: Ember? -> " in said[0]
    assert "the adapter of step 0 is taken" in said[0]
    assert said[1] == ""


def test_a_run_goes_on_with_as_many_ranks_only(tmp_path: Path) -> None:
    run_ranks(tmp_path / "out", flags(tmp_path, 2, "--save-steps 1"))
    cut_off(tmp_path / "out")
    with pytest.raises(ValueError, match=r"as many processes as the run has, 2: got 1, .*per-node"):
        train.main(["--output", str(tmp_path / "out"), *flags(tmp_path, 2), "--resume"])


def test_what_is_wrong_is_said_once_and_nothing_is_written(tmp_path: Path) -> None:
    ranks = train_ranks(tmp_path / "out", [flags(tmp_path, 2, "--max-length 99999")] * 2)
    (code, said), (other_code, other_said) = [rank.finish() for rank in ranks]
    assert (code, other_code) == (1, 1)
    assert said.startswith("error: --max-length must be at most the model's")
    assert other_said.startswith("error: another rank has ended: ")
    assert "Traceback" not in said + other_said
    assert not (tmp_path / "out").exists()


def test_ranks_that_see_other_data_do_not_begin(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = flags(tmp_path / "other", 2)
    data = tmp_path / "other" / "data.jsonl"
    data.write_text("\n".join(data.read_text().splitlines()[1:]) + "\n")
    ranks = train_ranks(tmp_path / "out", [flags(tmp_path, 2), other])
    ended = [rank.finish() for rank in ranks]
    assert [code for code, _ in ended] == [1, 1]
    assert "error: the run must be the same for all 2 ranks, and is not" in ended[0][1]
    assert not (tmp_path / "out").exists()


def test_ranks_whose_adapters_drift_apart_are_found_out(tmp_path: Path) -> None:
    ranks = train_ranks(tmp_path / "out", [flags(tmp_path, 2, "--save-steps 2")] * 2, drift)
    ended = [rank.finish() for rank in ranks]
    assert [code for code, _ in ended] == [1, 1]
    assert "error: the adapter must be the same for all 2 ranks, and is not" in ended[0][1]
    assert list_checkpoints(tmp_path / "out") == []


def drift() -> None:
    """Let the second rank step a little farther."""
    if os.environ["RANK"] == "1":
        step = AdamW.step

        def farther(self: AdamW, learning_rate: float, *args: Any) -> torch.Tensor:
            return step(self, learning_rate * (1 + 1e-6), *args)

        setattr(AdamW, "step", farther)  # noqa: B010


def test_out_of_memory_on_one_rank_saves_the_run(tmp_path: Path) -> None:
    whole = flags(tmp_path, 2, "--save-steps 0")
    run_ranks(tmp_path / "whole", whole)
    output = tmp_path / "out"
    ended = [rank.finish() for rank in train_ranks(output, [whole] * 2, exhaust)]
    assert [code for code, _ in ended] == [1, 1]
    assert "error: the GPU's memory must suffice for step 3: rank 1: out of memory; " in ended[0][1]
    assert "checkpoint-2 has the run as it stands; try --resume" in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]
    run_ranks(output, [*whole, "--resume"])
    assert rows_of(output) == rows_of(tmp_path / "whole")
    assert (output / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def exhaust() -> None:
    """Let the second rank's memory end in its fifth micro-batch, the first of the third step."""
    if os.environ["RANK"] == "1":
        micro_step, calls = MicroStep.__call__, []

        def exhausted(self: MicroStep, *args: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return micro_step(self, *args)

        setattr(MicroStep, "__call__", in_runs(exhausted, "__call__"))  # noqa: B010


def test_when_a_rank_is_killed_the_others_say_so_and_end(tmp_path: Path) -> None:
    arguments = flags(tmp_path, 2, "--max-steps 100000 --save-steps 2")
    ranks: list[TrainProcess] = train_ranks(tmp_path / "out", [arguments] * 2)
    ranks[0].wait_until(lambda: "step 3/" in ranks[0].said())
    ranks[1].kill()
    code, said = ranks[0].finish()
    assert code == 1
    assert "another rank has ended: " in said
    assert "Traceback" not in said
    assert list_checkpoints(tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("more", ["", "--packing --max-length 100", "--optim paged_adamw_8bit"])
def test_two_gpus_learn_what_one_does_and_resume_bit_for_bit(tmp_path: Path, more: str) -> None:
    # of shapes that come again, so that micro-batches are captured beside a reduction
    more = f"--device cuda --deterministic --max-steps 8 --save-steps 4 {more}"
    train.main(["--output", str(tmp_path / "one"), *flags(tmp_path, 8, more)])
    arguments = flags(tmp_path, 4, more)
    run_ranks(tmp_path / "two", arguments)
    assert_close(tmp_path / "two", tmp_path / "one")
    run_ranks(tmp_path / "broken", arguments)
    (tmp_path / "broken" / ADAPTER).unlink()
    run_ranks(tmp_path / "broken", [*arguments, "--resume"])
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "two")
    assert (tmp_path / "broken" / ADAPTER).read_bytes() == (tmp_path / "two" / ADAPTER).read_bytes()
