"""One kernel as Triton's compiler is given it: a key, and what a test may ask of the code.

The key is that of Triton's own cache, but for two parts, so that equal keys mean equal code on
every machine: the numbers of a kernel's lines, which move with each line above it, and the bytes of
the compiler, which are others for each version of Python. Triton's version stands for those.
"""

import hashlib
import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import DependenciesFinder, JITCallable

# a thread's registers, its stack, and the static shared memory of a block, as cuobjdump names them
USED = ("REG", "STACK", "LOCAL", "SHARED")
# before a pattern: which text of the PTX it matches
FIND = "find "


@dataclass(frozen=True)
class Compilation:
    """A kernel with its types and constants, a GPU, and the options of the launch."""

    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]

    @property
    def configuration(self) -> str:
        """Everything but the kernel and the GPU, to be read."""
        source = self.source
        return repr((source.signature, source.constants, source.attrs, self.options))

    @cached_property
    def key(self) -> str:
        """Name the source, the options, Triton, ptxas, and what of the environment counts."""
        backend: Any = make_backend(self.target)
        constants = self.source.constants.items()
        parts = (
            triton.__version__,
            backend.hash(),
            backend.parse_options(dict(self.options)).hash(),
            *sorted(get_cache_invalidating_env_vars().items()),
            _source_key(self.source.fn),
            self.source.signature,
            self.source.attrs,
            *(_source_key(value) for _, value in constants if isinstance(value, JITCallable)),
            *constants,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @cached_property
    def code(self) -> Any:
        """Compile, or take what Triton's cache has on the disk."""
        return triton.compile(self.source, target=self.target, options=self.options)

    def answer(self, question: str) -> Any:
        """Ask the code: for `resources`, `instructions`, or what `find PATTERN` finds in the PTX.

        Answers are such that JSON keeps them.
        """
        if question == "resources":
            found = re.findall(r"(\w+):(\d+)", self._cuobjdump("-res-usage"))
            usage = {name: int(number) for name, number in found if name in USED}
            metadata = self.code.metadata
            return usage | {"DYNAMIC": metadata.shared, "WARPS": metadata.num_warps}
        if question == "instructions":
            return self._count_instructions()
        assert question.startswith(FIND), question
        # without what says where the source lies, which is elsewhere on each machine
        ptx = re.sub(r"//.*|^\s*\.file\b.*", "", self.code.asm["ptx"], flags=re.MULTILINE)
        matches = re.findall(question[len(FIND) :], ptx)
        return [[match, len(list(equal))] for match, equal in groupby(matches)]

    def _count_instructions(self) -> int:
        names = re.findall(
            r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", self._cuobjdump("-sass")
        )
        # subroutines lie behind the last exit: the slow paths of a division, for instance
        return len(names) - names[::-1].index("EXIT")

    def _cuobjdump(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.code.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, option, file.name]
            # it warns of an old format each time
            return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


class _SourceFinder(DependenciesFinder):
    """Triton's reader of a function and of all that it calls, for sources without line numbers."""

    def _update_hash(self, func: JITCallable) -> None:
        self.hasher.update(_source_key(func).encode())


@cache
def _source_key(function: JITCallable) -> str:
    """Name the source of a function, of all that it calls, and the constants that they read."""
    nonlocals = inspect.getclosurevars(function.fn).nonlocals
    finder = _SourceFinder(function.__name__, function.__globals__, nonlocals, function.src)
    finder.visit(function.parse())
    read = finder.used_global_vals.items()
    constants = sorted((name, repr(value)) for (name, _), (value, _) in read)
    return f"{finder.ret} {constants} {getattr(function, 'noinline', False)}"
