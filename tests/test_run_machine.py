"""run/machine.py: which device and dtype are chosen, and what a GPU is too old for."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.ahead_of_time import SHARED_BYTES_LIMIT
from support.door_process import ROOT

import kernels.device
import run.machine
from kernels.device import Properties
from run.machine import choose_device, choose_dtype, describe_device, has_bfloat16, why_no_gpu

GPUS = {
    (7, 0): "Tesla V100",
    (7, 5): "Tesla T4",
    (8, 0): "NVIDIA A100",
    (9, 0): "NVIDIA H100",
    (12, 1): "NVIDIA GB10",
}


def install_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Let torch see one GPU, of which nothing runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPUS[capability])
    # too old a GPU has no facts here
    shared_bytes = SHARED_BYTES_LIMIT.get(10 * capability[0] + capability[1], 0)
    facts = Properties(capability, 1, shared_bytes)
    monkeypatch.setattr(kernels.device, "_properties_of_gpu", lambda device: facts)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 1)], ids=str)
def test_a_gpu_that_has_kernels_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    install_gpu(monkeypatch, capability)
    assert choose_device(name) == "cuda"


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_is_too_old_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    install_gpu(monkeypatch, (7, 0))
    with pytest.raises(ValueError, match=r"^a GPU must have .* 7\.5 or later") as refusal:
        choose_device(name)
    assert str(refusal.value).endswith(": Tesla V100 has 7.0; choose --device cpu")
    assert "\n" not in str(refusal.value)
    assert choose_device("cpu") == "cpu"


def test_a_process_looks_at_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = [(8, 0), (7, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert choose_device("auto", 0) == "cuda"
    with pytest.raises(ValueError, match=r"has 7\.0; choose --device cpu$"):
        choose_device("auto", 1)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 1), "bfloat16")],
    ids=str,
)
def test_the_dtype_is_bfloat16_where_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    install_gpu(monkeypatch, capability)
    assert choose_dtype("auto", "cuda") == dtype
    assert has_bfloat16("cuda") == (dtype == "bfloat16")
    for given in ("float32", "float16"):
        assert choose_dtype(given, "cuda") == given


def test_bfloat16_is_refused_where_the_gpu_does_not_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_gpu(monkeypatch, (7, 5))
    with pytest.raises(
        ValueError,
        match=r"^--dtype bfloat16 must .* 8\.0 or later: Tesla T4 has 7\.5; .* --dtype float16$",
    ):
        choose_dtype("bfloat16", "cuda")
    assert choose_dtype("bfloat16", "cpu") == "bfloat16"


def test_on_a_cpu_the_dtype_is_float32() -> None:
    assert choose_dtype("auto", "cpu") == "float32"
    assert not has_bfloat16("cpu")


def too_old() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found 11040).\nUpdate it")


NO_CUDA = "there is an NVIDIA GPU, but torch 2.13.0+cpu is a build without CUDA"
OLD_DRIVER = "torch cannot use the NVIDIA GPU: The NVIDIA driver on your system is too old (found"
UNUSED = {
    # devices in /dev, the CUDA of torch, CUDA_VISIBLE_DEVICES, what its start does
    "no GPU": (["nvidiactl", "null"], None, None, lambda: None, "no NVIDIA GPU"),
    "no GPU and CUDA": ([], "13.0", None, too_old, "no NVIDIA GPU"),
    "a build without CUDA": (["nvidia0"], None, "", lambda: None, NO_CUDA),
    "hidden": (["nvidia0"], "13.0", "", too_old, "CUDA_VISIBLE_DEVICES='' hides the NVIDIA GPU"),
    "an old driver": (["nvidia3"], "13.0", None, too_old, f"{OLD_DRIVER} 11040)."),
    "an unknown reason": (
        ["nvidia0"],
        "13.0",
        None,
        lambda: None,
        "torch cannot use the NVIDIA GPU",
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_a_cpu_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    devices, cuda, visible, start, reason = UNUSED[case]
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(run.machine, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", start)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert why_no_gpu() == reason
    assert describe_device("cpu") == f"CPU ({reason})"
    with pytest.raises(ValueError, match=r"^--device cuda must find a GPU that torch can use: "):
        choose_device("cuda")


def test_a_gpu_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch, (8, 0))
    properties = SimpleNamespace(name="NVIDIA A100", total_memory=(79 << 30) + (1 << 28))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert describe_device("cuda") == "NVIDIA A100, 79.2 GiB"
    assert describe_device("cpu") == "CPU (--device cpu)"


def test_the_gpu_of_a_plan_counts_in_place_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch, (9, 0))
    assert has_bfloat16("cuda", (8, 0))
    assert not has_bfloat16("cuda", (7, 5))
    assert choose_dtype("auto", "cuda", (7, 5)) == "float16"
    with pytest.raises(ValueError, match=r"8\.0 or later: --gpu has 7\.5; choose --dtype float16$"):
        choose_dtype("bfloat16", "cuda", (7, 5))


def test_setting_torch_up_imports_no_compiler() -> None:
    """torch.use_deterministic_algorithms would: five seconds of every start on a GPU."""
    script = (
        "import sys, torch\n"
        "from run.machine import configure_torch\n"
        "for is_deterministic in (True, False):\n"
        "    configure_torch(torch.device('cuda'), 0, is_deterministic)\n"
        "    assert torch.are_deterministic_algorithms_enabled() == is_deterministic\n"
        "    assert not torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "sys.exit(int('torch._inductor' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
