"""Dynamic loss scaling for float16, whose smallest gradients would vanish."""

from dataclasses import dataclass

import torch

INITIAL_SCALE = 65536.0
GROWTH_INTERVAL = 2000


@dataclass
class LossScale:
    """The factor on the loss: halved at an overflow, doubled after 2,000 steps without one.

    Micikevicius et al. 2018, section 3.2; the constants are torch.amp.GradScaler's.
    """

    scale: float
    is_dynamic: bool
    num_good_steps: int = 0

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "LossScale":
        """Dynamic for float16; bfloat16 and float32 have the range for a constant 1."""
        is_dynamic = dtype == torch.float16
        return cls(INITIAL_SCALE if is_dynamic else 1.0, is_dynamic)

    def update(self, is_finite: bool) -> None:
        """Adapt to whether the step's gradients were finite."""
        if not self.is_dynamic:
            return
        if not is_finite:
            self.scale, self.num_good_steps = self.scale / 2, 0
            return
        self.num_good_steps += 1
        if self.num_good_steps == GROWTH_INTERVAL:
            self.scale, self.num_good_steps = self.scale * 2, 0
