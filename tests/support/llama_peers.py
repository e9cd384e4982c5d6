"""What transformers and PEFT compute from the checkpoints that the tests of llama/ and lora/ use.

Each checkpoint is asked about once a run of pytest, by whichever of its processes is the first to
need it.
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
from safetensors.torch import load_file
from support.mxfp4_cases import (
    MXFP4,
    MXFP4_FIELDS,
    all_codes_at_all_scales,
    write_mxfp4,
)
from support.peer_process import run_peer
from support.shared_work import done_once, shared_folder
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
    return EXPERT_TENSORS if experts else ()


def write_our_adapter(checkpoint: Path, folder: Path) -> None:
    """Save an adapter that changes the logits, as the product does."""
    opened = open_checkpoint(checkpoint)
    model = load_model(opened, CPU, torch.float32, None)
    lora = replace(OUR_LORA, target_modules=projections(model.config))
    # it will be merged, and MXFP4 cannot hold an update
    if tensors := () if opened.mxfp4 else expert_tensors(model.config):
        # PEFT has no dropout for experts
        lora = replace(lora, lora_dropout=0.0, target_parameters=tensors)
    model.attach_lora(lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in model.adapter_tensors().items():
        if name.endswith("lora_B.weight"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    identity = identify(opened).original
    save_adapter(folder, model.adapter_tensors(), lora, str(checkpoint), identity)


def write_merged(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Merge an adapter into its base, as the product does."""
    folder.mkdir()
    base = open_checkpoint(checkpoint)
    (folder / CONFIG_NAME).write_bytes((checkpoint / CONFIG_NAME).read_bytes())
    updates = read_updates(adapter, base.config)
    layouts = quantized_layouts(base.config)
    write_merged_shards(base.shards, layouts, updates, None, CPU, folder)


def _run_peer(folder: Path, job: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    """Let the peers do a job, and keep what it was beside what they wrote."""
    run_peer(SCRIPT, folder, inputs, {"job": json.dumps(job)})
    (folder / "job.json").write_text(json.dumps(job))


@functools.cache
def _peer_in(folder: Path) -> Peer:
    job, facts = (json.loads((folder / f"{name}.json").read_text()) for name in ("job", "facts"))
    inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("in", "out"))
    return Peer(Path(job["checkpoint"]), folder, inputs, outputs, facts)


def _ask_for_variant(variant: str, folder: Path) -> None:
    fields = MXFP4_FIELDS if variant == MXFP4 else VARIANTS[variant]
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 96, (2, 40), generator=generator)
    labels = input_ids.masked_fill(torch.rand(2, 40, generator=generator) < 0.3, -100)
    # for the auxiliary loss of experts, the second row ends in padding
    is_token = (torch.arange(40) < torch.tensor([[40], [27]])).long()
    inputs = {"input_ids": input_ids, "labels": labels, "attention_mask": is_token}
    write = write_mxfp4 if variant == MXFP4 else partial(write_variant, variant=variant)
    checkpoint = write(folder / "checkpoint")
    has_experts = "num_experts_per_tok" in fields
    # all-linear is experts and their router, too
    tensors = expert_tensors(read_config(checkpoint))
    of_experts = {"target_modules": PROJECTIONS[:4], "target_parameters": tensors or None}
    write_our_adapter(checkpoint, folder / "our_adapter")
    write_merged(checkpoint, folder / "our_adapter", folder / "merged")
    job = {
        "checkpoint": str(checkpoint),
        "is_capped": "attn_logit_softcapping" in fields,
        "has_experts": has_experts,
        "dtypes": ["float64", "bfloat16", "float16"],
        "lora": PEFT_LORA | (of_experts if has_experts else {}),
        **{name: str(folder / name) for name in ("our_adapter", "peft_adapter", "merged")},
    }
    if variant == MXFP4:
        inputs |= dict(zip(("blocks", "scales"), all_codes_at_all_scales(), strict=True))
    else:
        # what was expanded is not saved in MXFP4
        job["resaved"] = str(folder / "resaved")
    _run_peer(folder, job, inputs)


def _ask_for_stories(assets: Path, folder: Path) -> None:
    checkpoint = assets / "stories260K"
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = (assets / "data" / "tinystories_val.txt").read_text(encoding="utf-8")
    num_tokens = NUM_CHUNKS * CHUNK_LENGTH
    # a token of this vocabulary is hardly four characters, so this text is long enough
    ids = tokenizer.encode(text[: 5 * num_tokens]).ids[:num_tokens]
    chunks = torch.tensor(ids).view(NUM_CHUNKS, CHUNK_LENGTH)
    job = {"checkpoint": str(checkpoint), "rank": TRAINABLE_RANK, "trainable": TRAINABLE_TARGETS}
    _run_peer(folder, job, {"input_ids": chunks[:4].clone(), "chunks": chunks})


TINY_WORK = {variant: partial(_ask_for_variant, variant) for variant in (*VARIANTS, MXFP4)}


def tiny_peer(tmp_path_factory: pytest.TempPathFactory, variant: str) -> Peer:
    """transformers and PEFT on the tiny checkpoint of one of VARIANTS, or on that in MXFP4."""
    folder = shared_folder(tmp_path_factory) / "tiny_peers"
    return _peer_in(done_once(folder, variant, TINY_WORK))


def stories_peer(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Peer:
    """transformers and PEFT on stories260K."""
    work = {"stories260K": partial(_ask_for_stories, assets)}
    return _peer_in(done_once(shared_folder(tmp_path_factory), "stories260K", work))
