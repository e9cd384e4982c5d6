"""step/gpus.py: GPUs by the names that people type, their facts, and the records of their rates."""

import json
from statistics import median

import pytest
import torch
from conftest import ROOT
from support.ahead_of_time import SHARED_BYTES_LIMIT

from kernels.device import properties
from run.machine import OLDEST
from step.duration import measure_rates
from step.gpus import GPUS, Gpu, find_gpu, smallest_with, unnamed_gpu
from step.memory_plan import CONTEXT_BYTES, GIB
from step.preflight import usable_bytes

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("a100-80gb", "A100-80"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80 PCIe"),
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("tesla t4", "T4"),
        ("l40s", "L40S"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("a6000", "RTX A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000"),
        ("RTX 5060 Ti 16GB", "RTX 5060 Ti 16"),
    ],
)
def test_a_gpu_is_found_as_people_write_it(typed: str, name: str) -> None:
    assert find_gpu(typed).name == name


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("a100", "nearest: A100-40, A100-80, A100-80 PCIe"),
        ("rtx 6000", "nearest: RTX 6000 Ada, RTX A6000, RTX PRO 6000"),
        ("4091", "nearest: RTX 4090"),
        ("mi300", "there are: RTX 4060, .*, H200"),
        ("", "there are: RTX 4060, "),
    ],
)
def test_an_unknown_gpu_is_answered_with_those_like_it(typed: str, answer: str) -> None:
    with pytest.raises(ValueError, match=f"got '{typed}'; {answer}") as refusal:
        find_gpu(typed)
    assert str(refusal.value).endswith("; for another one give --max-memory")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("label", "gpu"), GPUS, ids=[gpu.name for _, gpu in GPUS])
def test_a_run_may_take_a_little_less_than_the_label_says(label: int, gpu: Gpu) -> None:
    assert find_gpu(gpu.name) == find_gpu(f"{gpu.name} {label} GB") == gpu
    assert 0.85 * label * GIB < gpu.budget < 0.98 * label * GIB
    capability = gpu.facts.capability
    assert capability >= OLDEST
    assert gpu.facts.shared_bytes == SHARED_BYTES_LIMIT[10 * capability[0] + capability[1]]


def test_the_smallest_gpu_comes_first() -> None:
    budgets = [gpu.budget for _, gpu in GPUS]
    assert budgets == sorted(budgets)
    for least in (GIB, 23 * GIB, 60 * GIB):
        found = smallest_with(least)
        assert found is not None
        assert found.budget >= least
        assert all(gpu.budget < least for _, gpu in GPUS if gpu.budget < found.budget)
    assert smallest_with(budgets[-1]) == GPUS[-1][1]
    assert smallest_with(budgets[-1] + 1) is None


def test_the_page_lists_all_gpus() -> None:
    head = ["| `--gpu` | memory for a run | compute capability | time |", "|---|---|---|---|"]
    lines = [
        f"| {gpu.name} | {gpu.budget / GIB:.1f} GiB | {'.'.join(map(str, gpu.facts.capability))} | "
        f"{'yes' if gpu.rates else 'no'} |"
        for _, gpu in GPUS
    ]
    expected = "\n".join([*head, *lines])
    text = (ROOT / "docs" / "memory.md").read_text()
    found = text.partition("<!-- gpus -->\n")[2].partition("\n<!-- /gpus -->")[0]
    assert found == expected, f"put this between the markers:\n{expected}"


def test_rates_are_those_of_the_records() -> None:
    records = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    known = {gpu.name: gpu.rates for _, gpu in GPUS if gpu.rates}
    assert known.keys() == {"H100", "H200"}

    def of(device: str, key: str) -> float:
        return median(r[key] for r in records if r["device"] == device and key in r)

    h100 = "NVIDIA H100 80GB HBM3"
    assert known["H100"].product == pytest.approx(1e12 * of(h100, "matmul_tflops"), rel=0.005)
    assert known["H100"].memory == pytest.approx(1e9 * of(h100, "copy_gbps"), rel=0.005)
    assert known["H200"].memory == pytest.approx(1e9 * of("NVIDIA H200", "copy_gbps"), rel=0.005)


def test_of_a_gpu_without_a_name_the_memory_is_known() -> None:
    gpu = unnamed_gpu(24 * GIB)
    assert (gpu.budget, gpu.rates, gpu.facts.capability) == (24 * GIB, None, (9, 0))


@pytest.mark.gpu
def test_gpu_that_is_here_is_as_the_table_says() -> None:
    device = torch.device("cuda")
    try:
        gpu = find_gpu(torch.cuda.get_device_name())
    except ValueError:
        pytest.skip(f"{torch.cuda.get_device_name()} is not in the table")
    assert gpu.facts == properties(device)
    total = torch.cuda.get_device_properties(device).total_memory
    usable = usable_bytes(total - CONTEXT_BYTES)
    assert 0.97 * usable < gpu.budget <= usable
    if gpu.rates:
        measured = measure_rates(device, torch.bfloat16)
        # one shape of a product, against the mean of several
        assert gpu.rates.product == pytest.approx(measured.product, rel=0.15)
        # the records' copies are of gigabytes; one of 64 MiB reached 3.86 TB/s on an H200, not 4.24
        assert gpu.rates.memory == pytest.approx(measured.memory, rel=0.15)
