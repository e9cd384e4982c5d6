"""checkpoint/stored_mxfp4.py: gpt-oss with experts in MXFP4, as it is published, against
transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.equality import assert_equal
from support.llama_peers import CPU, Peer, tiny_peer
from support.micro_steps import KEEP, NF4, adapter_gradients, gradients_of, step_of
from support.mxfp4_cases import MXFP4, PROJECTIONS, mxfp4_tensors, write_mxfp4
from support.tiny_llama import float32_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint.implied import implied_checkpoint
from checkpoint.loading import load_model, load_sizes
from checkpoint.opening import open_checkpoint
from checkpoint.slots import slots_of
from checkpoint.stored_mxfp4 import scales_first
from generation.generator import generate_greedy
from llama.model import Llama
from lora.adapter_file import load_adapter, read_adapter_config
from lora.expert_group import ExpertGroup
from merging.job import parse
from nf4.mxfp4 import expand
from nf4.weight import NF4Weight, Quantization, member, quantize

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return tiny_peer(tmp_path_factory, MXFP4)


def load(folder: Path, quantization: Quantization | None = None) -> Llama:
    return load_model(open_checkpoint(folder), CPU, torch.float32, quantization)


def test_weights_are_expanded_as_transformers_does_bit_for_bit(peer: Peer) -> None:
    expected = peer.outputs["expanded"]
    assert expected.dtype == torch.bfloat16
    found = expand(peer.inputs["blocks"], peer.inputs["scales"]).mT.contiguous()
    # zeros have signs, and the largest scales make infinities
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_logits_and_greedy_tokens_equal_transformers(peer: Peer) -> None:
    model, input_ids = load(peer.checkpoint), peer.inputs["input_ids"]
    assert (model.logits(input_ids) - peer.outputs["logits"]).abs().max() <= 1e-4
    prompt = input_ids[0, :12].tolist()
    assert prompt + generate_greedy(model, prompt, 24, ()) == peer.outputs["greedy"][0].tolist()


def test_gradients_of_the_adapter_equal_pefts(peer: Peer) -> None:
    adapter, model = peer.folder / "peft_adapter", load(peer.checkpoint)
    model.attach_lora(read_adapter_config(adapter), seed=0)
    load_adapter(adapter, model.adapter_tensors())
    gradients_of(step_of(model, KEEP), peer.inputs["input_ids"], peer.inputs["labels"])
    for name, actual in adapter_gradients(model).items():
        expected = peer.outputs[f"grad.{name}"]
        assert (actual - expected).abs().max() <= float32_error(expected, 80), name


def test_a_merge_leaves_the_experts_as_they_are(peer: Peer) -> None:
    before, after = (
        load_file(folder / WEIGHTS) for folder in (peer.checkpoint, peer.folder / "merged")
    )
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    # and transformers loads it
    expected = peer.outputs["our_adapter_logits"]
    found = peer.outputs["merged_logits"]
    assert (found - expected).abs().max() <= float32_error(expected, 80)


def assert_holds_nf4(model: Llama, tensors: dict[str, Tensor]) -> None:
    """Each expert's matrix is quantized as if it were stored in 16 bits."""
    for prefix, group in model.frozen_groups():
        if not isinstance(group, ExpertGroup):
            continue
        (name,) = group.names
        stored = [tensors[f"{prefix}{name}{suffix}"] for suffix in ("_blocks", "_scales")]
        for index, each in enumerate(zip(*stored, strict=True)):
            rows = expand(*each)
            if name == "gate_up_proj":
                rows = torch.cat((rows[::2], rows[1::2]))
            assert isinstance(group.weight, NF4Weight)
            ours, expected = member(group.weight, index), quantize(rows, *NF4)
            for mine, theirs in zip(ours.tensors, expected.tensors, strict=True):
                assert_equal(mine, theirs, f"{prefix}{name} of {index}")


@pytest.mark.parametrize("num_shards", [1, 3])
def test_experts_are_quantized_as_those_in_16_bits_are(tmp_path: Path, num_shards: int) -> None:
    model = load(write_mxfp4(tmp_path, num_shards), NF4)
    assert_holds_nf4(model, mxfp4_tensors())


def test_scales_are_kept_until_their_blocks_come(tmp_path: Path) -> None:
    model, tensors = load(write_mxfp4(tmp_path), NF4), mxfp4_tensors()
    slots = slots_of(model, open_checkpoint(tmp_path).stored, {})
    for prefix, group in model.frozen_groups():
        if isinstance(group, ExpertGroup):
            name = f"{prefix}{group.names[0]}"
            staged = tensors[f"{name}_scales"].clone()
            slots[f"{name}.weight_scales"].place(staged)
            # by the next tensor, which is copied while kernels still work
            staged.fill_(200)
            slots[f"{name}.weight_blocks"].place(tensors[f"{name}_blocks"])
    assert_holds_nf4(model, tensors)


def test_scales_come_right_before_their_blocks(tmp_path: Path) -> None:
    opened = open_checkpoint(write_mxfp4(tmp_path, num_shards=3))
    names = [tensor.name for tensor in opened.needed()]
    assert len(names) == len(set(names)) == len(mxfp4_tensors())
    for place, name in enumerate(names):
        if name.endswith("_blocks"):
            assert names[place - 1] == name.removesuffix("_blocks") + "_scales"
    others = [name for name in names if name not in opened.mxfp4]
    assert others == [name for name in opened.stored if name not in opened.mxfp4]
    assert list(scales_first(opened.needed())) == opened.needed()


