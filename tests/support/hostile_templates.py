"""Chat templates that take all time or all memory, by the kind of thing that they do it with."""

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

_GROWS = "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = GROWN %}{% endfor %}"
_LONG = "'a' * 10 ** 6"


def _nested(opening: str, inside: str, closing: str, times: int) -> str:
    return opening * times + inside + closing * times


def _many_times(expression: str) -> str:
    """Each of these takes milliseconds."""
    return (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = EXPRESSION %}"
        "{% endfor %}{% endfor %}"
    ).replace("EXPRESSION", expression)


WITHOUT_END = {
    "loops": _many_times("1"),
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive-loops": "{% for i in range(40) recursive %}{% if loop.depth < 40 %}"
    "{{ loop(range(40)) }}{% endif %}{% endfor %}",
    "power": "{% set n = messages | length + 7 %}{{ 10 ** (10 ** n) > 1 }}",
    # worked out where the template is compiled
    "constant-power": "{{ 10 ** (10 ** 9) > 1 }}",
    "squares": "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}",
    "remainders": _many_times("10 ** 9999 % 7"),
    "sums": _many_times("range(99999) | sum"),
    "sorting": _many_times("range(99999) | sort | first"),
    "reversing": _many_times("range(99999) | reverse | list | first"),
    "grouping": _many_times("range(9999) | groupby('real') | first"),
    "searching": _many_times(f"({_LONG}).count('b')"),
    "splitting": _many_times("('a ' * 9999).split() | length"),
    "links": _many_times("('www.a.com ' * 999) | urlize"),
    "wrapping": _many_times("('a ' * 9999) | wordwrap(1)"),
    "json": _many_times("range(9999) | list | tojson"),
    "text": "{% for i in range(9999) %}{% for j in range(9999) %}a{% endfor %}{% endfor %}",
}
WITHOUT_BOUNDS = {
    "centre": "{{ 'a'.center(10 ** 11) }}",
    "centre-filter": "{{ 'a' | center(10 ** 11) }}",
    "left": "{{ 'a'.ljust(10 ** 11) }}",
    "right": "{{ 'a'.rjust(10 ** 11) }}",
    "zeros": "{{ 'a'.zfill(10 ** 11) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 9 * 2) * 50 }}",
    "product": "{{ 'a' * 10 ** 11 }}",
    "list": "{{ [0] * 10 ** 11 }}",
    "tuple": "{{ ((0, 1) * 10 ** 11) | length }}",
    "bytes": "{{ (1).to_bytes(10 ** 11, 'big') }}",
    "encoded": "{{ 'a'.encode() * 10 ** 11 }}",
    "range": "{{ range(10 ** 11) | list }}",
    "width": "{{ '%100000000000d' % 1 }}",
    "digits": "{{ '%.100000000000f' % 1 }}",
    "format-width": "{{ '{:>100000000000}'.format(1) }}",
    "format-of-a-width": "{{ '{:>{}}'.format(1, 10 ** 11) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 11) }}",
    "json-indent": "{{ [1] | tojson(indent=10 ** 11) }}",
    "batch": "{{ [1] | batch(10 ** 11, 0) | list }}",
    "slices": "{{ [1] | slice(10 ** 10) | list }}",
    "words": "{{ lipsum(n=10 ** 7) }}",
    "wrap-text": f"{{{{ ('a ' * 10 ** 5) | wordwrap(1, wrapstring={_LONG}) }}}}",
    "joined": f"{{{{ range(99999) | join({_LONG}) }}}}",
    "replaced": f"{{{{ ({_LONG}).replace('a', {_LONG}) }}}}",
    "escaped": "{{ ('<' * 10 ** 9) | escape }}",
    "sum-of-itself": _GROWS.replace("GROWN", "ns.s + ns.s"),
    "joined-to-itself": _GROWS.replace("GROWN", "ns.s ~ ns.s"),
    "list-of-itself": _GROWS.replace("GROWN", "ns.s | list + ns.s | list"),
    "joined-by-itself": _GROWS.replace("GROWN", "ns.s.join(ns.s * 3)"),
    "replaced-by-itself": _GROWS.replace("GROWN", "ns.s.replace('', ns.s)"),
    "printed-in-itself": _GROWS.replace("GROWN", "[ns.s, ns.s] | string"),
    "captured": _GROWS.replace(
        "{% set ns.s = GROWN %}", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
    ),
}
# what goes on for ever in Python ends at the depth of its stack
ROUND_IN_CIRCLES = {
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two-macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}"
    "{{ f() }}",
    "loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "block": "{% block b %}{{ self.b() }}{% endblock %}",
    "itself-as-json": "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a | tojson }}",
}
DEEP = {
    "parentheses": "{{ " + _nested("(", "1", ")", 5000) + " }}",
    "lists": "{{ " + _nested("[", "", "]", 5000) + " }}",
    "objects": "{{ " + _nested("{1: ", "1", "}", 5000) + " }}",
    "calls": "{{ " + _nested("range(", "1", ")", 5000) + " }}",
    "choices": "{{ " + _nested("1 if (", "1", ") else 2", 5000) + " }}",
    "conditions": _nested("{% if true %}", "", "{% endif %}", 300),
    "branches": "{% if false %}" + "{% elif false %}" * 5000 + "{% endif %}",
    "loops": _nested("{% for i in [1] %}", "", "{% endfor %}", 30),
    "macros": "".join(f"{{% macro m{i}() %}}" for i in range(300)) + "{% endmacro %}" * 300,
    "signs": "{{ " + "-" * 50_000 + "1 }}",
    "negations": "{{ " + "not " * 20_000 + "1 }}",
    "additions": "{{ 1" + " + 1" * 50_000 + " }}",
    "attributes": "{{ a" + ".a" * 50_000 + " }}",
    "indices": "{{ a" + "[0]" * 50_000 + " }}",
    "filters": "{{ 'a'" + " | upper" * 20_000 + " }}",
}
