"""kernels/constants.py: a table is made once, and never while a pass runs."""

import pytest
import torch
from torch import Tensor

from kernels.constants import constant, no_new_constants


def test_a_table_is_made_once_for_its_arguments() -> None:
    calls = []

    @constant
    def table(size: int, device: torch.device) -> Tensor:
        calls.append(size)
        return torch.zeros(size, device=device)

    cpu = torch.device("cpu")
    first = table(2, cpu)
    assert table(2, cpu) is first
    assert table(3, cpu).shape == (3,)
    assert calls == [2, 3]


def test_a_pass_takes_tables_and_makes_none() -> None:
    calls = []

    @constant
    def table(size: int) -> int:
        calls.append(size)
        return size

    table(1)
    with no_new_constants():
        with no_new_constants():
            assert table(1) == 1
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"made before a pass.*table\(2,\) was not"):
                table(2)
    assert table(2) == 2
    assert calls == [1, 2]
