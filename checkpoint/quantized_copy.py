"""A checkpoint in NF4, as transformers and bitsandbytes write it, made from one in 16 or 32 bits.

    shard -> one tensor at a time -> quantized, on the device -> its place in a shard

At most one tensor of either checkpoint is in memory. Every weight of the decoder's linear layers is
quantized as it is stored, also where a family stores q, k and v as one tensor; embeddings, norms,
biases and the head are copied. So are the encoders of images beside a tower, which transformers is
told to leave as they are.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.files import COMPANIONS
from checkpoint.identity import MADE_FROM, identify
from checkpoint.loading import check_finite
from checkpoint.opening import Checkpoint
from checkpoint.shard_reader import FLOATS, Report, StoredTensor, read_tensor
from checkpoint.shard_writer import PlannedTensor, split_into_shards, write_shards
from checkpoint.slots import META, embeddings_name
from checkpoint.tensor_names import modules_of
from kernels.nf4_quantize import nf4_quantize_member
from llama.config import CONFIG_NAME
from llama.model import quantized_layouts
from nf4.serialized import serialize
from nf4.weight import NF4Weight, Quantization, empty_weight

# numbers, and indices into tables
_ENCODER_DTYPES = (*FLOATS.values(), torch.int64, torch.int32)


@dataclass(frozen=True)
class QuantizedCopy:
    """The plan of a quantized copy.

    Attributes:
        weights: the names of the tensors that are quantized, in the model.
        quantization: the quantization of these weights.
        dtype: the dtype of the other tensors; None: as they are stored.
    """

    source: Checkpoint
    weights: frozenset[str]
    quantization: Quantization
    dtype: torch.dtype | None
    shards: list[list[PlannedTensor]]

    @property
    def num_weights(self) -> int:
        """Quantized weights, counted as numbers."""
        return sum(math.prod(self.source.stored[name].shape) for name in self.weights)

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of the quantized weights, with all that is stored beside them."""
        weights = set(map(self.source.names.in_files, self.weights))
        return sum(
            tensor.num_bytes
            for tensor in self._tensors()
            if tensor.name.partition(".weight")[0] + ".weight" in weights
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the copy."""
        return sum(tensor.num_bytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[PlannedTensor]:
        return chain.from_iterable(self.shards)


def plan_quantized_copy(
    source: Checkpoint, quantization: Quantization, dtype: torch.dtype | None
) -> QuantizedCopy:
    """Lay a copy out, without reading a weight.

    Raises:
        ValueError: the source, or an encoder beside it, is quantized already or stores all experts
            of a layer in one tensor, or there is no such block size.
    """
    if source.quantization:
        raise ValueError(
            f"--model must be a checkpoint in 16 or 32 bits: {source.folder} is in NF4 already; "
            "give the original one"
        )
    for tensor in source.encoders:
        if tensor.dtype not in _ENCODER_DTYPES:
            raise ValueError(
                f"--model must have an encoder in 16 or 32 bits: {tensor.name} is in "
                f"{_name(tensor.dtype)}; give the original one"
            )
    layouts = quantized_layouts(source.config)
    if stacked := [path for path, layout in layouts.items() if layout is not None]:
        raise ValueError(
            "--model must store each expert's weights apart, as bitsandbytes' format has matrices "
            f"alone: {source.names.in_files(stacked[0] + '.weight')} has those of all experts; "
            "train from this checkpoint, which is quantized to NF4 while it loads"
        )
    weights = frozenset(f"{path}.weight" for path in layouts)
    units = [
        _plan_tensor(
            replace(tensor, name=source.names.in_files(tensor.name)),
            tensor.name in weights,
            quantization,
            dtype,
        )
        for tensor in source.copied()
    ]
    return QuantizedCopy(source, weights, quantization, dtype, split_into_shards(units))


def _empty(shape: Sequence[int], quantization: Quantization, device: torch.device) -> NF4Weight:
    num_rows, in_features = shape
    return empty_weight((num_rows,), in_features, *quantization, device)


def _plan_tensor(
    tensor: StoredTensor, is_weight: bool, quantization: Quantization, dtype: torch.dtype | None
) -> list[PlannedTensor]:
    dtype = _copied_dtype(tensor, dtype)
    if not is_weight:
        return [PlannedTensor(tensor.name, tensor.shape, dtype)]
    parts = serialize(_empty(tensor.shape, quantization, META), dtype)
    return [
        PlannedTensor(tensor.name + suffix, tuple(part.shape), part.dtype)
        for suffix, part in parts.items()
    ]


def _copied_dtype(tensor: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    # an encoder may have tables of indices
    return dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype


def write_quantized_copy(
    copy: QuantizedCopy, folder: Path, device: torch.device, report: Report
) -> None:
    """Write a copy into a folder, quantizing on a device.

    Args:
        report: called as `report(done, total)` after each tensor.

    Raises:
        FileNotFoundError, ValueError: as `Shard.check_unchanged`; or a tensor holds a NaN, an
            infinity or a value that overflows the copy's dtype; or the head is tied to embeddings
            that it does not equal.
    """
    source = copy.source
    source.check_unchanged()
    metadata = {MADE_FROM: identify(source).own}
    write_shards(folder, copy.shards, _converted(copy, device, report), metadata)
    config = {**source.config_json, **_config_fields(copy, source.config_json)}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in chain.from_iterable(source.folder.glob(pattern) for pattern in COMPANIONS):
        target = folder / path.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _converted(
    copy: QuantizedCopy, device: torch.device, report: Report
) -> Iterator[tuple[str, Tensor]]:
    wanted = copy.source.copied()
    for done, stored in enumerate(wanted, start=1):
        name = copy.source.names.in_files(stored.name)
        if stored.name in copy.weights:
            for suffix, part in _quantized(copy, stored, read_tensor(stored).to(device)):
                yield name + suffix, part
        else:
            yield name, _kept(copy, stored, read_tensor(stored))
        report(done, len(wanted))


def _quantized(
    copy: QuantizedCopy, stored: StoredTensor, matrix: Tensor
) -> Iterator[tuple[str, Tensor]]:
    weight = _empty(stored.shape, copy.quantization, matrix.device)
    nf4_quantize_member(weight, 0, matrix, stored.name)
    for suffix, part in serialize(weight, copy.dtype or stored.dtype).items():
        yield suffix, part.cpu()


def _kept(copy: QuantizedCopy, stored: StoredTensor, tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor
    check_finite(stored.name, tensor)
    if stored.name == embeddings_name(copy.source.config):
        copy.source.check_tied_head()
    dtype = _copied_dtype(stored, copy.dtype)
    converted = tensor.to(dtype)
    if not bool(torch.stack(converted.aminmax()).isfinite().all()):
        raise ValueError(
            f"{stored.name} must fit the range of --dtype: its values overflow "
            f"{_name(dtype)}; choose bfloat16, or auto to keep them as they are"
        )
    return converted


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config_fields(copy: QuantizedCopy, config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the fields of a copy's config.json that differ from its source's."""
    fields: dict[str, Any] = {}
    if copy.dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        fields |= dict.fromkeys(keys, _name(copy.dtype))
    compute_dtype = copy.dtype or copy.source.embeddings.dtype
    # all that transformers writes; the block size is in the quant_state of each weight
    fields["quantization_config"] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": _name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": copy.quantization[1],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [
            "lm_head",
            *_routers(copy.source),
            *modules_of(t.name for t in copy.source.encoders),
        ],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    return fields


def _routers(source: Checkpoint) -> list[str]:
    """List the routers of experts, which transformers 4 takes for projections."""
    experts, decoder = source.config.experts, source.config.decoder
    has_experts = experts.has_experts if experts else ()
    return [
        source.names.in_files(f"{decoder}.layers.{layer}.mlp.gate.").rstrip(".")
        for layer, has in enumerate(has_experts)
        if has
    ]
