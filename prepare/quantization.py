"""The number format of a run's frozen weights: from the flags, or as its checkpoint stores them."""

from dataclasses import replace

from checkpoint.opening import Checkpoint
from checkpoint.stored_nf4 import describe_quantization
from nf4.weight import Quantization
from run.config import TrainConfig
from run.flags import ModelFlags


def quantization_of(config: ModelFlags) -> Quantization | None:
    """Gather what the flags say of the weights' quantization; None: 16 or 32 bits."""
    is_nf4 = config.quant == "nf4"
    return Quantization(config.block_size, config.double_quant) if is_nf4 else None


def follow_checkpoint(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """Take over the quantization of a checkpoint that is in NF4 already.

    A flag with its default value counts as not given.

    Raises:
        ValueError: the flags ask for another quantization.
    """
    stored = checkpoint.quantization
    if stored is None:
        return config
    asked = quantization_of(config)
    default = Quantization(TrainConfig.block_size, TrainConfig.double_quant)
    if asked is None or any(
        value not in choices for value, *choices in zip(asked, stored, default, strict=True)
    ):
        raise ValueError(
            "--quant, --block-size and --double-quant must be those of a checkpoint that is in NF4 "
            f"already: {checkpoint.folder} has {describe_quantization(stored)}, the flags say "
            f"{describe_quantization(asked)}; leave them out, or give the checkpoint that it was "
            "made from"
        )
    return replace(config, block_size=stored.block_size, double_quant=stored.double_quant)
