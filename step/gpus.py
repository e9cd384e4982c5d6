"""The GPUs that a run can be planned for where they are not there, by the names that people type.

    4090, rtx4090, "NVIDIA GeForce RTX 4090"    a100-80, A100-80GB, "NVIDIA A100 80GB PCIe"

The memory is the least that torch told users of each card, as they published it in error messages
and lists of properties: less than the label says, by what the driver and error correction take. A
desktop on the same GPU takes some hundreds of MiB more. Multiprocessors and compute capability are
the vendor's, shared memory is that of the CUDA programming guide.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from kernels.device import H200, Properties
from step.duration import Rates
from step.memory_plan import CONTEXT_BYTES, GIB
from step.preflight import usable_bytes

# shared memory that one program may have, by compute capability
_SHARED_BYTES = {
    (7, 5): 64 << 10,
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (12, 0): 99 << 10,
}
# what tells no two of these GPUs apart
_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|rtx|hbm\d*e?|sxm\d*|generation|blackwell|"
    r"max-q|workstation|server|edition|gi?b|[^a-z0-9]"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU that may be elsewhere.

    Attributes:
        budget: bytes of it that a run may take.
        rates: as `step.duration.measure_rates` would find them; None where nobody measured them.
    """

    name: str
    facts: Properties
    budget: int
    rates: Rates | None = None


def _gpu(
    name: str,
    total: float,  # GiB
    capability: tuple[int, int],
    num_multiprocessors: int,
    rates: Rates | None = None,
) -> Gpu:
    facts = Properties(capability, num_multiprocessors, _SHARED_BYTES[capability])
    return Gpu(name, facts, usable_bytes(int(total * GIB) - CONTEXT_BYTES), rates)


# by the GB on its label
GPUS: tuple[tuple[int, Gpu], ...] = (
    (8, _gpu("RTX 4060", 7.7, (8, 9), 24)),
    (10, _gpu("RTX 3080", 9.7, (8, 6), 68)),
    (11, _gpu("RTX 2080 Ti", 10.7, (7, 5), 68)),
    (12, _gpu("RTX 3060", 11.6, (8, 6), 28)),
    (16, _gpu("T4", 14.5, (7, 5), 40)),
    (16, _gpu("RTX 5060 Ti 16", 15.4, (12, 0), 36)),
    (16, _gpu("RTX A4000", 15.5, (8, 6), 48)),
    (16, _gpu("RTX 4080", 15.5, (8, 9), 76)),
    (24, _gpu("A10", 22.0, (8, 6), 72)),
    (24, _gpu("A10G", 22.0, (8, 6), 80)),
    (24, _gpu("L4", 22.0, (8, 9), 58)),
    (24, _gpu("RTX 3090", 23.5, (8, 6), 82)),
    (24, _gpu("RTX 4090", 23.5, (8, 9), 128)),
    (24, _gpu("A30", 23.5, (8, 0), 56)),
    (32, _gpu("RTX 5090", 31.3, (12, 0), 170)),
    (40, _gpu("A100-40", 39.3, (8, 0), 108)),
    (48, _gpu("A40", 44.3, (8, 6), 84)),
    (48, _gpu("L40", 44.3, (8, 9), 142)),
    (48, _gpu("L40S", 44.3, (8, 9), 142)),
    (48, _gpu("RTX 6000 Ada", 44.4, (8, 9), 142)),
    (48, _gpu("RTX A6000", 47.4, (8, 6), 84)),
    (80, _gpu("A100-80", 79.1, (8, 0), 108)),
    (80, _gpu("A100-80 PCIe", 79.1, (8, 0), 108)),
    (80, _gpu("H100 PCIe", 79.1, (9, 0), 114)),
    # of an SXM module: medians over the files of benchmarks/results
    (80, _gpu("H100", 79.1, (9, 0), 132, Rates(product=789e12, memory=3.01e12))),
    (96, _gpu("RTX PRO 6000", 94.9, (12, 0), 188)),
    # the copy: median as above; the products of two cards by measure_rates
    (141, _gpu("H200", 139.7, (9, 0), 132, Rates(product=770e12, memory=4.264e12))),
)


def _key(name: str) -> str:
    return _NOISE.sub("", name.lower())


# each also with the memory on its label
_BY_KEY = {
    key: gpu
    for label, gpu in GPUS
    for key in dict.fromkeys((_key(gpu.name), _key(f"{gpu.name} {label}GB")))
}


def find_gpu(name: str) -> Gpu:
    """Find a GPU by its name, as people type it.

    Raises:
        ValueError: there is none of that name here; the message names those that are like it.
    """
    key = _key(name)
    if key in _BY_KEY:
        return _BY_KEY[key]
    near = [other for other in _BY_KEY if key and key in other]
    near += get_close_matches(key, _BY_KEY, n=3, cutoff=0.7)
    names = dict.fromkeys(_BY_KEY[other].name for other in near) or (gpu.name for _, gpu in GPUS)
    raise ValueError(
        f"--gpu must be a GPU that is known here: got {name!r}; "
        f"{'nearest' if near else 'there are'}: {', '.join(names)}; for another one give "
        "--max-memory"
    )


def unnamed_gpu(budget: int) -> Gpu:
    """Describe a GPU of which the memory alone is known, with the facts of an H200."""
    return Gpu("one as new as an H200", H200, budget)


def smallest_with(num_bytes: int) -> Gpu | None:
    """Find the smallest GPU on which a run may take so many bytes; None if there is none."""
    return next((gpu for _, gpu in GPUS if gpu.budget >= num_bytes), None)
