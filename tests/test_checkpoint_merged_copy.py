"""checkpoint/merged_copy.py: the weights are the exact ones rounded once, transformers reads them,
and PEFT merges to the same."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SUPPORT
from safetensors.torch import load_file, save_file
from support.equality import assert_equal
from support.llama_peers import tiny_peer
from support.merge_cases import CASES, MergeCase, adapter_of, paths_of, weights_of, write_adapter
from support.micro_steps import NF4
from support.peer_process import run_peer
from support.tiny_llama import VARIANTS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint import merged_copy
from checkpoint.loading import load_model
from checkpoint.merged_copy import MergeFigures, read_updates, write_merged_shards
from checkpoint.opening import open_checkpoint
from checkpoint.tensor_names import TensorNames
from llama.config import read_config
from llama.model import projection_shapes, quantized_layouts
from llama.targets import update_sizes
from lora.adapter_file import load_adapter, read_adapter_config, save_adapter
from nf4.weight import Quantization, dequantize, quantize

CPU = torch.device("cpu")
# what the issue promises of float32 logits of order one
PROMISED = 1e-4
FLOAT32_EPS = torch.finfo(torch.float32).eps
# quantized before merging, and as stored
FORMATS = {
    "as stored": None,
    "NF4": NF4,
    "NF4 in blocks of 32": Quantization(32, False),
}


@dataclass(frozen=True)
class Merged:
    """A case on the disk, what the product merged, and what the peers say of it."""

    case: MergeCase
    checkpoint: Path
    adapter: Path
    folder: Path
    figures: MergeFigures
    input_ids: Tensor
    outputs: dict[str, Tensor]
    facts: dict[str, Any]


def merge(
    checkpoint: Path, adapter: Path, folder: Path, quantization: Quantization | None = None
) -> MergeFigures:
    """Merge as merge.py does."""
    config = read_config(checkpoint)
    folder.mkdir()
    for path in checkpoint.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    updates = read_updates(adapter, config)
    shards = open_checkpoint(checkpoint).shards
    paths = quantized_layouts(config)
    return write_merged_shards(shards, paths, updates, quantization, CPU, folder)


def save_again(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Load an adapter into its model and save it, as training does."""
    config = read_adapter_config(adapter)
    model = load_model(open_checkpoint(checkpoint), CPU, torch.float32, None)
    model.attach_lora(config, seed=0)
    load_adapter(adapter, model.adapter_tensors())
    save_adapter(folder, model.adapter_tensors(), config, str(checkpoint))


