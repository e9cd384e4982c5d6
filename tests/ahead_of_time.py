"""Compiles kernels for GPUs that are not there, exactly as their launchers would launch them.

A recorder in the kernel's place takes what the launcher passes; from that the compiler's input is
made as `triton.jit` makes it: types, constants, and which arguments are multiples of 16.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int64: "i64",
}
# bytes of shared memory that a block may have, by compute capability: CUDA programming guide,
# "Technical Specifications per Compute Capability"
SHARED_BYTES_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS_LIMIT = 64 << 10
WARP_SIZE = 32


@dataclass(frozen=True)
class CompiledLaunch:
    """One compiled kernel, and what it takes of a multiprocessor."""

    num_threads: int
    registers: int  # of a thread
    shared_bytes: int  # of a block
    stack_bytes: int  # of a thread: what did not fit the registers lies there
    ptx: str = field(repr=False)

    def assert_fits(self, capability: int) -> None:
        """It spills nothing and can be launched."""
        assert self.stack_bytes == 0, f"{self.stack_bytes} bytes of registers are spilled"
        assert self.registers * self.num_threads <= REGISTERS_LIMIT
        assert self.shared_bytes <= SHARED_BYTES_LIMIT[capability]


@dataclass
class _Recorder:
    """Stands for a kernel: takes one launch and does not run it."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            self.args, self.kwargs = args, kwargs

        return record


def compile_launch(
    module: ModuleType,
    kernel_name: str,
    launch: Callable[[], object],
    capability: int,  # 90 is sm_90
    **options: int,  # of the compiler, in place of the launcher's
) -> CompiledLaunch:
    """Compile the kernel that `launch` launches, for a GPU of the given capability."""
    kernel = getattr(module, kernel_name)
    recorder = _Recorder()
    with patch.object(module, kernel_name, recorder):
        launch()
    names: list[str] = kernel.arg_names
    values = dict(zip(names, recorder.args, strict=False)) | recorder.kwargs
    options = {name: values.pop(name) for name in list(values) if name not in names} | options
    constexprs = {param.name for param in kernel.params if param.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        # triton makes a constant of an integer that is 1
        if name in constexprs or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, Tensor)
        signature[name] = f"*{TYPE_NAMES[value.dtype]}" if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, WARP_SIZE),
        options=options,
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return CompiledLaunch(
        num_threads=compiled.metadata.num_warps * WARP_SIZE,
        registers=usage["REG"],
        shared_bytes=compiled.metadata.shared,
        stack_bytes=max(usage["STACK"], usage["LOCAL"]),
        ptx=compiled.asm["ptx"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.check_output(command, text=True)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}
