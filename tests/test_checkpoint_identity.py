"""checkpoint/identity.py: what is the same checkpoint, what is another, what it
costs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_llama import (
    FIELDS,
    VARIANTS,
    random_tensors,
    shapes,
    write_checkpoint,
    write_variant,
)
from torch import Tensor

import quantize
from checkpoint.identity import PAGE_BYTES, Identity, _function, identify, sample_of
from checkpoint.opening import open_checkpoint
from checkpoint.shard_reader import StoredTensor, read_bytes
from prepare.job import BUNDLED


def test_experts_have_the_identity_that_they_had_before_other_families_came(tmp_path: Path) -> None:
    fields = FIELDS | VARIANTS["mixtral"]
    config = open_checkpoint(write_checkpoint(tmp_path, fields, random_tensors(fields))).config
    assert config.experts is not None
    # stacked by columns
    assert not config.experts.is_by_columns
    before = {
        "num_experts": 4,
        "num_chosen": 2,
        "width": 24,
        "is_normalized": True,
        "is_stacked": False,
        "has_experts": (True, True),
    }
    assert _function(config)["experts"] == before
    # what is added to the loss, and where tensors lie, is not what a model computes
    experts = replace(config.experts, asks_for_aux_loss=True, block="block_sparse_moe")
    assert _function(replace(config, experts=experts))["experts"] == before


LLAMA_3_8B = FIELDS | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# its matrices of 512 KiB and embeddings of 4 MiB are sampled, as those of a large model are
LARGE = FIELDS | {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
}
# one layer with every kind of tensor that families have
KINDS: dict[str, dict[str, Any]] = {
    name: FIELDS | VARIANTS[name] | {"num_hidden_layers": 1, "max_window_layers": 0}
    for name in ("biases", "phi3", "gemma2", "qwen3")
}

# of bundled/model
PINNED = "a66c9539c6d920834e3ef59242df3bedd219b81061a843df5334078a685f801a"


def identity_of(folder: Path) -> Identity:
    return identify(open_checkpoint(folder))


def own(folder: Path) -> str:
    return identity_of(folder).own


def change(folder: Path, name: str, how: Callable[[Tensor], object]) -> Path:
    """Change a tensor of a checkpoint of one file in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    before = tensors[name].clone()
    how(tensors[name])
    assert not torch.equal(before, tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def flip(index: int) -> Callable[[Tensor], object]:
    """Change one number by its lowest bit."""

    def how(tensor: Tensor) -> None:
        tensor.view(-1).view(torch.uint8)[index * tensor.element_size()] ^= 1

    return how


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "large", LARGE, random_tensors(LARGE, torch.bfloat16))


@pytest.mark.parametrize("num_shards", [2, 5])
def test_the_same_weights_in_other_shards_are_the_same_checkpoint(
    tmp_path: Path, num_shards: int
) -> None:
    tensors = random_tensors(LARGE, torch.bfloat16)
    one = write_checkpoint(tmp_path / "one", LARGE, tensors)
    several = write_checkpoint(tmp_path / "several", LARGE, tensors, num_shards)
    assert identity_of(several) == identity_of(one)


