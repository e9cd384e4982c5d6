"""The support files that compile kernels: all shared memory is counted, and the table is read."""

import sys
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from support import compiled_kernels
from support.ahead_of_time import SHARED_BYTES_LIMIT, compile_launch
from support.compiled_kernels import Resources, note_compiled, resource_table

from kernels.launch import launch


@triton.jit
def _exchange_kernel(x_ptr, STATIC: tl.constexpr, DYNAMIC: tl.constexpr):
    offs = tl.arange(0, 128)
    x = tl.load(x_ptr + offs)
    if STATIC:
        x = tl.inline_asm_elementwise(
            """{
            .shared .align 16 .b8 buffer[4096];
            .reg .u32 address;
            mov.u32 address, buffer;
            st.shared.b32 [address], $1;
            ld.shared.b32 $0, [address + 64];
            }""",
            "=r,r",
            [x],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    if DYNAMIC:
        # a sum over 4 warps
        x += tl.sum(x, 0)
    tl.store(x_ptr + offs, x)


@pytest.mark.usefixtures("unrecorded")
@pytest.mark.parametrize("capability", SHARED_BYTES_LIMIT, ids="sm{}".format)
def test_static_shared_memory_is_counted_beside_dynamic(capability: int) -> None:
    def exchange(static: bool, dynamic: bool) -> None:
        x = torch.empty(128, dtype=torch.int32)
        launch(
            _exchange_kernel, (1,), x_ptr=x, STATIC=static, DYNAMIC=dynamic, enable_fp_fusion=True
        )

    with patch.object(compiled_kernels, "_COMPILED", {}):
        shared = {
            (static, dynamic): compile_launch(
                sys.modules[__name__],
                "_exchange_kernel",
                lambda static=static, dynamic=dynamic: exchange(static, dynamic),
                capability,
            ).shared_bytes
            for static in (False, True)
            for dynamic in (False, True)
        }
    # four partial sums
    assert shared[False, False] == 0
    assert shared[False, True] == 16
    assert shared[True, False] == 4096
    assert shared[True, True] == 4112


def test_table_shows_the_most_that_a_configuration_takes() -> None:
    with patch.object(compiled_kernels, "_COMPILED", {}):
        assert list(resource_table()) == []
        note_compiled("_long_kernel", 90, "a", Resources(40, 2048, 0))
        note_compiled("_long_kernel", 90, "b", Resources(64, 0, 8))
        note_compiled("_long_kernel", 90, "b", Resources(64, 0, 8))
        note_compiled("_long_kernel", 100, "a", Resources(32, 0, 0))
        note_compiled("_a_kernel", 90, "a", Resources(255, 0, 0))
        cells = [line.split() for line in list(resource_table())[1:]]
    assert cells == [
        ["_a_kernel", "sm_90", "1", "255", "0", "0"],
        ["_long_kernel", "sm_90", "2", "64", "2048", "8"],
        ["_long_kernel", "sm_100", "1", "32", "0", "0"],
    ]
