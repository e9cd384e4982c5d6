"""What transformers and PEFT compute from the checkpoints that the tests of llama/ and lora/ use.

Importing them takes longer than all they are asked for, so one process serves all tiny checkpoints
and one stories260K, each run once a session.
"""

import functools
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from support.mxfp4_cases import (
    MXFP4,
    MXFP4_FIELDS,
    all_codes_at_all_scales,
    write_mxfp4,
)
from support.peer_process import run_peer
from support.tiny_llama import VARIANTS, write_variant
from torch import Tensor

from checkpoint.identity import identify
from checkpoint.loading import load_model
from checkpoint.merged_copy import read_updates, write_merged_shards
from checkpoint.opening import open_checkpoint
from llama.config import CONFIG_NAME, LlamaConfig, read_config
from llama.model import PROJECTIONS, projections, quantized_layouts
from lora.adapter_file import save_adapter
from lora.config import LoRAConfig

SCRIPT = Path(__file__).with_name("transformers_peer.py")
CPU = torch.device("cpu")

# the first chunks of tinystories_val.txt, tokenized as one text
NUM_CHUNKS, CHUNK_LENGTH = 200, 256

# rsLoRA, and an alpha that is no multiple of the rank
OUR_LORA = LoRAConfig(4, 6.0, 0.05, PROJECTIONS, use_rslora=True)
PEFT_LORA = {"r": 3, "lora_alpha": 10, "lora_dropout": 0.0, "target_modules": "all-linear"}
EXPERT_TENSORS = ("down_proj", "gate_up_proj")
TRAINABLE_RANK = 8
TRAINABLE_TARGETS = {"all-linear": "all-linear", "q-v": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Peer:
    """A checkpoint, what was fed to it and what the peers made of it."""

    checkpoint: Path
    # holds our_adapter, peft_adapter, merged, and resaved, the checkpoint as they save it
    folder: Path
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    facts: dict[str, Any]


def expert_tensors(config: LlamaConfig) -> tuple[str, ...]:
    """The tensors of all experts of a layer that may have updates."""
    experts = config.experts
    return EXPERT_TENSORS if experts and not experts.is_by_columns else ()


def write_our_adapter(checkpoint: Path, folder: Path) -> None:
    """Save an adapter that changes the logits, as the product does."""
    model = load_model(open_checkpoint(checkpoint), CPU, torch.float32, None)
    lora = replace(OUR_LORA, target_modules=projections(model.config))
    if tensors := expert_tensors(model.config):
        # PEFT has no dropout for experts
        lora = replace(lora, lora_dropout=0.0, target_parameters=tensors)
    model.attach_lora(lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in model.adapter_tensors().items():
        if name.endswith("lora_B.weight"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    identity = identify(open_checkpoint(checkpoint)).original
    save_adapter(folder, model.adapter_tensors(), lora, str(checkpoint), identity)


def write_merged(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Merge an adapter into its base, as the product does."""
    folder.mkdir()
    base = open_checkpoint(checkpoint)
    (folder / CONFIG_NAME).write_bytes((checkpoint / CONFIG_NAME).read_bytes())
    updates = read_updates(adapter, base.config)
    layouts = quantized_layouts(base.config)
    write_merged_shards(base.shards, layouts, updates, None, CPU, folder)


def _run(
    base: Path, jobs: dict[str, dict[str, Any]], inputs: dict[str, dict[str, Tensor]]
) -> dict[str, Peer]:
    tensors = {f"{name}/{k}": v for name, own in inputs.items() for k, v in own.items()}
    outputs = run_peer(SCRIPT, base, tensors, {"jobs": json.dumps(jobs)})
    facts = json.loads((base / "facts.json").read_text())
    return {
        name: Peer(
            Path(job["checkpoint"]),
            base / name,
            inputs[name],
            {k.partition("/")[2]: v for k, v in outputs.items() if k.startswith(f"{name}/")},
            facts[name],
        )
        for name, job in jobs.items()
    }


@functools.cache
def _tiny_peers(base: Path) -> dict[str, Peer]:
    base.mkdir()
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 96, (2, 40), generator=generator)
    labels = input_ids.masked_fill(torch.rand(2, 40, generator=generator) < 0.3, -100)
    # for the auxiliary loss of experts, the second row ends in padding
    is_token = (torch.arange(40) < torch.tensor([[40], [27]])).long()
    jobs = {}
    for variant, fields in (VARIANTS | {MXFP4: MXFP4_FIELDS}).items():
        folder = base / variant
        write = write_mxfp4 if variant == MXFP4 else partial(write_variant, variant=variant)
        checkpoint = write(folder / "checkpoint")
        has_experts = "num_experts_per_tok" in fields
        # all-linear is experts and their router, too
        tensors = expert_tensors(read_config(checkpoint))
        of_experts = {"target_modules": PROJECTIONS[:4], "target_parameters": tensors or None}
        lora = PEFT_LORA | (of_experts if has_experts else {})
        write_our_adapter(checkpoint, folder / "our_adapter")
        write_merged(checkpoint, folder / "our_adapter", folder / "merged")
        jobs[variant] = {
            "checkpoint": str(checkpoint),
            "is_capped": "attn_logit_softcapping" in fields,
            "has_experts": has_experts,
            "dtypes": ["float64", "bfloat16", "float16"],
            "lora": lora,
            **{
                name: str(folder / name)
                for name in ("our_adapter", "peft_adapter", "merged", "resaved")
            },
        }
    # what was expanded is not saved in MXFP4
    del jobs[MXFP4]["resaved"]
    # tensors of one file may not share memory
    given = {"input_ids": input_ids, "labels": labels, "attention_mask": is_token}
    inputs = {v: {name: t.clone() for name, t in given.items()} for v in jobs}
    inputs[MXFP4] |= dict(zip(("blocks", "scales"), all_codes_at_all_scales(), strict=True))
    return _run(base, jobs, inputs)


@functools.cache
def _stories_peer(base: Path, assets: Path) -> Peer:
    base.mkdir()
    checkpoint = assets / "stories260K"
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = (assets / "data" / "tinystories_val.txt").read_text(encoding="utf-8")
    num_tokens = NUM_CHUNKS * CHUNK_LENGTH
    # a token of this vocabulary is hardly four characters, so this text is long enough
    ids = tokenizer.encode(text[: 5 * num_tokens]).ids[:num_tokens]
    chunks = torch.tensor(ids).view(NUM_CHUNKS, CHUNK_LENGTH)
    job = {"checkpoint": str(checkpoint), "rank": TRAINABLE_RANK, "trainable": TRAINABLE_TARGETS}
    inputs = {"input_ids": chunks[:4].clone(), "chunks": chunks}
    return _run(base, {"stories260K": job}, {"stories260K": inputs})["stories260K"]


def tiny_peer(tmp_path_factory: pytest.TempPathFactory, variant: str) -> Peer:
    """transformers and PEFT on the tiny checkpoint of one of VARIANTS, or on that in MXFP4."""
    return _tiny_peers(tmp_path_factory.getbasetemp() / "tiny_peers")[variant]


def stories_peer(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Peer:
    """transformers and PEFT on stories260K."""
    return _stories_peer(tmp_path_factory.getbasetemp() / "stories_peer", assets)