@functools.cache
def _all_merged(base: Path) -> dict[str, Merged]:
    """Every case, merged, and one process of the peers for all."""
    base.mkdir()
    jobs, figures = {}, {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = base / str(number)
        checkpoint = case.write_checkpoint(folder / "checkpoint")
        adapter = case.write_adapter(folder / "adapter", checkpoint)
        figures[name] = merge(checkpoint, adapter, folder / "merged")
        save_again(checkpoint, adapter, folder / "again")
        jobs[name] = {
            "checkpoint": str(checkpoint),
            "adapter": str(adapter),
            "merged": str(folder / "merged"),
            "again": str(folder / "again"),
        }
    input_ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    script = SUPPORT / "merge_peer.py"
    outputs = run_peer(script, base, {"input_ids": input_ids}, {"jobs": json.dumps(jobs)})
    facts = json.loads((base / "facts.json").read_text())
    return {
        name: Merged(
            CASES[name],
            Path(job["checkpoint"]),
            Path(job["adapter"]),
            Path(job["merged"]),
            figures[name],
            input_ids,
            {k.partition("/")[2]: v for k, v in outputs.items() if k.startswith(f"{name}/")},
            facts[name],
        )
        for name, job in jobs.items()
    }


@pytest.fixture(params=CASES)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return _all_merged(tmp_path_factory.getbasetemp() / "merge_peer")[request.param]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sharded checkpoint in bfloat16, for what needs no peer."""
    return CASES["some layers, one path, some excluded, bfloat16"].write_checkpoint(
        tmp_path / "checkpoint"
    )


@pytest.mark.parametrize("variant", ["qwen3-moe", "mixtral", "granite-moe", "gpt-oss"])
def test_experts_are_quantized_and_back_as_they_were_in_training(
    tmp_path: Path, variant: str
) -> None:
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    case = MergeCase(variant, torch.float32, 1, config, dict.fromkeys(paths, (2, 4)))
    checkpoint = case.write_checkpoint(tmp_path / "checkpoint")
    adapter = case.write_adapter(tmp_path / "adapter", checkpoint)
    merge(checkpoint, adapter, tmp_path / "merged", NF4)
    before, after = (weights_of(folder) for folder in (checkpoint, tmp_path / "merged"))
    changed = set()
    for name, tensor in before.items():
        is_bias = name.endswith("bias")
        if (".experts." in name or "put_linear" in name) and not is_bias:
            matrices = tensor if tensor.dim() == 3 else tensor[None]
            actual = after[name].view(matrices.shape)
            if variant == "gpt-oss":
                matrices, actual = (rows_of_gpt_oss(name, stack) for stack in (matrices, actual))
            back = [dequantize(quantize(matrix, *NF4), torch.float32) for matrix in matrices]
            assert_equal(actual, torch.stack(back), name)
            changed.add(name)
        if is_bias or name.endswith(("gate.weight", "router.layer.weight", "norm.weight", "sinks")):
            assert_equal(after[name], tensor, name)
    num_changed = {"qwen3-moe": 18, "mixtral": 24, "granite-moe": 4, "gpt-oss": 4}
    assert len(changed) == num_changed[variant]


def rows_of_gpt_oss(name: str, stack: Tensor) -> Tensor:
    """Turn matrices that lie by columns, those of gate and up in turn, into rows."""
    rows = stack.mT
    if "gate_up" in name:
        rows = torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1)
    return rows.contiguous()


def truth_of(merged: Merged, quantization: Quantization | None) -> Iterator[Any]:
    """Each changed tensor: its name, base, update and the sums of their terms' magnitudes, in
    float64."""
    weights, adapter = weights_of(merged.checkpoint), adapter_of(merged.adapter)
    for path, (_, scaling) in merged.case.scalings.items():
        base = weights[f"{path}.weight"]
        if quantization is not None:
            base = dequantize(quantize(base, *quantization), torch.float32)
        A, B = (adapter[f"{path}.lora_{side}.weight"].double() for side in "AB")
        update, magnitudes = scaling * (B @ A), scaling * (B.abs() @ A.abs())
        yield f"{path}.weight", base.double(), update, magnitudes


def product_error(merged: Merged, magnitudes: Tensor, truth: Tensor) -> Tensor:
    """What float32 may err in rank products, their sum, the factor and the last sum."""
    rank = max(rank for rank, _ in merged.case.sizes.values())
    return (rank + 2) * FLOAT32_EPS * magnitudes + FLOAT32_EPS * truth.abs()


def half_a_unit(truth: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(truth)
    return torch.ldexp(torch.full_like(truth, info.eps / 4), exponent).clamp(min=info.tiny / 2)


def test_ranks_and_scalings_are_those_of_peft(merged: Merged) -> None:
    shapes = projection_shapes(read_config(merged.checkpoint))
    ours = update_sizes(read_adapter_config(merged.adapter), shapes)
    assert ours == merged.case.scalings
    assert {path: tuple(size) for path, size in merged.facts["sizes"].items()} == ours
    # a tensor that PEFT misses or does not know it would name
    assert not [text for text in merged.facts["warnings"] if "key" in text or "ignored" in text]


def test_transformers_loads_the_result_and_gives_our_logits(merged: Merged) -> None:
    assert set(merged.facts["loading"].values()) == {0}
    assert merged.facts["dtype"] == str(merged.case.dtype)
    model = load_model(open_checkpoint(merged.folder), CPU, torch.float32, None)
    ours, theirs = model.logits(merged.input_ids), merged.outputs["our_logits"]
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    assert (ours - theirs).abs().max() <= PROMISED


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_model_gives_the_adapters_logits_in_transformers(
    tmp_path_factory: pytest.TempPathFactory, variant: str
) -> None:
    peer = tiny_peer(tmp_path_factory, variant)
    merged, adapted = peer.outputs["merged_logits"], peer.outputs["our_adapter_logits"]
    assert merged.isfinite().all()
    assert (merged - adapted).abs().max() <= PROMISED
    # which the base does not
    assert (merged - peer.outputs["logits"]).abs().max() > 0.1


def test_the_adapter_beside_the_base_gives_pefts_logits(merged: Merged) -> None:
    # also in training: members of one group have other ranks here
    model = load_model(open_checkpoint(merged.checkpoint), CPU, torch.float32, None)
    model.attach_lora(read_adapter_config(merged.adapter), seed=0)
    load_adapter(merged.adapter, model.adapter_tensors())
    theirs = merged.outputs["adapter_logits"]
    assert (model.logits(merged.input_ids) - theirs).abs().max() <= PROMISED
    base = load_model(open_checkpoint(merged.checkpoint), CPU, torch.float32, None)
    assert (base.logits(merged.input_ids) - theirs).abs().max() > 100 * PROMISED


def test_every_weight_is_the_exact_one_rounded_once(merged: Merged) -> None:
    weights = weights_of(merged.folder)
    for name, base, update, magnitudes in truth_of(merged, None):
        truth, actual = base + update, weights[name]
        assert actual.dtype == merged.case.dtype
        assert actual.isfinite().all()
        allowed = half_a_unit(truth, actual.dtype) + product_error(merged, magnitudes, truth)
        assert ((actual.double() - truth).abs() <= allowed).all(), name


def test_peft_merges_to_the_same_weights(merged: Merged) -> None:
    weights = weights_of(merged.folder)
    theirs = {k.removeprefix("merged."): v for k, v in merged.outputs.items() if "merged." in k}
    assert theirs.keys() == {f"{path}.weight" for path in merged.case.sizes}
    num_weights = num_different = 0
    for name, base, update, magnitudes in truth_of(merged, None):
        # both round what float32 makes of the same sum: next to a midpoint to either side
        truth = base + update
        error = product_error(merged, magnitudes, truth)
        assert theirs[name].dtype == merged.case.dtype
        difference = (weights[name].double() - theirs[name].double()).abs()
        is_midpoint = half_a_unit(truth, merged.case.dtype) * 2 * (1 + FLOAT32_EPS)
        assert (difference <= is_midpoint + 2 * error).all(), name
        num_weights += difference.numel()
        num_different += int((difference > 0).sum())
    if merged.case.dtype != torch.float32:
        # the share of values that lie so near to a midpoint
        rank = max(rank for rank, _ in merged.case.sizes.values())
        share = (rank + 3) * FLOAT32_EPS / torch.finfo(merged.case.dtype).eps
        assert num_different <= 1 + share * num_weights


def test_all_else_is_the_input_byte_for_byte(merged: Merged) -> None:
    changed = {f"{path}.weight" for path in merged.case.sizes}
    files = sorted(merged.checkpoint.iterdir())
    assert [path.name for path in files] == sorted(path.name for path in merged.folder.iterdir())
    assert sum(path.suffix == ".safetensors" for path in files) == merged.case.num_shards
    for path in files:
        before, after = path.read_bytes(), (merged.folder / path.name).read_bytes()
        if path.suffix == ".json":
            assert before == after
            continue
        header = 8 + int.from_bytes(before[:8], "little")
        assert before[:header] == after[:header]
        assert len(before) == len(after)
        ours = load_file(merged.folder / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(ours[name], tensor) == (name not in changed), name


@pytest.mark.parametrize("quantization", FORMATS)
def test_the_figures_are_those_of_the_files(
    merged: Merged, quantization: str, tmp_path: Path
) -> None:
    found = FORMATS[quantization]
    figures = merge(merged.checkpoint, merged.adapter, tmp_path / "merged", found)
    weights = weights_of(tmp_path / "merged")
    num_weights = num_changed = 0
    update_squares = lost_squares = product_squares = 0.0
    for name, base, update, magnitudes in truth_of(merged, found):
        num_weights += base.numel()
        num_changed += int((weights[name] != base.to(merged.case.dtype)).sum())
        update_squares += float(update.square().sum())
        lost_squares += float((weights[name].double() - base - update).square().sum())
        product_squares += float(product_error(merged, magnitudes, base).square().sum())
    assert (figures.num_tensors, figures.num_weights) == (len(merged.case.sizes), num_weights)
    assert figures.num_changed == num_changed
    assert figures.update_squares == pytest.approx(update_squares, rel=1e-5)
    lost = (lost_squares / update_squares) ** 0.5
    # float32's own error in the update is not in what the product counts
    assert abs(figures.lost - lost) <= (product_squares / update_squares) ** 0.5
    if merged.case.dtype != torch.float32:
        assert figures.lost == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("quantization", ["NF4", "NF4 in blocks of 32"])
def test_into_nf4_every_projection_is_what_it_was_in_training(
    merged: Merged, quantization: str, tmp_path: Path
) -> None:
    found = FORMATS[quantization]
    assert found is not None
    merge(merged.checkpoint, merged.adapter, tmp_path / "merged", found)
    before, after = weights_of(merged.checkpoint), weights_of(tmp_path / "merged")
    changed = {name: rest for name, *rest in truth_of(merged, found)}
    config = read_config(merged.checkpoint)
    paths, names = quantized_layouts(config), TensorNames(parts=config.file_names)
    for name, tensor in after.items():
        assert tensor.dtype == merged.case.dtype
        if name in changed:
            base, update, magnitudes = changed[name]
            truth = base + update
            allowed = half_a_unit(truth, tensor.dtype) + product_error(merged, magnitudes, truth)
            assert ((tensor.double() - truth).abs() <= allowed).all(), name
        elif names.in_model(name).removesuffix(".weight") in paths:
            expected = dequantize(quantize(before[name], *found), torch.float32)
            assert_equal(tensor, expected.to(tensor.dtype), name)
        else:
            assert_equal(tensor, before[name], name)


class LargestFloat32(TorchDispatchMode):
    """Notes the largest float32 tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_only_some_rows_are_in_float32_and_the_bits_do_not_depend_on_it(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_copy, "BLOCK_ELEMENTS", 3 * 72)
    config = read_config(merged.checkpoint)
    updates = read_updates(merged.adapter, config)
    shards = open_checkpoint(merged.checkpoint).shards
    (tmp_path / "merged").mkdir()
    with LargestFloat32() as seen:
        write_merged_shards(shards, {}, updates, None, CPU, tmp_path / "merged")
    largest = max(side.numel() for update in updates.values() for side in update[:2])
    if merged.case.dtype != torch.float32:
        assert 0 < seen.num_elements <= max(3 * 72, largest)
    whole = weights_of(merged.folder)
    for name, base, update, magnitudes in truth_of(merged, None):
        # blocks of other sizes may add up in another order
        actual = weights_of(tmp_path / "merged")[name]
        error = product_error(merged, magnitudes, base + update) * 2
        unit = half_a_unit(base + update, actual.dtype) * 2 * (1 + FLOAT32_EPS)
        assert ((actual.double() - whole[name].double()).abs() <= unit + error).all()


def test_what_peft_cannot_say_by_flags_survives_our_round_trip(
    merged: Merged,
) -> None:
    folder = merged.adapter.parent / "again"
    assert read_adapter_config(folder) == read_adapter_config(merged.adapter)
    before, after = adapter_of(merged.adapter), adapter_of(folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_equal(after[name], tensor, name)
    # PEFT finds the same in it
    assert merged.facts["again"] == {key: merged.facts[key] for key in ("warnings", "sizes")}
    assert_equal(merged.outputs["again_logits"], merged.outputs["adapter_logits"])


PATH = paths_of(0, "q_proj")[0]
CONFIG = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}


def tensors_of(path: str, rows: int = 32, columns: int = 32, B: float = 1.0) -> dict[str, Tensor]:
    return {
        f"{path}.lora_A.weight": torch.ones(2, columns),
        f"{path}.lora_B.weight": torch.full((rows, 2), B),
    }


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, tensors_of(PATH, columns=48), r"must have shape \(2, 32\): got \(2, 48\); the adapt"),
        ({}, tensors_of(PATH, rows=16), r"must have shape \(32, 2\): got \(16, 2\)"),
        ({}, tensors_of(PATH, B=0.0), "must change something: every lora_B or lora_A of it is z"),
        ({}, tensors_of(PATH, B=float("nan")), "must hold finite values only"),
        ({}, tensors_of(PATH.replace("0", "9")), r"unknown \(first: .*layers\.9\.self_attn"),
        ({"target_modules": ["c_attn"]}, {}, "must fit at least one projection of the model"),
        ({"target_modules": ["q_proj", "lm_head"]}, {}, "head and embeddings stay .* lm_head"),
        ({"target_modules": ["model.embed_tokens"]}, {}, "includes model.embed_tokens"),
        ({"target_modules": ".*"}, {}, "head and embeddings stay as they are: '.*' includes"),
    ],
    ids=[
        "columns",
        "rows",
        "zero",
        "nan",
        "layer",
        "no projection",
        "head",
        "embeddings",
        "everything",
    ],
)
def test_an_adapter_of_another_model_is_refused(
    checkpoint: Path, tmp_path: Path, config: Any, tensors: dict[str, Tensor], message: str
) -> None:
    fields = CONFIG | config
    if isinstance(fields["target_modules"], str):
        del fields["layers_to_transform"]
    write_adapter(tmp_path / "adapter", fields, tensors)
    with pytest.raises(ValueError, match=message):
        read_updates(tmp_path / "adapter", read_config(checkpoint))


