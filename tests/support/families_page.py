"""The tables of docs/families.md: what the tests and the planner say of each family."""

import contextlib
import importlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.real_sizes import REAL
from support.tiny_llama import FIELDS, VARIANTS
from support.tower_cases import TOWERS as TINY_TOWERS

from benchmarks.fits import smallest_gpu
from checkpoint.implied import implied_checkpoint
from checkpoint.loading import load_sizes
from export.gguf_architecture import ARCHITECTURES
from llama.families import FAMILIES
from llama.family import Family
from llama.model import projections
from llama.rope_scaling import PROPORTIONAL
from llama.towers import TOWERS
from lora.config import LoRAConfig
from nf4.weight import Quantization
from step.memory_plan import GIB, plan_memory
from step.workload import Workload

TESTS = Path(__file__).resolve().parent.parent


class Proof(NamedTuple):
    """Something that tests prove of a family, and the tests that do."""

    what: str
    tests: tuple[str, ...]


# one test for language models, or one for towers too
PROOFS = {
    "logits": Proof(
        "within 1e-4 of transformers' in float32",
        (
            "test_llama_model.py::test_logits_equal_transformers_in_float32",
            "test_llama_towers.py::test_logits_and_greedy_tokens_equal_transformers",
        ),
    ),
    "16 bits": Proof(
        "logits err no more than twice as much as transformers' in bfloat16 and float16",
        (
            "test_llama_model.py::test_half_precision_errs_no_more_than_twice_as_much_as_transformers",
        ),
    ),
    "gradients": Proof(
        "of an adapter: transformers' and PEFT's",
        (
            "test_llama_model.py::test_gradients_of_the_adapter_equal_pefts",
            "test_llama_towers.py::test_an_adapter_of_peft_for_the_whole_model_trains_on",
        ),
    ),
    "tokens": Proof(
        "the most probable ones are transformers'",
        (
            "test_generation_generator.py::test_greedy_tokens_equal_transformers",
            "test_llama_towers.py::test_logits_and_greedy_tokens_equal_transformers",
        ),
    ),
    "packed": Proof(
        "samples in one row give the loss and the gradients that they give alone",
        (
            "test_llama_packing.py::"
            "test_packed_samples_give_the_loss_and_the_gradients_that_they_give_alone",
        ),
    ),
    "NF4": Proof(
        "loss and gradients of quantized weights are the reference's in float64",
        ("test_llama_reference.py::test_loss_and_gradients_are_the_references",),
    ),
    "to PEFT": Proof(
        "PEFT loads our adapter and computes our logits",
        (
            "test_lora_adapter_file.py::test_peft_loads_ours_and_gives_the_same_logits",
            "test_llama_towers.py::test_peft_finds_the_language_model_alone_in_our_adapter",
        ),
    ),
    "from PEFT": Proof(
        "we load PEFT's adapter and compute its logits",
        (
            "test_lora_adapter_file.py::test_we_load_pefts_and_give_the_same_logits",
            "test_llama_towers.py::test_an_adapter_of_peft_for_the_whole_model_trains_on",
        ),
    ),
    "merged": Proof(
        "transformers loads the merged model and computes our logits",
        (
            "test_checkpoint_merged_copy.py::"
            "test_a_merged_model_gives_the_adapters_logits_in_transformers",
            "test_llama_towers.py::test_a_merged_copy_is_the_whole_model",
        ),
    ),
    "4 bits": Proof(
        "transformers and bitsandbytes load our copy in NF4 and compute our logits",
        (
            "test_checkpoint_stored_nf4.py::test_logits_are_as_near_the_truth_as_transformers",
            "test_llama_towers.py::test_a_quantized_copy_leaves_the_encoder_as_it_is",
        ),
    ),
    "GGUF": Proof(
        "llama.cpp's architecture, whose file has every tensor in its layout; the rest is refused, "
        "and fields of config.json that the architecture does not compute",
        ("test_export_gguf_file.py::test_every_tensor_is_the_checkpoints_in_llama_cpps_layout",),
    ),
}


