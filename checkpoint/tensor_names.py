"""The names of tensors in a checkpoint's files: those of the model, and those of an image encoder.

The modules of a language model alone are named alike everywhere, and so are its tensors. Those of a
tower are named here as transformers 5 names its modules, which PEFT's adapters follow:

    model.language_model.layers.0.self_attn.q_proj.weight             transformers 5, Qwen3-VL
    language_model.model.layers.0.self_attn.q_proj.weight             Llava, Mistral-3, Gemma-3
    model.layers.0.self_attn.q_proj.weight                            Qwen2.5-VL

transformers reads all three, and writes those that a family's first checkpoints had. So it does
with the names of experts, which are the same in all families here:

    model.layers.0.mlp.experts.0.gate_proj.weight                     Qwen3-MoE, OLMoE
    model.layers.0.block_sparse_moe.experts.0.w1.weight               Mixtral
    model.layers.0.mlp.experts.gate_up_proj                           gpt-oss, of all experts
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoint.shard_reader import Shard

# modules that turn images and sound into what the language model reads
_ENCODERS = frozenset(
    {
        "audio_tower",
        "embed_audio",
        "embed_vision",
        "image_newline",
        "mm_projector",
        "multi_modal_projector",
        "vision_embed_tokens",
        "vision_embedder",
        "vision_model",
        "vision_tower",
        "visual",
    }
)
# in a tower the encoders lie beside the decoder
_TOWER = "model"
_DECODER, _HEAD = f"{_TOWER}.language_model.", "lm_head."
_PARTS = ("embed_tokens.", "layers.", "norm.")
# of the decoder and the head, in the files of towers
_PREFIXES = (
    (_DECODER, _HEAD),
    ("language_model.model.", f"language_model.{_HEAD}"),
    ("model.", _HEAD),
)


@dataclass(frozen=True)
class TensorNames:
    """The names of a model's tensors in files.

    Attributes:
        prefixes: the model's by the files', where they differ.
        parts: of names, the files' and the model's, where they differ; $ is the end of a name.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[tuple[str, str], ...] = ()

    def in_model(self, name: str) -> str:
        name += "$"
        for theirs, ours in self.parts:
            name = name.replace(theirs, ours)
        return _renamed(name.removesuffix("$"), self.prefixes)

    def in_files(self, name: str) -> str:
        name += "$"
        for theirs, ours in self.parts:
            name = name.replace(ours, theirs)
        prefixes = {ours: theirs for theirs, ours in self.prefixes.items()}
        return _renamed(name.removesuffix("$"), prefixes)

    def renamed(self, shard: Shard) -> Shard:
        """Name the tensors of a file as the model does."""
        tensors = (replace(tensor, name=self.in_model(tensor.name)) for tensor in shard.tensors)
        return replace(shard, tensors=tuple(tensors))


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = next((each for each in prefixes if name.startswith(each)), "")
    return prefixes[prefix] + name.removeprefix(prefix) if prefix else name


def tower_names(folder: Path, stored: Collection[str]) -> TensorNames:
    """Find out how the files of a tower name its tensors.

    Raises:
        ValueError: in none of the known ways, or in several.
    """
    found = [
        (decoder, head)
        for decoder, head in _PREFIXES
        if any(name.startswith(f"{decoder}layers.") for name in stored)
    ]
    if len(found) != 1:
        choices = ", ".join(f"{decoder}layers" for decoder, _ in _PREFIXES)
        came = " and ".join(f"{decoder}layers" for decoder, _ in found) or "none of them"
        raise ValueError(
            f"{folder} must hold the layers of its language model under one of the names {choices}:"
            f" got {came}; save the checkpoint again with transformers"
        )
    ((decoder, head),) = found
    return TensorNames({decoder + part: _DECODER + part for part in _PARTS} | {head: _HEAD})


def encoder_of(name: str) -> str | None:
    """Find the encoder that a tensor belongs to; None for a tensor of another module."""
    return next((part for part in name.split(".") if part in _ENCODERS), None)


def modules_of(encoders: Iterable[str]) -> list[str]:
    """List the modules of a tower that these tensors belong to, as transformers 5 names them."""
    parts = {part for name in encoders if (part := encoder_of(name))}
    return [f"{_TOWER}.{part}" for part in sorted(parts)]