def test_unquantized_weights_are_kept_in_bfloat16(tmp_path: Path) -> None:
    model = load(write_mxfp4(tmp_path))
    weights = [g.weight for _, g in model.frozen_groups() if isinstance(g, ExpertGroup)]
    dtypes = [weight.dtype for weight in weights if isinstance(weight, Tensor)]
    assert dtypes == [torch.bfloat16] * 4


class LargestExpanded(TorchDispatchMode):
    """Notes the largest tensor in bfloat16 that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.bfloat16:
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_one_expert_is_expanded_at_a_time(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    with LargestExpanded() as seen:
        load(tmp_path, NF4)
    assert seen.num_elements == 2 * 64 * 32


@pytest.mark.parametrize("quantization", [None, NF4], ids=["unquantized", "nf4"])
def test_a_plan_has_the_sizes_of_what_is_loaded(
    tmp_path: Path, quantization: Quantization | None
) -> None:
    loaded = load(write_mxfp4(tmp_path), quantization)
    expected = [(tuple(t.shape), t.dtype) for t in loaded.frozen_tensors()]
    (tmp_path / "alone").mkdir()
    shutil.copyfile(tmp_path / CONFIG, tmp_path / "alone" / CONFIG)
    for checkpoint in (
        open_checkpoint(tmp_path),
        implied_checkpoint(tmp_path / "alone", 64),
    ):
        model = load_sizes(checkpoint, torch.float32, quantization)
        assert [(tuple(t.shape), t.dtype) for t in model.frozen_tensors()] == expected


@pytest.mark.gpu
def test_a_gpu_holds_the_same_experts(tmp_path: Path) -> None:
    expected = load(write_mxfp4(tmp_path, num_shards=2))
    actual = load_model(open_checkpoint(tmp_path), torch.device("cuda"), torch.float32, None)
    for (prefix, ours), (_, theirs) in zip(
        actual.frozen_groups(), expected.frozen_groups(), strict=True
    ):
        for mine, other in zip(ours.frozen_tensors(), theirs.frozen_tensors(), strict=True):
            assert_equal(mine.cpu(), other, prefix)


def test_it_is_said_that_experts_are_rounded_again(tmp_path: Path) -> None:
    (remark,) = open_checkpoint(write_mxfp4(tmp_path)).remarks
    assert remark.startswith(f"{tmp_path}: experts are in MXFP4, and expanded exactly")


def change_config(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | changes))


def test_blocks_without_the_config_that_names_them_are_refused(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    change_config(tmp_path, quantization_config=None)
    with pytest.raises(ValueError, match=r"must have a quantization_config of mxfp4.* has none"):
        open_checkpoint(tmp_path)


def test_another_family_in_mxfp4_is_refused(tmp_path: Path) -> None:
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    write_mxfp4(tmp_path)
    given = json.loads((tmp_path / CONFIG).read_text())
    kept = {key: given[key] for key in given if key.startswith(("hidden", "num_", "vocab"))}
    more = {key: given[key] for key in ("rms_norm_eps", "max_position_embeddings")}
    more |= {"intermediate_size": 64, "quantization_config": given["quantization_config"]}
    del kept["num_local_experts"], kept["num_experts_per_tok"]
    (tmp_path / CONFIG).write_text(json.dumps(kept | more | fields))
    with pytest.raises(ValueError, match="quantization_config says mxfp4"):
        implied_checkpoint(tmp_path, 64)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("_scales", None, r"missing are .*_scales"),
        ("_blocks", None, r"missing are .*_blocks|missing are .*_proj"),
        ("_scales", lambda t: t.short(), "must be stored as torch.uint8: got torch.int16"),
        ("_blocks", lambda t: t[:, :-1], "_blocks must have shape .* by config.json: got"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, projection: str, suffix: str, change: Any, message: str
) -> None:
    write_mxfp4(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = f"model.layers.1.mlp.experts.{projection}{suffix}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["unquantized", "nf4"])
def test_a_scale_that_is_nan_is_refused(tmp_path: Path, quantization: Quantization | None) -> None:
    write_mxfp4(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.mlp.experts.down_proj_scales"][1, 2, 0] = 255
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj\S* must stand for finite weights: one of"):
        load(tmp_path, quantization)


def test_a_merge_into_what_nf4_makes_of_experts_is_refused(peer: Peer, tmp_path: Path) -> None:
    flags = ["--model", str(peer.checkpoint), "--adapter", str(peer.folder / "our_adapter")]
    flags += ["--output", str(tmp_path / "merged"), "--block-size", "64"]
    assert parse(flags).model.mxfp4
    with pytest.raises(ValueError, match=r"are in MXFP4, which cannot hold .* use --base original"):
        parse([*flags, "--base", "nf4"])


def test_a_merge_of_updates_into_experts_in_mxfp4_is_refused(peer: Peer, tmp_path: Path) -> None:
    flags = ["--model", str(peer.checkpoint), "--adapter", str(peer.folder / "peft_adapter")]
    with pytest.raises(ValueError, match=r"updates them \(.*gate_up_proj.*\): those of .* MXFP4"):
        parse([*flags, "--output", str(tmp_path / "merged")])
