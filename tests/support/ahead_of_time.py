"""Compiles kernels for GPUs that are not there, exactly as their launchers would launch them.

A recorder in the place of `kernels.launch.launch` takes what the launcher passes; from that the
compiler's input is made as `triton.jit` makes it: types, constants, and which arguments are
multiples of 16. Launches of other kernels, which the same launcher may make, are let go. What the
compiler made of most launches is known (`compiled_record.py`), and they are not compiled again.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.compilation import FIND, Compilation
from support.compiled_kernels import Resources, note_compiled
from support.compiled_record import RECORD, Launch, running_tests
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# bytes of shared memory that a block may have, by compute capability: CUDA programming guide,
# "Technical Specifications per Compute Capability"
SHARED_BYTES_LIMIT = {
    75: 64 << 10,
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}
# what a block that uses shared memory gives up to the system; from sm_90 on cuobjdump counts it
# among the block's own, the limits above do not
RESERVED_SHARED_BYTES = {
    capability: (1 << 10) * (capability >= 90) for capability in SHARED_BYTES_LIMIT
}
# the GPUs that a kernel is compiled for, by the dtype that it computes in. sm_86 and sm_89 have the
# products of sm_80 and the shared memory of sm_120, sm_121 has both of sm_120: one dtype does for
# those. There are no products of bfloat16 on sm_75
GPUS = {
    torch.float32: (75, 80, 90, 100, 120),
    torch.float16: (75, 80, 90, 100, 120),
    torch.bfloat16: (80, 86, 89, 90, 100, 120, 121),
}
# what a product of 16-bit tiles becomes; Triton knows no tensor cores for sm_75
TENSOR_CORE_INSTRUCTION = {
    75: None,
    80: "mma.sync.aligned.m16n8k16",
    86: "mma.sync.aligned.m16n8k16",
    89: "mma.sync.aligned.m16n8k16",
    90: "wgmma.mma_async.sync.aligned",
    100: "tcgen05.mma.cta_group::1.kind::f16",
    120: "mma.sync.aligned.m16n8k16",
    121: "mma.sync.aligned.m16n8k16",
}
REGISTERS_LIMIT = 64 << 10
WARP_SIZE = 32


def on_each_gpu(
    dtypes: Iterable[torch.dtype], gpus: Mapping[torch.dtype, Iterable[int]] = GPUS
) -> pytest.MarkDecorator:
    """Run a test of a dtype and a capability with all that go together."""
    pairs = [(dtype, capability) for dtype in dtypes for capability in gpus[dtype]]
    ids = [f"{str(dtype)[6:]}-sm{capability}" for dtype, capability in pairs]
    return pytest.mark.parametrize(("dtype", "capability"), pairs, ids=ids)


@dataclass(frozen=True)
class CompiledLaunch(Resources):
    """One compiled kernel, and what it takes of a multiprocessor."""

    kernel: str
    num_threads: int
    _launch: Launch = field(repr=False)
    _compilation: Compilation = field(repr=False)

    def find(self, pattern: str) -> list[str]:
        """`re.findall` in the PTX."""
        matches = self._launch.ask(FIND + pattern, self._compilation.answer)
        return [match for match, number in matches for _ in range(number)]

    def count_instructions(self) -> int:
        """Count what a thread executes at most, in code that has no loop."""
        return self._launch.ask("instructions", self._compilation.answer)

    def assert_fits(self, capability: int, spilled_bytes: int = 0) -> None:
        """It spills nothing, or no more than is known, and can be launched."""
        assert self.stack_bytes <= spilled_bytes, (
            f"{self.stack_bytes} bytes of registers are spilled"
        )
        assert self.registers * self.num_threads <= REGISTERS_LIMIT
        assert self.shared_bytes <= SHARED_BYTES_LIMIT[capability]

    def assert_multiplies_as(self, instruction: str | None) -> None:
        """Its products are this instruction of the tensor cores, or none."""
        found = set(self.find(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S+"))
        assert bool(found) == bool(instruction), found
        assert all(name.startswith(instruction or "") for name in found), found


@dataclass
class _Recorder:
    """Stands for `kernels.launch.launch`: takes the launch of one kernel and runs none."""

    kernel: Any
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, kernel: Any, grid: object, **arguments: Any) -> None:
        if kernel is self.kernel:
            self.arguments = arguments


def compile_launch(
    module: ModuleType,
    kernel_name: str,
    launch: Callable[[], object],
    capability: int,  # 90 is sm_90
    **options: int,  # of the compiler, in place of the launcher's
) -> CompiledLaunch:
    """Compile the kernel that `launch` launches, for a GPU of the given capability."""
    kernel = getattr(module, kernel_name)
    recorder = _Recorder(kernel)
    with ExitStack() as stack:
        # a launcher may go on to launch a kernel of another file
        files = [file for name, file in sys.modules.items() if name.startswith("kernels.")]
        for owner in {module, *files}:
            if hasattr(owner, "launch"):
                stack.enter_context(patch.object(owner, "launch", recorder))
        launch()
    names: list[str] = kernel.arg_names
    values = dict(recorder.arguments)
    options = {name: values.pop(name) for name in list(values) if name not in names} | options
    constexprs = {param.name for param in kernel.params if param.is_constexpr}
    plain = {param.name for param in kernel.params if param.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        # triton makes a constant of an integer that is 1
        if name in constexprs or (isinstance(value, int) and value == 1 and name not in plain):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        if isinstance(value, TensorDescriptor):
            kind = f"{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}"
            signature[name] = f"tensordesc<{kind}>"
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPE_NAMES[value.dtype]}"
            number = value.data_ptr()
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            number = value
        if number % 16 == 0 and name not in plain:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compilation = Compilation(source, GPUTarget("cuda", capability, WARP_SIZE), options)
    launched = RECORD.look_up(
        Launch(
            running_tests(), kernel_name, capability, compilation.configuration, compilation.key
        ),
        compilation.answer,
    )
    used = launched.ask("resources", compilation.answer)
    static_shared = max(used["SHARED"] - RESERVED_SHARED_BYTES[capability], 0)
    resources = Resources(
        registers=used["REG"],
        # triton's own is dynamic; inline PTX may declare static memory beside it
        shared_bytes=used["DYNAMIC"] + static_shared,
        stack_bytes=max(used["STACK"], used["LOCAL"]),
    )
    note_compiled(kernel_name, capability, compilation.configuration, resources)
    return CompiledLaunch(
        **asdict(resources),
        kernel=kernel_name,
        num_threads=used["WARPS"] * WARP_SIZE,
        _launch=launched,
        _compilation=compilation,
    )
