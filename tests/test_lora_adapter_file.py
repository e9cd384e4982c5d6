"""lora/adapter_file.py: PEFT loads ours, we load PEFT's, and what is unclear is refused."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.equality import assert_equal
from support.llama_peers import CPU, OUR_LORA, PEFT_LORA, Peer, tiny_peer, write_our_adapter
from support.merge_cases import write_adapter
from support.micro_steps import NF4
from support.tiny_llama import VARIANTS, write_variant
from torch import Tensor

from checkpoint.identity import identify
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from foreign import guest
from llama.config import read_config
from llama.model import Llama, parameter_shapes, projection_shapes, projections
from llama.targets import update_sizes
from lora.adapter_file import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_adapter,
    read_adapter_config,
    read_base_identity,
    save_adapter,
)
from lora.config import LoRAConfig

# what the issue promises of float32 logits of order one
PROMISED = 1e-4


@pytest.fixture(params=VARIANTS)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return tiny_peer(tmp_path_factory, request.param)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that the product saved."""
    write_our_adapter(write_variant(tmp_path / "model", "grouped-query"), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def model(tmp_path: Path) -> Llama:
    """The adapter's base model, with a fresh adapter of its shape."""
    model = load_model(
        open_checkpoint(write_variant(tmp_path / "model", "grouped-query")),
        CPU,
        torch.float32,
        NF4,
    )
    model.attach_lora(OUR_LORA, seed=99)
    return model


def identity_of(checkpoint: Path) -> str:
    return identify(open_checkpoint(checkpoint)).own


def with_adapter(checkpoint: Path, folder: Path) -> Llama:
    model = load_model(open_checkpoint(checkpoint), CPU, torch.float32, None)
    model.attach_lora(read_adapter_config(folder), seed=0)
    load_adapter(folder, model.adapter_tensors())
    return model


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_logits_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= PROMISED


def test_peft_loads_ours_and_gives_the_same_logits(peer: Peer) -> None:
    model = with_adapter(peer.checkpoint, peer.folder / "our_adapter")
    actual = model.logits(peer.inputs["input_ids"]).detach()
    assert_logits_close(actual, peer.outputs["our_adapter_logits"])
    assert (actual - peer.outputs["logits"]).abs().max() > 100 * PROMISED


def test_peft_warns_of_nothing_in_ours(peer: Peer) -> None:
    # what PEFT and transformers say about each other they say of PEFT's own adapter too
    assert peer.facts["our_adapter_warnings"] == peer.facts["peft_adapter_warnings"]


def test_we_load_pefts_and_give_the_same_logits(peer: Peer) -> None:
    folder = peer.folder / "peft_adapter"
    config = read_adapter_config(folder)
    base = read_config(peer.checkpoint)
    paths, tensors = projection_shapes(base), parameter_shapes(base)
    assert update_sizes(config, paths, tensors).keys() == paths.keys() | tensors.keys()
    assert (config.r, config.lora_alpha) == (PEFT_LORA["r"], PEFT_LORA["lora_alpha"])
    actual = with_adapter(peer.checkpoint, folder).logits(peer.inputs["input_ids"]).detach()
    assert_logits_close(actual, peer.outputs["peft_adapter_logits"])
    assert (actual - peer.outputs["logits"]).abs().max() > 100 * PROMISED


def test_names_shapes_and_dtypes_in_the_file_are_pefts(peer: Peer) -> None:
    ours = load_file(peer.folder / "our_adapter" / WEIGHTS_NAME)
    theirs = load_file(peer.folder / "peft_adapter" / WEIGHTS_NAME)
    assert ours.keys() == theirs.keys()
    assert "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight" in ours
    experts = read_config(peer.checkpoint).experts
    count = experts.num_experts if experts else 1
    ranks = {rank * number for rank in (OUR_LORA.r, PEFT_LORA["r"]) for number in (1, count)}
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == torch.float32
        assert set(ours[name].shape) - ranks == set(tensor.shape) - ranks, name
    with safe_open(peer.folder / "our_adapter" / WEIGHTS_NAME, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base_identity": identity_of(peer.checkpoint)}


def test_ours_names_its_base_and_pefts_does_not(peer: Peer) -> None:
    assert read_base_identity(peer.folder / "our_adapter") == identity_of(peer.checkpoint)
    assert read_base_identity(peer.folder / "peft_adapter") == ""


def test_equal_adapters_have_equal_bytes(tmp_path: Path, model: Llama) -> None:
    for number in range(12):
        folder = tmp_path / str(number)
        save_adapter(folder, model.adapter_tensors(), OUR_LORA, "base", "0" * 64)
    files = [tmp_path / str(number) / WEIGHTS_NAME for number in range(12)]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_base_is_read_of_a_whole_file_only(adapter: Path) -> None:
    path = adapter / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        read_base_identity(adapter)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"must hold {WEIGHTS_NAME}"):
        read_base_identity(adapter)


def test_the_config_is_a_part_of_pefts(peer: Peer) -> None:
    ours = json.loads((peer.folder / "our_adapter" / CONFIG_NAME).read_text())
    theirs = json.loads((peer.folder / "peft_adapter" / CONFIG_NAME).read_text())
    assert ours.keys() <= theirs.keys()
    own = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "target_parameters"}
    assert {k: v for k, v in ours.items() if k not in own} == {
        k: v for k, v in theirs.items() if k in ours.keys() - own
    }
    assert isinstance(ours["lora_alpha"], int)
    assert ours["target_modules"] == list(projections(read_config(peer.checkpoint)))
    # PEFT's are those of a set
    tensors = sorted(theirs["target_parameters"] or ())
    assert ours.get("target_parameters", []) == tensors


