"""step/walk.py and step/repeated_calls.py: what is composed is what is walked, and what is
walked is what runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.micro_steps import CPU, LORA, NF4, fitting
from support.tiny_llama import VARIANTS, deeper, random_tensors, write_checkpoint
from torch import Tensor

from checkpoint.loading import load_model, load_sizes
from checkpoint.opening import open_checkpoint
from kernels.fp8 import E4M3
from lora.config import LoRAConfig
from nf4.weight import Quantization
from step.allocations import Allocations, Event
from step.micro_step import POLICIES, Policy
from step.repeated_calls import RepeatedCalls
from step.walk import META, PASSES, STEP, StepWalk, _kind_of
from step.workload import Workload

# of six layers; neighbours of every two policies
MIXES: dict[str, tuple[Policy, ...]] = {}
for _name, _policy in POLICIES.items():
    MIXES[_name] = (_policy, _policy, _policy, _policy, _policy, _policy)
MIXES["as planned"] = ("offload", "offload", "recompute", "recompute", "keep", "keep")
MIXES["mixed"] = ("keep", "offload", "recompute", "expand", "recompute", "offload")
MIXES["expanded last"] = ("keep", "keep", "keep", "keep", "expand", "expand")


def sizes_of(
    folder: Path,
    variant: str,
    dtype: torch.dtype,
    quantization: Quantization | None = NF4,
    lora: LoRAConfig = LORA,
) -> Workload:
    """Two rows of 128 tokens through six tiny layers."""
    fields = deeper(variant, 6)
    write_checkpoint(folder, fields, random_tensors(fields, torch.bfloat16))
    model = load_sizes(open_checkpoint(folder), dtype, quantization)
    model.attach_lora(fitting(lora, model.config), seed=0)
    return Workload(model, moment_bytes=8, batch=2, tokens=128)


def assert_composed_is_walked(work: Workload) -> None:
    """Compare, mix by mix, what is repeated for layers that are alike with a walk through all."""
    repeating, walking = StepWalk(work), StepWalk(work, repeats=False)
    for mix in MIXES.values():
        events = repeating.events(mix)
        assert events == walking.events(mix)
        taken = {event.block for event in events if event.num_bytes}
        assert taken == {event.block for event in events if not event.num_bytes}
        assert {event.pool for event in events} >= {PASSES, STEP}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_alike_repeat_what_one_did(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    assert_composed_is_walked(sizes_of(tmp_path, variant, dtype))


SETTINGS = (
    "packed",
    "dropout",
    "noise",
    "evaluated",
    "evaluated fp8",
    "other ranks",
    "none",
    "aux",
)


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_repeat_what_one_layer_did(tmp_path: Path, case: str) -> None:
    if case == "none":
        assert_composed_is_walked(sizes_of(tmp_path, "mistral", torch.bfloat16, None))
        return
    if case == "aux":
        # in a mixture, whose experts have updates, not alike in all layers
        lora = replace(LORA, target_parameters=("down_proj", "gate_up_proj"))
        lora = replace(lora, rank_pattern={"1.mlp.experts.down_proj": 70})
        work = sizes_of(tmp_path, "mixtral", torch.bfloat16, lora=lora)
        assert_composed_is_walked(replace(work, has_aux_loss=True))
        return
    lora = LORA
    if case == "dropout":
        lora = replace(LORA, lora_dropout=0.1)
    if case == "other ranks":
        # layers that are not alike
        lora = replace(LORA, rank_pattern={"1.self_attn.q_proj": 70, "2.mlp.down_proj": 8})
        lora = replace(lora, exclude_modules=("layers.3.mlp.up_proj", "layers.4.self_attn"))
    work = sizes_of(tmp_path, "qwen3", torch.bfloat16, lora=lora)
    if case == "packed":
        work = replace(work, sample_tokens=17.0)
    if case == "noise":
        work = replace(work, has_noise=True)
    if case.startswith("evaluated"):
        work = replace(work, evaluation=(5, 200))
    if case.endswith("fp8"):
        work.model.multiply_in_8_bits(E4M3)
    assert_composed_is_walked(work)


def test_layers_whose_experts_are_stored_otherwise_are_not_alike(tmp_path: Path) -> None:
    first, second, *_ = sizes_of(tmp_path, "olmoe", torch.bfloat16).model.layers
    assert _kind_of(first) == _kind_of(second)
    second.mlp.down.allocate(META, torch.bfloat16, None, None)
    assert _kind_of(first) != _kind_of(second)


def test_a_repeated_walk_says_the_same_again(tmp_path: Path) -> None:
    walk = StepWalk(sizes_of(tmp_path, "gemma2", torch.bfloat16))
    first = {name: walk.events(mix) for name, mix in MIXES.items()}
    assert {name: walk.events(mix) for name, mix in MIXES.items()} == first
    # and the model's layers are as they were
    assert all("forward" not in vars(layer) for layer in walk._work.model.layers)


def test_rows_take_what_rows_that_are_padded_take(tmp_path: Path) -> None:
    work = sizes_of(tmp_path, "grouped-query", torch.bfloat16)
    walks = [StepWalk(replace(work, tokens=tokens)) for tokens in (100, 128)]
    # padding has no labels, so the loss takes less
    padded, full = (
        [event for event in walk.events(MIXES["keep"]) if event.pool == PASSES] for walk in walks
    )
    assert padded == full


def kept_bytes(events: list[Event]) -> int:
    """The bytes of what is taken and not given back."""
    held: dict[int, int] = {}
    for block, num_bytes, _ in events:
        held[block] = num_bytes
    return sum(held.values())


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_keeps_on_the_cpu_what_the_walk_says(
    tmp_path: Path, variant: str, policy: Policy
) -> None:
    work = sizes_of(tmp_path, variant, torch.float32)
    planned = kept_bytes(StepWalk(work).kept_by(policy))
    fields = deeper(variant, 6)
    model = load_model(open_checkpoint(tmp_path), CPU, torch.float32, NF4)
    model.attach_lora(fitting(LORA, model.config), seed=0)
    ids = torch.zeros(work.batch, work.tokens, dtype=torch.int64)
    shared = model.shared(ids)
    x = torch.randn(work.M, fields["hidden_size"])
    with torch.no_grad(), Allocations("cpu") as recorded:
        kept = model.layers[-1].forward(x, x, shared, has_backward=policy == "keep")[2]
    # there the rotated queries and keys lie beside the buffer that holds the values
    heads = model.config.heads(5)
    rotated = fields["num_attention_heads"] + heads.num_key_value_heads
    beside = 4 * work.M * rotated * heads.head_dim * (policy == "keep")
    assert kept_bytes(recorded.events) == planned + beside
    del kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_that_is_computed_again_keeps_its_input_alone(tmp_path: Path, variant: str) -> None:
    work = sizes_of(tmp_path, variant, torch.float32)
    # and the few columns that the low-rank update of down_proj makes of the gates
    width = work.config.hidden_size + work.model.layers[-1].mlp.tail
    assert kept_bytes(StepWalk(work).kept_by("recompute")) == 4 * work.M * width


def test_calls_alike_take_and_give_back_alike() -> None:
    recorded, calls, made = Allocations(), RepeatedCalls(), []

    def work(x: Tensor, held: list[Tensor], scale: int) -> tuple[Tensor, Tensor, list[int]]:
        made.append(scale)
        scratch = x * scale
        result = scratch + 1
        # given back in the middle
        held.pop()
        return result.T, result[1:], [scale, held is None]

    repeated = calls.of(work, "kind", recorded)
    with recorded:
        for scale in (2, 2, 3):
            x = torch.empty(4, 6, device=META)
            held = [torch.empty(5, device=META)]
            start, first = len(recorded.events), recorded.num_blocks
            whole, part, rest = repeated(x, held, scale)
            assert rest == [scale, False]
            assert (whole.shape, whole.stride()) == ((6, 4), (1, 6))
            assert (part.shape, part.storage_offset()) == ((3, 6), 6)
            assert whole.untyped_storage()._cdata == part.untyped_storage()._cdata
            del whole
            assert [
                (event.block - first, event.num_bytes) for event in recorded.events[start:]
            ] == [(1, 96), (2, 96), (0, 0), (1, 0)]
            del part
            assert recorded.events[-1] == (first + 2, 0, "default")
            del held
            assert len(recorded.events) == start + 5
    assert made == [2, 3]


def test_a_call_that_takes_for_good_is_no_call_to_repeat() -> None:
    recorded, calls, held = Allocations(), RepeatedCalls(), []

    def hoard(x: Tensor) -> Tensor:
        held.append(x + 1)
        return x * 2

    with recorded, pytest.raises(AssertionError):
        calls.of(hoard, "kind", recorded)(torch.empty(3, device=META))
