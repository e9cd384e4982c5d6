"""Checkpoints in NF4: theirs read here, ours read by transformers and bitsandbytes; refusals."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SUPPORT
from safetensors.torch import load_file
from support.equality import assert_equal, assert_no_worse_than
from support.live_bytes import LiveBytes
from support.llama_peers import CPU
from support.micro_steps import NF4
from support.peer_process import run_peer
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint
from torch import Tensor

import quantize
from checkpoint.implied import implied_checkpoint
from checkpoint.loading import load_model, load_sizes
from checkpoint.opening import open_checkpoint
from llama.model import Llama
from nf4.double_quant import QuantizedAbsmax
from nf4.serialized import STATE
from nf4.weight import NF4Weight, Quantization, dequantize, member

FILE = "model.safetensors"
SCRIPT = SUPPORT / "stored_nf4_peer.py"
QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
}
# rows are whole blocks of 64; matrices have one or one and a half groups of scales
WIDE = FIELDS | {"hidden_size": 128, "intermediate_size": 192}
# nor blocks nor bytes are whole: 76 x 57 numbers are odd in places
ODD = FIELDS | {
    "hidden_size": 76,
    "intermediate_size": 57,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PHI3 = VARIANTS["phi3"] | {
    "rope_scaling": VARIANTS["phi3"]["rope_scaling"]
    | {name: [1.0 + i / 8 for i in range(12)] for name in ("short_factor", "long_factor")}
}
DEFAULT = {
    "fields": WIDE,
    "quantization": NF4,
    "dtype": "float32",
    "storage": "uint8",
    "skip": None,
    "shard": "1GB",
    "has_ours": True,
}
MIXED = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.o_proj"]
CASES: dict[str, dict[str, Any]] = {
    "double-quantized": {},
    "single-bfloat16": {"quantization": Quantization(64, False), "dtype": "bfloat16"},
    "blocks-of-128": {
        "quantization": Quantization(128, True),
        "fields": WIDE | {"intermediate_size": 256},
        "dtype": "float16",
    },
    "blocks-of-32": {"quantization": Quantization(32, False)},
    "odd-shapes": {"fields": ODD},
    "odd-shapes-single": {
        "fields": ODD,
        "quantization": Quantization(64, False),
        "dtype": "bfloat16",
    },
    "qwen2": {"fields": WIDE | VARIANTS["qwen2"]},
    "phi3": {"fields": WIDE | PHI3, "dtype": "bfloat16"},
    "in-shards": {"shard": "30KB"},
    "stored-as-bfloat16": {"storage": "bfloat16", "has_ours": False},
    "mixed": {"skip": MIXED, "dtype": "bfloat16", "has_ours": False},
}


def write_source(case: dict[str, Any], folder: Path) -> Path:
    tensors = random_tensors(case["fields"], getattr(torch, case["dtype"]))
    return write_checkpoint(folder, case["fields"], tensors)


def quantize_folder(source: Path, output: Path, quantization: Quantization, *more: str) -> Path:
    block_size, double_quant = quantization
    flags = ["--model", str(source), "--output", str(output), "--block-size", str(block_size)]
    quantize.main([*flags, *([] if double_quant else ["--no-double-quant"]), *more])
    return output


@functools.cache
def _outputs(base: Path) -> dict[str, Tensor]:
    base.mkdir()
    jobs = {}
    for name, changes in CASES.items():
        case, folder = DEFAULT | changes, base / name
        source = write_source(case, folder / "source")
        ours = folder / "ours" if case["has_ours"] else None
        if ours:
            quantize_folder(source, ours, case["quantization"], "--device", "cpu")
        del case["fields"]
        jobs[name] = case | {
            "source": str(source),
            "theirs": str(folder / "theirs"),
            "ours": str(ours or ""),
        }
    input_ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    outputs = run_peer(SCRIPT, base, {"input_ids": input_ids}, {"jobs": json.dumps(jobs)})
    return outputs | {"input_ids": input_ids}


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases, each with its checkpoints: source, theirs, ours."""
    folder = tmp_path_factory.getbasetemp() / "stored_nf4"
    _outputs(folder)
    return folder


def outputs_of(base: Path, case: str, kind: str) -> dict[str, Tensor]:
    prefix = f"{case}/{kind}/"
    return {k.removeprefix(prefix): v for k, v in _outputs(base).items() if k.startswith(prefix)}


def load(folder: Path, **options: Any) -> Llama:
    opened = open_checkpoint(folder)
    return load_model(opened, CPU, torch.float32, opened.quantization, **options)


