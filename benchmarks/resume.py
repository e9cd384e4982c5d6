"""Train on a GPU, kill and resume, and compare with the run that was left alone.

    python -m benchmarks resume --model DIR --data FILE --json benchmarks/results/resume.h100.json

Three processes of train.py: one runs through; one is killed with SIGKILL as soon as its checkpoint
has appeared and it has gone on; the third resumes that. Losses, norms and the adapter's bytes must
be equal.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, head, write
from run.config import CONFIG_FILE

# these depend on the clock, or on what ran before
NOT_COMPARED = ("tokens_per_second", "peak_memory_bytes")


def rows_of(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start(flags: list[str], output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *flags, "--output", str(output), *more]
    return subprocess.Popen(command, cwd=ROOT)


def finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"train.py must succeed: got exit code {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a killed and resumed run.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    arguments = parser.parse_args()
    half = arguments.steps // 2
    flags = ["--model", arguments.model, "--data", arguments.data, *arguments.flags]
    flags += ["--max-steps", str(arguments.steps), "--save-steps", str(half)]
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        finish(start(flags, whole))
        victim = start(flags, broken)
        while len(rows_of(broken)) < half + 3:
            if victim.poll() is not None:
                raise RuntimeError(f"train.py must run until it is killed: got {victim.returncode}")
            time.sleep(0.05)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        num_rows_at_kill = len(rows_of(broken))
        finish(start(flags, broken, "--resume"))
        expected, actual = rows_of(whole), rows_of(broken)
        differing = [
            {"step": a["step"], "key": key, "whole": a[key], "resumed": b.get(key)}
            for a, b in zip(expected, actual, strict=True)
            for key in a
            if key not in NOT_COMPARED and a[key] != b.get(key)
        ]
        adapters = [(f / "adapter_model.safetensors").read_bytes() for f in (whole, broken)]
        config = json.loads((whole / CONFIG_FILE).read_text())
    record = head("resume", arguments.commit) | {
        "config": {k: v for k, v in config.items() if k not in ("model", "data", "output")},
        "killed_after_step": num_rows_at_kill,
        "resumed_from_step": half,
        "differing_values": differing,
        "adapter_bytes_equal": adapters[0] == adapters[1],
        "first_loss": expected[0]["loss"],
        "last_loss": expected[-1]["loss"],
        "peak_memory_bytes": expected[-1]["peak_memory_bytes"],
        "median_tokens_per_second": sorted(r["tokens_per_second"] for r in expected)[half],
        "losses": [round(row["loss"], 5) for row in expected],
    }
    write(arguments.json, record)
    is_equal = not differing and record["adapter_bytes_equal"]
    print(f"resumed run {'equals' if is_equal else 'DIFFERS FROM'} the uninterrupted one")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
