"""step/compiling.py and kernels/ahead.py: kernels are compiled before they are launched, once."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from support.door_process import ROOT

from kernels.ahead import compile_ahead
from kernels.device import H200
from kernels.rms_norm import rms_norm
from step.compiling import compiling_beside

# compiles in processes beside it what a walk launches, and says when the body ran
WALK = """
import torch
from kernels.device import H200, meta_stands_for
from kernels.rms_norm import rms_norm
from step.compiling import compiling_beside

# torch computes with threads that a forked process has not
torch.set_num_threads(2)
numbers = torch.ones(1 << 20)

def walk():
    numbers.exp()
    with meta_stands_for(H200):
        for width in (64, 576, 64, 576):
            x = torch.empty(32, width, dtype=torch.bfloat16, device="meta")
            rms_norm(x, x[0], 1e-5)

def stop():
    walk()
    raise OSError("of one process alone")

numbers.exp()
with compiling_beside({walk}, H200):
    print("body")
"""

# the same for a run's step on a GPU, and then takes the step
STEP = """
import os
from pathlib import Path
import torch
from benchmarks.random_model import LLAMA_3_8B, random_model
from dataclasses import replace
from llama.model import PROJECTIONS
from lora.config import LoRAConfig
from functools import partial
from optim.adamw import AdamW
from optim.unified_memory import paged_memory
from optim.arena import GradientArena
from rows.batch import Batch
from step.compiling import compiling_beside
from step.micro_step import MicroStep
from step.walk import StepWalk
from step.workload import Workload

CUDA = torch.device("cuda")
CACHE = os.environ["TRITON_CACHE_DIR"]
config = replace(LLAMA_3_8B, num_hidden_layers=2, windows=(None,) * 2, vocab_size=4096)

paged = partial(paged_memory, residency="device")

def made(device):
    model = random_model(config, device)
    model.attach_lora(LoRAConfig(16, 32.0, 0.1, PROJECTIONS), seed=0)
    return model, GradientArena({n: p for n, p in model.named_parameters() if p.requires_grad})

def compiled():
    # kernels, and the launchers of those Tritons that compile them
    files = [f for kind in ("cubin", "so") for f in Path(CACHE).rglob(f"*.{kind}")]
    return sorted(file.name for file in files if "cuda_utils" not in file.name)

sizes, gradients = made(torch.device("meta"))
work = Workload(sizes, 8.0, batch=2, tokens=512, evaluation=(2, 256), device=CUDA)
policies = ("keep", "recompute")

def walk():
    StepWalk(work).events(policies)
    AdamW(gradients, weight_decay=0.0, memory=paged).step(0.0)

with compiling_beside(walk, work.gpu):
    model, own = made(CUDA)
before = compiled()
step = MicroStep(model, own, policies, captures=True)
for tokens in (512, 512, 384, 64):
    ids = torch.ones(2, tokens, dtype=torch.int64)
    step(Batch(ids, ids), torch.ones((), device=CUDA))
ids = torch.ones(2, 256, dtype=torch.int64)
step.evaluate(Batch(ids, ids))
AdamW(own, weight_decay=0.0).step(0.0)
torch.cuda.synchronize()
print(len(before), "then", [name for name in compiled() if name not in before], len(compiled()))
"""
# and a step whose evaluations alone multiply in 16 bits
FP8_STEP = STEP.replace(
    "    model.attach_lora(", "    model.multiply_in_8_bits(E4M3)\n    model.attach_lora("
)


def run(script: str, cache: Path) -> str:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process.stdout


@pytest.mark.parametrize("walk", ["walk", "stop"])
def test_what_a_walk_launches_is_compiled_once(tmp_path: Path, walk: str) -> None:
    assert run(WALK.format(walk=walk), tmp_path) == "body\n"
    # of two widths, in as many processes as there are cores
    assert len(list(tmp_path.rglob("_rms_norm_kernel.cubin"))) == 2


def test_a_process_without_a_share_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(4, 64, device="meta")
    # neither a launch of its own nor the compiler is reached
    rms_norm(x, x[0], 1e-5)
    compile_ahead(None, (1,), {})


def test_without_room_for_processes_the_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    has_run = False
    with compiling_beside(lambda: None, H200):
        has_run = True
    assert has_run


@pytest.mark.gpu
@pytest.mark.parametrize("step", [STEP, FP8_STEP], ids=["bf16", "fp8"])
def test_gpu_finds_all_kernels_of_a_step_compiled(tmp_path: Path, step: str) -> None:
    num_before, later = run(step, tmp_path).split(" then ")
    assert int(num_before) > 20
    assert later == f"[] {num_before}\n"