def test_a_config_that_asks_for_the_same_is_the_same(tmp_path: Path) -> None:
    tensors = random_tensors(FIELDS)
    one = write_checkpoint(tmp_path / "one", FIELDS, tensors)
    rewritten = dict(reversed(FIELDS.items())) | {
        "head_dim": 8,
        "torch_dtype": "float32",
        "transformers_version": "5.0.0",
        "eos_token_id": [2, 5],
        "use_cache": False,
    }
    del rewritten["rope_theta"]
    rewritten["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert own(write_checkpoint(tmp_path / "two", rewritten, tensors)) == own(one)


@pytest.mark.parametrize(
    "field",
    [
        {"rope_theta": 500000.0},
        {"rms_norm_eps": 1e-6},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_config_that_asks_for_another_function_is_another_checkpoint(
    tmp_path: Path, field: dict[str, Any]
) -> None:
    tensors = random_tensors(FIELDS)
    one = write_checkpoint(tmp_path / "one", FIELDS, tensors)
    # the same tensors fit both numbers of heads
    other = write_checkpoint(tmp_path / "other", FIELDS | field, tensors)
    assert own(other) != own(one)


@pytest.mark.parametrize(
    ("variant", "field"),
    [
        ("gemma3", {"rope_local_base_freq": 200.0}),
        ("gemma4", {"rope_parameters": {}}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
        ("smollm3", {"no_rope_layers": [0, 0]}),
    ],
)
def test_other_rotary_positions_of_one_layer_are_another_checkpoint(
    tmp_path: Path, variant: str, field: dict[str, Any]
) -> None:
    # without windows, which would tell alone
    fields = FIELDS | VARIANTS[variant] | {"use_sliding_window": False}
    tensors = random_tensors(fields)
    one = write_checkpoint(tmp_path / "one", fields, tensors)
    other = write_checkpoint(tmp_path / "other", fields | field, tensors)
    assert own(other) != own(one)


@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_number_in_any_small_tensor_shows(tmp_path: Path, kind: str) -> None:
    fields = KINDS[kind]
    tensors = random_tensors(fields)
    folder = write_checkpoint(tmp_path / kind, fields, tensors)
    seen = {own(folder)}
    for name, tensor in tensors.items():
        for index in (0, tensor.numel() // 2, tensor.numel() - 1):
            # changes stay, so each identity is a new one
            change(folder, name, flip(index))
            seen.add(own(folder))
    assert len(seen) == 1 + 3 * len(tensors)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_retrained_matrix_shows_where_one_number_in_ten_thousand_changed(
    large: Path, name: str
) -> None:
    before = own(large)
    # 26 of 262,144 numbers, of which the sample has one half
    places = torch.randperm(512 * 512, generator=torch.Generator().manual_seed(1))[:26]

    def retrain(tensor: Tensor) -> None:
        tensor.view(-1)[places] += 1

    assert own(change(large, f"model.layers.0.self_attn.{name}.weight", retrain)) != before


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("token", [0, 1, 2047, 4095])
def test_one_retrained_token_shows(large: Path, name: str, token: int) -> None:
    before = own(large)
    assert own(change(large, name, lambda tensor: tensor[token].mul_(2))) != before


def test_a_large_matrix_is_looked_at_from_its_first_to_its_last_rows_in_all_columns() -> None:
    rows, columns = 1024, 4096
    starts, num_bytes = sample_of(4 * rows * columns, num_rows=0)
    seen = torch.cat([torch.arange(start // 4, (start + num_bytes) // 4) for start in starts])
    assert seen.min() == 0
    assert seen.max() // columns >= rows - 1
    assert set((seen % columns).tolist()) == set(range(columns))
    # no gap is longer than a page and the distance to the next, of 64
    assert seen.sort().values.diff().max() <= rows * columns // 63


def test_two_tensors_that_changed_places_are_another_checkpoint(tmp_path: Path) -> None:
    tensors = random_tensors(FIELDS)
    one = write_checkpoint(tmp_path / "one", FIELDS, tensors)
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    swapped = tensors | {first: tensors[second], second: tensors[first]}
    assert own(write_checkpoint(tmp_path / "other", FIELDS, swapped)) != own(one)


def test_another_dtype_of_the_same_bytes_is_another_checkpoint(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape).bfloat16() for name, shape in shapes(FIELDS).items()}
    one = write_checkpoint(tmp_path / "one", FIELDS, tensors)
    halves = {name: tensor.view(torch.float16) for name, tensor in tensors.items()}
    assert own(write_checkpoint(tmp_path / "other", FIELDS, halves)) != own(one)


def test_what_no_model_reads_does_not_count(tmp_path: Path) -> None:
    fields = FIELDS | VARIANTS["tied"]
    tensors = random_tensors(fields)
    one = write_checkpoint(tmp_path / "one", fields, tensors)
    more = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert own(write_checkpoint(tmp_path / "other", fields, more)) == own(one)


def test_less_than_a_hundredth_of_an_8b_model_is_read() -> None:
    total = sampled = 0
    for shape in shapes(LLAMA_3_8B).values():
        num_bytes = 2 * torch.Size(shape).numel()
        starts, size = sample_of(num_bytes, shape[0] if shape[0] == LLAMA_3_8B["vocab_size"] else 0)
        total += num_bytes
        sampled += len(starts) * size
    assert total == 16_060_522_496
    # 64 bytes of 2 x 128,256 rows; 64 or 112 pages of 7 x 32 matrices; 65 norms
    pages = 32 * (4 * 64 + 3 * 112)
    assert sampled == 2 * 128256 * 64 + pages * 4096 + 65 * 8192


@pytest.mark.parametrize("at_once", [1, 4096, 1 << 30])
def test_how_much_is_read_at_once_does_not_matter(
    large: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = own(large)
    monkeypatch.setattr("checkpoint.identity.BYTES_AT_ONCE", at_once)
    assert own(large) == expected


def test_of_a_large_matrix_what_the_sample_leaves_out_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = LARGE | {"intermediate_size": 65536}
    folder = write_checkpoint(tmp_path / "wide", wide, random_tensors(wide, torch.bfloat16))
    num_read: list[int] = []

    def counted(stored: StoredTensor, start: int, file: int, target: torch.Tensor) -> None:
        if "mlp" in stored.name:
            num_read.append(len(target))
        read_bytes(stored, start, file, target)

    monkeypatch.setattr("checkpoint.identity.read_bytes", counted)
    own(folder)
    # three matrices of 64 MiB
    assert sum(num_read) == 3 * 64 * PAGE_BYTES


def test_an_identity_stays_what_it_is() -> None:
    # adapters and runs have it on their disks: a version that computes another one knows none
    assert own(BUNDLED / "model") == PINNED


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A quantized copy of tmp_path / "source"."""
    source = write_variant(tmp_path / "source", "grouped-query", torch.bfloat16)
    quantize.main(f"--model {source} --output {tmp_path / 'copy'} --device cpu".split())
    return tmp_path / "copy"


def test_a_quantized_copy_says_what_it_was_made_from(copy: Path) -> None:
    source = identity_of(copy.parent / "source")
    assert source.own == source.original
    assert identity_of(copy).original == source.own
    assert identity_of(copy).own != source.own


@pytest.mark.parametrize(
    "suffix", [".weight", ".weight.absmax", ".weight.quant_state.bitsandbytes__nf4"]
)
def test_a_quantized_copys_own_bytes_count_and_another_programs_has_no_original(
    copy: Path, suffix: str
) -> None:
    before = own(copy)

    def how(tensor: Tensor) -> None:
        # of the JSON, a digit of nested_offset, the mean of the scales
        is_json = "quant_state" in suffix
        index = bytes(tensor.tolist()).index(b"nested_offset") + 19 if is_json else 7
        tensor.view(-1)[index] ^= 1

    changed = identity_of(change(copy, f"model.layers.1.mlp.down_proj{suffix}", how))
    assert changed.own != before
    assert changed.original == ""


def test_copies_of_different_checkpoints_put_together_have_no_original(tmp_path: Path) -> None:
    source = write_variant(tmp_path / "source", "grouped-query")
    quantize.main(f"--model {source} --output {tmp_path / 'copy'} --device cpu".split())
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    places = {}
    for number, (shard, names) in enumerate(
        {"a": sorted(tensors)[::2], "b": sorted(tensors)[1::2]}.items()
    ):
        file = f"{shard}.safetensors"
        part = {name: tensors[name] for name in names}
        save_file(part, tmp_path / "copy" / file, metadata={"made_from": str(number)})
        places |= dict.fromkeys(names, file)
    (tmp_path / "copy" / "model.safetensors").unlink()
    index = json.dumps({"weight_map": places})
    (tmp_path / "copy" / "model.safetensors.index.json").write_text(index)
    assert identity_of(tmp_path / "copy").original == ""
