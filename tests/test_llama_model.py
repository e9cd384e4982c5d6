"""llama/model.py against transformers and PEFT on tiny random checkpoints, and against itself."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.equality import assert_equal, assert_no_worse_on_the_whole_than, assert_no_worse_than
from support.llama_peers import (
    CPU,
    PEFT_LORA,
    TRAINABLE_RANK,
    TRAINABLE_TARGETS,
    Peer,
    stories_peer,
    tiny_peer,
)
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
from support.tiny_llama import (
    FIELDS,
    VARIANTS,
    float32_error,
    random_tensors,
    write_checkpoint,
    write_variant,
)
from torch import Tensor

from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from llama.model import PROJECTIONS, Llama, parameter_shapes, projection_shapes
from lora.adapter_file import load_adapter, read_adapter_config
from lora.config import LoRAConfig, resolve_target_modules
from nf4.weight import Quantization
from rows.batch import Batch

EPS = torch.finfo(torch.float32).eps
# what the issue promises of float32 logits of order one
PROMISED = 1e-4
CUDA = torch.device("cuda")


@pytest.fixture(params=VARIANTS)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return tiny_peer(tmp_path_factory, request.param)


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device = CPU,
) -> Llama:
    return load_model(open_checkpoint(folder), device, dtype, quantization)


def projection_gradients(model: Llama, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients of the loss by the names of the adapter's tensors."""
    gradients_of(step_of(model, KEEP), input_ids, labels)
    return adapter_gradients(model)


def test_logits_equal_transformers_in_float32(peer: Peer) -> None:
    actual = load(peer.checkpoint).logits(peer.inputs["input_ids"])
    expected = peer.outputs["logits"]
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= PROMISED


