"""answering/memory.py: bytes of weights, keys and values, against what is free."""

from pathlib import Path

import pytest
import torch
from support.tiny_llama import write_variant

from answering.memory import available_bytes, check_memory, expanded_bytes, weight_bytes
from checkpoint.loading import load_model, load_sizes
from checkpoint.opening import Checkpoint, open_checkpoint
from llama.cache import KeyValueCache
from llama.model import Llama, projections
from lora.config import LoRAConfig
from nf4.weight import Quantization

CPU = torch.device("cpu")


def sizes_of(checkpoint: Checkpoint, quantization: Quantization | None) -> Llama:
    sizes = load_sizes(checkpoint, torch.float32, quantization)
    sizes.attach_lora(LoRAConfig(4, 8, 0.0, projections(checkpoint.config)), seed=0)
    return sizes


@pytest.mark.parametrize("quantization", [None, Quantization(32, True)])
def test_weights_take_what_the_loaded_model_takes(
    tmp_path: Path, quantization: Quantization | None
) -> None:
    checkpoint = open_checkpoint(write_variant(tmp_path, "grouped-query"))
    model = load_model(checkpoint, CPU, torch.float32, quantization)
    model.attach_lora(LoRAConfig(4, 8, 0.0, projections(checkpoint.config)), seed=0)
    assert weight_bytes(sizes_of(checkpoint, quantization)) == weight_bytes(model)


def test_expanded_weights_are_counted_where_they_are_kept(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_variant(tmp_path, "grouped-query"))
    sizes = sizes_of(checkpoint, Quantization(32, True))
    expanded = [4 * group.num_rows * group.in_features for _, group in sizes.groups()]
    assert expanded_bytes(sizes, CPU) == sum(expanded)
    assert expanded_bytes(sizes, torch.device("cuda")) == max(expanded)
    # weights in the computation's dtype are used as they are
    assert expanded_bytes(sizes_of(checkpoint, None), CPU) == 0


def test_what_does_not_fit_is_refused_with_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sizes_of(open_checkpoint(write_variant(tmp_path, "grouped-query")), None)
    weights, cache = (
        weight_bytes(sizes),
        KeyValueCache.num_bytes(sizes.config, 2, 100, torch.float32),
    )
    free = weights + cache
    monkeypatch.setattr("answering.memory.available_bytes", lambda device: free)
    check_memory(sizes, CPU, 2, 100)
    free -= 1
    with pytest.raises(ValueError, match=r"for 2 x 100 tokens .* --max-length or --batch-size$"):
        check_memory(sizes, CPU, 2, 100)
    with pytest.raises(ValueError, match=r"for 1 x 201 tokens .*lower --max-length$"):
        check_memory(sizes, CPU, 1, 201)
    free = weights
    with pytest.raises(ValueError, match=r"a smaller model, or --quant nf4$"):
        check_memory(sizes, CPU, 1, 1)


@pytest.mark.parametrize("variant", ["grouped-query", "gemma4"])
def test_a_cache_takes_what_is_counted(tmp_path: Path, variant: str) -> None:
    config = open_checkpoint(write_variant(tmp_path, variant)).config
    cache = KeyValueCache(config, 2, 100, torch.float32, CPU)
    num_bytes = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert KeyValueCache.num_bytes(config, 2, 100, torch.float32) == num_bytes


def test_a_machine_says_what_it_has() -> None:
    free = available_bytes(CPU)
    assert free is None or free > 1 << 20
