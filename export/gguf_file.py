"""A GGUF file of a checkpoint, planned without reading a weight and written tensor by tensor.

The writer, the names of tensors and the rounding to f16, bf16 and q8_0 are the gguf package's, an
optional extra. The file has what llama.cpp's own converter writes for the same folder, but for
descriptions of the model; docs/merging.md tells how the two are compared. One tensor is in memory
at a time, in float32 and rounded.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from checkpoint.opening import Checkpoint
from checkpoint.shard_reader import Report
from data.tokenizer import Tokenizer
from export.gguf_architecture import Architecture, architecture_of, fields_of, remarks_of
from export.gguf_tensors import tensors_of
from export.gguf_vocabulary import read_vocabulary
from export.sentencepiece_model import SENTENCEPIECE_FILE
from llama.towers import TEXT

if TYPE_CHECKING:
    import gguf

PACKAGE = "gguf>=0.19"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a GGUF file.

    Attributes:
        byte_shape: of what is written: each row as bytes.
    """

    name: str
    type: "gguf.GGMLQuantizationType"
    byte_shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class GGUFPlan:
    """The plan of a GGUF file.

    Attributes:
        type: f16, bf16 or q8_0.
        family: a word that the model's name must have for llama.cpp; empty for most.
        fields: the file's, by their names.
        remarks: lines about what llama.cpp does otherwise.
    """

    type: str
    architecture: Architecture
    family: str
    fields: Mapping[str, Any]
    tensors: Sequence[PlannedTensor]
    remarks: Sequence[str]

    @property
    def num_bytes(self) -> int:
        """About as many as the file has: tensors, and the texts of tokens and merges."""
        texts = (
            text for value in self.fields.values() if isinstance(value, list) for text in value
        )
        return sum(t.num_bytes for t in self.tensors) + sum(len(str(t)) + 8 for t in texts)


def check_installed() -> None:
    """Refuse to plan a file that nothing can write.

    Raises:
        ValueError: the gguf package is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"--gguf must find the gguf package: it is not installed; pip install '{PACKAGE}'"
        )


def plan_gguf(checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path, type: str) -> GGUFPlan:
    """Lay a GGUF file out.

    Args:
        folder: of the tokenizer's files; its tokenizer.model may lie in the checkpoint's.

    Raises:
        FileNotFoundError, ValueError: as `architecture_of` and `read_vocabulary`.
    """
    architecture = architecture_of(checkpoint)
    pieces = folder / SENTENCEPIECE_FILE
    if not pieces.is_file():
        pieces = checkpoint.folder / SENTENCEPIECE_FILE
    # the ids around a text_config are those of the whole model, and go before its own
    around = {k: v for k, v in checkpoint.config_json.items() if v is not None}
    config = {**(around.get(TEXT) or {}), **around}
    vocabulary = read_vocabulary(folder, tokenizer, pieces, config, checkpoint.config.vocab_size)
    fields = fields_of(checkpoint, architecture)
    fields |= {f"tokenizer.ggml.{name}": value for name, value in vocabulary.fields.items()}
    if template := fields.pop("tokenizer.ggml.chat_template", None):
        fields["tokenizer.chat_template"] = template
    tensors = _plan_tensors(checkpoint, architecture, type)
    remarks = [*remarks_of(checkpoint, architecture), *vocabulary.remarks]
    if num_kept := sum(t.type.name == "F16" for t in tensors if type == "q8_0"):
        remarks.append(f"{num_kept} matrices stay in f16: their rows are no whole blocks of q8_0")
    return GGUFPlan(type, architecture, vocabulary.family, fields, tensors, remarks)


def _plan_tensors(
    checkpoint: Checkpoint, architecture: Architecture, type: str
) -> list[PlannedTensor]:
    import gguf

    (key,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(key, checkpoint.config.num_hidden_layers)
    planned = []
    for tensor in tensors_of(checkpoint, architecture):
        # those that the checkpoint does not have are named as the file has them
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias")) or tensor.name
        kind = gguf.GGMLQuantizationType[type.upper()]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if len(tensor.shape) == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif tensor.shape[-1] % block:
            kind = gguf.GGMLQuantizationType.F16
        block, size = gguf.GGML_QUANT_SIZES[kind]
        byte_shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        planned.append(PlannedTensor(name, kind, byte_shape, math.prod(byte_shape)))
    return planned


def write_gguf(
    plan: GGUFPlan, checkpoint: Checkpoint, path: Path, name: str, report: Report
) -> None:
    """Write a GGUF file.

    Args:
        checkpoint: the weights to write, of the planned names and shapes.
        name: of the model, in the file.
        report: called as `report(done, total)` after each tensor.

    Raises:
        ValueError: a weight overflows the file's type.
        OSError: the disk refused.
    """
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(" ".join(filter(None, (plan.family, name))))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{plan.type.upper()}"])
    for field, value in plan.fields.items():
        _add(writer, field, value)
    for tensor in plan.tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.byte_shape,
            np.dtype(np.uint8),
            tensor.num_bytes,
            raw_dtype=tensor.type,
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        sources = tensors_of(checkpoint, plan.architecture)
        for done, (tensor, source) in enumerate(zip(plan.tensors, sources, strict=True), start=1):
            values = source.read()
            _check_fits(tensor, source.name, values, plan.type)
            writer.write_tensor_data(gguf.quants.quantize(values.numpy(), tensor.type))
            report(done, len(plan.tensors))
    finally:
        writer.close()


def _add(writer: "gguf.GGUFWriter", field: str, value: Any) -> None:
    # bool is an int, too
    if isinstance(value, bool):
        writer.add_bool(field, value)
    elif isinstance(value, int):
        writer.add_uint32(field, value)
    elif isinstance(value, float):
        writer.add_float32(field, value)
    elif isinstance(value, str):
        writer.add_string(field, value)
    else:
        writer.add_array(field, value)


def _check_fits(tensor: PlannedTensor, name: str, values: Tensor, type: str) -> None:
    # scales of q8_0 are float16s of the largest number over 127
    most = {"F16": 65504.0, "Q8_0": 65504.0 * 127}.get(tensor.type.name, math.inf)
    if float(values.abs().max()) > most:
        raise ValueError(
            f"{name} must fit --gguf {type}: a weight is larger than {most:,.0f}; use --gguf bf16"
        )
