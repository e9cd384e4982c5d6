"""Tiny models with an adapter, and the gradients that a micro-step adds to it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from support.tiny_llama import FIELDS, write_variant
from torch import Tensor

from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from llama.config import LlamaConfig
from llama.model import PROJECTIONS, Llama, projections
from lora.config import LoRAConfig
from nf4.weight import Quantization
from optim.arena import GradientArena
from rows.batch import Batch
from step.micro_step import MicroStep, Policy

NF4 = Quantization(64, True)
LORA = LoRAConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=PROJECTIONS)
CPU = torch.device("cpu")
# of both layers
KEEP: tuple[Policy, ...] = ("keep", "keep")
_GRADIENTS: WeakKeyDictionary[Llama, GradientArena] = WeakKeyDictionary()


def fitting(lora: LoRAConfig, config: LlamaConfig) -> LoRAConfig:
    """An adapter without the targets that a mixture of experts refuses."""
    return replace(lora, target_modules=projections(config)) if config.experts else lora


def load_tiny(
    folder: Path,
    lora: LoRAConfig | None = LORA,
    quantization: Quantization | None = NF4,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    variant: str = "grouped-query",
    **changes: Any,  # of the config
) -> Llama:
    """A tiny model whose updates are not zero."""
    folder = write_variant(folder, variant, dtype, **changes)
    model = load_model(open_checkpoint(folder), device, dtype, quantization)
    if lora is not None:
        model.attach_lora(fitting(lora, model.config), seed=0)
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B.weight"):
                drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
                tensor.copy_(0.1 * drawn)
    return model


def in_runs(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Let a function take the place of a step's method where it computes; where a plan walks
    through it on the meta device, the method is as it was."""
    method = getattr(MicroStep, name)

    def called(self: MicroStep, *args: Any, **kwargs: Any) -> Any:
        chosen = method if self.model.device.type == "meta" else function
        return chosen(self, *args, **kwargs)

    return called


def step_of(
    model: Llama,
    policies: Sequence[Policy],
    noise_alpha: float = 0.0,
    captures: bool = False,
    has_aux_loss: bool = False,
) -> MicroStep:
    """A training step of a model; all steps of one model add to the same gradients."""
    if model not in _GRADIENTS:
        adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _GRADIENTS[model] = GradientArena(adapter)
    return MicroStep(model, _GRADIENTS[model], policies, noise_alpha, captures, has_aux_loss)


def tokens(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, FIELDS["vocab_size"], shape, generator=generator)


def gradients_of(
    step: MicroStep,
    input_ids: Tensor,
    labels: Tensor,
    factor: float = 1.0,
    dropout_seed: int = 0,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    aux_factor: float | None = None,
) -> dict[str, Tensor]:
    """The gradients of one micro-batch, and its losses, on the CPU."""
    step.gradients.zero_()
    scale = torch.tensor(factor, device=step.model.device)
    batch = Batch(input_ids, labels, positions, lengths)
    if aux_factor is None:
        found = {"loss": step(batch, scale, dropout_seed).cpu()}
    else:
        aux_scale = torch.tensor(aux_factor, device=step.model.device)
        loss = step(batch, scale, dropout_seed, aux_scale).cpu()
        found = {"loss": loss, "aux_loss": step.aux_loss.cpu().clone()}
    for name, parameter in step.gradients.parameters.items():
        assert parameter.grad is not None
        found[name] = parameter.grad.cpu().clone()
    return found


def adapter_gradients(model: Llama) -> dict[str, Tensor]:
    """The gradients of the parameters by the names of the adapter's tensors."""
    found = {}
    for prefix, group in model.groups():
        if group.lora_A is None or group.lora_B is None:
            continue
        assert group.lora_A.grad is not None
        assert group.lora_B.grad is not None
        for (name, size), update in zip(group.sizes.items(), group.updates, strict=True):
            grad_A, grad_B = group.lora_A.grad[update.A], group.lora_B.grad[update.B]
            found[f"{prefix}{name}.lora_A.weight"] = grad_A[: size.rank]
            found[f"{prefix}{name}.lora_B.weight"] = grad_B[:, : size.rank]
    for prefix, experts in model.experts():
        for before, _, update in experts.updates():
            assert update.lora_A.grad is not None
            assert update.lora_B.grad is not None
            found[f"{prefix}{before}lora_A.weight"] = update.lora_A.grad
            found[f"{prefix}{before}lora_B.weight"] = update.lora_B.grad
    return found
