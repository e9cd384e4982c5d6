"""data/card.py: the parts that a card declares."""

from pathlib import Path

import pytest

from data.card import matching, read_parts

NAMES = ["main/train-0.csv", "main/train-1.csv", "main/test-0.csv", "a.csv", "x/y/z.csv"]


def parts_of(tmp_path: Path, configs: str) -> dict[tuple[str, str, bool], list[str]]:
    card = tmp_path / "README.md"
    card.write_text(f"---\nconfigs:\n{configs}\n---\n")
    return {(p.subset, p.split, p.is_default): [*p.names] for p in read_parts(card, NAMES)}


@pytest.mark.parametrize(
    ("configs", "parts"),
    [
        ("- data_files: a.csv", {("default", "train", True): ["a.csv"]}),
        (
            "- data_files: [x/**/*.csv, a.csv, x/*/z.csv]",
            {("default", "train", True): ["x/y/z.csv", "a.csv"]},
        ),
        (
            "- {config_name: no, data_files: [{split: 1, path: ./a.csv}]}",
            {("no", "1", True): ["a.csv"]},
        ),
        (
            "- {config_name: a, data_files: {train: a.csv, test: [x/**]}}\n"
            "- {config_name: b, default: True, data_files: '**'}",
            {
                ("a", "train", False): ["a.csv"],
                ("a", "test", False): ["x/y/z.csv"],
                ("b", "train", True): sorted(NAMES),
            },
        ),
        (
            "- {config_name: m, data_dir: ./main/, data_files: [{split: t, path: 't*-0.csv'}]}",
            {("m", "t", True): ["main/test-0.csv", "main/train-0.csv"]},
        ),
        (
            "- {config_name: m, data_dir: main}\n- {config_name: n, data_dir: m}",
            {
                ("m", "test", False): ["main/test-0.csv"],
                ("m", "train", False): ["main/train-0.csv", "main/train-1.csv"],
            },
        ),
        ("- data_files: [/etc/passwd, ../*, none.csv]", {("default", "train", True): []}),
    ],
)
def test_data_files_are_read_in_all_their_forms(
    tmp_path: Path, configs: str, parts: dict[tuple[str, str, bool], list[str]]
) -> None:
    assert parts_of(tmp_path, configs) == parts


@pytest.mark.parametrize(
    "configs",
    ["- main", "- config_name: [a]", "- data_files: [{split: {a: b}, path: c}]", "- data_dir: [a]"],
)
def test_what_is_no_name_is_refused(tmp_path: Path, configs: str) -> None:
    with pytest.raises(ValueError, match=r"README\.md must have .* in configs: got "):
        parts_of(tmp_path, configs)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*.csv", ["a.csv"]),
        ("main/t*-[1-9].csv", ["main/train-1.csv"]),
        ("main/test-?.csv", ["main/test-0.csv"]),
        ("**/z.csv", ["x/y/z.csv"]),
        ("**/a.csv", ["a.csv"]),
        ("x/**/z.csv", ["x/y/z.csv"]),
        ("x/y/**/z.csv", ["x/y/z.csv"]),
        ("x/*", []),
        ("x", []),
    ],
)
def test_a_star_stays_in_its_folder(pattern: str, matched: list[str]) -> None:
    assert matching(NAMES, pattern) == matched


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    name = "/".join("a" * 20)
    assert matching([name], "/".join(["**", "*"] * 15 + ["b"])) == []
    assert matching(["a" * 200], "*a" * 60 + "b") == []
