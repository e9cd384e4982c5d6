"""train.py under SIGKILL, SIGTERM, SIGINT, a full disk and damaged checkpoints, each for real.

What is lost is at most the steps since the last checkpoint, and what comes out is the same, bit for
bit.
"""

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import weakref
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.micro_steps import in_runs
from support.short_model import short_model
from support.train_process import DEADLINE_S, ROOT, TrainProcess, cut_off, heed_signals
from test_run_folder import rewrite_state

import train
import training.saving
from data.tokenizer import Tokenizer
from optim.adamw import AdamW
from run.checkpoint import OPTIMIZER_FILE, list_checkpoints
from run.signals import StopRequest
from step.micro_step import MicroStep

NUM_STEPS = 30
NUM_KILLS = 20
# more than the killed processes take together
LONG = ("--max-steps", "100")
# about what a process takes to its first step on a machine that has nothing else to do
START_S = 0.3
CLOCK = ("tokens_per_second", "peak_memory_bytes")
ADAPTER = "adapter_model.safetensors"


def flags(folder: Path, *more: str) -> list[str]:
    """A run with many short steps and a checkpoint after each."""
    data = folder / "data.jsonl"
    if not data.is_file():
        lines = (ROOT / "bundled" / "data.jsonl").read_text().splitlines()
        data.write_text("\n".join(lines[:70:10]) + "\n")
    given = (
        f"--model {short_model()} --data {data} --device cpu --max-steps {NUM_STEPS} --save-steps 1"
    )
    given += " --batch-size 1 --gradient-accumulation-steps 1 --lora-dropout 0.1 --lora-r 2"
    return [*given.split(), "--target-modules", "q_proj,down_proj", *more]


