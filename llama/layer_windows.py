"""How many tokens each layer sees, as config.json and its family say."""

from typing import Literal

from foreign.json_fields import JsonFields
from llama.layer_ropes import rotated_layers

LayerWindows = Literal[
    "none",
    "all",
    "listed",
    "alternating",
    "pattern",
    "pattern but last",
    "pattern or none",
    "later",
    "unrotated",
    "switched",
]
# transformers' classes make a mask of the window whatever the layers see, and stop without a size
_ALWAYS: tuple[LayerWindows, ...] = ("listed", "alternating", "pattern", "pattern but last")


def read_windows(fields: JsonFields, kind: LayerWindows, num_layers: int) -> tuple[int | None, ...]:
    """Read how many tokens each layer sees, itself included; None: all before it.

    Args:
        kind: which layers see only the last `sliding_window` tokens: none or all, or all
            where `use_sliding_window` is set, whatever `layer_types` says; otherwise those that
            `layer_types` names, or without it all, every other one from the first on, all but every
            `sliding_window_pattern`th (of a model that has windows, or of every one; and in one
            kind the last layer sees all tokens, whatever the file says), or, where
            `use_sliding_window` is set, those from `max_window_layers` on, or those without rotary
            positions.

    Raises:
        ValueError: the fields are of the wrong type, or do not fit together.
    """
    has_size = fields.values.get("sliding_window") is not None
    if kind in _ALWAYS and not has_size and "sliding_window" in fields.values:
        raise ValueError(
            f"{fields.where}: sliding_window must be the tokens of a window: got null, with which "
            "transformers computes nothing in this family; give a number, and layer_types with "
            "full_attention for layers without a window"
        )
    size = fields.integer("sliding_window") if has_size or kind in _ALWAYS else None
    listed = _listed(fields, num_layers)
    if listed is not None and kind not in ("none", "all", "switched"):
        sees_window = listed
    else:
        sees_window = _by_rule(fields, kind, num_layers, has_size)
        if listed not in (None, sees_window):
            own = "sliding_attention" if sees_window[0] else "full_attention"
            raise ValueError(
                f"{fields.where}: layer_types must be {own} for all layers of this family: "
                f"got {fields.values['layer_types']!r}"
            )
    if kind == "pattern but last":
        sees_window[-1] = False
    if any(sees_window) and size is None:
        raise ValueError(
            f"{fields.where}: sliding_window must be given with sliding layers: got none"
        )
    return tuple(size if sees else None for sees in sees_window)


def _listed(fields: JsonFields, num_layers: int) -> list[bool] | None:
    """Read which layers see a window, where the file lists the layers."""
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return None
    named = {"full_attention": False, "sliding_attention": True}
    is_list = isinstance(kinds, list) and len(kinds) == num_layers
    if not is_list or not all(kind in tuple(named) for kind in kinds):
        raise ValueError(
            f"{fields.where}: layer_types must name one of {', '.join(named)} for each of "
            f"{num_layers} layers: got {kinds!r}"
        )
    return [named[kind] for kind in kinds]


def _by_rule(fields: JsonFields, kind: LayerWindows, num_layers: int, has_size: bool) -> list[bool]:
    """Work out which layers see a window, where the file does not list the layers."""
    if kind == "alternating":
        return [layer % 2 == 0 for layer in range(num_layers)]
    if kind == "none" or not has_size:
        return [False] * num_layers
    if kind in ("all", "listed"):
        return [True] * num_layers
    if kind.startswith("pattern"):
        interval = fields.integer("sliding_window_pattern")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    is_used = fields.boolean("use_sliding_window", False)
    if kind == "switched":
        return [is_used] * num_layers
    if kind == "unrotated":
        return [is_used and not has for has in rotated_layers(fields, num_layers)]
    first = fields.values.get("max_window_layers")
    if type(first) is not int:
        raise ValueError(f"{fields.where}: max_window_layers must be an integer: got {first!r}")
    return [is_used and layer >= first for layer in range(num_layers)]
