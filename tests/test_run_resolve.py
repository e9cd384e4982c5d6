"""run/resolve.py: what defaults mean on a GPU that is not there."""

from dataclasses import replace

import pytest
import torch
from test_run_machine import install_gpu

from optim.loss_scale import LossScale
from run.config import TrainConfig
from run.resolve import resolve

CONFIG = TrainConfig(model="m", data="d", device="cuda")


@pytest.mark.parametrize(
    ("capability", "packing", "dtype", "is_scaled"),
    [((7, 5), False, "float16", True), ((8, 0), True, "bfloat16", False)],
    ids=str,
)
def test_a_gpu_without_bfloat16_does_not_pack_and_scales_its_loss(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    packing: bool,
    dtype: str,
    is_scaled: bool,
) -> None:
    install_gpu(monkeypatch, capability)
    config = resolve(CONFIG, positions=4096)
    assert (config.device, config.packing, config.dtype) == ("cuda", packing, dtype)
    scale = LossScale.for_dtype(getattr(torch, config.dtype), torch.device("cpu"))
    assert scale.is_dynamic == is_scaled


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)], ids=str)
@pytest.mark.parametrize("packing", [False, True], ids="packing-{}".format)
def test_rows_are_shared_as_asked_for_on_any_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], packing: bool
) -> None:
    install_gpu(monkeypatch, capability)
    assert resolve(replace(CONFIG, packing=packing), positions=4096).packing == packing


def test_rows_are_not_shared_by_default_on_a_cpu_or_where_lengths_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not resolve(replace(CONFIG, device="cpu"), positions=4096).packing
    install_gpu(monkeypatch, (9, 0))
    assert not resolve(replace(CONFIG, group_by_length=True), positions=4096).packing
    assert not resolve(CONFIG, positions=4096, packable=1024).packing


@pytest.mark.parametrize(
    ("capability", "packing", "dtype"), [((7, 5), False, "float16"), ((8, 6), True, "bfloat16")]
)
def test_the_gpu_of_a_plan_need_not_be_there(
    capability: tuple[int, int], packing: bool, dtype: str
) -> None:
    asked = replace(CONFIG, device="auto", plan=True, max_memory="24GiB", activations="offload")
    config = resolve(asked, positions=4096, planned=capability)
    assert (config.device, config.packing, config.dtype) == ("cuda", packing, dtype)
    with pytest.raises(ValueError, match="--device cpu must be given without --gpu"):
        resolve(replace(asked, device="cpu"), positions=4096, planned=capability)
