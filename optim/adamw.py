"""AdamW over flat arenas: parameters, gradients and both moments are one buffer each.

torch.optim keeps two tensors per parameter and walks them one by one; bitsandbytes pages each
tensor by itself, and only those of 100,000 elements or more, which is hardly any LoRA matrix. Here
the model's parameters become views of an arena that is laid out as that of their gradients
(`optim/arena.py`), and the moments lie in one buffer beside them, so a step, a norm, or a page's
way to the host is one call for everything. `kernels/adamw.py` holds the arithmetic, and
`optim/unified_memory.py` says where the buffer's pages are.

Nothing here asks the device for a value except `num_steps`, `checksum`, `state_tensors` and
`load_state`, which are for checkpoints.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels.adamw import adamw, make_adamw_tables
from kernels.adamw_8bit import ZERO_CODES
from kernels.adamw_arenas import (
    MOMENT_BLOCK,
    NUM_SHARED_SCALARS,
    SUM_PROGRAMS,
    Arenas,
)
from optim.arena import GradientArena
from optim.state_memory import OrdinaryMemory, StateMemory

# Kingma and Ba 2015, "Adam", and torch's
BETAS = (0.9, 0.999)


def moment_bytes_per_element(is_8bit: bool) -> float:
    """Count the bytes of both moments of an element: two codes and its share of two scales, or two
    numbers of 4 bytes."""
    return 2 + 8 / MOMENT_BLOCK if is_8bit else 8


class AdamW:
    """AdamW with decoupled weight decay, its moments in float32 or in 8 bits.

    The algorithm, in equations and in torch, is that of `kernels/adamw.py`.

    Attributes:
        gradients: what a step reads.
    """

    def __init__(
        self,
        gradients: GradientArena,
        *,
        weight_decay: float,
        betas: tuple[float, float] = BETAS,
        memory: Callable[[int, torch.device], StateMemory] = OrdinaryMemory,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        """Move the parameters into an arena, in place: their tensors become views of it.

        Args:
            gradients: of the parameters to train.
            betas: decay of the first and of the second moment in a step.
            memory: allocates the moments: takes bytes and a device.
            rate_factors: by which a parameter's learning rate differs from the step's; 1 for those
                that are not named.

        Raises:
            ValueError: no parameters, or a factor for one that is not there.
            RuntimeError: the device refused the memory.
        """
        parameters, device = gradients.parameters, gradients.values.device
        if not parameters:
            raise ValueError("an optimizer must have at least one parameter: got none")
        factors = dict(rate_factors or {})
        unknown = sorted(factors.keys() - parameters.keys())
        if unknown:
            raise ValueError(
                f"factors of the learning rate must be for parameters to train: got {unknown[0]}"
            )
        self._layout = layout = gradients.layout
        self._memory = memory(layout.moment_bytes(), device)
        group_of_block, groups = self._groups(factors, weight_decay)
        moments = layout.carve(self._memory.buffer)
        moments.exp_avg_codes.fill_(ZERO_CODES[0])
        moments.exp_avg_sq_codes.fill_(ZERO_CODES[1])
        num_elements = layout.num_elements
        self._arenas = Arenas(
            parameters=torch.zeros(num_elements, device=device),
            gradients=gradients.values,
            moments=moments,
            group_of_block=group_of_block.to(device),
            groups=groups.to(device),
            betas=betas,
            num_updates=torch.zeros(1, dtype=torch.int32, device=device),
            scalars=torch.zeros(NUM_SHARED_SCALARS.value + 2 * len(groups), device=device),
            partial_sums=torch.zeros(SUM_PROGRAMS, dtype=torch.float64, device=device),
        )
        if device.type != "cpu":
            make_adamw_tables(self._arenas.parameters.device, betas)
        self.gradients = gradients
        self._unscaled = torch.ones((), device=device)
        with torch.no_grad():
            for name, parameter in parameters.items():
                view = layout.view(self._arenas.parameters, name)
                view.copy_(parameter)
                parameter.data = view

    def _groups(self, factors: dict[str, float], weight_decay: float) -> tuple[Tensor, Tensor]:
        """Tabulate the parameter groups: which blocks have which factor of the learning rate."""
        layout = self._layout
        distinct = sorted({1.0, *factors.values()})
        # the kernel reads a byte a block
        assert len(distinct) <= 256
        groups = torch.zeros(layout.num_blocks, dtype=torch.uint8)
        for name, start in layout.starts.items():
            first = start // MOMENT_BLOCK
            index = distinct.index(factors.get(name, 1.0))
            groups[first : first + layout.blocks_of(name)] = index
        rows = [[factor, weight_decay] for factor in distinct]
        return groups, torch.tensor(rows, dtype=torch.float64)

    def describe(self) -> str:
        """Say where the moments are, how large they are, and what was moved."""
        num_bytes, num_8bit = self._memory.buffer.nbytes, self._layout.num_8bit_blocks
        share = num_8bit / self._layout.num_blocks
        kind = f", {100 * share:.0f} % of them in 8 bits" if num_8bit else ""
        return f"moments of {num_bytes / (1 << 20):.1f} MiB{kind} in {self._memory.describe()}"

    def prefetch(self) -> None:
        """Start bringing the moments to the device; call it while the device has other work.

        Raises:
            torch.OutOfMemoryError: the device has no room for them.
        """
        self._memory.prefetch()

    @torch.no_grad()
    def step(
        self,
        learning_rate: float,
        max_norm: float = 0.0,
        loss_scale: Tensor | None = None,  # () float32
    ) -> Tensor:  # () float32, the norm of the gradients before clipping, on the device
        """Update every parameter from the gradients, or nothing where their norm is not finite.

            norm = |gradients| / loss_scale
            g    = gradients min(1, max_norm / (norm + 1e-6)) / loss_scale

        As torch.nn.utils.clip_grad_norm_, but that the gradients stay as they are; a max_norm of 0
        does not clip.

        Raises:
            torch.OutOfMemoryError: the device has no room for the moments; nothing was changed.

        Note:
            Does not wait for the device.
        """
        # the one thing that can be refused, before anything is changed
        self._memory.prefetch()
        scale = self._unscaled if loss_scale is None else loss_scale
        pieces = self._memory.pieces(self._arenas)
        return adamw(self._arenas, learning_rate, max_norm, scale, pieces)

    def checksum(self) -> int:
        """Add up the bits of all parameters, to tell whether others are the same.

        Note:
            Waits for the device, and takes none of its memory, which may have run out.
        """
        return int(self._arenas.parameters.cpu().view(torch.int32).sum(dtype=torch.int64))

    @property
    def num_steps(self) -> int:
        """The steps that changed the parameters. Waits for the device."""
        return int(self._arenas.num_updates)

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments by name ("exp_avg.model.layers.0.self_attn.qkv.lora_A"), as views.

        Of a moment in 8 bits: "exp_avg_codes.NAME" and, one number a block, "exp_avg_absmax.NAME".

        Note:
            Waits for the device. Of unified memory they are the host's view, so that they can be
            read when the device has no memory left.
        """
        layout = self._layout
        moments = layout.carve(self._memory.settled())
        tensors = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            for name, shape in layout.shapes.items():
                block = layout.first_block(name)
                elements = slice(block * MOMENT_BLOCK, block * MOMENT_BLOCK + shape.numel())
                if layout.is_8bit(name):
                    codes = getattr(moments, f"{moment}_codes")[elements].view(shape)
                    absmax = getattr(moments, f"{moment}_absmax")
                    tensors[f"{moment}_codes.{name}"] = codes
                    tensors[f"{moment}_absmax.{name}"] = absmax[
                        block : block + layout.blocks_of(name)
                    ]
                else:
                    tensors[f"{moment}.{name}"] = getattr(moments, moment)[elements].view(shape)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], num_steps: int) -> None:
        """Copy saved moments into the arenas, which stay where they are: paging is kept.

        Raises:
            ValueError: names, shapes or dtypes are not this optimizer's; nothing was copied then.
        """
        own = self.state_tensors()
        differing = sorted(own.keys() ^ tensors.keys()) or [
            name
            for name in own
            if (own[name].shape, own[name].dtype) != (tensors[name].shape, tensors[name].dtype)
        ]
        if differing:
            raise ValueError(
                "a saved optimizer state must have this model's names and shapes, and the moments "
                f"of this --optim: {len(differing)} differ, the first is {differing[0]}"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self._arenas.num_updates.fill_(num_steps)
