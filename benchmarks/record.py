"""The head of every result file: the machine and the versions that a figure belongs to."""

import json
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _output_of(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _device() -> dict[str, Any]:
    """Describe what computes: a GPU, or a CPU by the instructions that torch uses."""
    import torch

    if not torch.cuda.is_available():
        name = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
        return {"device": name, "driver": None, "cuda": None}
    query = "--query-gpu=driver_version"
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _output_of("nvidia-smi", query, "--format=csv,noheader").splitlines()[0],
        "cuda": torch.version.cuda,
    }


def head(benchmark: str, commit: str) -> dict[str, Any]:
    """Describe the device, the software and the commit.

    Args:
        commit: of the checkout that is measured; empty to ask git.
    """
    # the tables of files that exist are drawn without them
    import torch

    from kernels.language import triton

    return {
        "benchmark": benchmark,
        **_device(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or _output_of("git", "rev-parse", "HEAD"),
        # null where git cannot tell
        "dirty": None if commit else bool(_output_of("git", "status", "--porcelain")),
        "date": date.today().isoformat(),
    }


def text_of(record: dict[str, Any]) -> str:
    """Format a record as JSON, each of its rows on a line, so that a change reads as rows."""
    text = json.dumps({name: value for name, value in record.items() if name != "rows"}, indent=1)
    if "rows" in record:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
        text = text.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}'
    return text + "\n"


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(record))
    print(f"wrote {path}")
