"""AdamW over flat arenas: parameters, gradients and both moments are one buffer each.

torch.optim keeps two tensors per parameter and walks them one by one; bitsandbytes pages each
tensor by itself, and only those of 100,000 elements or more, which is hardly any LoRA matrix. Here
the model's parameters and their .grad become views of two arenas in ordinary memory, the moments
two more in CUDA unified memory, so a step, a norm or a memset is one pass over everything. Under
memory pressure the driver moves pages of the moments to the host and back.

The arithmetic is torch's, operation by operation: in float32 on the CPU the parameters are equal
bit for bit.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optim.unified_memory import managed_zeros

BETA1, BETA2 = 0.9, 0.999
EPSILON = 1e-8


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

        p = p - lr wd p
        m = m + (1 - b1) (g - m)
        v = b2 v + (1 - b2) g^2
        p = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Decay comes before the step, as in torch; bitsandbytes' CUDA kernel applies it afterwards.

    Attributes:
        gradients: the arena that every parameter's .grad is a view of.
        num_steps: t, the steps taken.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float, is_paged: bool
    ) -> None:
        """Move the parameters into an arena, in place: their tensors become views of it.

        Args:
            parameters: float32, all on one device, by name.
            is_paged: on a CUDA device, keep the moments in unified memory.

        Raises:
            ValueError: no parameters, or one that is not float32 on the device of the first.
            RuntimeError: the device refused unified memory.
        """
        if not parameters:
            raise ValueError("an optimizer must have at least one parameter: got none")
        device = next(iter(parameters.values())).device
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32 or parameter.device != device:
                raise ValueError(
                    f"parameters to train must be float32 on {device}: "
                    f"got {name} as {parameter.dtype} on {parameter.device}"
                )
        self._weight_decay = weight_decay
        self.num_steps = 0
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        num_elements = sum(shape.numel() for shape in self._shapes.values())
        self._parameters = torch.empty(num_elements, device=device)
        self.gradients = torch.zeros(num_elements, device=device)
        if is_paged and device.type == "cuda":
            moments = managed_zeros(2 * num_elements, device)
            self._memory = "CUDA unified memory"
        else:
            moments = torch.zeros(2 * num_elements, device=device)
            self._memory = f"ordinary memory of {device}"
        self._exp_avg, self._exp_avg_sq = moments.chunk(2)
        views = zip(
            parameters.values(),
            self._views(self._parameters).values(),
            self._views(self.gradients).values(),
            strict=True,
        )
        with torch.no_grad():
            for parameter, view, gradient in views:
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = gradient

    def _views(self, arena: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self._shapes.values()]
        pieces = zip(self._shapes.items(), arena.split(sizes), strict=True)
        return {name: piece.view(shape) for (name, shape), piece in pieces}

    def describe(self) -> str:
        """Say where the moments are, and how large they are."""
        num_bytes = self._exp_avg.nbytes + self._exp_avg_sq.nbytes
        return f"moments of {num_bytes / (1 << 20):.1f} MiB in {self._memory}"

    def zero_grad(self) -> None:
        self.gradients.zero_()

    def scale_gradients(
        self, factor: float, max_norm: float
    ) -> Tensor:  # () float32, on the device
        """Multiply all gradients by `factor` and clip their 2-norm; return the norm before that.

            norm = |factor g|
            g    = factor g min(1, max_norm / (norm + 1e-6))

        As torch.nn.utils.clip_grad_norm_; a max_norm of 0 does not clip.
        """
        if factor != 1.0:
            self.gradients.mul_(factor)
        norm = torch.linalg.vector_norm(self.gradients)
        if max_norm > 0:
            self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from the gradients."""
        self.num_steps += 1
        correction1 = 1 - BETA1**self.num_steps
        correction2 = 1 - BETA2**self.num_steps
        self._parameters.mul_(1 - learning_rate * self._weight_decay)
        self._exp_avg.lerp_(self.gradients, 1 - BETA1)
        self._exp_avg_sq.mul_(BETA2).addcmul_(self.gradients, self.gradients, value=1 - BETA2)
        denominator = self._exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(EPSILON)
        self._parameters.addcdiv_(self._exp_avg, denominator, value=-learning_rate / correction1)

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments by name ("exp_avg.model.layers.0.self_attn.qkv.lora_A"), as views."""
        arenas = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        return {
            f"{moment}.{name}": view
            for moment, arena in arenas.items()
            for name, view in self._views(arena).items()
        }

    def load_state(self, tensors: Mapping[str, Tensor], num_steps: int) -> None:
        """Copy saved moments into the arenas, which stay where they are: paging is kept.

        Raises:
            ValueError: names or shapes are not this optimizer's; nothing was copied then.
        """
        own = self.state_tensors()
        differing = sorted(own.keys() ^ tensors.keys()) or [
            name for name in own if own[name].shape != tensors[name].shape
        ]
        if differing:
            raise ValueError(
                "a saved optimizer state must have this model's names and shapes: "
                f"{len(differing)} differ, the first is {differing[0]}"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.num_steps = num_steps
