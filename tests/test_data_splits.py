"""data/splits.py: what the names of files say."""

import pytest

from data.splits import Part, family_of, kind_of, parts_by_name, split_of, subset_of


@pytest.mark.parametrize(
    ("name", "split", "kind"),
    [
        ("train.jsonl", "train", "train"),
        ("train.jsonl.gz", "train", "train"),
        ("gsm8k_train.jsonl", "gsm8k_train", "train"),
        ("data.train.jsonl", "data.train", "train"),
        ("data/train-00000-of-00001.parquet", "train", "train"),
        ("data/train_sft-00000-of-00003.parquet", "train_sft", "train"),
        ("data/sft-00000-of-00003.parquet", "sft", ""),
        ("train/0.json", "train", "train"),
        ("train_sft/part-00000-of-00001.parquet", "train_sft", "train"),
        ("train/validation.json", "validation", "validation"),
        ("dev.csv", "dev", "validation"),
        ("x_val.csv", "x_val", "validation"),
        ("Test.csv", "Test", "test"),
        ("latest.jsonl", "", ""),
        ("trains.jsonl", "", ""),
        ("quotes.jsonl", "", ""),
    ],
)
def test_a_split_is_a_word_of_the_name(name: str, split: str, kind: str) -> None:
    assert split_of(name) == split
    assert kind_of(split) == kind


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("train_sft", "test_sft", True),
        ("x-train", "x-validation", True),
        ("train", "dev", True),
        ("train_sft", "test_gen", False),
        ("train", "test_gen", False),
        ("gen", "sft", False),
    ],
)
def test_a_family_has_a_name_of_its_own(one: str, other: str, is_same: bool) -> None:
    assert (family_of(one) == family_of(other)) is is_same


@pytest.mark.parametrize(
    ("name", "subset"),
    [("train.csv", "."), ("train/0.csv", "."), ("en/train/a.csv", "en"), ("en/a/test.csv", "en/a")],
)
def test_a_subset_is_the_folders_that_name_no_split(name: str, subset: str) -> None:
    assert subset_of(name) == subset


def test_parts_have_their_files_in_order() -> None:
    assert parts_by_name(["train/1.csv", "b/train.csv", "train/0.csv"]) == [
        Part("b", "train", ("b/train.csv",)),
        Part(".", "train", ("train/0.csv", "train/1.csv")),
    ]