def test_an_adapter_survives_the_round_trip(adapter: Path, model: Llama) -> None:
    config = read_adapter_config(adapter)
    assert set(config.target_modules) == set(OUR_LORA.target_modules)
    assert config == LoRAConfig(
        OUR_LORA.r,
        OUR_LORA.lora_alpha,
        OUR_LORA.lora_dropout,
        config.target_modules,
        OUR_LORA.use_rslora,
    )
    load_adapter(adapter, model.adapter_tensors())
    saved = load_file(adapter / WEIGHTS_NAME)
    for name, tensor in model.adapter_tensors().items():
        assert_equal(tensor, saved[f"base_model.model.{name}"], name)


@pytest.mark.parametrize("targets", [("k_proj",), ("q_proj", "v_proj"), ("up_proj", "o_proj")])
def test_the_file_holds_the_targets_alone(tmp_path: Path, targets: tuple[str, ...]) -> None:
    checkpoint = write_variant(tmp_path / "model", "grouped-query")
    model = load_model(open_checkpoint(checkpoint), CPU, torch.float32, None)
    config = LoRAConfig(2, 2.5, 0.0, targets)
    model.attach_lora(config, seed=0)
    save_adapter(tmp_path / "new" / "adapter", model.adapter_tensors(), config, str(checkpoint))
    saved = load_file(tmp_path / "new" / "adapter" / WEIGHTS_NAME)
    assert {name.split(".")[-3] for name in saved} == set(targets)
    assert len(saved) == 2 * len(targets) * 2
    assert read_adapter_config(tmp_path / "new" / "adapter").lora_alpha == 2.5


