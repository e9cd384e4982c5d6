"""Jinja as transformers sets it up for chat templates, and facts from the text of a template.

The environment is transformers': sandboxed, with the same globals, filters and tags. Each template
is compiled and parsed once.
"""

import contextlib
import functools
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.chat.template_trace import (
    TraceExtension,
    compile_ending,
    compile_traced,
    has_generation_marks,
)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _TemplateDict:
    """What templates call as dict(): no class, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """What templates call as namespace(): no name in it may begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _check_public(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace's names must not begin with an underscore: got {name!r}"
        )


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=16)
def traced(template: str) -> jinja2.Template:
    return compile_traced(_environment(), template)


@functools.lru_cache(maxsize=16)
def ending(template: str) -> jinja2.Template | None:
    return compile_ending(_environment(), template)


@functools.lru_cache(maxsize=16)
def has_marks(template: str) -> bool:
    return has_generation_marks(_environment(), template)


@functools.lru_cache(maxsize=16)
def names_read(template: str) -> frozenset[str]:
    names = _environment().parse(template).find_all(jinja2.nodes.Name)
    return frozenset(name.name for name in names if name.ctx == "load")


@functools.lru_cache(maxsize=16)
def fields_read(template: str) -> frozenset[str]:
    tree = _environment().parse(template)
    attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    return frozenset(attributes | {node.value for node in tree.find_all(jinja2.nodes.Const)})


@functools.lru_cache(maxsize=16)
def clock_formats(template: str) -> list[str] | None:
    """The constants that strftime_now is called with, None if it is used in another way."""
    # rendering raises the error of an invalid template
    with contextlib.suppress(jinja2.TemplateSyntaxError, RecursionError):
        return _constant_formats(_environment().parse(template))
    return None


def _constant_formats(tree: jinja2.nodes.Template) -> list[str] | None:
    uses = {id(n) for n in tree.find_all(jinja2.nodes.Name) if n.name == "strftime_now"}
    formats = []
    for node in tree.find_all((jinja2.nodes.Call, jinja2.nodes.Test)):
        if id(node.node) not in uses:
            continue
        uses.remove(id(node.node))
        if isinstance(node, jinja2.nodes.Call):
            constants = [a.value for a in node.args if isinstance(a, jinja2.nodes.Const)]
            if len(node.args) != 1 or len(constants) != 1:
                return None
            formats.append(str(constants[0]))
        elif node.name not in ("defined", "undefined"):
            return None
    return None if uses else formats


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[TraceExtension, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    return environment
