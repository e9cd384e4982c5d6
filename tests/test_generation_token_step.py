"""generation/token_step.py, generation/token_pass.py: token by token the model computes what it
computes at once."""

from pathlib import Path

import pytest
import torch
from support.equality import assert_no_worse_on_the_whole_than
from support.llama_peers import expert_tensors
from support.tiny_llama import VARIANTS, write_variant
from torch import Tensor

from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from generation.experts import TokenExperts
from generation.sampling import Sampling
from generation.token_pass import TokenPass
from generation.token_step import TokenStep
from llama.cache import KeyValueCache, Slot
from llama.experts import ExpertMLP, Routed
from llama.model import Llama, projections
from lora.config import LoRAConfig
from lora.rows import Rows
from nf4.weight import Quantization

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NF4 = Quantization(64, True)
# of the sequences, before and after the tokens that are computed one by one
STARTS, END = (1, 5, 9), 15


def load(
    tmp_path: Path,
    variant: str,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    num_updated: int | None = None,
) -> Llama:
    """Load a tiny model with an update of the first projections, all of them by default."""
    checkpoint = open_checkpoint(write_variant(tmp_path / variant, variant))
    model = load_model(checkpoint, device, dtype, quantization)
    if num_updated != 0:
        names = projections(model.config)[:num_updated]
        experts = expert_tensors(model.config) if num_updated is None else ()
        lora = LoRAConfig(3, 6, 0.0 if experts else 0.1, names, target_parameters=experts)
        model.attach_lora(lora, seed=0)
        generator = torch.Generator().manual_seed(1)
        for tensor in model.adapter_tensors().values():
            drawn = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.copy_(drawn.to(tensor.device))
    return model


def some_ids(model: Llama, num_tokens: int = END) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (len(STARTS), num_tokens)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator)


@torch.no_grad()
def token_by_token(model: Llama, ids: Tensor) -> Tensor:  # (B, END - max(STARTS), V)
    """Logits of the last tokens, from caches that begin at different lengths."""
    device = model.device
    if device.type != "cpu":
        model.make_tables()
    cache = KeyValueCache(model.config, len(STARTS), END + 1, model.compute_dtype, device)
    for sequence, start in enumerate(STARTS):
        slot = Slot(cache, torch.tensor([sequence], device=device))
        model.hidden_states(ids[sequence : sequence + 1, :start].to(device), slot)
    one_token = TokenPass(model, cache)
    lengths, never = torch.tensor(STARTS, device=device), torch.zeros(len(STARTS)).long().to(device)
    found: list[list[Tensor]] = [[] for _ in STARTS]
    for _ in range(END - min(STARTS)):
        # a sequence that has ended goes on with its last token
        at = lengths.clamp(max=END - 1)
        tokens = ids.to(device).gather(1, at[:, None])[:, 0]
        logits = model.project(one_token(tokens, at, never))
        for sequence, place in enumerate(at.tolist()):
            if len(found[sequence]) < END - STARTS[sequence]:
                assert place == STARTS[sequence] + len(found[sequence])
                found[sequence].append(logits[sequence].cpu())
        lengths += 1
    num_last = END - max(STARTS)
    return torch.stack([torch.stack(rows[-num_last:]) for rows in found])


@pytest.mark.parametrize("num_updated", [None, 1, 0], ids=["all", "one", "no updates"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token_as_at_once(tmp_path: Path, variant: str, num_updated: int | None) -> None:
    model = load(tmp_path, variant, num_updated=num_updated)
    ids = some_ids(model)
    expected = model.logits(ids)[:, max(STARTS) :]
    actual = token_by_token(model, ids)
    # one rounding of each operation, of numbers of order one
    bound = 100 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


def test_a_quantized_model_token_by_token_as_at_once(tmp_path: Path) -> None:
    model = load(tmp_path, "grouped-query", quantization=NF4)
    ids = some_ids(model)
    expected = model.logits(ids)[:, max(STARTS) :]
    bound = 100 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (token_by_token(model, ids) - expected).abs().max() <= bound


@pytest.mark.parametrize("num_tokens", [1, 3], ids=["picked", "all expanded"])
@pytest.mark.parametrize("quantization", [None, NF4, Quantization(32, False)], ids=str)
@pytest.mark.parametrize("variant", ["olmoe", "mixtral", "granite-moe", "gpt-oss"])
def test_few_tokens_have_the_experts_that_many_have(
    tmp_path: Path, variant: str, quantization: Quantization | None, num_tokens: int
) -> None:
    mlp = load(tmp_path, variant, quantization=quantization).layers[1].mlp
    assert isinstance(mlp, ExpertMLP)
    y = torch.randn(num_tokens, mlp.gate.in_features, generator=torch.Generator().manual_seed(3))
    kept = Routed()
    mlp.project_in(Rows(y), None, kept)
    expected = mlp.project_out(mlp.inner(kept), None, kept)
    one_token = TokenExperts(mlp, torch.float32, num_tokens)
    assert one_token._picks == (num_tokens == 1)
    # two products of sums of at most 32 terms
    bound = 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (one_token(y, None) - expected).abs().max() <= bound


def test_a_step_waits_for_no_value_and_idle_slots_stay(tmp_path: Path) -> None:
    model = load(tmp_path, "grouped-query")
    step = TokenStep(model, Sampling(), END, 3, captures=False)
    step.begin(1, [3, 5, 7], 0)
    first = step.ids.clone()
    for _ in range(4):
        step()
    assert first[[0, 2]].tolist() == step.ids[[0, 2]].tolist() == [0, 0]
    assert step._lengths.tolist() == [0, 7, 0]
    step.end(1)
    assert step._lengths.tolist() == step._is_running.tolist() == [0, 0, 0]


def test_penalized_tokens_are_those_of_prompt_and_answer(tmp_path: Path) -> None:
    model = load(tmp_path, "grouped-query")
    step = TokenStep(model, Sampling(repetition_penalty=1e6), 64, 1, captures=False)
    prompt = [3, 5, 7]
    for turn in range(2):
        step.begin(0, prompt, turn)
        chosen = [int(step.ids)]
        for _ in range(20):
            step()
            chosen.append(int(step.ids))
        # a penalty that large allows no token twice, and a slot forgets the text before
        assert len({*prompt, *chosen}) == len(prompt) + len(chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, NF4], ids=["unquantized", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_token_by_token_is_as_good_as_at_once(
    tmp_path: Path, variant: str, dtype: torch.dtype, quantization: Quantization | None
) -> None:
    model = load(tmp_path, variant, CUDA, dtype, quantization)
    ids = some_ids(model)
    at_once = model.logits(ids.to(CUDA))[:, max(STARTS) :].cpu()
    exact = load(tmp_path, variant, quantization=quantization).logits(ids)[:, max(STARTS) :]
    assert_no_worse_on_the_whole_than(token_by_token(model, ids), at_once, exact.double())