def rows(output: Path) -> list[dict[str, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def last_step(output: Path) -> int:
    """Of the newest checkpoint, 0 if there is none."""
    found = list_checkpoints(output)
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def assert_equals(output: Path, whole: Path) -> None:
    assert rows(output) == rows(whole)
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    code, said = TrainProcess(folder / "out", *flags(folder)).finish()
    assert code == 0, said
    return folder / "out"


def test_killed_at_random_moments_and_inside_a_save_it_ends_bit_for_bit_the_same(
    tmp_path: Path,
) -> None:
    whole = tmp_path / "whole"
    code, said = TrainProcess(whole, *flags(tmp_path, *LONG)).finish()
    assert code == 0, said
    output = tmp_path / "out"
    chance = random.Random(0)
    times = [path.stat().st_mtime for path in list_checkpoints(whole)]
    seconds_of_a_step = (times[-1] - times[0]) / (len(times) - 1)
    num_kills, num_inside_a_save = 0, 0
    while num_kills < NUM_KILLS or not num_inside_a_save:
        before = last_step(output)
        limited = flags(tmp_path, *LONG, "--resume", "--save-total-limit", "2")
        process = TrainProcess(output, *limited)
        # some while it starts, most in one of the next steps, each of which has a save
        has_begun = chance.random() < 0.8
        if has_begun:
            first = before + chance.randint(1, 2)
            process.wait_until(lambda: last_step(output) >= first)  # noqa: B023
        process.wait(chance.uniform(0, seconds_of_a_step if has_begun else START_S))
        process.kill()
        num_kills += 1
        num_inside_a_save += any(output.glob("checkpoint-*.partial"))
        # nothing that was there is gone, and of the old ones no more is kept than is asked for
        assert last_step(output) >= before
        assert len(list_checkpoints(output)) <= 3
        if before and has_begun:
            assert f"checkpoint-{before}: {before} steps done" in process.said()
    code, said = TrainProcess(output, *flags(tmp_path, *LONG, "--resume")).finish()
    assert code == 0, said
    assert not list(output.glob("*.partial"))
    assert_equals(output, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    never_saving = flags(tmp_path, "--save-steps", "0")
    process = TrainProcess(output, *never_saving)
    process.wait_until(lambda: "step 3/" in process.said())
    os.kill(process.pid, number)
    code, said = process.finish()
    assert code == 0, said
    assert f"{number.name}: stopping after this step, with a checkpoint" in said
    step = last_step(output)
    assert 3 <= step < NUM_STEPS
    assert f"stopped by {number.name} after step {step} of {NUM_STEPS}: " in said
    assert f"checkpoint-{step} has the run as it stands, --resume goes on from there" in said
    code, said = TrainProcess(output, *never_saving, "--resume", "auto").finish()
    assert code == 0, said
    assert_equals(output, whole)


def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    never_saving = flags(tmp_path, "--save-steps", "0")
    ours, theirs = os.openpty()
    command = [sys.executable, "train.py", "--output", str(output), *never_saving]

    def begin() -> None:
        heed_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with subprocess.Popen(
        command,
        cwd=ROOT,
        # sums add up in the order of the whole run
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=begin,
    ) as process:
        os.close(theirs)
        os.set_blocking(ours, False)
        while not (output / "metrics.jsonl").is_file() or len(rows(output)) < 3:
            assert process.poll() is None
            # a terminal that nobody reads would stop the run
            with suppress(BlockingIOError):
                os.read(ours, 1 << 16)
            time.sleep(0.001)
        os.close(ours)
        process.wait(60)
    step = last_step(output)
    assert 3 <= step < NUM_STEPS
    assert list_checkpoints(output) == [output / f"checkpoint-{step}"]
    code, said = TrainProcess(output, *never_saving, "--resume").finish()
    assert code == 0, said
    assert_equals(output, whole)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_process_is_refused_and_the_first_goes_on(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = TrainProcess(output, *flags(tmp_path))
    first.wait_until(lambda: last_step(output) >= 3)
    for more in ("--resume", "--no-resume"):
        with pytest.raises(ValueError, match="by one process at a time: another one is writing it"):
            train.main(["--output", str(output), *flags(tmp_path, more)])
    code, said = first.finish()
    assert code == 0, said
    assert_equals(output, whole)


def test_asked_twice_it_stops_at_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    # an evaluation takes longer than the test waits for
    slow = flags(tmp_path, "--eval-data", str(ROOT / "bundled" / "data.jsonl"))
    process = TrainProcess(output, *slow)
    process.wait_until((output / "metrics.jsonl").is_file)
    os.kill(process.pid, signal.SIGINT)
    process.wait_until(lambda: "again stops at once" in process.said())
    os.kill(process.pid, signal.SIGINT)
    code, said = process.finish()
    assert code == 1
    assert said.endswith("interrupted: what is not in a checkpoint is lost\n")
    assert "Traceback" not in said
    assert last_step(output) == 0


def follow_slowly() -> None:
    """Let the tracker wandb take long at the end of a run, and its thread at the exit."""

    def wait(what: str) -> None:
        print(what, flush=True)
        time.sleep(DEADLINE_S)

    def leave() -> None:
        threading.main_thread().join()
        wait("the tracker leaves")

    tracker: Any = ModuleType("wandb")
    tracker.__spec__ = ModuleSpec("wandb", None)
    tracker.init = lambda **given: tracker
    tracker.log = lambda figures, step: None
    tracker.finish = lambda: wait("the tracker sends")
    sys.modules["wandb"] = tracker
    threading.Thread(target=leave).start()


def test_ctrl_c_at_a_trackers_end_costs_the_tracker_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = flags(tmp_path, "--max-steps", "2", "--report-to", "wandb")
    process = TrainProcess(output, *given, before=follow_slowly)
    process.wait_until(lambda: "the tracker sends" in process.said())
    os.kill(process.pid, signal.SIGINT)
    process.wait_until(lambda: "the tracker leaves" in process.said())
    os.kill(process.pid, signal.SIGINT)
    code, said = process.finish()
    assert code == -signal.SIGINT, said
    assert "--report-to wandb is left out: interrupted\n" in said
    assert "Traceback" not in said
    assert "lost" not in said
    for name in (ADAPTER, "README.md", "loss.png"):
        assert (output / name).is_file(), name


def limit_files(process: TrainProcess, size: int) -> None:
    """Let the disk refuse whatever makes a file larger."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def test_a_full_disk_costs_checkpoints_but_not_the_run(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = TrainProcess(output, *flags(tmp_path, "--save-total-limit", "1"))
    process.wait_until(lambda: last_step(output) >= 3)
    limit_files(process, 1000)
    process.wait_until(lambda: "no checkpoint, the run goes on: " in process.said())
    process.wait_until(lambda: "metrics.jsonl cannot be written: " in process.said())
    kept = last_step(output)
    assert kept >= 3
    # whole, whatever was refused after it
    assert list_checkpoints(output) == [output / f"checkpoint-{kept}"]
    limit_files(process, resource.RLIM_INFINITY)
    code, said = process.finish()
    assert code == 0, said
    assert f"checkpoint-{kept + 1} must be written: got " in said
    assert_equals(output, whole)


def test_a_disk_that_stays_full_ends_the_run_with_a_message_and_its_last_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = TrainProcess(output, *flags(tmp_path))
    process.wait_until(lambda: last_step(output) >= 3)
    limit_files(process, 1000)
    code, said = process.finish()
    assert code == 1
    assert "Traceback" not in said
    assert not (output / ADAPTER).exists()
    step = last_step(output)
    assert said.splitlines()[-1].startswith(f"error: {output} must take the results: got ")
    assert said.endswith(
        f"checkpoint-{step} is the last checkpoint, for --resume; make room, or move the folder to "
        "another disk and give its place as --output, with --resume\n"
    )
    output = output.rename(tmp_path / "elsewhere")
    code, said = TrainProcess(output, *flags(tmp_path, "--resume")).finish()
    assert code == 0, said
    assert f"checkpoint-{step}: {step} steps done" in said
    assert_equals(output, whole)


def test_room_for_the_end_is_kept_while_a_run_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    step, kept = AdamW.step, []

    def noted(self: AdamW, *args: Any) -> torch.Tensor:
        (path,) = output.glob("reserve*")
        kept.append(path.stat().st_blocks * 512)
        if len(kept) == 6:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    def freed(folder: Path, *args: Any) -> None:
        assert list(output.glob("reserve*")) == []
        write(folder, *args)

    write = training.saving.save_adapter
    monkeypatch.setattr(AdamW, "step", noted)
    monkeypatch.setattr(training.saving, "save_adapter", freed)
    config = ["--output", str(output), *flags(tmp_path, "--max-steps", "7", "--save-steps", "0")]
    # one that is stopped, and one that ends
    train.main(config)
    saved = sum(path.stat().st_size for path in (output / "checkpoint-6").glob("*.safetensors"))
    train.main([*config, "--resume"])
    assert len(kept) == 7
    # but for the names of its tensors
    assert min(kept) >= 0.9 * saved
    assert list(output.glob("reserve*")) == []


def test_a_disk_without_room_for_the_checkpoints_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr("run.room.shutil.disk_usage", lambda path: usage)
    output = tmp_path / "out"
    config = ["--output", str(output), *flags(tmp_path)]
    with pytest.raises(ValueError, match=r"room for .* another disk, --save-total-limit, or"):
        train.main(config)
    assert not output.exists()
    train.main([*config, "--save-total-limit", "1", "--max-steps", "2"])


def test_rows_are_on_the_disk_before_their_checkpoint_and_before_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename, replace = os.fsync, Path.rename, Path.replace
    flushed: dict[str, int] = {}
    seen = []

    def flushing(descriptor: int) -> None:
        fsync(descriptor)
        flushed[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = os.fstat(
            descriptor
        ).st_size

    def renaming(self: Path, target: Path) -> Path:
        is_result = target.name.startswith("checkpoint-") or target.name == ADAPTER
        for name in ("metrics.jsonl", "samples.jsonl") if is_result else ():
            assert flushed[name] == (target.parent / name).stat().st_size, target
            seen.append(target.name)
        return (rename if self.is_dir() else replace)(self, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(Path, "replace", renaming)
    config = flags(tmp_path, "--max-steps", "3", "--sample-prompt", "hello", "--sample-steps", "1")
    train.main(["--output", str(tmp_path / "out"), *config])
    assert set(seen) == {"checkpoint-1", "checkpoint-2", ADAPTER}


def test_a_tokenizer_that_is_gone_at_the_end_costs_only_its_copy(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(self: Tokenizer, folder: Path) -> None:
        raise FileNotFoundError("the model's folder is gone")

    monkeypatch.setattr(Tokenizer, "save", gone)
    train.main(["--output", str(tmp_path / "out"), *flags(tmp_path)])
    assert "the tokenizer's copy has failed" in capsys.readouterr().out
    assert_equals(tmp_path / "out", whole)


def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = TrainProcess(output, *flags(tmp_path))
    process.wait_until(lambda: last_step(output) >= 5)
    process.kill()
    newest = list_checkpoints(output)[-1]
    step = last_step(output)
    file = newest / OPTIMIZER_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, said = TrainProcess(output, *flags(tmp_path, "--resume")).finish()
    assert code == 0, said
    assert f"got {OPTIMIZER_FILE} with another hash than sha256.json has; going back" in said
    assert f"checkpoint-{step - 1}: {step - 1} steps done" in said
    assert (output / f"{newest.name}.damaged" / OPTIMIZER_FILE).read_bytes() == content
    assert_equals(output, whole)


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--packing --max-length 64",
        pytest.param("--device cuda --deterministic", marks=pytest.mark.gpu),
    ],
)
def test_stopped_after_every_single_step_it_ends_bit_for_bit_the_same(
    tmp_path: Path, more: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 7 samples in steps of 2 micro-batches of 1: an epoch is 4 steps, the last one short
    given = "--max-steps 7 --gradient-accumulation-steps 2 --save-steps 0 --eval-steps 3"
    given += f" --optim paged_adamw_8bit --eval-data {tmp_path / 'data.jsonl'} {more}"
    config = flags(tmp_path, *given.split())
    train.main(["--output", str(tmp_path / "whole"), *config])
    step = AdamW.step

    def stopped(self: AdamW, *args: Any) -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(AdamW, "step", stopped)
    output = tmp_path / "out"
    # what is left in the end is the last evaluation
    for done in range(1, 8):
        train.main(["--output", str(output), *config, "--resume"])
        assert f"stopped by SIGTERM after step {done} of 7" in capsys.readouterr().out
    train.main(["--output", str(output), *config, "--resume"])
    assert "stopped by" not in capsys.readouterr().out
    assert_equals(output, tmp_path / "whole")


def test_asked_to_stop_it_does_not_wait_for_an_evaluations_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # of 7 batches each: before the first step, after the second and after the last
    given = f"--max-steps 4 --save-steps 0 --eval-steps 2 --eval-data {tmp_path / 'data.jsonl'}"
    config = flags(tmp_path, *given.split())
    train.main(["--output", str(tmp_path / "whole"), *config])
    evaluate, calls = MicroStep.evaluate, []

    def stopped(self: MicroStep, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) in (3, 3 + 7 + 5):
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, *args)

    monkeypatch.setattr(MicroStep, "evaluate", in_runs(stopped, "evaluate"))
    output = tmp_path / "out"
    for done, num_calls in ((0, 3), (2, 15)):
        train.main(["--output", str(output), *config, "--resume"])
        assert f"stopped by SIGTERM after step {done} of 4" in capsys.readouterr().out
        assert len(calls) == num_calls
    train.main(["--output", str(output), *config, "--resume"])
    assert len(calls) == 15 + 2 * 7
    assert_equals(output, tmp_path / "whole")


def test_out_of_memory_the_run_is_saved_and_the_next_setting_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = flags(tmp_path, "--max-steps", "7", "--save-steps", "0", "--logging-steps", "3")
    train.main(["--output", str(tmp_path / "whole"), *config])
    output = tmp_path / "out"
    num_left = iter(range(5, 0, -1))

    def exhausted(self: MicroStep, *args: Any) -> torch.Tensor:
        taken = torch.zeros(1)
        computed.append(weakref.ref(taken))
        if next(num_left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return micro_step(self, *args)

    def saved(self: AdamW) -> dict[str, torch.Tensor]:
        # there must be room for it
        assert [tensor() for tensor in computed] == [None] * 6
        return state_tensors(self)

    computed: list[weakref.ref[torch.Tensor]] = []
    micro_step, state_tensors = MicroStep.__call__, AdamW.state_tensors
    monkeypatch.setattr(MicroStep, "__call__", in_runs(exhausted, "__call__"))
    monkeypatch.setattr(AdamW, "state_tensors", saved)
    with pytest.raises(
        train.CannotGoOn,
        match=r"suffice for step 6: CUDA out of memory.*GiB; .*checkpoint-5 has the run as it "
        r"stands; try --resume --activations recompute",
    ):
        train.main(["--output", str(output), *config])
    monkeypatch.undo()
    train.main(["--output", str(output), *config, "--resume", "--activations", "recompute"])
    assert_equals(output, tmp_path / "whole")


def test_a_loss_that_is_not_a_number_changes_nothing_and_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    # one step at such a rate, and the next loss is NaN
    diverging = ["--learning-rate", "1e22", "--warmup-ratio", "0", "--max-bad-steps", "3"]
    diverging += ["--target-modules", "all-linear"]
    with pytest.raises(train.CannotGoOn, match=r"3 steps in a row .* step 4 with loss nan; its"):
        train.main(["--output", str(output), *flags(tmp_path, *diverging)])
    said = capsys.readouterr().out
    skipped = [f"step {n}: the gradients are not finite" in said for n in range(1, 5)]
    assert skipped == [False, True, True, True]
    # from step 1 on the adapter has stayed as it was
    first, third = (output / f"checkpoint-{n}" / ADAPTER for n in (1, 3))
    assert first.read_bytes() == third.read_bytes()
    record = json.loads((output / "bad-step-4.json").read_text())
    assert record["loss"] == "nan"
    assert record["samples"][0]["text"]


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    config = ["--output", str(tmp_path / "out"), *flags(tmp_path, "--max-steps", "3")]
    train.main(config)
    cut_off(tmp_path / "out")
    data = tmp_path / "data.jsonl"
    lines = data.read_text().splitlines()
    # of as many samples and steps
    data.write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(ValueError, match="must be given the same samples: those of train are not"):
        train.main([*config, "--resume"])
    data.write_text("\n".join(lines) + "\n")
    train.main([*config, "--resume"])


def test_a_state_beyond_the_runs_end_does_not_train_for_ever(tmp_path: Path) -> None:
    config = ["--output", str(tmp_path / "out"), *flags(tmp_path, "--max-steps", "3")]
    train.main(config)
    cut_off(tmp_path / "out")
    path = list_checkpoints(tmp_path / "out")[-1].rename(tmp_path / "out" / "checkpoint-1000000000")
    rewrite_state(path, {"step": 10**9})
    with pytest.raises(
        ValueError, match=r"is of step 1,000,000,000, and the run has 3 steps; start a"
    ):
        train.main([*config, "--resume"])


def test_a_damaged_row_of_metrics_does_not_end_the_run(tmp_path: Path) -> None:
    config = ["--output", str(tmp_path / "out"), *flags(tmp_path, "--max-steps", "3")]
    config += ["--sample-prompt", "who"]
    train.main(config)
    cut_off(tmp_path / "out")
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = tmp_path / "out" / name
        path.write_text("{}\n" + path.read_text())
    steps = [row["step"] for row in rows(tmp_path / "out")[1:]]
    train.main([*config, "--resume"])
    assert [row["step"] for row in rows(tmp_path / "out")] == steps
    assert (tmp_path / "out" / "samples.jsonl.damaged-1").is_file()


def test_an_error_of_the_user_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "--output", str(tmp_path / "out")]
    command += ["--target-modules", "q_porj"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --target-modules must be all-linear or names among")
    assert "Traceback" not in done.stderr
