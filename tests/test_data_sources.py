"""data/sources.py: which files a place means, and where that is no choice of ours."""

from pathlib import Path

import pytest

from data.sources import Use, choose_files, describe_files, find_data, split_of

SHARDS = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]


# as HuggingFaceH4/ultrachat_200k
ULTRACHAT = [
    f"data/{split}_{kind}-0000{i}-of-00002.parquet"
    for split in ("train", "test")
    for kind in ("sft", "gen")
    for i in range(2)
]


@pytest.mark.parametrize("place", ["data.jsonl", "no/such.csv", "no-such-data", "a/b/c"])
def test_a_path_is_no_hub_id(place: str) -> None:

    assert find_data(place, "--data") == [Path(place)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("gsm8k_train.jsonl", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("train/0.json", "train"),
        ("train/validation.json", "validation"),
        ("dev.csv", "validation"),
        ("x_val.csv", "validation"),
        ("Test.csv", "test"),
        ("latest.jsonl", ""),
        ("trains.jsonl", ""),
        ("quotes.jsonl", ""),
    ],
)
def test_a_split_is_a_word_of_the_name(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("names", "use", "chosen"),
    [
        (["quotes.jsonl", "README.md", ".gitattributes"], "train", ["quotes.jsonl"]),
        (["b.json", "a.json"], "train", ["a.json", "b.json"]),
        (["b.json", "a.json"], "eval", ["a.json", "b.json"]),
        ([*SHARDS[::-1], "data/test-0.parquet"], "train", SHARDS),
        ([*SHARDS, "data/test-0.parquet"], "eval", ["data/test-0.parquet"]),
        (["train.csv", "test.csv", "valid.csv"], "eval", ["valid.csv"]),
        (["train.jsonl.gz", "LICENSE.txt", "notes.txt"], "train", ["train.jsonl.gz"]),
        (["a.txt", "b.txt", "LICENSE.txt"], "train", ["a.txt", "b.txt"]),
        (["train.json", "dataset_infos.json", ".cache/train.json"], "train", ["train.json"]),
        (
            ["train/1.json", "train/0.json", "test/0.json"],
            "train",
            ["train/0.json", "train/1.json"],
        ),
        (["train_part1.csv", "train_part2.csv"], "train", ["train_part1.csv", "train_part2.csv"]),
        (["a_train.csv", "b_train.csv"], "train", ["a_train.csv", "b_train.csv"]),
        (["train_sft.csv", "test_sft.csv", "test_gen.csv"], "train", ["train_sft.csv"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_files_of_a_split_are_chosen_in_order(
    names: list[str], use: Use, chosen: list[str]
) -> None:
    assert choose_files(names, "owner/name", "--data", use) == chosen


@pytest.mark.parametrize(
    ("names", "use", "match"),
    [
        (["a.bin"], "train", "must have files that can be read: owner/name has a.bin; convert"),
        ([], "train", "owner/name has none"),
        (["train.csv"], "eval", "split validation or test: .*train.csv; .*--eval-fraction"),
        (["test.csv"], "train", "split train: owner/name has test.csv; give the path"),
        (["a.csv", "test.csv"], "train", "split train: owner/name has a.csv, test.csv"),
        (["a.csv", "a.json"], "train", r"one format, .*has \.csv, \.json; download"),
        (
            SHARDS[1:],
            "train",
            "must have all 2 files of its set: owner/name has 1, data/train-00001",
        ),
        (["main/train.json", "socratic/train.json"], "train", "one folder, .*main, socratic"),
        (ULTRACHAT, "train", "one split, .*: owner/name has train_gen, train_sft; download"),
        (ULTRACHAT, "eval", "one split, .*: owner/name has test_gen, test_sft; download"),
        (["train.csv", "train_gen.csv"], "train", "one split, .* has train, train_gen; download"),
        (["gen-000-of-001.csv", "sft-000-of-001.csv"], "train", "one split, .* has gen, sft;"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_leaves_a_choice_is_refused(names: list[str], use: Use, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        choose_files(names, "owner/name", "--data", use)


def test_a_folder_means_its_files(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "test.jsonl", "README.md"):
        (tmp_path / name).write_bytes(b"{}")
    assert find_data(str(tmp_path), "--data") == [tmp_path / f"train-{i}.jsonl" for i in range(2)]
    assert find_data(str(tmp_path), "--eval-data", "eval") == [tmp_path / "test.jsonl"]


def test_linked_folders_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere" / "deeper"
    (folder / "z").mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    (elsewhere / "train-0.jsonl").write_bytes(b"{}")
    (folder / "linked").symlink_to(elsewhere.parent)
    (elsewhere / "back").symlink_to(folder)
    (folder / "train-9.jsonl").symlink_to(tmp_path / "nowhere")
    assert find_data(str(folder), "--data") == [folder / "linked" / "deeper" / "train-0.jsonl"]
    # the same folder again, by another link and by a link to a part of it
    (folder / "again").symlink_to(elsewhere.parent)
    (folder / "z" / "part").symlink_to(elsewhere)
    (found,) = find_data(str(folder), "--data")
    assert found.samefile(elsewhere / "train-0.jsonl")
    # a folder has its own name, whatever links to it
    (folder / "z" / "train-0.jsonl").write_bytes(b"{}")
    (folder / "again").unlink()
    (folder / "linked").unlink()
    (folder / "z" / "part").unlink()
    (folder / "a").symlink_to(folder / "z")
    assert find_data(str(folder), "--data") == [folder / "z" / "train-0.jsonl"]


def test_the_files_that_are_read_are_named() -> None:
    assert describe_files([Path("a/b.jsonl")]) == "reading a/b.jsonl"
    files = [Path(f"train-{i}.jsonl") for i in range(7)]
    named = ", ".join(f"train-{i}.jsonl" for i in range(5))
    assert describe_files(files) == f"reading 7 files: {named}, ..."
