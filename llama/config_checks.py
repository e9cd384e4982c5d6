"""Fields of config.json that are refused: those that are unknown, and those that ask for another
model than the one here."""

import json
from collections.abc import Collection, Mapping, Set
from typing import Any

from foreign.json_fields import JsonFields
from llama.config_fields import COMPUTED, DROPOUTS, ONE_VALUE, WITHOUT_EFFECT
from llama.family import Family
from llama.layer_heads import PER_LAYER


def check_model_type(fields: JsonFields, name: str, expected: Collection[str]) -> None:
    """Refuse a model_type that does not go with the architecture of this name.

    Raises:
        ValueError: there is a model_type, and it is another one.
    """
    model_type = fields.values.get("model_type")
    if "model_type" in fields.values and model_type not in tuple(expected):
        raise ValueError(
            f"{fields.path}: model_type must be {' or '.join(map(repr, expected))} with {name}: "
            f"got {model_type!r}"
        )


def fields_of(family: Family) -> Set[str]:
    """The fields that a family has beside those of all."""
    own = family.fields | family.aliases.keys()
    return own if family.heads == "alike" else own | {PER_LAYER}


def check_fields(
    fields: JsonFields, name: str, own: Set[str], harmless: Mapping[str, Any] | None = None
) -> None:
    """Refuse fields that are unknown, and those that another model than this one is needed for.

    Args:
        name: of the architecture.
        own: the fields that it has beside those of all.
        harmless: as `Family.harmless`.

    Raises:
        ValueError: there is such a field, and it is set.
    """
    known = COMPUTED | own | DROPOUTS | WITHOUT_EFFECT | ONE_VALUE.keys()
    unknown = sorted(key for key, value in fields.values.items() if value and key not in known)
    if unknown:
        raise ValueError(
            f"{fields.where} must hold fields that {name} has: got {unknown[0]} = "
            f"{fields.values[unknown[0]]!r}; remove it or set it to null, which is safe if the "
            "field does not change what the model computes"
        )
    for key in ONE_VALUE.keys() & (fields.values.keys() - own):
        value, computed = fields.values[key], ONE_VALUE[key]
        is_harmless = value is not None and value == (harmless or {}).get(key)
        if bool(value) != bool(computed) and not is_harmless:
            raise ValueError(
                f"{fields.where}: {key} must be {json.dumps(computed)} or absent: got "
                f"{json.dumps(value)}; another value is another function, which is not computed "
                "here"
            )


def check_function(fields: JsonFields, family: Family) -> None:
    """Refuse what a family's models may have and the model here has not, and other values than the
    one of a field that it computes.

    Args:
        fields: with the family's defaults.

    Raises:
        ValueError: a field asks for such a thing.
    """
    for name, needed in family.lacks.items():
        if given := fields.values.get(name):
            raise ValueError(
                f"{fields.where}: {name} must be 0, false or null: got {json.dumps(given)}; such a "
                f"model needs {needed}, which this one does not have"
            )
    for name, computed in family.constants.items():
        if (given := fields.number(name, computed)) != computed:
            raise ValueError(
                f"{fields.where}: {name} must be {computed:g}, which is what is computed here: "
                f"got {given:g}"
            )