def test_a_weight_that_would_overflow_is_named(tmp_path: Path) -> None:
    checkpoint = CASES["all-linear, layers in a list, tied, float16"].write_checkpoint(
        tmp_path / "checkpoint"
    )
    write_adapter(tmp_path / "adapter", CONFIG, tensors_of(PATH, B=1e5))
    with pytest.raises(ValueError, match=f"{PATH}.weight must stay finite with its update: .*16"):
        merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")


def test_a_base_that_is_not_finite_is_named(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        if f"{PATH}.weight" in tensors:
            tensors[f"{PATH}.weight"][3, 4] = torch.nan
            save_file(tensors, path, metadata={"format": "pt"})
    write_adapter(tmp_path / "adapter", CONFIG, tensors_of(PATH))
    for number, quantization in enumerate(FORMATS.values()):
        with pytest.raises(ValueError, match=f"{PATH}.weight must .* finite"):
            merge(checkpoint, tmp_path / "adapter", tmp_path / str(number), quantization)


def test_an_update_of_zeros_loses_nothing() -> None:
    # neither A nor B is zero, and each is where the other one is
    assert MergeFigures(1, 4, 0, 0.0, 0.0).lost == 0.0


def test_an_update_without_a_tensor_is_refused_before_anything_is_written(
    merged: Merged, tmp_path: Path
) -> None:
    config, shards = read_config(merged.checkpoint), open_checkpoint(merged.checkpoint).shards
    updates = read_updates(merged.adapter, config)
    updates["model.layers.9.mlp.experts.down_proj"] = next(iter(updates.values()))
    with pytest.raises(ValueError, match=r"every tensor .* got no model\.layers\.9\.mlp\.experts"):
        write_merged_shards(shards, quantized_layouts(config), updates, None, CPU, tmp_path)
    assert not [*tmp_path.iterdir()]