def test_16_bit_adapters_are_loaded_into_float32(adapter: Path, model: Llama) -> None:
    path = adapter / WEIGHTS_NAME
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    load_adapter(adapter, model.adapter_tensors())
    for name, tensor in model.adapter_tensors().items():
        assert_equal(tensor, halves[f"base_model.model.{name}"].float(), name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "must describe a LORA adapter: got peft_type 'IA3'"),
        ({"use_dora": True}, "must describe a plain LoRA: use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "plain LoRA: modules_to_save is ['lm_head']"),
        ({"layer_replication": [[0, 1]]}, "plain LoRA: layer_replication is"),
        ({"use_something_new": True}, "plain LoRA: use_something_new is True"),
        ({"bias": "lora_only"}, "must have bias none: got 'lora_only'"),
        ({"lora_bias": True}, "plain LoRA: lora_bias is True"),
        ({"use_qalora": True}, "plain LoRA: use_qalora is True"),
        ({"alora_invocation_tokens": [1]}, "plain LoRA: alora_invocation_tokens is [1]"),
        ({"trainable_token_indices": [1]}, "plain LoRA: trainable_token_indices is [1]"),
        ({"target_parameters": "w"}, "target_parameters must be a list of names: got 'w'"),
        ({"target_parameters": ["w"]}, "--lora-dropout must be 0 with --target-parameters"),
        ({"arrow_config": {"top_k": 3}}, "plain LoRA: arrow_config is {'top_k': 3}"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes them; save the"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16' changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changes them"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda' changes them"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changes them"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga' changes them"),
        ({"target_modules": None}, "target_modules must be a list of names or a regular expr"),
        ({"target_modules": [1]}, "target_modules must be a list of names or a regular expression"),
        ({"target_modules": "(q_proj"}, "must be a regular expression: got '(q_proj'"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules must be a list of names or a regular"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be a layer's index or a list"),
        ({"layers_to_transform": True}, "layers_to_transform must be a layer's index or a list"),
        ({"layers_pattern": 3}, "layers_pattern must be a pattern or a list of them: got 3"),
        ({"layers_to_transform": 1, "target_modules": "x"}, "must come with a list of target_mod"),
        ({"rank_pattern": {"q": 2.5}}, "rank_pattern must be an object of patterns and integers"),
        ({"rank_pattern": {"q": 0}}, "--lora-r must be at least 1: got 0"),
        ({"rank_pattern": {"q(": 1}}, "must be a regular expression: got 'q('"),
        ({"alpha_pattern": {"q": "2"}}, "alpha_pattern must be an object of patterns and numbers"),
        ({"alpha_pattern": {"q": -1}}, "--lora-alpha must be positive: got -1"),
        ({"r": "16"}, "r must be an integer: got '16'"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false: got 'yes'"),
        ({"lora_alpha": None}, "lora_alpha must be a number: got None"),
        ({"lora_dropout": "0"}, "lora_dropout must be a number: got '0'"),
        ({"r": 0}, "--lora-r must be at least 1: got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_is_no_plain_lora_is_refused(
    adapter: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(adapter, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_adapter_config(adapter)
    assert str(adapter / CONFIG_NAME) in str(raised.value)


def test_a_broken_or_missing_adapter_is_named(tmp_path: Path, adapter: Path, model: Llama) -> None:
    with pytest.raises(FileNotFoundError, match=f"must hold {CONFIG_NAME} and"):
        read_adapter_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"must hold {WEIGHTS_NAME}: none in"):
        load_adapter(tmp_path, model.adapter_tensors())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is pickled, which is never"):
        load_adapter(tmp_path, model.adapter_tensors())
    for content in ("{", "[]"):
        (adapter / CONFIG_NAME).write_text(content)
        with pytest.raises(ValueError, match=re.escape(str(adapter / CONFIG_NAME))):
            read_adapter_config(adapter)
    path = adapter / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        load_adapter(adapter, model.adapter_tensors())


EMBEDDINGS = "model.embed_tokens.weight"


@pytest.mark.parametrize("name", [EMBEDDINGS, "lm_head.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_embedding_layers_must_be_the_bases(
    adapter: Path, model: Llama, name: str, dtype: torch.dtype
) -> None:
    layer = dict(model.named_parameters())[name].detach()
    path = adapter / WEIGHTS_NAME
    saved = {key: tensor.clone() for key, tensor in load_file(path).items()}
    save_file(saved | {f"base_model.model.{name}": layer}, path)
    base = {name: layer.to(dtype)}
    load_adapter(adapter, model.adapter_tensors(), lambda: base)
    for key, tensor in model.adapter_tensors().items():
        assert_equal(tensor, saved[f"base_model.model.{key}"], key)
    message = re.escape(f"{path}: {name} must equal the base's, which alone is used: ")
    with pytest.raises(ValueError, match=f"{message}there is none to compare with; if the"):
        load_adapter(adapter, model.adapter_tensors())
    base[name][-1, -1] += 1
    for other in (base, {name: base[name][:-1]}):
        with pytest.raises(ValueError, match=f"{message}it differs; if the base's embeddings"):
            load_adapter(adapter, model.adapter_tensors(), lambda: other)  # noqa: B023


def test_without_embedding_layers_those_of_the_base_are_not_read(
    adapter: Path, model: Llama
) -> None:
    load_adapter(adapter, model.adapter_tensors(), lambda: pytest.fail("gigabytes were read"))


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), f"1 tensors are missing (first: ['{FIRST}']), 0 unknown"),
        (lambda t: t.update(x=torch.ones(1)), "0 tensors are missing (first: []), 1 unknown"),
        (lambda t: t.update({FIRST[17:]: t.pop(FIRST)}), "1 tensors are missing"),
        (lambda t: t.update({FIRST: t[FIRST][:2].clone()}), "must have shape (4, 72): got (2, 72)"),
        (lambda t: t[FIRST].fill_(torch.nan), "must hold finite values only: got NaN"),
        (lambda t: t.update({FIRST: t[FIRST].int()}), "must hold floats: got torch.int32"),
    ],
    ids=["missing", "unknown", "unprefixed", "rank", "nan", "integers"],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_copied(
    adapter: Path, model: Llama, change: Any, message: str
) -> None:
    # load_file maps the file, which is about to be written over
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / WEIGHTS_NAME).items()}
    change(tensors)
    save_file(tensors, adapter / WEIGHTS_NAME)
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_adapter(adapter, model.adapter_tensors())
    assert str(adapter / WEIGHTS_NAME) in str(raised.value)
    for name, tensor in model.adapter_tensors().items():
        assert_equal(tensor, before[name], name)


