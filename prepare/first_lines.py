"""The first lines of a run: the device, the model, the data and the output folder."""

from collections.abc import Iterable
from pathlib import Path

from checkpoint.opening import Checkpoint
from lora.config import LoRAConfig
from prepare.base import sized_model
from run.config import TrainConfig
from run.folder import DEFAULT_PARENT
from run.machine import describe_device

# of a terminal that nobody made wider
COLUMNS = 80


def first_lines(config: TrainConfig, lora: LoRAConfig, checkpoint: Checkpoint) -> list[str]:
    """Say in a line or two what a run uses and where it writes, each part whole on its line."""
    trained, total = sized_model(config, lora, checkpoint).num_parameters()
    output = near(config.output) if config.output else f"a new folder in {DEFAULT_PARENT}"
    lines = packed(
        (
            f"{describe_device(config.device)}, {config.dtype}",
            f"{near(config.model)}: {rounded(total)} parameters, {rounded(trained)} trained",
            f"data {near(config.data)}",
            f"output {output}",
        )
    )
    experts = checkpoint.config.experts
    if experts and experts.asks_for_aux_loss and not config.router_aux_loss_coef:
        lines.append(
            "config.json has output_router_logits, for which transformers adds an auxiliary loss; "
            "here --router-aux-loss-coef adds it, and there is none without that flag"
        )
    return lines


def near(place: str) -> str:
    """A place as seen from the folder that the program runs in, if it lies below that."""
    path = Path(place)
    is_below = path.is_absolute() and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if is_below else place


def rounded(number: int) -> str:
    """A number of parameters in three digits, as models are named after it: 8.03B, 135M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        # 999.6 M in three digits are 1 B
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def packed(parts: Iterable[str]) -> list[str]:
    """Put parts behind one another, as many in a line as it holds."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len("; ") + len(part) <= COLUMNS:
            lines[-1] += f"; {part}"
        else:
            lines.append(part)
    return lines