def members(model: Llama) -> dict[str, NF4Weight]:
    """Each weight in NF4 by its name in the checkpoint."""
    return {
        f"{prefix}{name}.weight": member(group.weight, index)
        for prefix, group in model.groups()
        for index, name in enumerate(group.names)
        if isinstance(group.weight, NF4Weight)
    }


def buffers(weight: NF4Weight) -> dict[str, Tensor]:
    scales = weight.absmax
    if isinstance(scales, QuantizedAbsmax):
        found = {"absmax": scales.codes, "group_absmax": scales.group_absmax, "mean": scales.mean}
    else:
        found = {"absmax": scales}
    return found | {"packed": weight.packed, "expanded": dequantize(weight, torch.float32)}


def assert_is_theirs(model: Llama, outputs: dict[str, Tensor]) -> None:
    """Every byte, scale, offset and expanded weight is what bitsandbytes has."""
    found = {
        f"{name}/{part}": value
        for name, weight in members(model).items()
        for part, value in buffers(weight).items()
    }
    assert found.keys() == {name for name in outputs if "/" in name}
    for name, value in found.items():
        assert_equal(value, outputs[name], name)


def both_kinds() -> list[tuple[str, str]]:
    kinds = [(name, "theirs") for name in CASES]
    return kinds + [(n, "ours") for n, case in CASES.items() if case.get("has_ours", True)]


@pytest.mark.parametrize(("case", "kind"), both_kinds())
def test_a_stored_weight_is_read_bit_for_bit_as_bitsandbytes_does(
    base: Path, case: str, kind: str
) -> None:
    folder = base / case / kind
    assert open_checkpoint(folder).quantization == (DEFAULT | CASES[case])["quantization"]
    if case == "in-shards" and kind == "theirs":
        assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_is_theirs(load(folder), outputs_of(base, case, kind))


@pytest.mark.parametrize(("case", "kind"), both_kinds())
def test_logits_are_as_near_the_truth_as_transformers(base: Path, case: str, kind: str) -> None:
    outputs = outputs_of(base, case, kind)
    actual = load(base / case / kind).logits(_outputs(base)["input_ids"])
    truth = outputs["logits.float64"]
    # where rows are no whole blocks a CPU with AVX-512 gives bitsandbytes the wrong scales
    baseline = "logits.expanded" if case.startswith("odd-shapes") else "logits"
    assert_no_worse_than(actual, outputs[baseline], truth)


@pytest.mark.parametrize("case", [name for name, c in CASES.items() if c.get("has_ours", True)])
def test_a_quantized_copy_is_what_its_source_becomes_when_loaded(base: Path, case: str) -> None:
    source = base / case / "source"
    quantization = (DEFAULT | CASES[case])["quantization"]
    expected = load_model(open_checkpoint(source), CPU, torch.float32, quantization)
    actual = load(base / case / "ours")
    assert_same(actual, expected)
    assert actual.config == expected.config