@pytest.mark.parametrize(
    "device", [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_twice_as_much_as_transformers(
    peer: Peer, dtype: torch.dtype, device: torch.device
) -> None:
    name = str(dtype).removeprefix("torch.")
    model = load(peer.checkpoint, dtype, device=device)
    input_ids = peer.inputs["input_ids"].to(device)
    assert model.hidden_states(input_ids).dtype == dtype
    actual = model.logits(input_ids).cpu()
    baseline = peer.outputs[f"logits.{name}"].float()
    # of two experts that are nearly alike for a token, rounding decides: the largest error is luck
    compare = assert_no_worse_on_the_whole_than if model.config.experts else assert_no_worse_than
    compare(actual, baseline, peer.outputs["logits.float64"])


def test_gradients_of_the_adapter_equal_pefts(peer: Peer) -> None:
    adapter = peer.folder / "peft_adapter"
    model = load(peer.checkpoint)
    model.attach_lora(read_adapter_config(adapter), seed=0)
    load_adapter(adapter, model.adapter_tensors())
    actual = projection_gradients(model, peer.inputs["input_ids"], peer.inputs["labels"])
    expected = {
        name.removeprefix("grad."): grad
        for name, grad in peer.outputs.items()
        if name.startswith("grad.")
    }
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert actual[name].shape == grad.shape
        assert actual[name].dtype == torch.float32
        assert actual[name].isfinite().all()
        # two layers forward and back, about 20 sums each way
        assert (actual[name] - grad).abs().max() <= float32_error(grad, 80), name
    targets = (*projection_shapes(model.config), *parameter_shapes(model.config))
    assert len(expected) == 2 * len(targets)
    assert PEFT_LORA["target_modules"] == "all-linear"


@pytest.mark.parametrize("targets", TRAINABLE_TARGETS)
def test_trainable_parameters_are_counted_as_peft_does(
    tmp_path_factory: pytest.TempPathFactory, assets: Path, targets: str
) -> None:
    peer = stories_peer(tmp_path_factory, assets)
    names = TRAINABLE_TARGETS[targets]
    names = (names,) if isinstance(names, str) else names
    config = LoRAConfig(TRAINABLE_RANK, 8, 0.0, resolve_target_modules(names, PROJECTIONS))
    # 4-bit weights count as the numbers they stand for
    for quantization in (None, NF4):
        model = load(peer.checkpoint, quantization=quantization)
        model.attach_lora(config, seed=0)
        trained, total = model.num_parameters()
        said = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%"
        assert peer.facts[f"trainable.{targets}"].startswith(said)


def test_an_untied_head_and_biases_are_counted(tmp_path: Path) -> None:
    fields = FIELDS | VARIANTS["biases"]
    tensors = random_tensors(fields)
    model = load(write_checkpoint(tmp_path, fields, tensors), quantization=NF4)
    model.attach_lora(LORA, seed=0)
    trainable = sum(tensor.numel() for tensor in model.adapter_tensors().values())
    frozen = sum(tensor.numel() for tensor in tensors.values())
    assert model.num_parameters() == (trainable, frozen + trainable)
    assert sum(p.numel() for p in model.trainable_parameters()) == trainable


def test_a_new_adapter_changes_nothing_and_only_it_trains(tmp_path: Path) -> None:
    plain = load_tiny(tmp_path, lora=None)
    expected = plain.logits(tokens(2, 9))
    plain.attach_lora(LORA, seed=0)
    assert_equal(plain.logits(tokens(2, 9)), expected)
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert len(trained) == 2 * 4 * 2


def test_embeddings_are_scaled_by_what_transformers_rounds(tmp_path: Path) -> None:
    model = load(write_variant(tmp_path, "gemma2", torch.bfloat16), torch.bfloat16)
    input_ids = tokens(2, 9)
    scale = torch.tensor(math.sqrt(FIELDS["hidden_size"]), dtype=torch.bfloat16)
    expected = model.decoder.embed_tokens.weight[input_ids.flatten()] * scale
    assert_equal(model.embed(input_ids), expected.detach())


def test_a_seed_gives_one_adapter(tmp_path: Path) -> None:
    def draw(seed: int) -> dict[str, Tensor]:
        model = load(write_variant(tmp_path, "grouped-query"))
        model.attach_lora(LORA, seed)
        return model.adapter_tensors()

    first, again, other = draw(0), draw(0), draw(1)
    assert first.keys() == again.keys() == other.keys()
    for name, tensor in first.items():
        assert_equal(again[name], tensor, name)
        if name.endswith("lora_A.weight"):
            assert not torch.equal(other[name], tensor)
            assert tensor.abs().max() <= tensor.shape[1] ** -0.5
        else:
            assert not tensor.any()


def test_no_two_groups_drop_the_same_places(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, replace(LORA, lora_dropout=0.5))
    seed = torch.tensor([7])
    # as wide as the narrowest group, so that all masks have one shape
    ones = torch.ones(8, FIELDS["hidden_size"])
    masks = [group.dropped(ones, seed) for _, group in model.groups()]
    assert len(masks) == 8
    for mask, other in combinations(masks, 2):
        assert not torch.equal(mask, other)


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    model = load(write_variant(tmp_path, "grouped-query"))
    with pytest.raises(ValueError, match=r"at least one projection .* got \('qproj',\)"):
        model.attach_lora(LoRAConfig(4, 8, 0.0, ("qproj",)), seed=0)


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (("q_proj", "gate_proj"), "gate_proj"),
        (("experts.0.down_proj",), "down_proj"),
        (r".*\.(q_proj|up_proj)", "up_proj"),
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_are_no_targets(
    tmp_path: Path, variant: str, targets: tuple[str, ...] | str, name: str
) -> None:
    model = load(write_variant(tmp_path, variant))
    with pytest.raises(ValueError, match=f"includes {name}; .*--target-parameters gate_up_proj"):
        model.attach_lora(LoRAConfig(4, 8, 0.0, targets), seed=0)
    # all-linear is attention, in layers with one MLP too
    model.attach_lora(LoRAConfig(4, 8, 0.0, "all-linear"), seed=0)
    adapted = {path.split(".")[4] for path in model.adapter_tensors()}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_loss_is_the_cross_entropy_of_the_logits(tmp_path: Path) -> None:
    model = load_tiny(tmp_path)
    input_ids = tokens(3, 17)
    labels = input_ids.masked_fill(torch.rand(3, 17) < 0.4, -100)
    logits = model.logits(input_ids)[:, :-1].double().flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()
    actual = model.loss(Batch(input_ids, labels))
    assert actual.dtype == torch.float32
    # the logits are the same numbers: a sum of at most 48 losses, each of a few rounded steps
    assert abs(actual.item() - expected) <= 48 * EPS * abs(expected)


def test_padding_on_the_right_changes_nothing(tmp_path: Path) -> None:
    model = load_tiny(tmp_path)
    input_ids, labels = tokens(2, 12), tokens(2, 12)
    labels[:, 7:] = -100
    other = input_ids.clone()
    other[:, 7:] = 0
    # the same shapes and the same numbers at every real token: equal to the bit
    assert_equal(model.logits(other)[:, :7], model.logits(input_ids)[:, :7])
    assert_equal(model.loss(Batch(other, labels)), model.loss(Batch(input_ids, labels)))
    expected = projection_gradients(model, input_ids, labels)
    for name, grad in projection_gradients(model, other, labels).items():
        assert_equal(grad, expected[name], name)
    # without padding the products have other shapes
    short = model.loss(Batch(input_ids[:, :7], labels[:, :7]))
    assert (model.loss(Batch(input_ids, labels)) - short).abs() <= float32_error(short, 40)


def test_frozen_tensors_but_the_head_stay_in_the_checkpoints_dtype(tmp_path: Path) -> None:
    fields = FIELDS | VARIANTS["biases"]
    model = load(
        write_checkpoint(tmp_path, fields, random_tensors(fields, torch.bfloat16)),
        quantization=NF4,
    )
    model.attach_lora(LORA, seed=0)
    dtypes = {p.dtype for p in model.model.parameters() if not p.requires_grad}
    biases = {group.bias.dtype for _, group in model.groups() if group.bias is not None}
    assert dtypes == biases == {torch.bfloat16}
    assert model.head.dtype == model.compute_dtype == torch.float32
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    assert model.logits(tokens(1, 4)).dtype == torch.float32


def test_group_members_bear_the_checkpoints_names(tmp_path: Path) -> None:
    model = load_tiny(tmp_path)
    names = {name for name, p in model.named_parameters() if not p.requires_grad}
    names |= {f"{prefix}{name}.weight" for prefix, group in model.groups() for name in group.names}
    assert names == set(random_tensors(FIELDS))
    assert "model.layers.1.mlp.down_proj.lora_B.weight" in model.adapter_tensors()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["grouped-query", "gemma2", "granite", "olmo2", "command-r"])
@pytest.mark.parametrize("quantization", [None, NF4], ids=["unquantized", "nf4"])
def test_bf16_logits_and_gradients_on_cuda_err_no_more_than_twice_as_much_as_on_the_cpu(
    tmp_path: Path, quantization: Quantization | None, variant: str
) -> None:
    folder = write_variant(tmp_path, variant, torch.bfloat16)
    input_ids, labels = tokens(2, 33), tokens(2, 33)

    def run(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        # quantized on the CPU's arithmetic or the GPU's: tests/test_checkpoint_loading.py counts
        model = load_model(open_checkpoint(folder), torch.device(device), dtype, quantization)
        model.attach_lora(LORA, seed=0)
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B.weight"):
                drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
                tensor.copy_(0.1 * drawn)
        logits = model.logits(input_ids.to(device)).cpu()
        # not the loss: one number's error is luck, the largest of many is not
        found = projection_gradients(model, input_ids, labels)
        return {"logits": logits} | {name: grad.cpu() for name, grad in found.items()}

    # float32 on the CPU errs by 2^-16 of what bfloat16 does, so it serves as the truth
    truth, baseline = run("cpu", torch.float32), run("cpu", torch.bfloat16)
    for name, actual in run("cuda", torch.bfloat16).items():
        assert_no_worse_on_the_whole_than(actual, baseline[name], truth[name].double(), what=name)
