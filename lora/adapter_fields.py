"""The fields of an adapter_config.json that somebody else wrote."""

from collections.abc import Callable, Mapping
from typing import Any


class AdapterFields:
    """The fields of adapter_config.json, whose kinds are checked as they are taken."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def _take(self, key: str, default: Any, what: str, is_valid: Callable[[Any], bool]) -> Any:
        value = self._values.get(key)
        value = default if value is None else value
        if not is_valid(value):
            raise ValueError(f"{key} must be {what}: got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return self._take(key, default, "a number", is_number)

    def integer(self, key: str) -> int:
        return self._take(key, None, "an integer", is_integer)

    def boolean(self, key: str) -> bool:
        return self._take(key, False, "true or false", lambda value: isinstance(value, bool))

    def modules(self, key: str, default: Any) -> tuple[str, ...] | str:
        """Take a list of names, or a text that is a pattern."""
        what = "a list of names or a regular expression"
        value = self._take(key, default, what, _is_text_or_list)
        # a set's order differs from run to run, and PEFT's list comes from one
        return value if isinstance(value, str) else tuple(sorted(set(value)))

    def names(self, key: str) -> tuple[str, ...]:
        value = self._take(key, [], "a list of names", _is_list)
        return tuple(sorted(set(value)))

    def layers(self) -> tuple[int, ...] | None:
        what = "a layer's index or a list of them"
        value = self._take("layers_to_transform", [], what, _is_integer_or_list)
        return (value,) if is_integer(value) else tuple(value) or None

    def layers_pattern(self) -> tuple[str, ...]:
        value = self._take("layers_pattern", [], "a pattern or a list of them", _is_text_or_list)
        return tuple(filter(None, [value] if isinstance(value, str) else value))

    def patterns(self, key: str, what: str, is_valid: Callable[[Any], bool]) -> dict[str, Any]:
        return self._take(
            key,
            {},
            f"an object of patterns and {what}",
            lambda v: isinstance(v, dict) and all(map(is_valid, v.values())),
        )


def is_integer(value: Any) -> bool:
    return type(value) is int


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str) or _is_list(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_integer_or_list(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, list) and all(map(is_integer, value)))
