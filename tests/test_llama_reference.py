"""llama/reference.py: the passes that are written out compute its loss and its gradients, in every
family."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.llama_peers import expert_tensors
from support.micro_steps import (
    KEEP,
    LORA,
    NF4,
    adapter_gradients,
    gradients_of,
    load_tiny,
    step_of,
    tokens,
)
from support.tiny_llama import VARIANTS, float32_error
from torch import Tensor

from llama.config import LlamaConfig
from llama.model import Llama, parameter_shapes, projection_shapes, projections
from llama.reference import Projection, Reference
from lora.expert_group import ExpertGroup
from lora.expert_update import ExpertUpdate
from lora.frozen_group import FrozenGroup
from lora.linear_group import LinearGroup
from nf4.weight import NF4Weight, Quantization, dequantize
from rows.batch import Batch

# rows of samples of 5, 1, 6 and 4, 9, 1 tokens, for windows of 8
SAMPLES = torch.tensor(
    [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0]]
)


def load(folder: Path, variant: str, quantization: Quantization | None) -> Llama:
    """A model with an update of every projection, none of them zero."""
    model = load_tiny(folder, None, quantization, variant=variant)
    tensors = expert_tensors(model.config)
    targets = {"target_modules": projections(model.config), "target_parameters": tensors}
    model.attach_lora(replace(LORA, **targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.adapter_tensors().items():
        if "lora_B" in name:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def of_experts(prefix: str, group: FrozenGroup, weight: Tensor) -> dict[str, Tensor]:
    """The matrices and biases of experts, also where a checkpoint has them in one tensor."""
    if group.num_stacked is None:
        parts = weight.split(group.rows)
        return {f"{prefix}{n}.weight": p for n, p in zip(group.names, parts, strict=True)}
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[group.names[0]]
    paths = [f"{e}.{name}" for e in range(group.num_stacked) for name in names]
    stacked = {"weight": weight} if group.bias is None else {"weight": weight, "bias": group.bias}
    return {
        f"{prefix}{path}.{kind}": part
        for kind, tensor in stacked.items()
        for path, part in zip(paths, tensor.chunk(len(paths)), strict=True)
    }


def parts_of_update(group: ExpertGroup, update: ExpertUpdate) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each expert's projections, of which gate and up have one A."""
    A, B = update.of_experts(update.lora_A.detach(), update.lora_B.detach())
    names = ("gate_proj", "up_proj") if "gate" in group.names[0] else ("down_proj",)
    return {
        f"{e}.{name}": (A[e], part)
        for e in range(group.num_experts)
        for name, part in zip(names, B[e].chunk(len(names)), strict=True)
    }


def joined(grads: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The gradients of experts' updates as PEFT has them: those of gate and up add up in A, and are
    one below the other in B, or in turn."""
    is_in_turn = config.experts is not None and config.experts.is_by_columns
    found = {name: grad for name, grad in grads.items() if ".experts." not in name}
    of_experts = {name: grad for name, grad in grads.items() if ".experts." in name}
    for prefix in dict.fromkeys(name.partition(".experts.")[0] for name in of_experts):
        some = {n: g for n, g in of_experts.items() if n.startswith(f"{prefix}.experts.")}
        count = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in some)
        for before, names in (("base_layer.", ("gate_proj", "up_proj")), ("", ("down_proj",))):
            path = f"{prefix}.experts.{{e}}.{{name}}.lora_{{kind}}.weight"
            parts = {
                kind: [
                    [some[path.format(e=e, name=name, kind=kind)] for name in names]
                    for e in range(count)
                ]
                for kind in "AB"
            }
            A = torch.cat([torch.stack(own).sum(0) for own in parts["A"]])
            dim = 1 if is_in_turn else 0
            rows = [torch.stack(own, dim).flatten(0, 1) for own in parts["B"]]
            B = torch.stack(rows, dim=2)
            found[f"{prefix}.experts.{before}lora_A.weight"] = A
            found[f"{prefix}.experts.{before}lora_B.weight"] = B.flatten(1)
    return found


def reference_of(model: Llama) -> Reference:
    """Copy a model and its adapter, which alone trains: NF4 expanded, groups taken apart."""
    reference = Reference(model.config)
    tensors = {n: p for n, p in model.named_parameters() if not n.endswith(("lora_A", "lora_B"))}
    for prefix, group in model.frozen_groups():
        weight = group.weight
        if isinstance(weight, NF4Weight):
            weight = dequantize(weight, torch.float32)
        if not isinstance(group, LinearGroup):
            tensors |= of_experts(prefix, group, weight)
            continue
        stacked = (
            {"weight": weight} if group.bias is None else {"weight": weight, "bias": group.bias}
        )
        for kind, tensor in stacked.items():
            parts = tensor.split(group.rows)
            tensors |= {f"{prefix}{n}.{kind}": p for n, p in zip(group.names, parts, strict=True)}
        for name, size in group.sizes.items():
            projection = reference.get_submodule(prefix + name)
            assert isinstance(projection, Projection)
            projection.attach(*size)
    for prefix, experts in model.experts():
        prefix = prefix.replace(".block_sparse_moe.", ".mlp.")
        for _, group, update in experts.updates():
            for path, part in parts_of_update(group, update).items():
                projection = reference.get_submodule(prefix + path)
                assert isinstance(projection, Projection)
                projection.attach(update.rank, update.scaling)
                names = ("lora_A", "lora_B")
                tensors |= {
                    f"{prefix}{path}.{name}.weight": matrix
                    for name, matrix in zip(names, part, strict=True)
                }
    of_modules = {n: t for n, t in model.adapter_tensors().items() if ".experts." not in n}
    reference.double().load_state_dict(tensors | of_modules)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return reference


def results_of_autograd(
    model: Llama, ids: Tensor, labels: Tensor, positions: Tensor | None
) -> dict[str, Tensor]:
    """The reference's loss, and its gradients by PEFT's names."""
    reference = reference_of(model)
    loss = reference.loss(Batch(ids, labels, positions))
    named = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach()} | joined(dict(zip(named, grads, strict=True)), model.config)


@pytest.mark.parametrize("quantization", [NF4, None], ids=["nf4", "unquantized"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_the_references(
    tmp_path: Path, variant: str, is_packed: bool, quantization: Quantization | None
) -> None:
    positions = SAMPLES if is_packed else None
    ids = tokens(2, SAMPLES.shape[1] if is_packed else 40)
    labels = ids.masked_fill(
        torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.2, -100
    )
    if positions is not None:
        labels = labels.masked_fill(positions == 0, -100)
    model = load(tmp_path, variant, quantization)
    loss = gradients_of(step_of(model, KEEP), ids, labels, positions=positions)["loss"]
    found = adapter_gradients(model).items()
    actual = {"loss": loss} | {n.replace(".block_sparse_moe.", ".mlp."): g for n, g in found}
    truth = results_of_autograd(model, ids, labels, positions)
    assert actual.keys() == truth.keys()
    targets = (*projection_shapes(model.config), *parameter_shapes(model.config))
    assert len(truth) == 1 + 2 * len(targets)
    for name, expected in truth.items():
        assert expected.dtype == torch.float64
        # two layers forward and back, about 20 sums each way
        assert (actual[name] - expected).abs().max() <= float32_error(expected, 80), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_references(tmp_path: Path, variant: str) -> None:
    model, ids = load(tmp_path, variant, NF4), tokens(2, 40)
    with torch.no_grad():
        expected = reference_of(model)(ids)
    assert (model.logits(ids) - expected).abs().max() <= float32_error(expected, 40)
