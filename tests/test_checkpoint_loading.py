"""checkpoint/loading.py: what is loaded is what the files hold, and files that lie are refused."""

import gc
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.equality import assert_equal
from support.hub_server import Repository, files_of, serving
from support.live_bytes import LiveBytes
from support.llama_peers import CPU, Peer, tiny_peer
from support.mxfp4_cases import write_mxfp4
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint, write_variant
from torch import Tensor

import checkpoint.loading
import checkpoint.shard_reader
from checkpoint.device_sink import DeviceSink
from checkpoint.files import INDEX_NAME, SINGLE_NAME, find_checkpoint
from checkpoint.loading import _load_on_gpu, describe_loading, load_model, load_sizes
from checkpoint.opening import open_checkpoint
from checkpoint.shard_reader import make_ring, stream
from checkpoint.tensor_names import TensorNames
from kernels.nf4_dequantize import nf4_dequantize
from llama.model import Llama
from lora.expert_group import ExpertGroup
from lora.frozen_group import FrozenGroup
from lora.linear_group import LinearGroup
from nf4.double_quant import QuantizedAbsmax
from nf4.serialized import serialize
from nf4.weight import NF4Weight, Quantization, dequantize, member, quantize

NF4 = Quantization(64, True)
FP32, BF16 = torch.float32, torch.bfloat16
QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
}


def load(folder: Path, quantization: Quantization | None = None, **options: Any) -> Llama:
    return load_model(open_checkpoint(folder), CPU, torch.float32, quantization, **options)


def as_stored(group: FrozenGroup, rows: Tensor) -> Tensor:
    """Lay the rows of a tensor out as a checkpoint does."""
    if group.num_stacked is None:
        return rows
    return torch.stack([group.layout.as_stored(each) for each in rows.chunk(group.num_stacked)])


