"""benchmarks/comparison.py: README's picture is that of the committed result."""

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from benchmarks.comparison import BARS, LONGEST, STYLE, has_peers, picture
from benchmarks.report import RESULTS, load
from benchmarks.tables import Row

SVG = "{http://www.w3.org/2000/svg}"


def record(*left_out: str) -> dict[str, Any]:
    """A result whose providers take as many tokens and GiB as their place in the picture says."""
    rows: list[Row] = [
        {"provider": provider, "policy": policy, "shape": shape}
        | {"tokens_per_second": 1000.0 * place, "peak_gib": 1.25 * place}
        for place, (provider, policy) in enumerate(BARS, start=1)
        for shape in ("1x2048", "4x2048")
        if provider not in left_out
    ]
    versions = {"unsloth": "3", "transformers": "4", "bitsandbytes": "5"}
    about = {"device": "a GPU", "date": "2026-01-02", "torch": "2"}
    return about | {"versions": versions, "rows": rows}


def test_the_committed_picture_is_that_of_the_result() -> None:
    num_found = 0
    for device, records in load(RESULTS).items():
        if has_peers(records.get("train_step", {"rows": []})):
            committed = (RESULTS / f"train_step.{device}.svg").read_text()
            expected = picture(records["train_step"])
            assert committed == expected, "run python -m benchmarks report --write"
            num_found += 1
    assert num_found


def test_every_provider_has_a_bar_for_each_quantity() -> None:
    root = ElementTree.fromstring(picture(record()))
    kinds = [rect.get("class") for rect in root.iter(f"{SVG}rect")]
    assert kinds == ["page", *2 * ["ours", "peer", "ours", "peer", "peer"]]
    widths = [float(rect.get("width", "")) for rect in root.iter(f"{SVG}rect")][1:6]
    assert widths == [LONGEST * place / 5 for place in range(1, 6)]
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert words[1:6] == list(BARS.values())
    assert {"1,000", "5,000", "1.2", "6.2"} <= set(words)
    assert words[-1] == "a GPU, 2026-01-02, torch 2, Unsloth 3, transformers 4, bitsandbytes 5"


def test_without_a_peer_there_is_no_comparison() -> None:
    assert has_peers(record())
    assert not has_peers(record("unsloth"))
    failed = record()
    failed["rows"][-1]["error"] = "out of memory"
    assert not has_peers(failed)


def test_every_colour_has_a_dark_one() -> None:
    light, _, dark = STYLE.partition("@media (prefers-color-scheme: dark)")
    selectors = re.compile(r"([\w.]+) \{[^}]*fill: (#\w+)")
    assert dict(selectors.findall(light)).keys() == dict(selectors.findall(dark)).keys()


def test_the_picture_is_of_equal_bytes() -> None:
    assert picture(record()) == picture(json.loads(json.dumps(record())))
