"""Write everything else in this room: `python -m bundled.make`, some minutes on two CPU cores.

The model is the product's own Llama in float32, with a trainable product in each linear group's
place, run by torch's autograd: the product's own passes know no gradient of a frozen weight. The
same machine writes the same bytes every time.
"""

import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from bundled.corpus import documents
from bundled.instructions import held_out_set, training_set
from data.chat.template_files import BUNDLED_TEMPLATES
from llama.config import read_config
from llama.layer import RMSNorm
from llama.model import Llama
from llama.rope import rope_tables
from lora.linear_group import LinearGroup

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"

# as in SmolLM2, a document opens and closes like a turn, so the turns' tokens are pretrained too
BOS, EOS = "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 768
NUM_TOKENIZER_DOCUMENTS = 20_000

SEED = 1
NUM_THREADS = 2
NUM_STEPS = 1500
BATCH_SIZE = 16
LENGTH = 128
LEARNING_RATE = 4e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.05
INIT_STD = 0.02


class _TrainableGroup(nn.Module):
    """A LinearGroup whose weight has a gradient: y = x W^T, of all members."""

    def __init__(self, group: LinearGroup) -> None:
        super().__init__()
        self.names, self.rows = group.names, group.rows
        self.weight = nn.Parameter(torch.empty(sum(group.rows), group.in_features))

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., sum of rows)
        return F.linear(x, self.weight)


def _normalize(x: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, H, T, head_dim)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _hidden_states(model: Llama, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
    """Run the decoder as `Llama.hidden_states` does, through torch's operations, which have a graph
    of autograd."""
    config = model.config
    tables = rope_tables(model.frequencies[0], torch.arange(input_ids.shape[1]))
    num_heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    x = model.model.embed_tokens(input_ids)
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = attention.qkv(_normalize(x, layer.norm(layer.norms.before_attention)))
        heads = qkv.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        query, key, value = heads.split(num_heads, dim=1)
        query, key = _rotate(query, *tables), _rotate(key, *tables)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + attention.o(mixed.transpose(1, 2).flatten(2))
        gate, up = mlp.gate_up(_normalize(x, layer.norm(layer.norms.before_mlp))).chunk(2, dim=-1)
        x = x + mlp.down(F.silu(gate) * up)
    return _normalize(x, model.model.norm)


def make_tokenizer() -> tokenizers.Tokenizer:
    """Train a byte-level BPE on the corpus; it writes BOS before a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(SEED), NUM_TOKENIZER_DOCUMENTS), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write_configs(tokenizer: tokenizers.Tokenizer) -> None:
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    tokenizer.save(str(MODEL / "tokenizer.json"))
    _write_json(
        MODEL / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": 256,
            "clean_up_tokenization_spaces": False,
            "chat_template": (BUNDLED_TEMPLATES / "chatml.jinja").read_text(),
        },
    )
    _write_json(MODEL / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    _write_json(
        MODEL / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": INIT_STD,
            "use_cache": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "torch_dtype": "bfloat16",
        },
    )


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


def _windows(tokenizer: tokenizers.Tokenizer) -> Iterator[Tensor]:  # (BATCH_SIZE, LENGTH + 1) each
    """Documents one after the other, cut into windows whose last token starts the next."""
    ids: list[int] = []
    size = BATCH_SIZE * LENGTH
    for document in documents(SEED):
        ids += tokenizer.encode(document + EOS).ids
        if len(ids) > size:
            window = torch.tensor(ids[: size + 1])
            del ids[:size]
            yield torch.stack([window[i * LENGTH :][: LENGTH + 1] for i in range(BATCH_SIZE)])


def _learning_rate(step: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (NUM_STEPS - WARMUP_STEPS)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(tokenizer: tokenizers.Tokenizer) -> Llama:
    """Train a Llama of config.json's shape on the corpus."""
    torch.manual_seed(SEED)
    model = Llama(read_config(MODEL), torch.float32)
    for name, group in [(n, m) for n, m in model.named_modules() if isinstance(m, LinearGroup)]:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _TrainableGroup(group))
    model.requires_grad_(True)
    num_residuals = 2 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            # what adds to the residual stream starts smaller, as in GPT-2
            is_residual = name.endswith((".o.weight", ".down.weight"))
            nn.init.normal_(
                parameter, std=INIT_STD / math.sqrt(num_residuals if is_residual else 1)
            )
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    bar = tqdm(islice(_windows(tokenizer), NUM_STEPS), total=NUM_STEPS, desc="pretraining")
    for step, window in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step)
        hidden = _hidden_states(model, window[:, :-1])
        loss = F.cross_entropy((hidden @ model.head.T).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def checkpoint_tensors(model: Llama) -> dict[str, Tensor]:
    """The model's weights under the checkpoint's names, in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        prefix, _, _ = name.removesuffix(".weight").rpartition(".")
        owner = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(owner, _TrainableGroup):
            parts = parameter.detach().split(owner.rows)
            names = [f"{prefix}.{member}.weight" for member in owner.names]
            tensors |= dict(zip(names, parts, strict=True))
        else:
            tensors[name] = parameter.detach()
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def main() -> None:
    started = time.monotonic()
    # another number of threads sums in another order
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    MODEL.mkdir(exist_ok=True)
    for name, conversations in (("data", training_set()), ("eval", held_out_set())):
        lines = "".join(json.dumps(conversation) + "\n" for conversation in conversations)
        (FOLDER / f"{name}.jsonl").write_text(lines)
    tokenizer = make_tokenizer()
    write_configs(tokenizer)
    model = pretrain(tokenizer)
    save_file(checkpoint_tensors(model), MODEL / "model.safetensors", metadata={"format": "pt"})
    total_bytes = sum(path.stat().st_size for path in MODEL.iterdir())
    print(f"{MODEL}: {total_bytes:,} bytes, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
