"""Which rotary positions each layer has, as config.json and its family say."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from foreign.json_fields import JsonFields
from llama.rope_scaling import PROPORTIONAL, SHARE, LongRopeScaling, Rope, read_rope

DEFAULT_ROPE_THETA = 10000.0

LayerRopes = Literal["alike", "by window", "listed", "windowed"]


def read_rotary_dim(fields: JsonFields, share: float | None, head_dim: int) -> int:
    """Read how many dimensions of a head turn, apart from the share of a proportional scaling.

    Args:
        share: the family's where config.json gives none; None: the family turns all dimensions.

    Raises:
        ValueError: the family turns all and config.json asks for some, or half a pair would turn.
    """
    where, scopes = fields.where, [fields.values]
    for key in ("rope_parameters", "rope_scaling"):
        given = fields.values.get(key)
        inner = (given, *given.values()) if isinstance(given, dict) else ()
        sets = [each for each in inner if isinstance(each, dict)]
        scopes += [s for s in sets if PROPORTIONAL not in (s.get("rope_type"), s.get("type"))]
    if share is not None and any(scope.get(SHARE, share) is None for scope in scopes):
        # one class of transformers then turns all dimensions, another one stops
        raise ValueError(f"{where}: {SHARE} must be a number or absent: got null")
    parts = [replace(fields, values=scope) for scope in scopes]
    given = [part.optional_number(SHARE) for part in parts]
    shares = {each for each in given if each is not None} or {1.0 if share is None else share}
    if len(shares) > 1:
        raise ValueError(
            f"{where}: partial_rotary_factor must be the same wherever it is given: "
            f"got {sorted(shares)}"
        )
    (found,) = shares
    if found > 1 or (share is None and found != 1):
        most = "absent or 1" if share is None else "at most 1"
        raise ValueError(f"{where}: partial_rotary_factor must be {most}: got {found}")
    rotary_dim = int(head_dim * found)
    if head_dim % 2 or rotary_dim % 2 or not rotary_dim:
        raise ValueError(
            f"{where}: head_dim must be even, and so the dimensions that turn, because rotary "
            f"positions turn pairs: got {head_dim} and {rotary_dim}"
        )
    return rotary_dim


def read_ropes(
    fields: JsonFields,
    kind: LayerRopes,
    sees_window: Sequence[bool],
    rotary_dims: Sequence[int],
    types: Mapping[str, str],
    scales_queries: bool,
) -> tuple[Rope | None, ...]:
    """Read the rotary positions of each layer; None: its heads are not rotated.

    Args:
        kind: all layers have the same; or those that see a window have others than the rest; or
            no_rope_layers says which layers have any; or those that see a window have some, and
            all layers of a model without windows.
        sees_window: of each layer.
        rotary_dims: of each layer, dimensions of a head that turn.
        types: the family's names of scalings.
        scales_queries: whether the family's queries grow with their positions.

    Raises:
        ValueError: the fields are of the wrong type, or do not fit together.
    """
    if kind == "by window":
        dims = dict(zip(sees_window, rotary_dims, strict=True))
        windowed, full = _ropes_by_window(fields, dims, types)
        ropes = tuple(windowed if sees else full for sees in sees_window)
    else:
        theta = fields.number("rope_theta", DEFAULT_ROPE_THETA)
        rope = read_rope(fields, _only_set(fields), theta, rotary_dims[0], types, scales_queries)
        num_layers = len(sees_window)
        is_rotated = [True] * num_layers
        if kind == "listed":
            is_rotated = rotated_layers(fields, num_layers)
        elif kind == "windowed" and fields.values.get("sliding_window") is not None:
            is_rotated = list(sees_window)
        ropes = tuple(rope if has_rope else None for has_rope in is_rotated)
    _check_one_length(fields, ropes)
    return ropes


def _only_set(fields: JsonFields) -> Any:
    """Find the parameters that all layers share."""
    # transformers 5 writes rope_parameters, with rope_theta inside; earlier versions rope_scaling
    keys = ("rope_parameters", "rope_scaling")
    given = [fields.values[key] for key in keys if fields.values.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(
            f"{fields.where}: rope_parameters and rope_scaling must agree: "
            f"got {given[0]!r} and {given[1]!r}"
        )
    return given[0] if given else {}


def _ropes_by_window(
    fields: JsonFields,
    dims: Mapping[bool, int],  # by whether a layer sees a window
    types: Mapping[str, str],
) -> tuple[Rope, Rope]:
    """Read the rotary positions of layers that see a window, and of layers that see all tokens.

    transformers 5 writes a set of parameters for each; earlier versions a frequency for those that
    see a window, and the scaling of the others.
    """
    kinds = ("sliding_attention", "full_attention")
    given, scaling = (fields.values.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(given, dict) or not given.keys() <= set(kinds):
        raise ValueError(
            f"{fields.where}: rope_parameters must hold a set of parameters for each of "
            f"{' and '.join(kinds)}: got {given!r}"
        )
    windowed, full = (given.get(kind) or {"rope_type": "default"} for kind in kinds)
    if isinstance(full, dict):
        # read_rope refuses what is no object
        full = full | scaling if isinstance(scaling, dict) else scaling
    theta = fields.number("rope_local_base_freq", DEFAULT_ROPE_THETA)
    full_theta = fields.number("rope_theta", DEFAULT_ROPE_THETA)
    (some, *_) = dims.values()
    return (
        read_rope(fields, windowed, theta, dims.get(True, some), types),
        read_rope(fields, full, full_theta, dims.get(False, some), types),
    )


def rotated_layers(fields: JsonFields, num_layers: int) -> list[bool]:
    """Read which layers rotate their heads; no_rope_layers has a 1 for those that do."""
    listed = fields.values.get("no_rope_layers")
    if listed is None:
        interval = fields.integer("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    is_list = isinstance(listed, list) and len(listed) >= num_layers
    if not is_list or not all(type(has_rope) is int for has_rope in listed):
        raise ValueError(
            f"{fields.where}: no_rope_layers must be a 0 or a 1 for each of {num_layers} layers: "
            f"got {listed!r}"
        )
    return [has_rope != 0 for has_rope in listed[:num_layers]]


def _check_one_length(fields: JsonFields, ropes: tuple[Rope | None, ...]) -> None:
    """Refuse layers whose frequencies change at different lengths: a sequence is long or not."""
    lengths = {
        rope.scaling.original_max_position_embeddings
        for rope in ropes
        if rope is not None and isinstance(rope.scaling, LongRopeScaling)
    }
    if len(lengths) > 1:
        raise ValueError(
            f"{fields.where}: original_max_position_embeddings must be the same in all sets of "
            f"parameters: got {sorted(lengths)}"
        )