NONE = {"x": torch.zeros(1)}
PATHS = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(32) for name in "qkvo"]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "([a-z_.0-9]+)+X"},
        {"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*X"},
        {"exclude_modules": "(.|[a-z_.0-9])*X"},
        {"target_modules": ["q_proj"], "rank_pattern": {"([a-z_.0-9]+)+X": 8}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"(.+)+(.+)+X": 8}},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [0],
            "layers_pattern": ["([a-z_.]+)+([a-z_.0-9]+)+X"],
        },
    ],
    ids=lambda value: next(reversed(value)),
)
def test_a_pattern_that_backtracks_for_ever_is_refused(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "SECONDS", 0.5)
    write_adapter(tmp_path / "a", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, NONE)
    change_config(tmp_path / "a", **changes)
    config = read_adapter_config(tmp_path / "a")
    start = time.monotonic()
    with pytest.raises(ValueError, match="the adapter's patterns of modules must come to an end"):
        update_sizes(config, PATHS)
    # of a machine that others use as well
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x" * 10_001, "at most 10,000 characters: got 10,001"),
        ("(" * 5000 + ")" * 5000, "must be a regular expression"),
        ("a{99999999999999999999}", "must be a regular expression"),
        ("(?P<a>", "must be a regular expression"),
    ],
    ids=["long", "deep", "many", "open"],
)
def test_a_pattern_beyond_reason_is_refused(pattern: str, message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {"r": 4, "lora_alpha": 8, "target_modules": pattern}, NONE)
    with pytest.raises(ValueError, match=rf"adapter_config.json: .*{message}"):
        read_adapter_config(tmp_path / "a")


def test_names_alone_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.targets.in_guest", lambda *_: pytest.fail("it was forked"))
    for targets in (("q_proj",), "all-linear"):
        assert update_sizes(LoRAConfig(4, 8, 0.0, targets), PATHS)


def test_patterns_find_in_a_process_what_they_find_here() -> None:
    config = LoRAConfig(4, 8, 0.0, r".*\.[0-4]\.self_attn\.(q|v)_proj", rank_pattern={"v_proj": 2})
    assert config.has_patterns
    expected = {p: s for p in PATHS if (s := config.update_size(p)) is not None}
    assert len(expected) == 10
    assert update_sizes(config, PATHS) == expected
