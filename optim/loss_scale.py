"""Dynamic loss scaling for float16, whose smallest gradients would vanish."""

import torch
from torch import Tensor

INITIAL_SCALE = 65536.0
GROWTH_INTERVAL = 2000


class LossScale:
    """The factor on the loss: halved at an overflow, doubled after 2,000 steps without one.

    Micikevicius et al. 2018, section 3.2; the constants are torch.amp.GradScaler's. The factor
    lives on the device, like the norm that changes it, so no step waits for the host.
    """

    scale: Tensor  # () float32
    num_good_steps: Tensor  # () int32, since the scale last changed

    def __init__(self, scale: float, is_dynamic: bool, device: torch.device) -> None:
        self.is_dynamic = is_dynamic
        self.scale = torch.full((), scale, device=device)
        self.num_good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @classmethod
    def for_dtype(cls, dtype: torch.dtype, device: torch.device) -> "LossScale":
        """Make a dynamic scale for float16, and a constant 1 for dtypes of a wider range."""
        is_dynamic = dtype == torch.float16
        return cls(INITIAL_SCALE if is_dynamic else 1.0, is_dynamic, device)

    def update(self, grad_norm: Tensor) -> None:  # () float32
        """Adapt to whether the norm of the step's gradients was finite.

        Note:
            Does not wait for the device.
        """
        if not self.is_dynamic:
            return
        is_finite = grad_norm.isfinite()
        good = torch.where(is_finite, self.num_good_steps + 1, 0)
        is_due = good == GROWTH_INTERVAL
        factor = torch.where(is_finite, torch.where(is_due, 2.0, 1.0), 0.5)
        self.scale.mul_(factor)
        self.num_good_steps.copy_(torch.where(is_due, 0, good))

    def state(self) -> tuple[float, int]:
        """Read the scale and the number of good steps. Waits for the device."""
        return float(self.scale), int(self.num_good_steps)

    def load_state(self, scale: float, num_good_steps: int) -> None:
        """Take over a saved state."""
        self.scale.fill_(scale)
        self.num_good_steps.fill_(num_good_steps)
