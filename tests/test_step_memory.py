"""step/micro_step.py: nothing that outlives a pass lies in the passes' memory, on a GPU."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.micro_steps import gradients_of, step_of
from torch import Tensor

from benchmarks.random_model import LLAMA_3_8B, random_model
from generation.generator import generate_greedy
from kernels import constants
from llama.model import PROJECTIONS, Llama
from lora.config import LoRAConfig
from rows.batch import Batch
from step.micro_step import POLICIES, MicroStep

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# wide enough for every path of a product, with members of their own rows, and a bias
CONFIG = replace(
    LLAMA_3_8B,
    vocab_size=4096,
    hidden_size=2048,
    intermediate_size=7168,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    windows=(None,) * 2,
    query_pre_attn_scalar=128,
)
# rows around where each path of a product begins and ends; the largest is captured first
TRAINED = [(2, 512), (1, 64), (2, 64), (3, 64), (1, 128), (4, 512), (1, 192)]
EVALUATED = [(1, 100), (1, 1), (1, 16), (1, 17), (3, 33), (2, 600)]


@pytest.fixture(autouse=True)
def _equal_bits() -> Iterator[None]:
    """Let attention add its gradients up in one order, as --deterministic does."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def some_model(dropout: float) -> Llama:
    model = random_model(CONFIG, CUDA)
    model.attach_lora(LoRAConfig(16, 32.0, dropout, PROJECTIONS), seed=0)
    for name, tensor in model.adapter_tensors().items():
        if "lora_B" in name:
            tensor.normal_(std=0.02)
    return model


def some_ids(B: int, T: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * B + T)
    return torch.randint(0, CONFIG.vocab_size, (B, T), generator=generator)


def live_in_pool(step: MicroStep) -> list[int]:
    """Bytes of every tensor that lies in the step's pool."""
    return [
        block["size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) == tuple(step._pool.id)
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]


def train(step: MicroStep, B: int, T: int, is_packed: bool) -> dict[str, Tensor]:
    ids = some_ids(B, T)
    labels, positions = ids.clone(), None
    if is_packed:
        positions = torch.arange(T).expand(B, T) % 48
        labels[positions == 0] = -100
    return gradients_of(step, ids, labels, 0.5, 3, positions)


def every_path(
    step: MicroStep, is_packed: bool, trains_first: bool
) -> Iterator[tuple[str, object]]:
    """Take every path to a result, several times and in changing order."""
    for turn in range(3):
        for shape in TRAINED:
            # launched, captured and replayed
            for _ in range(3 if turn == 0 else 1):
                yield f"trained {shape}", train(step, *shape, is_packed)
        if turn or not trains_first:
            for B, T in EVALUATED:
                ids = some_ids(B, T)
                yield f"evaluated {B, T}", step.evaluate(Batch(ids, ids)).cpu()
            yield "answered", generate_greedy(step.model, some_ids(1, 40)[0].tolist(), 8, ())


@pytest.mark.parametrize("trains_first", [False, True], ids=["", "resumed"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize(
    ("policies", "dropout"), [("keep", 0.0), ("recompute", 0.1), ("offload", 0.0)]
)
def test_every_path_leaves_the_pool_empty_and_comes_again_bit_for_bit(
    policies: str, dropout: float, is_packed: bool, trains_first: bool
) -> None:
    # as in a process of its own: what earlier tests made would hide who makes it
    constants._tables.clear()
    model = some_model(dropout)
    step = step_of(model, (POLICIES[policies],) * 2, captures=True)
    if not trains_first:
        ids = some_ids(1, 100)
        step.evaluate(Batch(ids, ids))
    first: dict[str, object] = {}
    for name, result in every_path(step, is_packed, trains_first):
        assert live_in_pool(step) == [], name
        if name not in first:
            first[name] = result
        elif isinstance(result, dict):
            expected = first[name]
            assert isinstance(expected, dict)
            differing = [key for key in result if not torch.equal(result[key], expected[key])]
            assert not differing, (name, differing[:3])
        elif isinstance(result, Tensor):
            assert torch.equal(result, torch.as_tensor(first[name])), name
        else:
            assert result == first[name], name
    assert len(first) == len(TRAINED) + len(EVALUATED) + 1


def test_a_table_that_was_forgotten_is_an_error_and_no_wrong_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    constants._tables.clear()
    monkeypatch.setattr(Llama, "make_tables", lambda self: None)
    step = step_of(some_model(0.0), (POLICIES["keep"],) * 2, captures=True)
    with pytest.raises(RuntimeError, match="tables of kernels must be made before a pass"):
        train(step, 1, 64, is_packed=False)


@pytest.mark.parametrize("policies", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("inside", ["launched", "captured"])
def test_what_a_failed_pass_took_is_given_back_and_the_next_is_right(
    policies: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = some_model(0.0)
    step = step_of(model, (POLICIES[policies],) * 2, captures=True)
    expected = train(step, 2, 512, is_packed=False)
    if inside == "launched":
        step.release()
    before = torch.cuda.memory_reserved()
    backward = type(model.layers[0]).backward

    def full(self: object, *args: object, **kwargs: object) -> None:
        # in the last layer that the pass comes to, with copies under way
        if model.layers[0] is self:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB")
        backward(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.layers[0]), "backward", full)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        train(step, 2, 512, is_packed=False)
    monkeypatch.undo()
    step.release()
    assert torch.cuda.memory_reserved() <= before
    for _ in range(3):
        actual = train(step, 2, 512, is_packed=False)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
