"""train.py killed with SIGKILL, while it trains and while it saves: nothing is lost."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS, SAVE_STEPS = 24, 2
CLOCK = ("tokens_per_second", "peak_memory_bytes")


def start(output: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--output", str(output), "--device", "cpu"]
    command += ["--batch-size", "2", "--max-steps", str(NUM_STEPS)]
    command += ["--save-steps", str(SAVE_STEPS), "--lora-dropout", "0.1", "--eval-data", ""]
    command += ["--sample-prompt", "", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    return said.decode()


def kill_when(process: subprocess.Popen, is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not is_time():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "the moment to kill never came"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def rows(output: Path) -> list[dict[str, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def num_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    finish(start(output))
    return output


def test_killed_while_training_and_while_saving_it_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    kill_when(start(output), lambda: num_lines(output / "metrics.jsonl") >= 5)
    for _ in range(5):
        process = start(output, "--resume")
        kill_when(process, lambda: any(output.glob("checkpoint-*.partial")))
        # killed inside the save, if the half-written checkpoint is still there; a save that was
        # quicker than the signal is tried again
        partial = next(output.glob("checkpoint-*.partial"), None)
        if partial is not None:
            break
    assert partial is not None
    step = int(partial.stem.removeprefix("checkpoint-"))
    assert not (output / f"checkpoint-{step}").exists()
    said = finish(start(output, "--resume"))
    assert f"checkpoint-{step - SAVE_STEPS}: {step - SAVE_STEPS} steps done" in said
    assert not partial.exists()
    assert rows(output) == rows(whole)
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_an_error_of_the_user_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "--target-modules", "q_porj")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said.decode().startswith("error: --target-modules must be all-linear or names among")
    assert "Traceback" not in said.decode()
