"""kernels/launch.py: what is launched, and what a refusal says."""

from unittest.mock import MagicMock

import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels.launch import KernelDoesNotFit, launch


def test_a_kernel_gets_its_grid_and_arguments() -> None:
    kernel = MagicMock()
    x = torch.zeros(1)
    launch(kernel, (2, 3), n=4, x_ptr=x, BLOCK=5)
    kernel.__getitem__.assert_called_once_with((2, 3))
    kernel[2, 3].assert_called_once_with(n=4, x_ptr=x, BLOCK=5)


def test_of_tensors_without_values_nothing_is_launched() -> None:
    kernel = MagicMock()
    launch(kernel, (1,), n=4, x_ptr=torch.zeros(1, device="meta"))
    assert not kernel.mock_calls


def test_a_grid_that_no_gpu_has_is_a_bug() -> None:
    kernel = MagicMock()
    launch(kernel, (1 << 20, 65_535), x_ptr=torch.zeros(1))
    with pytest.raises(AssertionError):
        launch(kernel, (1, 65_536), x_ptr=torch.zeros(1))


def test_a_kernel_that_does_not_fit_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = MagicMock(__name__="_wide_kernel")
    kernel.__getitem__.return_value.side_effect = OutOfResources(70_000, 65_536, "shared memory")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(
        KernelDoesNotFit,
        match=r"_wide_kernel must fit.*70,000 of shared memory, Tesla T4 has 65,536",
    ):
        launch(kernel, (1,), x_ptr=torch.zeros(1))