def loaded_tensors(model: Llama) -> dict[str, Tensor]:
    """Everything an unquantized model holds, by the checkpoint's names."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for prefix, group in model.frozen_groups():
        assert isinstance(group.weight, Tensor)
        for name, rows in zip(group.names, group.row_slices(), strict=True):
            tensors[f"{prefix}{name}.weight"] = as_stored(group, group.weight[rows])
            if group.bias is not None:
                tensors[f"{prefix}{name}.bias"] = as_stored(group, group.bias[rows])
    names = TensorNames(parts=model.config.file_names)
    return {names.in_files(name): tensor for name, tensor in tensors.items()}


def assert_holds(model: Llama, expected: dict[str, Tensor]) -> None:
    actual = loaded_tensors(model)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, name)


def buffers(weight: NF4Weight) -> dict[str, Tensor]:
    if isinstance(weight.absmax, QuantizedAbsmax):
        absmax = weight.absmax
        scales = {"codes": absmax.codes, "group_absmax": absmax.group_absmax, "mean": absmax.mean}
    else:
        scales = {"absmax": weight.absmax}
    return {"packed": weight.packed, **scales}


def head_in(
    dtype: torch.dtype, fields: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The head as it is kept: in the dtype of the computation, converted once."""
    name = "model.embed_tokens.weight" if fields["tie_word_embeddings"] else "lm_head.weight"
    return {name: tensors[name].to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unquantized_model_holds_the_files_tensors(
    tmp_path: Path, variant: str, num_shards: int, dtype: torch.dtype
) -> None:
    fields = FIELDS | VARIANTS[variant]
    tensors = random_tensors(fields, dtype)
    model = load(write_checkpoint(tmp_path, fields, tensors, num_shards))
    assert_holds(model, tensors | head_in(torch.float32, fields, tensors))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("double_quant", [False, True], ids=["nf4", "nf4-dq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_member_is_its_tensor_quantized_alone(
    tmp_path: Path, dtype: torch.dtype, double_quant: bool
) -> None:
    fields = FIELDS | VARIANTS["biases"]
    tensors = random_tensors(fields, dtype)
    model = load(write_checkpoint(tmp_path, fields, tensors), Quantization(32, double_quant))
    num_members = 0
    for prefix, group in model.groups():
        assert isinstance(group.weight, NF4Weight)
        assert group.bias is not None
        for index, name in enumerate(group.names):
            alone = quantize(tensors[f"{prefix}{name}.weight"], 32, double_quant)
            for key, expected in buffers(alone).items():
                assert_equal(buffers(member(group.weight, index))[key], expected, name)
            num_members += 1
        biases = [tensors[f"{prefix}{name}.bias"] for name in group.names]
        assert_equal(group.bias, torch.cat(biases))
    assert num_members == 7 * FIELDS["num_hidden_layers"]


@pytest.mark.parametrize("variant", ["qwen3-moe", "mixtral", "granite-moe", "gpt-oss"])
def test_a_quantized_expert_is_its_tensor_quantized_alone(tmp_path: Path, variant: str) -> None:
    fields = FIELDS | VARIANTS[variant]
    tensors = random_tensors(fields)
    model = load(write_checkpoint(tmp_path, fields, tensors), NF4)
    names, num_matrices = TensorNames(parts=model.config.file_names), 0
    for prefix, group in model.frozen_groups():
        if not isinstance(group, ExpertGroup):
            continue
        assert isinstance(group.weight, NF4Weight)
        stored = [tensors[names.in_files(f"{prefix}{name}.weight")] for name in group.names]
        matrices = stored if group.num_stacked is None else list(stored[0])
        for index, matrix in enumerate(matrices):
            if variant == "gpt-oss":
                # by columns, and of gate and up in turn
                num_in_turn = 2 if group.names == ("gate_up_proj",) else 1
                rows = [matrix.T[start::num_in_turn] for start in range(num_in_turn)]
                matrix = torch.cat(rows)
            for key, expected in buffers(quantize(matrix, 64, True)).items():
                assert_equal(buffers(member(group.weight, index))[key], expected, key)
        assert len(group.weight.rows) == len(matrices)
        num_matrices += len(matrices)
    # three of each expert; one layer of the first has none, gate and up of the last are one
    assert (
        num_matrices
        == {
            "qwen3-moe": 3 * 6,
            "mixtral": 2 * 3 * 4,
            "granite-moe": 2 * 2 * 4,
            "gpt-oss": 2 * 2 * 4,
        }[variant]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_saves_in_shards_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, variant: str
) -> None:
    peer: Peer = tiny_peer(tmp_path_factory, variant)
    resaved = peer.folder / "resaved"
    assert len(list(resaved.glob("model-*.safetensors"))) > 1
    # transformers 5 writes rope_parameters where the checkpoint has rope_theta and rope_scaling
    assert "rope_parameters" in json.loads((resaved / "config.json").read_text())
    model, original = load(resaved), load(peer.checkpoint)
    assert model.config == original.config
    assert_holds(model, loaded_tensors(original))


def test_loading_peaks_at_the_packed_model_and_one_tensor(tmp_path: Path) -> None:
    size = 128
    fields = FIELDS | {
        "vocab_size": size,
        "hidden_size": size,
        "intermediate_size": size,
        "num_hidden_layers": 12,
        "num_key_value_heads": 4,
    }
    write_checkpoint(tmp_path, fields, random_tensors(fields, torch.bfloat16))
    with LiveBytes() as live:
        model = load(tmp_path, NF4)
    packed = sum(p.nbytes for p in model.parameters()) + model.frequencies.nbytes
    for _, group in model.groups():
        assert isinstance(group.weight, NF4Weight)
        packed += group.weight.num_bytes
    # the tensor itself in 2 bytes a weight, and the quantizer's float32 and int32 copies of it: the
    # widened, the padded, the absolute, the scaled and the coded one, the last again in 1 byte
    one_tensor = size * size * (2 + 5 * 4 + 1)
    assert packed < live.peak <= packed + one_tensor
    # a bound that a loader holding the whole checkpoint would break
    assert packed + one_tensor < (tmp_path / SINGLE_NAME).stat().st_size


def test_a_loaded_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    write_variant(tmp_path, "grouped-query")
    model = load(tmp_path)
    expected = {name: tensor.clone() for name, tensor in loaded_tensors(model).items()}
    path = tmp_path / SINGLE_NAME
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(b"\x5a" * (size - size // 4))
    assert_holds(model, expected)


def test_progress_is_reported_after_each_tensor(tmp_path: Path) -> None:
    tensors = random_tensors(FIELDS)
    write_checkpoint(tmp_path, FIELDS, tensors, num_shards=2)
    reports: list[tuple[int, int]] = []
    load(tmp_path, NF4, report=lambda done, total: reports.append((done, total)))
    assert reports == [(done, len(tensors)) for done in range(1, len(tensors) + 1)]


def test_the_hubs_cache_of_symbolic_links_is_loaded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "real", FIELDS, random_tensors(FIELDS), num_shards=2)
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "real").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert_holds(load(snapshot), random_tensors(FIELDS))


# transformers finds which file it reads before it reads one; a script of its own, because it would
# find our `kernels`
WHICH_FILES = """
import sys
from pathlib import Path
from transformers import modeling_utils
found, _ = modeling_utils._get_resolved_checkpoint_files(
    pretrained_model_name_or_path=sys.argv[1], variant=None, gguf_file=None, use_safetensors=None,
    download_kwargs={}, user_agent={}, is_remote_code=False, transformers_explicit_filename=None,
)
print(" ".join(sorted(Path(path).name for path in found)))
"""


def test_of_two_checkpoints_in_a_folder_the_one_file_is_read_as_transformers_does(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    old, new = random_tensors(FIELDS, seed=1), random_tensors(FIELDS, seed=2)
    write_checkpoint(folder, FIELDS, old, num_shards=2)
    assert_holds(load(folder), old)
    assert describe_loading(open_checkpoint(folder), torch.float32) == []
    write_checkpoint(folder, FIELDS, new)
    assert_holds(load(folder), new)
    line = f"{folder} has both {SINGLE_NAME} and {INDEX_NAME}: the first is read, as transformers"
    assert describe_loading(open_checkpoint(folder), torch.float32) == [f"{line} does"]
    pytest.importorskip("transformers")
    command = [sys.executable, "-I", "-c", WHICH_FILES, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [SINGLE_NAME], done.stderr


@pytest.mark.parametrize(
    ("is_tied", "stored", "compute", "converted"),
    [
        (False, BF16, BF16, []),
        # rows that are looked up become larger one by one
        (False, BF16, FP32, ["head"]),
        (False, FP32, BF16, ["embeddings", "head"]),
        (True, BF16, BF16, []),
        (True, BF16, FP32, ["embeddings"]),
        (True, FP32, BF16, ["embeddings"]),
    ],
)
def test_what_is_kept_in_another_dtype_is_said(
    tmp_path: Path,
    is_tied: bool,
    stored: torch.dtype,
    compute: torch.dtype,
    converted: list[str],
) -> None:
    fields = FIELDS | {"tie_word_embeddings": is_tied}
    write_checkpoint(tmp_path, fields, random_tensors(fields, stored))
    assert describe_loading(open_checkpoint(tmp_path), compute) == [
        f"{what}: stored in {stored}, kept in {compute}, the compute dtype" for what in converted
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.vision_tower.blocks.0.attn.qkv.weight",
        "visual.merger.mlp.0.weight",
        "multi_modal_projector.linear_1.bias",
    ],
)
def test_tensors_that_the_model_does_not_need_are_left_alone_with_a_line(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    tensors = random_tensors(FIELDS)
    write_checkpoint(tmp_path, FIELDS, tensors | {name: torch.ones(4, dtype=dtype)})
    assert_holds(load(tmp_path), tensors)
    assert describe_loading(open_checkpoint(tmp_path), torch.float32) == [
        f"{tmp_path} has tensors that the model does not need; left alone: {name}"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["tied", "gemma2"])
def test_a_tied_model_may_store_its_head_alone(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    fields = FIELDS | VARIANTS[variant]
    tensors = random_tensors(fields, dtype)
    write_checkpoint(tmp_path / "usual", fields, tensors)
    stored = dict(tensors)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    write_checkpoint(tmp_path / "head", fields, stored)
    assert_holds(load(tmp_path / "head"), tensors | head_in(torch.float32, fields, tensors))
    both = [tmp_path / name for name in ("usual", "head")]
    opened = [open_checkpoint(folder) for folder in both]
    usual, head = (loaded_tensors(load_sizes(each, torch.float16, None)) for each in opened)
    assert {n: (t.shape, t.dtype) for n, t in usual.items()} == {
        n: (t.shape, t.dtype) for n, t in head.items()
    }
    usual, head = (describe_loading(each, torch.float32) for each in opened)
    assert usual == head
    # its values count
    stored["lm_head.weight"][-1, -1] = torch.nan
    write_checkpoint(tmp_path / "head", fields, stored)
    with pytest.raises(ValueError, match="must hold finite values only"):
        load(tmp_path / "head")


def test_a_tied_head_may_be_stored_if_it_equals_the_embeddings(tmp_path: Path) -> None:
    fields = FIELDS | {"tie_word_embeddings": True}
    tensors = random_tensors(fields)
    head = tensors["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path, fields, tensors | {"lm_head.weight": head})
    assert_holds(load(tmp_path), tensors)
    assert describe_loading(open_checkpoint(tmp_path), torch.float32) == [
        f"{tmp_path} has tensors that the model does not need; left alone: lm_head.weight"
    ]
    head[-1, -1] += 1
    write_checkpoint(tmp_path, fields, tensors | {"lm_head.weight": head})
    with pytest.raises(ValueError, match=r"lm_head\.weight must equal model\.embed_tokens\.weight"):
        load(tmp_path)


def test_quantized_members_may_differ_in_dtype_and_others_not(tmp_path: Path) -> None:
    tensors = random_tensors(FIELDS)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].half()
    write_checkpoint(tmp_path, FIELDS, tensors)
    load(tmp_path, NF4)
    with pytest.raises(ValueError, match=r"k_proj\.weight, .* must share a dtype: got torch"):
        load(tmp_path)


# what is done to a good checkpoint of three shards, the error, and what its message must say
Damage = Callable[[Path], object]
SHARD = "model-00002-of-00003.safetensors"


def change_tensors(change: Callable[[dict[str, Tensor]], object], file: str = SHARD) -> Damage:
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change(tensors)
        save_file(tensors, folder / file)

    return damage


def change_index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        change(index)
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return damage


def change_config(**changes: Any) -> Damage:
    return lambda folder: (folder / "config.json").write_text(json.dumps(FIELDS | changes))


def move_shard(to: str) -> Damage:
    """The index follows the shard to another place."""

    def damage(folder: Path) -> None:
        (folder / to).parent.mkdir(exist_ok=True)
        (folder / SHARD).rename(folder / to)
        change_index(
            lambda index: index["weight_map"].update(
                {name: to for name, file in index["weight_map"].items() if file == SHARD}
            )
        )(folder)

    return damage


def truncate(num_bytes: int) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(content[:num_bytes])

    return damage


def pickle_only(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def first_of(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


DAMAGES: dict[str, tuple[Damage, type[Exception], str]] = {
    "shard-missing": (
        lambda folder: (folder / SHARD).unlink(),
        FileNotFoundError,
        f"names the shard {SHARD}, which must be in",
    ),
    "shard-renamed": (
        lambda folder: (folder / SHARD).rename(folder / "model-2-of-3.safetensors"),
        FileNotFoundError,
        "nearest there: model-",
    ),
    "shard-a-dangling-link": (
        lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).symlink_to("gone")),
        FileNotFoundError,
        f"names the shard {SHARD}",
    ),
    "shard-truncated": (truncate(-100), ValueError, "must be a complete safetensors file"),
    "shard-empty": (truncate(0), ValueError, "truncated or damaged, download it again"),
    "shard-header-truncated": (truncate(50), ValueError, SHARD),
    "shards-swapped": (
        lambda folder: (folder / SHARD).write_bytes(
            (folder / SHARD.replace("2", "1")).read_bytes()
        ),
        ValueError,
        f"must hold exactly the tensors that {INDEX_NAME} places there",
    ),
    "index-leaves-by-dots": (move_shard(f"../{SHARD}"), ValueError, "files of its own folder only"),
    "index-leaves-by-a-folder": (move_shard(f"sub/{SHARD}"), ValueError, f"got 'sub/{SHARD}'"),
    "index-names-an-absolute-path": (
        change_index(lambda index: index["weight_map"].update(x="/etc/passwd")),
        ValueError,
        "must name files of its own folder only: got '/etc/passwd'",
    ),
    "index-names-the-parent": (
        change_index(lambda index: index["weight_map"].update(x="..")),
        ValueError,
        "got '..'",
    ),
    "index-without-map": (
        change_index(lambda index: index.pop("weight_map")),
        ValueError,
        "must have a weight_map of tensor names to file names",
    ),
    "index-not-json": (
        lambda folder: (folder / INDEX_NAME).write_text("{"),
        ValueError,
        "must be JSON: got Expecting property name",
    ),
    "index-a-list": (
        lambda folder: (folder / INDEX_NAME).write_text("[]"),
        ValueError,
        "must hold a JSON object: got a list",
    ),
    "index-with-a-tensor-twice": (
        lambda folder: (folder / INDEX_NAME).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        ValueError,
        "got the key 'a' twice in one object",
    ),
    "index-with-a-nul": (
        lambda folder: (folder / INDEX_NAME).write_text('{"weight_map": {"a": "b\\u0000"}}'),
        ValueError,
        "must name files of its own folder only",
    ),
    "index-maps-to-numbers": (
        change_index(lambda index: index["weight_map"].update(x=1)),
        ValueError,
        "must have a weight_map of tensor names to file names",
    ),
    "index-lists-what-no-shard-has": (
        change_index(lambda index: index["weight_map"].update(x=SHARD)),
        ValueError,
        "1 differ, the first is x",
    ),
    "tensor-missing": (
        lambda folder: (
            change_tensors(lambda t: t.pop("model.norm.weight"), SHARD.replace("2", "3"))(folder),
            change_index(lambda index: index["weight_map"].pop("model.norm.weight"))(folder),
        ),
        ValueError,
        "missing are model.norm.weight; unknown are none",
    ),
    "more-layers-in-the-config": (
        change_config(num_hidden_layers=3),
        ValueError,
        "missing are model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.gate_proj.weight and 6 more; unknown are none",
    ),
    "fewer-layers-in-the-config": (
        change_config(num_hidden_layers=1),
        ValueError,
        "missing are none; unknown are model.layers.1.input_layernorm.weight",
    ),
    "biases-in-the-config-alone": (
        change_config(attention_bias=True),
        ValueError,
        "missing are model.layers.0.self_attn.k_proj.bias",
    ),
    "head-tied-in-the-config-alone": (
        change_config(tie_word_embeddings=True),
        ValueError,
        "lm_head.weight must equal model.embed_tokens.weight",
    ),
    "another-vocabulary": (
        change_config(vocab_size=97),
        ValueError,
        "must have shape (97, 32) by config.json: got (96, 32)",
    ),
    "another-number-of-heads": (
        change_config(num_key_value_heads=4),
        ValueError,
        "k_proj.weight must have shape (32, 32) by config.json: got (16, 32)",
    ),
    "another-architecture": (
        change_config(architectures=["GPT2LMHeadModel"]),
        ValueError,
        "must describe one of the architectures LlamaForCausalLM",
    ),
    "integers": (
        change_tensors(lambda t: t.update({k: v.int() for k, v in t.items()})),
        ValueError,
        "must be stored as torch.float32 or torch.float16 or torch.bfloat16: got torch.int32",
    ),
    "pickled": (
        pickle_only,
        FileNotFoundError,
        "pytorch_model.bin is pickled, which is never read",
    ),
    "config-missing": (
        lambda folder: (folder / "config.json").unlink(),
        FileNotFoundError,
        "must hold config.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, FIELDS, random_tensors(FIELDS), num_shards=3)
    load(folder)
    harm, error, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(error, match=re.escape(message)) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "quantization", [None, Quantization(64, False), NF4], ids=["none", "nf4", "nf4-dq"]
)
@pytest.mark.parametrize(
    "ending",
    ["q_proj.weight", "o_proj.bias", "norm.weight", "embed_tokens.weight", "lm_head.weight"],
)
def test_a_tensor_that_is_not_finite_is_named(
    tmp_path: Path, ending: str, quantization: Quantization | None, bad: float
) -> None:
    fields = FIELDS | VARIANTS["biases"]
    tensors = random_tensors(fields)
    name = first_of(tensors, ending)
    tensors[name].view(-1)[7] = bad
    write_checkpoint(tmp_path, fields, tensors)
    with pytest.raises(ValueError, match=re.escape(name) + " must hold finite"):
        load(tmp_path, quantization)


def test_structure_is_checked_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, FIELDS, random_tensors(FIELDS), num_shards=3)
    truncate(-1)(tmp_path)
    monkeypatch.setattr(LinearGroup, "allocate", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        load(tmp_path)


def test_an_empty_folder_is_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    message = f"must hold {SINGLE_NAME} or {INDEX_NAME}: {tmp_path} has config.json; download"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load(tmp_path)


def test_a_local_folder_is_its_own_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_checkpoint(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    # a folder comes before a hub id of the same name
    assert find_checkpoint("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "model", ["", "no-such-folder", "./a/b", "/no/such", "~/no/such", "a/b/c", "~nobody/x"]
)
def test_what_is_no_folder_and_no_hub_id_is_refused(model: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"owner/name@revision: got {model!r}")):
        find_checkpoint(model)


def test_a_hub_id_fetches_only_the_files_needed(tmp_path: Path) -> None:
    code = "import sys; from checkpoint.files import find_checkpoint as f; print(f(sys.argv[1]))"
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    small = ("config.json", "tokenizer.json", "additional_chat_templates/tools.jinja")
    needed = {
        name: name.encode() for name in (*small, "model-1.safetensors", "model-2.safetensors")
    }
    needed[INDEX_NAME] = index.encode()
    others = {"model-old.safetensors", "pytorch_model.bin", "original/params.json"}
    files = needed | dict.fromkeys(others, b"")
    with serving(
        models__owner__name=Repository(files),
        models__owner__both=Repository(files | {SINGLE_NAME: b"1"}),
        models__owner__pickled=Repository({"config.json": b"", "pytorch_model.bin": b""}),
        models__owner__outside=Repository(
            {INDEX_NAME: b'{"weight_map": {"a": "../../x.safetensors"}}'}
        ),
    ) as hub:
        before = "import sys; from checkpoint.files import find_description as d; "
        before += "print(*d(sys.argv[1], has_tokenizer=False).glob('*')); "
        done = hub.run(["-c", before + code, "owner/name"], tmp_path)
        described, folder = done.stdout.splitlines()
        # a plan needs no more
        assert described == str(Path(folder) / "config.json"), done.stderr
        assert files_of(Path(folder)).keys() == needed.keys()
        assert sorted(hub.downloads()) == sorted(needed)
        done = hub.run(["-c", code, "owner/both"], tmp_path)
        assert files_of(Path(done.stdout.strip())).keys() == {*small, SINGLE_NAME}, done.stderr
        done = hub.run(["-c", code, "owner/pickled"], tmp_path)
        assert "owner/pickled has config.json, pytorch_model.bin; pytorch_model.bin is pickled" in (
            done.stderr
        )
        done = hub.run(["-c", code, "owner/outside"], tmp_path)
        assert "must name files of its own folder only: got '../../x.safetensors'" in done.stderr


class LateStream:
    """Stands in for a stream of a GPU: what is put on it runs when another waits for it."""

    def __init__(self, device: object = None) -> None:
        self.queue: list[Callable[[], object]] = []
        self.num_done = 0
        self.lock = threading.Lock()

    def run(self, num_calls: int) -> None:
        with self.lock:
            while num_calls > self.num_done:
                self.queue[self.num_done]()
                self.num_done += 1

    def wait_stream(self, other: "LateStream") -> None:
        other.run(len(other.queue))

    def wait_event(self, event: "LateEvent") -> None:
        event.synchronize()


class LateEvent:
    """Stands in for an event: a place in a stream's queue."""

    def __init__(self, blocking: bool = False) -> None:
        self.stream = LateStream()
        self.num_calls = 0

    def record(self, stream: LateStream) -> None:
        self.stream, self.num_calls = stream, len(stream.queue)

    def synchronize(self) -> None:
        self.stream.run(self.num_calls)


@contextmanager
def late_copies(stream: LateStream) -> Iterator[None]:
    """Stands in for `torch.cuda.stream`: copies in this context are put off."""
    copy = Tensor.copy_

    def put_off(target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        assert non_blocking
        stream.queue.append(lambda: copy(target, source))
        return target

    with patch.object(Tensor, "copy_", put_off):
        yield


@pytest.fixture
def _stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's loads take the GPU's way, on streams that do everything as late as they may, in
    pieces of 1000 bytes."""
    kernels = LateStream()
    for name, stand_in in {
        "Stream": LateStream,
        "Event": LateEvent,
        "stream": late_copies,
        "current_stream": lambda _: kernels,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(checkpoint.shard_reader, "PIECE_BYTES", 1000)
    monkeypatch.setattr(
        checkpoint.loading, "make_ring", lambda tensors, is_pinned: make_ring(tensors, False)
    )
    monkeypatch.setattr(
        checkpoint.loading,
        "_load_on_cpu",
        lambda wanted, slots, report: _load_on_gpu(wanted, slots, CPU, report),
    )


@pytest.mark.usefixtures("_stand_in_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stand_in_gpu_holds_the_files_tensors(
    tmp_path: Path, variant: str, num_shards: int, dtype: torch.dtype
) -> None:
    fields = FIELDS | VARIANTS[variant]
    tensors = random_tensors(fields, dtype)
    model = load(write_checkpoint(tmp_path, fields, tensors, num_shards))
    assert_holds(model, tensors | head_in(torch.float32, fields, tensors))
    assert not any(p.requires_grad for p in model.parameters())


def test_a_stand_in_gpu_holds_a_tied_head_that_is_stored_alone(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fields = FIELDS | VARIANTS["tied"]
    tensors = random_tensors(fields, torch.bfloat16)
    stored = dict(tensors)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    write_checkpoint(tmp_path, fields, stored)
    request.getfixturevalue("_stand_in_gpu")
    assert_holds(load(tmp_path), tensors | head_in(torch.float32, fields, tensors))


@pytest.mark.parametrize("quantization", [Quantization(64, False), NF4], ids=["nf4", "nf4-dq"])
def test_a_stand_in_gpu_quantizes_to_the_same_bytes(
    tmp_path: Path, quantization: Quantization, request: pytest.FixtureRequest
) -> None:
    fields = FIELDS | VARIANTS["biases"]
    write_checkpoint(tmp_path, fields, random_tensors(fields, torch.bfloat16), num_shards=2)
    expected = load(tmp_path, quantization)
    request.getfixturevalue("_stand_in_gpu")
    reports: list[tuple[int, int]] = []
    actual = load(tmp_path, quantization, report=lambda done, total: reports.append((done, total)))
    num_tensors = len(random_tensors(fields))
    assert reports == [(done, num_tensors) for done in range(1, num_tensors + 1)]
    for (_, ours), (prefix, theirs) in zip(actual.groups(), expected.groups(), strict=True):
        assert isinstance(ours.weight, NF4Weight)
        assert isinstance(theirs.weight, NF4Weight)
        assert isinstance(ours.bias, Tensor)
        assert isinstance(theirs.bias, Tensor)
        for name, tensor in buffers(theirs.weight).items():
            assert_equal(buffers(ours.weight)[name], tensor, f"{prefix}{name}")
        assert_equal(ours.bias, theirs.bias, prefix)
    for (name, ours), (_, theirs) in zip(
        actual.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert_equal(ours.detach(), theirs.detach(), name)


def test_a_stand_in_gpu_expands_the_same_experts(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_mxfp4(tmp_path, num_shards=2)
    expected = load(tmp_path, NF4)
    request.getfixturevalue("_stand_in_gpu")
    actual = load(tmp_path, NF4)
    for (_, ours), (prefix, theirs) in zip(
        actual.frozen_groups(), expected.frozen_groups(), strict=True
    ):
        for mine, other in zip(ours.frozen_tensors(), theirs.frozen_tensors(), strict=True):
            assert_equal(mine, other, prefix)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [Quantization(32, False), NF4], ids=["nf4", "nf4-dq"])
def test_a_stand_in_gpu_keeps_stored_nf4_byte_for_byte(
    tmp_path: Path,
    quantization: Quantization,
    storage: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    folder = write_nf4(tmp_path, quantization, storage)
    expected = load(folder, quantization)
    request.getfixturevalue("_stand_in_gpu")
    actual = load(folder, quantization)
    num_kept = 0
    for (_, ours), (prefix, theirs) in zip(actual.groups(), expected.groups(), strict=True):
        if isinstance(ours.weight, Tensor):
            assert isinstance(theirs.weight, Tensor)
            assert_equal(ours.weight, theirs.weight, prefix)
            num_kept += 1
            continue
        assert isinstance(theirs.weight, NF4Weight)
        for name, tensor in buffers(theirs.weight).items():
            assert_equal(buffers(ours.weight)[name], tensor, f"{prefix}{name}")
    assert num_kept == 1


def write_nf4(folder: Path, quantization: Quantization, storage: torch.dtype) -> Path:
    """Write a checkpoint in NF4, one group of it in 16 bits, as another library might."""
    fields = FIELDS | {"hidden_size": 128, "quantization_config": QUANTIZATION_CONFIG}
    stored = {}
    for name, tensor in random_tensors(fields, torch.bfloat16).items():
        if "_proj.weight" in name and name != "model.layers.1.self_attn.o_proj.weight":
            for suffix, part in serialize(quantize(tensor, *quantization), tensor.dtype).items():
                stored[name + suffix] = part if suffix else part.view(-1).view(storage).view(-1, 1)
        else:
            stored[name] = tensor
    # tensors of one file may not share memory
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    return write_checkpoint(folder, fields, stored, num_shards=3)


@pytest.mark.usefixtures("_stand_in_gpu")
@pytest.mark.parametrize("part", ["absmax", "nested_absmax"])
def test_a_stand_in_gpu_names_stored_scales_that_are_not_finite(tmp_path: Path, part: str) -> None:
    quantization = Quantization(64, part == "nested_absmax")
    write_nf4(tmp_path, quantization, torch.uint8)
    name = f"model.layers.0.mlp.up_proj.weight.{part}"
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][0] = torch.nan
            save_file(tensors, path)
    with pytest.raises(ValueError, match=re.escape(name) + " must hold finite values only"):
        load(tmp_path, quantization)


def write_non_finite(folder: Path, endings: tuple[str, ...], bad: float) -> list[str]:
    """Write a checkpoint in which a value of some tensors is not finite, and name those."""
    fields = FIELDS | VARIANTS["biases"]
    tensors = random_tensors(fields)
    names = [first_of(tensors, ending) for ending in endings]
    for name in names:
        tensors[name].view(-1)[7] = bad
    write_checkpoint(folder, fields, tensors)
    return names


# what the message says beside the name, by what is not finite
NON_FINITE = {
    "q_proj.weight": "weights only: 1 of 1024 are NaN or infinite; the checkpoint is damaged",
    "o_proj.bias": "values only: got NaN or infinity",
    "norm.weight": "values only: got NaN or infinity",
    "embed_tokens.weight": "values only: got NaN or infinity",
    "lm_head.weight": "values only: got NaN or infinity",
}


@pytest.mark.usefixtures("_stand_in_gpu")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantization", [Quantization(64, False), NF4], ids=["nf4", "nf4-dq"])
@pytest.mark.parametrize("ending", NON_FINITE)
def test_a_stand_in_gpu_names_a_tensor_that_is_not_finite(
    tmp_path: Path, ending: str, quantization: Quantization, bad: float
) -> None:
    (name,) = write_non_finite(tmp_path, (ending,), bad)
    message = f"{name} must hold finite {NON_FINITE[ending]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, quantization)


@pytest.mark.usefixtures("_stand_in_gpu")
def test_a_stand_in_gpu_names_a_file_that_became_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, FIELDS, random_tensors(FIELDS))
    path = tmp_path / SINGLE_NAME

    def cut_and_stream(*arguments: Any) -> None:
        os.truncate(path, path.stat().st_size - 100)
        stream(*arguments)

    monkeypatch.setattr(checkpoint.loading, "stream", cut_and_stream)
    message = rf"^{re.escape(str(path))} must hold \d+ bytes of \S+ from \d+: it ends at"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, NF4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_onto_cuda_gives_the_cpus_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    fields = FIELDS | {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 512}
    write_checkpoint(tmp_path, fields, random_tensors(fields, dtype))
    devices = (CPU, torch.device("cuda"))
    on_cpu, on_cuda = (
        load_model(open_checkpoint(tmp_path), each, torch.float32, NF4) for each in devices
    )
    for (name, ours), (_, theirs) in zip(
        on_cuda.named_parameters(), on_cpu.named_parameters(), strict=True
    ):
        assert_equal(ours.detach().cpu(), theirs.detach(), name)
    for (prefix, ours), (_, theirs) in zip(on_cuda.groups(), on_cpu.groups(), strict=True):
        assert isinstance(ours.weight, NF4Weight)
        assert isinstance(theirs.weight, NF4Weight)
        actual = {name: tensor.cpu() for name, tensor in buffers(ours.weight).items()}
        expected = buffers(theirs.weight)
        assert_equal(actual["packed"], expected["packed"], prefix)
        # the mean of the scales is a float32 sum in the device's order, so its last bits may differ
        num_blocks = expected["codes"].numel()
        difference = (actual["mean"] - expected["mean"]).abs()
        assert (difference <= num_blocks * torch.finfo(torch.float32).eps * expected["mean"]).all()
        # it moves every scaled value by up to twice that over its group's scale, and a code only
        # where one of the map's 255 midpoints lies in between; values of [-1, 1] have a density of
        # about a half there, which leaves room for chance
        shift = 2 * difference.max() / expected["group_absmax"].min()
        num_differing = int((actual["codes"] != expected["codes"]).sum())
        assert num_differing <= math.ceil(4 * 255 * float(shift) * num_blocks), prefix


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [Quantization(32, False), NF4], ids=["nf4", "nf4-dq"])
def test_cuda_keeps_stored_nf4_byte_for_byte(
    tmp_path: Path, quantization: Quantization, storage: torch.dtype
) -> None:
    folder = write_nf4(tmp_path, quantization, storage)
    expected = load(folder, quantization)
    actual = load_model(open_checkpoint(folder), torch.device("cuda"), torch.float32, quantization)
    for (_, ours), (prefix, theirs) in zip(actual.groups(), expected.groups(), strict=True):
        if isinstance(ours.weight, Tensor):
            assert isinstance(theirs.weight, Tensor)
            assert_equal(ours.weight.cpu(), theirs.weight, prefix)
            continue
        assert isinstance(theirs.weight, NF4Weight)
        for name, tensor in buffers(theirs.weight).items():
            assert_equal(buffers(ours.weight)[name].cpu(), tensor, f"{prefix}{name}")
        for dtype in (torch.float32, torch.bfloat16):
            expanded = nf4_dequantize(ours.weight, dtype).cpu()
            assert_equal(expanded, dequantize(theirs.weight, dtype), prefix)


@pytest.mark.gpu
def test_cuda_peaks_at_the_model_where_it_is_stored_in_nf4(tmp_path: Path) -> None:
    folder = write_nf4(tmp_path, NF4, torch.uint8)
    # makes what later loads share
    load_model(open_checkpoint(folder), torch.device("cuda"), torch.bfloat16, NF4)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_model(open_checkpoint(folder), torch.device("cuda"), torch.bfloat16, NF4)
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    # of each tensor its least and its largest value, and both in float32; each takes 512 bytes
    num_tensors = len(list(model.parameters())) + 3 * 13 + 1
    # what a reduction leaves between its parts
    assert held <= peak <= held + 4 * 512 * num_tensors + (1 << 18)


# matrices of several pieces, and of no whole number of them
LARGER = FIELDS | VARIANTS["biases"] | {"hidden_size": 256, "intermediate_size": 640}
CUDA = torch.device("cuda")


def slow_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels fall behind the copies, by some milliseconds a tensor."""
    quantize_late = LinearGroup.place

    def quantize_later(group: LinearGroup, *arguments: Any) -> Tensor:
        torch.cuda._sleep(5_000_000)
        return quantize_late(group, *arguments)

    monkeypatch.setattr(LinearGroup, "place", quantize_later)


def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies fall behind the threads and the kernels, by some tenths of a millisecond each."""
    copy = DeviceSink.copy

    def copy_later(sink: DeviceSink, start: int, piece: Tensor) -> Callable[[], None]:
        with torch.cuda.stream(sink._copies):
            torch.cuda._sleep(500_000)
        return copy(sink, start, piece)

    monkeypatch.setattr(DeviceSink, "copy", copy_later)


SPEEDS = {"as-it-is": lambda _: None, "slow-kernels": slow_kernels, "slow-copies": slow_copies}


@pytest.mark.gpu
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(
    "quantization", [None, Quantization(64, False), NF4], ids=["none", "nf4", "nf4-dq"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_holds_each_tensor_as_if_loaded_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    quantization: Quantization | None,
    speed: str,
) -> None:
    tensors = random_tensors(LARGER, dtype)
    write_checkpoint(tmp_path, LARGER, tensors, num_shards=3)
    monkeypatch.setattr(checkpoint.shard_reader, "PIECE_BYTES", 30_001)
    SPEEDS[speed](monkeypatch)
    # what an earlier load leaves in the memory is the same, what another leaves is not
    for _ in range(3):
        torch.empty(1 << 24, dtype=torch.uint8, device=CUDA).fill_(0xA5)
        model = load_model(open_checkpoint(tmp_path), CUDA, dtype, quantization)
        for name, parameter in model.named_parameters():
            assert_equal(parameter.detach().cpu(), tensors[name], name)
        for prefix, group in model.groups():
            assert isinstance(group.bias, Tensor)
            biases = [tensors[f"{prefix}{name}.bias"] for name in group.names]
            assert_equal(group.bias.cpu(), torch.cat(biases), prefix)
            weights = [tensors[f"{prefix}{name}.weight"] for name in group.names]
            if quantization is None:
                assert isinstance(group.weight, Tensor)
                assert_equal(group.weight.cpu(), torch.cat(weights), prefix)
                continue
            assert isinstance(group.weight, NF4Weight)
            for index, weight in enumerate(weights):
                # on the GPU, whose mean of the scales adds up in an order of its own
                alone = buffers(quantize(weight.to(CUDA), *quantization))
                for key, tensor in buffers(member(group.weight, index)).items():
                    assert_equal(tensor, alone[key], f"{prefix}{group.names[index]} {key}")


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "quantization", [None, Quantization(64, False), NF4], ids=["none", "nf4", "nf4-dq"]
)
@pytest.mark.parametrize("ending", NON_FINITE)
def test_cuda_names_a_tensor_that_is_not_finite(
    tmp_path: Path, ending: str, quantization: Quantization | None, bad: float
) -> None:
    (name,) = write_non_finite(tmp_path, (ending,), bad)
    message = f"{name} must hold finite "
    if quantization is not None:
        message += NON_FINITE[ending]
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_model(open_checkpoint(tmp_path), CUDA, torch.float32, quantization)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["as stored", "NF4"])
def test_a_file_that_is_cut_while_it_is_read_ends_in_a_message(
    tmp_path: Path, quantization: Quantization | None
) -> None:
    fields = FIELDS | {"hidden_size": 256, "num_attention_heads": 8}
    write_checkpoint(tmp_path, fields, random_tensors(fields))

    def cut(done: int, total: int) -> None:
        # pages behind the end of a file are a memory map's SIGBUS
        os.truncate(tmp_path / "model.safetensors", 1 << 14)

    with pytest.raises(ValueError, match="it was truncated while it was read, download it again"):
        load_model(open_checkpoint(tmp_path), CPU, torch.float32, quantization, cut)


@pytest.mark.gpu
def test_cuda_peaks_at_the_packed_model_and_two_tensors(tmp_path: Path) -> None:
    hidden, inner = 512, 1536
    fields = FIELDS | {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 6,
    }
    write_checkpoint(tmp_path, fields, random_tensors(fields, torch.bfloat16))
    # makes what later loads share
    load_model(open_checkpoint(tmp_path), CUDA, torch.bfloat16, NF4)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_model(open_checkpoint(tmp_path), CUDA, torch.bfloat16, NF4)
    packed = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    two_tensors = 2 * hidden * inner * 2
    # the quantizer's float32 scale of each block, and what a reduction leaves between its parts
    temporaries = hidden * inner // 64 * 4 + (1 << 18)
    assert packed < peak <= packed + two_tensors + temporaries
    # embeddings that came through the staging memory, or a second copy of them, would break it
    assert two_tensors + temporaries < model.decoder.embed_tokens.weight.nbytes