def architecture_of(fields: Mapping[str, Any]) -> str:
    return (FIELDS | dict(fields))["architectures"][0]


def _of_variant(variant: str) -> str:
    return architecture_of(VARIANTS[variant])


def _of_tower(name: str) -> str:
    kind = TINY_TOWERS[name]["model_type"]
    return next(key for key, tower in TOWERS.items() if tower.model_type == kind)


def _of_stored(case: str) -> str:
    cases = importlib.import_module("test_checkpoint_stored_nf4").CASES
    return architecture_of(cases[case].get("fields", {}))


# a test's parameter, and the family of each of its values
PARAMETERS: dict[str, Callable[[str], str]] = {
    "variant": _of_variant,
    "peer": _of_variant,
    "case": _of_stored,
}


class _Collected:
    """A plugin that keeps what pytest found."""

    items: Sequence[pytest.Item] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def proven() -> dict[str, set[str]]:
    """Collect the tests of all proofs: the families that each has a case of."""
    tests = {str(TESTS / test) for proof in PROOFS.values() for test in proof.tests}
    found, flags = _Collected(), "--collect-only -q --noconftest -p no:cacheprovider"
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main([*flags.split(), *sorted(tests)], plugins=[found])
    assert status == pytest.ExitCode.OK
    families: dict[str, set[str]] = {name: set() for name in PROOFS}
    for item in found.items:
        assert isinstance(item, pytest.Function)
        test = f"{item.path.name}::{item.originalname}"
        parameters = PARAMETERS | ({"peer": _of_tower} if "towers" in item.path.name else {})
        for parameter, value in item.callspec.params.items():
            if parameter in parameters and isinstance(value, str):
                for name, proof in PROOFS.items():
                    if test in proof.tests:
                        families[name].add(parameters[parameter](value))
    return families


def table_of_proofs() -> str:
    """Tabulate what is proven of each family."""
    found = proven()
    assert found["GGUF"] == ARCHITECTURES.keys() & FAMILIES.keys()
    lines = []
    for name in (*FAMILIES, *TOWERS):
        cells = ["yes" if name in found[what] else "" for what in PROOFS if what != "GGUF"]
        gguf = ARCHITECTURES[name].name if name in ARCHITECTURES else "refused"
        lines.append([f"`{name}`", *cells, gguf])
    return _table(["class", *PROOFS], lines)


def list_of_proofs() -> str:
    """List what each column of the table says, and its tests."""
    lines = []
    for name, proof in PROOFS.items():
        tests = ", ".join(f"`tests/{test}`" for test in proof.tests)
        lines.append(f"- **{name}**: {proof.what}. {tests}")
    return "\n".join(lines)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


# what a field of `Family` says where it has a value
SAID: dict[str, Mapping[Any, str]] = {
    "qkv_bias": {True: "biases of q, k and v"},
    "is_fused": {True: "q, k and v in one tensor, gate and up in another"},
    "is_mlp_fused": {True: "gate and up in one tensor"},
    "qk_norm": {True: "norms of queries and keys"},
    "has_joint_qk_norm": {True: "these norms are of all heads together"},
    "has_value_norm": {True: "norms of values, without weights"},
    "heads": {
        "by window": "layers without a window have wider heads, whose keys may be the values too"
    },
    "windows": {
        "all": "sliding windows",
        "listed": "sliding windows in layers that are listed",
        "alternating": "sliding windows in every other layer",
        "pattern": "sliding windows in most layers",
        "pattern but last": "sliding windows in most layers",
        "pattern or none": "sliding windows in most layers, or in none",
        "later": "sliding windows in later layers, if switched on",
        "unrotated": "sliding windows in layers without rotary positions, if switched on",
        "switched": "sliding windows, if switched on",
    },
    "rotary_share": {0.5: "half of each head turns", 1.0: "a part of each head may turn"},
    "is_interleaved": {True: "dimensions turn in interleaved pairs"},
    "ropes": {
        "by window": "layers with a window have rotary positions of their own",
        "listed": "some layers have no rotary positions",
        "windowed": "layers without a window have no rotary positions",
    },
    "scales_queries": {True: "queries grow with their positions"},
    "has_sinks": {True: "a sink in the scores of each head"},
    "norm_offset": {1.0: "weights of norms are stored less one"},
    "has_centred_norms": {True: "layer normalization"},
    "is_parallel": {True: "attention and MLP have one input"},
    "scales_embeddings": {True: "embeddings are times the root of hidden_size"},
    "has_layer_scalar": {True: "a factor of what leaves each layer"},
}
# and what a field of config.json says that the family reads beside Llama's
FIELDS_SAID = {
    "embedding_multiplier": "multipliers of embeddings, residuals, scores and logits",
    "logit_scale": "a scale of the logits",
    "query_pre_attn_scalar": "a scale of the scores",
    "attn_logit_softcapping": "capped scores",
    "final_logit_softcapping": "capped logits",
}
# of which more is said than a value, or nothing: what files call things, and other defaults
OTHERWISE = frozenset({"norms", "experts", "fields", "activation_field", "defaults", "rope_types"})
UNSAID = frozenset(
    {
        "model_type",
        "o_bias",
        "mlp_bias",
        "head_dim",
        "activation_names",
        "lacks",
        "harmless",
        "constants",
        "rope_default",
        "aliases",
        "file_names",
        "transformers_class",
    }
)


