"""A checkpoint folder, opened: config.json and the headers of its files, read once and checked.

No weight is read. A shape or dtype that contradicts config.json, a missing tensor and an unknown
tensor are found from the headers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.files import INDEX_NAME, SINGLE_NAME, first_few, read_shards
from checkpoint.number_formats import check_not_quantized, number_format
from checkpoint.shard_reader import Shard, StoredTensor, read_tensor
from checkpoint.slots import HEAD, META, Slot, embeddings_name, slots_of
from checkpoint.stored_mxfp4 import find_mxfp4, scales_first
from checkpoint.stored_nf4 import StoredNF4, as_bytes, check_stored_nf4, read_stored_nf4
from checkpoint.tensor_names import TensorNames, encoder_of, tower_names
from llama.config import CONFIG_NAME, LlamaConfig, check_config, read_config_json
from llama.config_fields import DROPOUTS
from llama.model import Llama
from llama.towers import TEXT
from nf4.mxfp4 import BLOCKS, EXPANDED
from nf4.weight import Quantization

_GIB = 1 << 30


@dataclass(frozen=True)
class Checkpoint:
    """A model's checkpoint folder with all that its headers and config.json say, checked.

    Attributes:
        config_json: the fields of config.json, also those that decide nothing here.
        shards: the files of weights, sorted by name; none where config.json is all that is known.
        stored: their tensors, in the files' order.
        nf4: the weights that are stored in NF4.
        mxfp4: the names of the tensors that stand for weights in MXFP4.
        left_alone: names of stored tensors that the model does not need.
        names: the names of the model's tensors in the files.
    """

    folder: Path
    config: LlamaConfig
    config_json: Mapping[str, Any]
    shards: tuple[Shard, ...]
    stored: Mapping[str, StoredTensor]
    nf4: StoredNF4
    left_alone: frozenset[str]
    names: TensorNames
    mxfp4: frozenset[str]

    @property
    def quantization(self) -> Quantization | None:
        """How the weights are quantized that are stored in NF4; None if there are none."""
        return self.nf4.quantization

    @property
    def embeddings(self) -> StoredTensor:
        """The embeddings, or the head where tied embeddings are stored as the head alone."""
        name = embeddings_name(self.config)
        return self.stored[name if name in self.stored else HEAD]

    @property
    def encoders(self) -> list[StoredTensor]:
        """The tensors of the encoders of images beside a tower, in the files' order."""
        if not self.config.is_tower:
            return []
        return [self.stored[name] for name in self.stored if encoder_of(name)]

    @property
    def remarks(self) -> list[str]:
        """Lines about files, tensors and fields of the folder that are not used."""
        lines = []
        if (self.folder / SINGLE_NAME).is_file() and (self.folder / INDEX_NAME).is_file():
            lines.append(
                f"{self.folder} has both {SINGLE_NAME} and {INDEX_NAME}: the first is read, as "
                "transformers does"
            )
        if encoders := self.encoders:
            num_bytes = sum(tensor.num_bytes for tensor in encoders)
            lines.append(
                f"{self.folder}: the language model alone is used; {len(encoders):,} tensors for "
                f"images, {num_bytes / _GIB:.2f} GiB, are neither trained nor loaded"
            )
        if others := self.left_alone - {tensor.name for tensor in encoders}:
            lines.append(
                f"{self.folder} has tensors that the model does not need; left alone: "
                f"{first_few(others)}"
            )
        given = {**self.config_json, **(self.config_json.get(TEXT) or {})}
        lines += [
            f"{self.folder / CONFIG_NAME} has {name} {given[name]!r}: it is not applied; "
            "--lora-dropout drops an adapter's input"
            for name in sorted(DROPOUTS & given.keys())
            if given[name]
        ]
        if self.mxfp4:
            lines.append(
                f"{self.folder}: experts are in MXFP4, and expanded exactly while they load; NF4 "
                "rounds them again (docs/models.md says by how much)"
            )
        said = number_format(self.config_json)
        if said and not self.nf4.states and not self.mxfp4:
            lines.append(
                f"{self.folder / CONFIG_NAME} has a quantization_config ({said}), and no "
                "weight is quantized: it is left over from another form, and ignored"
            )
        return lines

    def needed(self) -> list[StoredTensor]:
        """List the tensors that a model is loaded from, in the files' order, so that each file is
        read front to back."""
        others = self.left_alone | self.nf4.read
        wanted = [tensor for name, tensor in self.stored.items() if name not in others]
        return list(scales_first(wanted)) if self.mxfp4 else wanted

    def weight_dtype(self, name: str) -> torch.dtype:
        """Find the dtype of a weight that is not in NF4, or of a bias; in MXFP4 that which it is
        expanded to."""
        return EXPANDED if name + BLOCKS in self.mxfp4 else self.stored[name].dtype

    def copied(self) -> list[StoredTensor]:
        """List the tensors of a copy of the checkpoint in another form, in the files' order."""
        names = {tensor.name for tensor in (*self.needed(), *self.encoders)}
        return [tensor for name, tensor in self.stored.items() if name in names]

    def vocabulary(self) -> dict[str, StoredTensor]:
        """Find the embeddings and the head; where one tensor is stored for both, it is both."""
        names = (embeddings_name(self.config), HEAD)
        return {name: self.stored.get(name, self.embeddings) for name in names}

    def vocabulary_tensors(self) -> dict[str, Tensor]:
        """Read the embeddings and the head as they are stored."""
        return {name: read_tensor(stored) for name, stored in self.vocabulary().items()}

    def check_unchanged(self) -> None:
        """Refuse files that were changed since the checkpoint was opened.

        Raises:
            FileNotFoundError, ValueError: as `Shard.check_unchanged`.
        """
        for shard in self.shards:
            shard.check_unchanged()

    def check_tied_head(self) -> None:
        """Refuse a stored head that config.json ties to the embeddings and that differs from them.

        Raises:
            ValueError: the head differs.
        """
        if not self.config.tie_word_embeddings or HEAD not in self.left_alone:
            return
        values = self.vocabulary_tensors()
        name = embeddings_name(self.config)
        if not torch.equal(values[HEAD].to(values[name]), values[name]):
            raise ValueError(
                f"{self.folder}: config.json ties the head to the embeddings, so "
                f"{self.names.in_files(HEAD)} must equal {self.names.in_files(name)}: they differ; "
                "set tie_word_embeddings to false"
            )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's config.json and headers.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: the files contradict each other or config.json, or are in another format.
    """
    fields = read_config_json(folder)
    config = check_config(fields)
    with META:
        model = Llama(config, torch.float32)
    shards, names = read_shards(folder), TensorNames(parts=config.file_names)
    if config.is_tower:
        names = tower_names(folder, [tensor.name for shard in shards for tensor in shard.tensors])
    if names != TensorNames():
        shards = [names.renamed(shard) for shard in shards]
    stored = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    said = number_format(fields.values)
    nf4 = read_stored_nf4(folder, {n: t for n, t in stored.items() if not encoder_of(n)})
    check_stored_nf4(folder, model, nf4, said)
    stored |= {name: as_bytes(stored[name]) for name in nf4.states if name in stored}
    mxfp4 = find_mxfp4(folder, model, stored, said)
    slots = slots_of(model, stored, nf4.states)
    others = stored.keys() - slots.keys()
    left_alone = frozenset(n for n in others if _is_left_alone(n, config.tie_word_embeddings))
    if not nf4.states and not mxfp4:
        taken = {name: tensor for name, tensor in stored.items() if name not in left_alone}
        check_not_quantized(folder, taken, slots.keys(), said)
    checkpoint = Checkpoint(
        folder, config, fields.values, tuple(shards), stored, nf4, left_alone, names, mxfp4
    )
    _check(checkpoint, slots)
    return checkpoint


def _is_left_alone(name: str, is_tied: bool) -> bool:
    """Whether a checkpoint may hold a tensor that the model does not need."""
    # rotary frequencies and their cosines follow from config.json
    is_rotary = "rotary_emb" in name.split(".")
    return is_rotary or bool(encoder_of(name)) or (is_tied and name == HEAD)


def _check(checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> None:
    """Hold what the files contain against what config.json implies."""
    stored, names = checkpoint.stored, checkpoint.names
    extra = stored.keys() - slots.keys() - checkpoint.nf4.read - checkpoint.left_alone
    missing = slots.keys() - stored.keys()
    if missing or extra:
        raise ValueError(
            f"{checkpoint.folder} must hold exactly the tensors that config.json implies: missing "
            f"are {first_few(map(names.in_files, missing))}; unknown are "
            f"{first_few(map(names.in_files, extra))}"
        )
    shapes = {name: slot.shape for name, slot in slots.items()}
    if HEAD in checkpoint.left_alone:
        shapes[HEAD] = shapes[embeddings_name(checkpoint.config)]
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{stored[name].file}: {names.in_files(name)} must have shape {shape} by "
                f"config.json: got {stored[name].shape}"
            )
    for name, slot in slots.items():
        if stored[name].dtype not in slot.dtypes:
            raise ValueError(
                f"{stored[name].file}: {names.in_files(name)} must be stored as "
                f"{' or '.join(map(str, slot.dtypes))}: got {stored[name].dtype}"
            )
