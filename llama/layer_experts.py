"""The experts of a model's layers, as config.json and its family say."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from foreign.json_fields import JsonFields

# far beyond any model of today
_MOST_EXPERTS, _MOST_WIDTH = 1 << 14, 1 << 24


class LayerExperts(NamedTuple):
    """How a family's config.json describes the experts of its layers.

    Attributes:
        layers: all have experts; or every `decoder_sparse_step`th that `mlp_only_layers` does not
            name.
        width_field: what gives the intermediate size of each.
        is_normalized: as in `Experts`; None: `norm_topk_prob` says it.
        is_stacked: the checkpoint has a projection of all experts as one tensor, gate and up
            together.
        is_by_columns: the matrices of such a tensor multiply from the right, and columns of gate
            and of up come in turn.
        block: what transformers calls the module of the router and its experts.
    """

    layers: Literal["all", "sparse"] = "all"
    width_field: str = "intermediate_size"
    is_normalized: bool | None = None
    is_stacked: bool = False
    is_by_columns: bool = False
    block: str = "mlp"


@dataclass(frozen=True)
class Experts:
    """How many experts a layer has, what they are, and which of them a token has.

    Attributes:
        num_chosen: of a token, those with the largest scores.
        width: the intermediate size of each.
        is_normalized: whether the weights of the experts that a token has sum to one.
        is_stacked, is_by_columns, block: as in `LayerExperts`.
        has_experts: of each layer; the others have one MLP.
        asks_for_aux_loss: transformers adds the auxiliary loss in training (`llama/balance.py`).
    """

    num_experts: int
    num_chosen: int
    width: int
    is_normalized: bool
    is_stacked: bool
    has_experts: tuple[bool, ...]
    is_by_columns: bool = False
    asks_for_aux_loss: bool = False
    block: str = "mlp"


def read_experts(fields: JsonFields, kind: LayerExperts | None, num_layers: int) -> Experts | None:
    """Read which layers have experts, and what these are; None: no layer has any.

    Raises:
        ValueError: a field is missing, of the wrong type, or does not fit another one.
    """
    if kind is None:
        return None
    has_experts = _has_experts(fields, kind, num_layers)
    if not any(has_experts):
        return None
    num_experts = fields.integer("num_experts", most=_MOST_EXPERTS)
    num_chosen = fields.integer("num_experts_per_tok")
    if num_chosen > num_experts:
        raise ValueError(
            f"{fields.where}: num_experts_per_tok must be at most the number of experts, "
            f"{num_experts}: got {num_chosen}"
        )
    is_normalized = kind.is_normalized
    if is_normalized is None:
        is_normalized = fields.boolean("norm_topk_prob", False)
    return Experts(
        num_experts,
        num_chosen,
        fields.integer(kind.width_field, most=_MOST_WIDTH),
        is_normalized,
        kind.is_stacked,
        tuple(has_experts),
        kind.is_by_columns,
        fields.boolean("output_router_logits", False),
        kind.block,
    )


def _has_experts(fields: JsonFields, kind: LayerExperts, num_layers: int) -> list[bool]:
    if kind.layers == "all":
        return [True] * num_layers
    step = fields.integer("decoder_sparse_step", 1)
    named: Any = fields.values.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        raise ValueError(f"{fields.where}: mlp_only_layers must be a list of layers: got {named!r}")
    return [(layer + 1) % step == 0 and layer not in named for layer in range(num_layers)]