def differences(family: Family) -> list[str]:
    """Say what tells a family from Llama."""
    words = []
    for name, said in SAID.items():
        value = getattr(family, name)
        # Llama may have biases
        if value not in (getattr(FAMILIES["LlamaForCausalLM"], name), False):
            words.append(said[value])
    if family.experts is not None:
        some = "all layers" if family.experts.layers == "all" else "most layers"
        words.append(f"a mixture of experts in {some}")
        words += ["router and experts have biases"] if family.mlp_bias else []
    if family.norms.before_attention is None:
        words.append("norms behind attention and MLP, none before")
    elif family.norms.behind_attention is not None:
        words.append("norms before and behind attention and MLP")
    if PROPORTIONAL in family.rope_types:
        words.append("in layers without a window a share of each head may turn")
    if family.defaults.get("query_pre_attn_scalar") == 1:
        words.append("scores without a scale")
    if "gelu" in family.defaults.get(family.activation_field, "silu"):
        words.append("GELU")
    if "clamped_swish" in family.activation_names.values():
        words.append("clamped gates")
    return words + [said for name, said in FIELDS_SAID.items() if name in family.fields]


def table_of_differences() -> str:
    """Tabulate what tells each family from Llama."""
    lines = [
        [f"`{name}`", f"`{family.model_type}`", _said(family)] for name, family in FAMILIES.items()
    ]
    for name, tower in TOWERS.items():
        texts = [f"`{text.model_type}` ({_said(text)})" for text in tower.texts]
        words = f"{' or '.join(texts)}, beside an encoder of images"
        lines.append([f"`{name}`", f"`{tower.model_type}`", words])
    return _table(["class", "model_type", "unlike Llama"], lines)


def _said(family: Family) -> str:
    alike = "itself" if family.model_type == "llama" else "names and defaults of fields alone"
    return "; ".join(differences(family)) or alike


def line_of_plan(model: str, folder: Path) -> str:
    """Plan a run of one of REAL from its config.json, and name the smallest GPU that has as much
    memory."""
    (folder / "config.json").write_text(json.dumps(REAL[model]))
    checkpoint = implied_checkpoint(folder, block_size=64)
    sizes = load_sizes(checkpoint, torch.bfloat16, Quantization(64, True))
    _, num_parameters = sizes.num_parameters()
    sizes.attach_lora(LoRAConfig(16, 32.0, 0.0, projections(sizes.config)), seed=0)
    work = Workload(sizes, moment_bytes=8, batch=1, tokens=2048)
    needed = plan_memory(work, ("offload",) * sizes.config.num_hidden_layers).device
    figures = (f"{num_parameters / 1e9:.1f} billion", f"{needed / GIB:.1f} GiB")
    name = f"`{architecture_of(REAL[model])}`"
    return f"| {' | '.join((model, name, *figures, smallest_gpu(needed)))} |"