def assert_same(actual: Llama, expected: Llama) -> None:
    found = members(actual)
    assert found.keys() == members(expected).keys()
    for name, weight in members(expected).items():
        for part, value in buffers(weight).items():
            assert_equal(buffers(found[name])[part].cpu(), value.cpu(), f"{name} {part}")
    for (name, ours), (_, theirs) in zip(
        actual.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert_equal(ours.detach().cpu(), theirs.detach().cpu(), name)
    for (prefix, ours), (_, theirs) in zip(actual.groups(), expected.groups(), strict=True):
        assert (ours.bias is None) == (theirs.bias is None)
        if ours.bias is not None and theirs.bias is not None:
            assert_equal(ours.bias, theirs.bias, prefix)


@pytest.mark.parametrize("case", CASES)
def test_config_json_alone_says_what_transformers_stores(base: Path, case: str) -> None:
    opened = open_checkpoint(base / case / "theirs")
    assert opened.quantization
    implied = implied_checkpoint(opened.folder, opened.quantization.block_size)
    assert implied.quantization == opened.quantization
    found = {tensor.name: (tensor.shape, tensor.dtype) for tensor in implied.needed()}
    assert found == {tensor.name: (tensor.shape, tensor.dtype) for tensor in opened.needed()}


def test_modules_left_in_16_bits_stay_as_stored(base: Path) -> None:
    folder = base / "mixed" / "theirs"
    tensors = load_file(folder / "model.safetensors")
    model = load(folder)
    kept = []
    for prefix, group in model.groups():
        if isinstance(group.weight, Tensor):
            stored = [tensors[f"{prefix}{name}.weight"] for name in group.names]
            assert_equal(group.weight, torch.cat(stored), prefix)
            kept += [prefix + name for name in group.names]
    mlp = "model.layers.0.mlp."
    names = [f"{mlp}{name}_proj" for name in ("gate", "up", "down")]
    assert sorted(kept) == sorted([*names, "model.layers.1.self_attn.o_proj"])


# what is done to a good checkpoint of one file, and what the message must say
Damage = Callable[[dict[str, Tensor], dict[str, Any]], object]
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"


def change_state(name: str, **changes: Any) -> Damage:
    """Change fields of a weight's JSON; None removes one."""

    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        fields = json.loads(bytes(tensors[name + STATE].tolist())) | changes
        fields = {key: value for key, value in fields.items() if value is not None}
        tensors[name + STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    return damage


def change_value(name: str, value: float) -> Damage:
    return lambda tensors, config: tensors[name].view(-1)[3:4].fill_(value)


def remove(*names: str) -> Damage:
    return lambda tensors, config: [tensors.pop(name) for name in names]


def rename(name: str, other: str) -> Damage:
    return lambda tensors, config: tensors.update({other: tensors.pop(name)})


def cast(name: str, dtype: torch.dtype) -> Damage:
    return lambda tensors, config: tensors.update({name: tensors[name].to(dtype)})


def expand(*names: str) -> Damage:
    """Store weights in 32 bits again."""

    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in names:
            shape = json.loads(bytes(tensors[name + STATE].tolist()))["shape"]
            for part in [part for part in tensors if part.startswith(name + ".")]:
                del tensors[part]
            tensors[name] = torch.ones(shape)

    return damage


def expand_all(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    expand(*[name.removesuffix(STATE) for name in tensors if name.endswith(STATE)])(tensors, config)


def quantize_head(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for part in [part for part in tensors if part.startswith(Q)]:
        tensors["lm_head.weight" + part.removeprefix(Q)] = tensors[part].clone()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "fp4": (
        rename(Q + STATE, Q + ".quant_state.bitsandbytes__fp4"),
        f"{Q} must be in NF4 or in 16 or 32 bits: got bitsandbytes fp4; use the original",
    ),
    "fp4-in-the-json": (change_state(Q, quant_type="fp4"), "quant_type must be nf4: got 'fp4'"),
    "no-json": (
        lambda tensors, config: tensors[Q + STATE].fill_(7),
        f"{Q + STATE} must be JSON",
    ),
    "a-list": (
        lambda tensors, config: tensors.update(
            {Q + STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}
        ),
        f"{Q + STATE} must hold a JSON object: got a list",
    ),
    "a-block-size-of-48": (change_state(Q, blocksize=48), "blocksize must be one of (32, 64,"),
    "no-block-size": (change_state(Q, blocksize=None), "blocksize must be one of"),
    "groups-of-128": (change_state(Q, nested_blocksize=128), "nested_blocksize must be 256: got"),
    "an-infinite-offset": (
        change_state(Q, nested_offset=float("inf")),
        "nested_offset must be a finite number: got inf",
    ),
    "half-an-offset": (change_state(Q, nested_dtype="float16"), "nested_dtype must be float32"),
    "another-shape": (
        change_state(Q, shape=[64, 256]),
        f"{Q} must have shape (128, 128) by config.json: its quant_state says (64, 256)",
    ),
    "a-flat-shape": (change_state(Q, shape=[16384]), "shape must be two sizes: got [16384]"),
    "two-block-sizes": (
        change_state(K, blocksize=128),
        "must have one block size and one kind of scales",
    ),
    "another-table": (
        change_value(Q + ".quant_map", 0.5),
        f"{Q}.quant_map must be bitsandbytes' table, value for value: it differs",
    ),
    "another-second-table": (
        change_value(Q + ".nested_quant_map", 0.5),
        f"{Q}.nested_quant_map must be bitsandbytes' table",
    ),
    "a-table-in-16-bits": (cast(Q + ".quant_map", torch.bfloat16), f"{Q}.quant_map must be"),
    "no-table": (
        remove(Q + ".quant_map"),
        f"must hold {Q}.quant_map for a weight in NF4: no file does",
    ),
    "no-scales": (remove(Q + ".absmax"), f"missing are {Q}.absmax; unknown are none"),
    "no-group-scales": (remove(Q + ".nested_absmax"), f"missing are {Q}.nested_absmax"),
    "no-codes": (remove(Q), f"missing are {Q}; unknown are none"),
    "fewer-codes": (
        lambda tensors, config: tensors.update({Q: tensors[Q][:-1].clone()}),
        f"{Q} must have shape (8192, 1) by config.json: got (8191, 1)",
    ),
    "fewer-scales": (
        lambda tensors, config: tensors.update({Q + ".absmax": tensors[Q + ".absmax"][:-1]}),
        f"{Q}.absmax must have shape (256,) by config.json: got (255,)",
    ),
    "scales-of-another-kind": (
        cast(Q + ".absmax", torch.float32),
        f"{Q}.absmax must be stored as torch.uint8: got torch.float32",
    ),
    "group-scales-in-16-bits": (
        cast(Q + ".nested_absmax", torch.bfloat16),
        f"{Q}.nested_absmax must be stored as torch.float32: got torch.bfloat16",
    ),
    "bytes-for-a-norm": (
        cast("model.norm.weight", torch.uint8),
        "model.norm.weight must be stored as torch.float32 or torch.float16 or torch.bfloat16: "
        "got torch.uint8",
    ),
    "one-of-a-group-not-quantized": (
        expand(K),
        "q_proj, k_proj, v_proj of model.layers.0.self_attn share a buffer and must all be in NF4 "
        "or none: k_proj is not; use the original checkpoint",
    ),
    "a-quantized-head": (
        quantize_head,
        "only projections may be in NF4: lm_head.weight is in NF4 too; keep it out",
    ),
    "int8": (
        lambda tensors, config: tensors.update({Q.replace("weight", "SCB"): torch.ones(128)}),
        f"{Q} must be in NF4 or in 16 or 32 bits: got bitsandbytes int8; use the original",
    ),
    "codes-as-integers": (
        lambda tensors, config: tensors.update({Q: tensors[Q].view(torch.int8)}),
        f"the codes of {Q} must be stored as torch.uint8, torch.bfloat16, torch.float16, "
        "torch.float32: got torch.int8; use the original",
    ),
    "no-quantization-config": (
        lambda tensors, config: config.pop("quantization_config"),
        "must have a quantization_config of bitsandbytes nf4, as the weights are in NF4: it has "
        "none",
    ),
    "a-quantization-config-of-int8": (
        lambda tensors, config: config.update(quantization_config={"load_in_8bit": True}),
        "must have a quantization_config of bitsandbytes nf4, as the weights are in NF4: it has "
        "bitsandbytes int8",
    ),
}


def damaged(base: Path, folder: Path, damage: Damage) -> Path:
    source = base / "double-quantized" / "theirs"
    tensors = {name: tensor.clone() for name, tensor in load_file(source / FILE).items()}
    config = json.loads((source / "config.json").read_text())
    damage(tensors, config)
    return write_checkpoint(folder, config, tensors)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_of_another_format_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = damaged(base, tmp_path, damage)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        open_checkpoint(folder)
    assert str(folder) in str(raised.value)


LEFTOVERS = {
    "bitsandbytes nf4": QUANTIZATION_CONFIG,
    "bitsandbytes fp4": QUANTIZATION_CONFIG | {"bnb_4bit_quant_type": "fp4"},
    "gptq": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.parametrize("said", LEFTOVERS)
def test_a_quantization_config_is_left_over_where_all_weights_have_16_bits(
    tmp_path: Path, said: str
) -> None:
    tensors = random_tensors(FIELDS, torch.bfloat16)
    fields = FIELDS | {"quantization_config": LEFTOVERS[said]}
    write_checkpoint(tmp_path, fields, tensors)
    found = open_checkpoint(tmp_path)
    assert found.quantization is None
    assert found.remarks == [
        f"{tmp_path / 'config.json'} has a quantization_config ({said}), and no weight is "
        "quantized: it is left over from another form, and ignored"
    ]
    load(tmp_path)
    # each of these shows that some weight is quantized, whatever the config says
    name = "model.layers.0.self_attn.q_proj.weight"
    others: dict[str, tuple[str, Tensor]] = {
        "is stored as torch.int8": (name, tensors[name].to(torch.int8)),
        "is stored as torch.float8_e4m3fn": (name, tensors[name].to(torch.float8_e4m3fn)),
        "is no tensor of the model": (name.replace("weight", "step"), torch.ones(1)),
    }
    for shown, (other, tensor) in others.items():
        write_checkpoint(tmp_path, fields, tensors | {other: tensor})
        message = f"16 or 32 bits, or in bitsandbytes nf4: {other} {shown}, and quantization_config"
        with pytest.raises(ValueError, match=f"{message} says {said}; use the original"):
            load(tmp_path)
    del tensors[name]
    write_checkpoint(tmp_path, fields, tensors)
    with pytest.raises(ValueError, match=f"{name} is missing, and quantization_config says {said}"):
        load(tmp_path)


# the names of tensors of other formats in place of q_proj.weight or beside it
OTHER_FORMATS = {
    "GPTQ": ["qweight", "qzeros", "scales", "g_idx"],
    "AWQ or GPTQ": ["qweight", "qzeros", "scales"],
    "compressed-tensors": ["weight_packed", "weight_scale", "weight_shape"],
    "FP8": ["weight", "weight_scale_inv"],
    "FP8 or compressed-tensors": ["weight", "weight_scale"],
    "HQQ": ["W_q", "meta"],
    "AQLM": ["codes", "codebooks", "scales"],
    "bitsandbytes in 4 bits, without its quant_state": ["weight", "weight.absmax"],
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_another_format_is_named_whether_the_config_says_so_or_not(
    tmp_path: Path, kind: str
) -> None:
    tensors = random_tensors(FIELDS, torch.bfloat16)
    prefix = "model.layers.0.self_attn.q_proj."
    del tensors[f"{prefix}weight"]
    tensors |= {prefix + end: torch.ones(4, dtype=torch.int32) for end in OTHER_FORMATS[kind]}
    for config, said in (
        ({}, "there is no quantization_config"),
        ({"quant_method": "x"}, "quantization_config says x"),
    ):
        fields = FIELDS | ({"quantization_config": config} if config else {})
        write_checkpoint(tmp_path, fields, tensors)
        with pytest.raises(ValueError, match=rf"q_proj\.\S+ is of {kind}, and {said}; use the "):
            load(tmp_path)


def test_a_tied_head_stored_alone_is_copied_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = WIDE | {"tie_word_embeddings": True}
    tensors = random_tensors(fields)
    embeddings = tensors.pop("model.embed_tokens.weight")
    beside = {"lm_head.weight": embeddings, "model.rotary_emb.inv_freq": torch.ones(4).double()}
    source = write_checkpoint(tmp_path / "source", fields, tensors | beside)
    copy = quantize_folder(source, tmp_path / "copy", NF4, "--device", "cpu")
    assert "does not need; left alone: model.rotary_emb.inv_freq\n" in capsys.readouterr().out
    assert set(load_file(copy / FILE)) >= {"lm_head.weight"}
    assert_equal(load(copy).decoder.embed_tokens.weight.detach(), embeddings, "embeddings")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_refused(base: Path, tmp_path: Path, bad: float) -> None:
    folder = damaged(base, tmp_path, lambda t, _: t[Q + ".nested_absmax"].fill_(bad))
    with pytest.raises(ValueError, match=re.escape(f"{Q}.nested_absmax must hold finite values")):
        load(folder)


@pytest.mark.parametrize(
    "quantization", [None, Quantization(128, True), Quantization(64, False)], ids=str
)
def test_another_quantization_than_the_stored_one_is_refused(
    base: Path, quantization: Quantization | None
) -> None:
    folder = base / "double-quantized" / "theirs"
    with pytest.raises(ValueError, match="is in NF4 with --block-size 64 --double-quant, asked"):
        load_model(open_checkpoint(folder), CPU, torch.float32, quantization)


def test_only_a_checkpoint_in_nf4_has_a_stored_quantization(base: Path) -> None:
    assert open_checkpoint(base / "double-quantized" / "source").quantization is None


@pytest.mark.parametrize("case", ["double-quantized", "single-bfloat16", "mixed"])
def test_loading_takes_no_more_memory_than_the_model(base: Path, case: str) -> None:
    opened = open_checkpoint(base / case / "theirs")
    sizes = load_sizes(opened, torch.float32, opened.quantization)
    held = sum(tensor.nbytes for tensor in sizes.frozen_tensors())
    with LiveBytes() as live:
        model = load_model(opened, CPU, torch.float32, opened.quantization)
    assert held == held_bytes(model) + model.frequencies.nbytes
    # what finds a value that is not finite: two numbers, stacked, and one truth value for each
    extremes = 4 * 4 + 2 * 4 + 2 + 1
    # the head as it is stored, while it is converted
    head = opened.stored["lm_head.weight"]
    converted = head.num_bytes if head.dtype != torch.float32 else 0
    assert live.peak <= held + converted + extremes


def held_bytes(model: Llama) -> int:
    total = sum(parameter.nbytes for parameter in model.parameters())
    for _, group in model.groups():
        weight = group.weight
        total += weight.num_bytes if isinstance(weight, NF4Weight) else weight.nbytes
        total += 0 if group.bias is None else group.bias.nbytes
    return total
