"""The heads of each layer's attention, as config.json and its family say."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from foreign.json_fields import JsonFields

# far beyond any model of today, and small enough to be laid out before the weights contradict
MOST_HEADS = MOST_HEAD_DIM = 1 << 16
PER_LAYER = "per_layer_config"
_DIM, _COUNT = "head_dim", "num_key_value_heads"

LayerHeads = Literal["alike", "by window"]


class Heads(NamedTuple):
    """The heads of a layer's attention, beside the number of those of queries.

    Attributes:
        rotary_dim: of the dimensions of a head that turn, the first ones.
        has_values: values have a projection; otherwise they are the keys, before these are
            normalized and rotated.
    """

    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    has_values: bool = True


def read_heads(
    fields: JsonFields, kind: LayerHeads, common: Heads, sees_window: Sequence[bool]
) -> tuple[Heads, ...]:
    """Read the heads of each layer, all of whose dimensions turn; empty: all have the common ones.

    Args:
        kind: all layers have the same heads; or those that see all tokens have others than those
            that see a window, and may have no projection of values. transformers 5 writes the
            heads of single layers.
        sees_window: of each layer.

    Raises:
        ValueError: the fields are of the wrong type, or do not fit together.
    """
    if kind == "alike":
        return ()
    shares_values = fields.boolean("attention_k_eq_v", False)
    if fields.values.get(PER_LAYER) is not None:
        own = _listed(fields, len(sees_window))
    else:
        of_all = {_DIM: fields.integer("global_head_dim", 512, MOST_HEAD_DIM)}
        if shares_values:
            count = common.num_key_value_heads
            of_all[_COUNT] = fields.integer("num_global_key_value_heads", count, MOST_HEADS)
        own = {layer: of_all for layer, sees in enumerate(sees_window) if not sees}
    heads = []
    for layer, sees in enumerate(sees_window):
        given = own.get(layer, {})
        dim = given.get(_DIM, common.head_dim)
        if dim % 2:
            raise ValueError(
                f"{fields.where}: the dimensions of a head must be even, because rotary positions "
                f"turn pairs: got {dim} in layer {layer}"
            )
        count = given.get(_COUNT, common.num_key_value_heads)
        heads.append(Heads(count, dim, dim, sees or not shares_values))
    if len(set(zip(sees_window, heads, strict=True))) > len(set(sees_window)):
        raise ValueError(
            f"{fields.where}: {PER_LAYER} must give the same heads for all layers that see a "
            f"window, and for all others: got {fields.values[PER_LAYER]!r}"
        )
    return tuple(heads)


def _listed(fields: JsonFields, num_layers: int) -> dict[int, Mapping[str, int]]:
    """Read the heads of single layers, by the layers' numbers."""
    listed: Any = fields.values[PER_LAYER]
    names = {str(layer): layer for layer in range(num_layers)}
    own: dict[int, Mapping[str, int]] = {}
    for name, given in listed.items() if isinstance(listed, dict) else [("", listed)]:
        # transformers pads with zeros
        layer = names.get(name.lstrip("0") or "0")
        if layer is None or not isinstance(given, dict) or not given.keys() <= {_DIM, _COUNT}:
            raise ValueError(
                f"{fields.where}: {PER_LAYER} must give {_DIM} and {_COUNT} alone, for some of "
                f"{num_layers} layers by their numbers: got {name!r}: {given!r}"
            )
        section = f"{fields.section}, " if fields.section else ""
        inner = replace(fields, values=given, section=f"{section}{PER_LAYER} {name}")
        most = {_DIM: MOST_HEAD_DIM, _COUNT: MOST_HEADS}
        own[layer] = {key: inner.integer(key, most=most[key]) for key in given}
    return own
