"""data/sources.py: which files a place means, and where that is no choice of ours."""

from pathlib import Path, PurePosixPath

import pytest

from data.sources import Found, Use, Wanted, check_names, choose_part, find_data, parts_of
from data.splits import Part, parts_by_name

DATA, EVAL = Wanted("--data"), Wanted("--eval-data", "eval")
SHARDS = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]


# as HuggingFaceH4/ultrachat_200k
ULTRACHAT = [
    f"data/{split}_{kind}-0000{i}-of-00002.parquet"
    for split in ("train", "test")
    for kind in ("sft", "gen")
    for i in range(2)
]


def choose(names: list[str], wanted: Wanted) -> list[str]:
    """The files of a data set that are chosen."""

    def get(name: str) -> Path:
        raise AssertionError(name)

    names = [name for name in names if name != "README.md"]
    parts = parts_of(names, "owner/name", wanted, get)
    return [*choose_part(parts, "owner/name", wanted).names]


@pytest.mark.parametrize("place", ["data.jsonl", "no/such.csv", "no-such-data", "a/b/c"])
def test_a_path_is_no_hub_id(place: str) -> None:
    assert find_data(place, DATA) == Found([Path(place)])


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
        (["a_train_1.csv", "a_train_2.csv"], "train", ["a_train_1.csv", "a_train_2.csv"]),
        (["train_sft.csv", "test_sft.csv", "test_gen.csv"], "train", ["train_sft.csv"]),
        # a split in a folder of its own is of no other subset than a split beside it
        (["train.csv", "more/test.csv"], "eval", ["more/test.csv"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_files_of_a_split_are_chosen_in_order(
    names: list[str], use: Use, chosen: list[str]
) -> None:
    assert choose(names, Wanted("--data", use)) == chosen


@pytest.mark.parametrize(
    ("names", "use", "match"),
    [
        (["a.bin"], "train", "must have files that can be read: owner/name has a.bin; convert"),
        ([], "train", "owner/name has none"),
        (["train.csv"], "eval", "split for validation or test: .* has train; .*--eval-fraction"),
        (
            ["test.csv"],
            "train",
            "split for train: owner/name has test; choose with --split, or give",
        ),
        (["a.csv", "test.csv"], "train", "split for train: owner/name has a.csv, test; choose"),
        (["a.csv", "a.json"], "train", r"one format, .*has \.csv, \.json; download"),
        (
            SHARDS[1:],
            "train",
            "must have all 2 files of its set: owner/name has 1, data/train-00001",
        ),
        (
            ["main/train.json", "socratic/train.json"],
            "train",
            "one subset of owner/name, .*: there are main, socratic; choose with --subset main",
        ),
        (
            ULTRACHAT,
            "train",
            "one split of owner/name, .*: there are train_gen, train_sft; choose with --split tr",
        ),
        (ULTRACHAT, "eval", "there are test_gen, test_sft; choose with --eval-split test_gen"),
        (["train.csv", "train_gen.csv"], "train", "there are train, train_gen; choose"),
        (["gen-000-of-001.csv", "sft-000-of-001.csv"], "train", "one split .* gen, sft;"),
        (["x_train_sft.csv", "x_train_gen.csv"], "train", "are x_train_gen, x_train_sft; choose"),
        (["train_sft/0.csv", "train_gen/0.csv"], "train", "one split .*: there are train_gen, tr"),
        (["a_train.csv", "b_train.csv"], "train", "one split .*: there are a_train, b_train;"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_leaves_a_choice_is_refused(names: list[str], use: Use, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        choose(names, Wanted("--data", use))


def test_a_folder_means_its_files(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "test.jsonl", "README.md"):
        (tmp_path / name).write_bytes(b"{}")
    assert find_data(str(tmp_path), DATA).files == [tmp_path / f"train-{i}.jsonl" for i in range(2)]
    assert find_data(str(tmp_path), EVAL).files == [tmp_path / "test.jsonl"]


def test_linked_folders_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere" / "deeper"
    (folder / "z").mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    (elsewhere / "train-0.jsonl").write_bytes(b"{}")
    (folder / "linked").symlink_to(elsewhere.parent)
    (elsewhere / "back").symlink_to(folder)
    (folder / "train-9.jsonl").symlink_to(tmp_path / "nowhere")
    only = [folder / "linked" / "deeper" / "train-0.jsonl"]
    assert find_data(str(folder), DATA).files == only
    # the same folder again, by another link and by a link to a part of it
    (folder / "again").symlink_to(elsewhere.parent)
    (folder / "z" / "part").symlink_to(elsewhere)
    (found,) = find_data(str(folder), DATA).files
    assert found.samefile(elsewhere / "train-0.jsonl")
    # a folder has its own name, whatever links to it
    (folder / "z" / "train-0.jsonl").write_bytes(b"{}")
    (folder / "again").unlink()
    (folder / "linked").unlink()
    (folder / "z" / "part").unlink()
    (folder / "a").symlink_to(folder / "z")
    assert find_data(str(folder), DATA).files == [folder / "z" / "train-0.jsonl"]


def test_the_part_and_the_files_that_are_read_are_named() -> None:
    assert Found([Path("a/b.jsonl")]).describe() == "reading a/b.jsonl"
    part, other = Part("main", "train", ()), Part("socratic", "train", ())
    files = [Path(f"train-{i}.jsonl") for i in range(7)]
    named = ", ".join(f"train-{i}.jsonl" for i in range(5))
    assert Found(files, part, (part,)).describe() == f"reading 7 files: {named}, ..."
    said = Found(files, part, (part, other)).describe()
    assert said == f"subset main, split train, reading 7 files: {named}, ..."


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
  - split: test
    path: [socratic/test-*, extra/**/*.jsonl]
dataset_info:
- this: {is: not read
---
# A card
"""
GSM8K = ["main/train-0.jsonl", "main/test-0.jsonl", "socratic/train-0.jsonl", "extra/a/b.jsonl"]


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """A clone of a data set whose card declares two subsets."""
    for name in GSM8K:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def test_subsets_of_a_card_are_asked_about_and_chosen(gsm8k: Path) -> None:
    place = str(gsm8k)
    with pytest.raises(ValueError, match="there are main, socratic; choose with --subset main"):
        find_data(place, DATA)
    with pytest.raises(ValueError, match="main, socratic, and none is called maine; choose"):
        find_data(place, Wanted("--data", subsets=["maine"]))
    found = find_data(place, Wanted("--data", subsets=["socratic"]))
    assert found.files == [gsm8k / "socratic/train-0.jsonl"]
    assert found.describe().startswith("subset socratic, split train, reading ")
    # the data to evaluate on is of the subset that is learned from
    assert find_data(place, Wanted("--eval-data", "eval", beside=found.part)).files == [
        gsm8k / "extra/a/b.jsonl"
    ]
    (gsm8k / "README.md").write_text("---\nconfigs: [&a {data_files: x}, *a]\n---\n")
    with pytest.raises(ValueError, match="must have YAML without aliases"):
        find_data(place, DATA)


def test_the_default_subset_of_a_card_is_taken(gsm8k: Path) -> None:
    text = CARD.replace("- config_name: socratic", "- config_name: socratic\n  default: true")
    (gsm8k / "README.md").write_text(text)
    assert find_data(str(gsm8k), DATA).files == [gsm8k / "socratic/train-0.jsonl"]
    found = find_data(str(gsm8k), Wanted("--data", subsets=["main"]))
    assert found.files == [gsm8k / "main/train-0.jsonl"]


def test_paths_of_a_card_that_match_no_file_are_an_error(gsm8k: Path) -> None:
    (gsm8k / "README.md").write_text("---\nconfigs: [{data_files: ../*.jsonl}]\n---\n")
    (gsm8k.parent / "outside.jsonl").write_bytes(b"{}")
    with pytest.raises(ValueError, match="has none of the split train of default, by the paths"):
        find_data(str(gsm8k), DATA)


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (ULTRACHAT, Wanted("", "train", splits=["train_sft"]), "train_sft"),
        (ULTRACHAT, Wanted("", "train", splits=["test_gen"]), "test_gen"),
        (ULTRACHAT, Wanted("", "train", splits=["no", "train_gen"]), "train_gen"),
        (ULTRACHAT, Wanted("", "eval", splits=["test_gen"]), "test_gen"),
        # the family that is learned from
        (ULTRACHAT, Wanted("", "eval", beside=Part("data", "train_sft", ())), "test_sft"),
        (["train_a.csv", "val_b.csv", "test_a.csv"], Wanted("", "eval"), "val_b"),
        (
            ["train_a.csv", "val_b.csv", "test_a.csv"],
            Wanted("", "eval", beside=Part(".", "train_a", ())),
            "test_a",
        ),
        # a kind, where no split has that name
        (["x_train.csv", "x_dev.csv"], Wanted("", "train", splits=["validation"]), "x_dev"),
    ],
)
def test_a_split_is_named_or_goes_with_what_is_learned_from(
    names: list[str], wanted: Wanted, chosen: str
) -> None:
    assert {chosen} == {
        PurePosixPath(n).name.partition("-")[0].partition(".")[0] for n in choose(names, wanted)
    }


def test_two_splits_are_read_as_one_where_that_is_said() -> None:
    chosen = choose(ULTRACHAT, Wanted("", "train", splits=["train_sft+train_gen"]))
    assert chosen == ULTRACHAT[:4]


def test_a_folder_is_a_subset_by_its_name() -> None:
    names = ["en/web/train.csv", "en/news/train.csv", "train/en/x/0.csv"]
    assert choose(names, Wanted("", subsets=["en/web"])) == names[:1]
    assert choose(names, Wanted("", subsets=["en/x"])) == names[2:]


def test_a_name_that_no_data_set_has_is_refused() -> None:
    parts = tuple(parts_by_name(ULTRACHAT))
    found = [Found([], parts[0], parts), Found([])]
    check_names("--split", [parts[0].split], found)
    check_names("--subset", ["data"], found)
    with pytest.raises(ValueError, match="--split must name a split of the data: got 'trian'"):
        check_names("--split", ["trian"], found)
    with pytest.raises(ValueError, match=r"--subset must name .* there is none"):
        check_names("--subset", ["main"], found[1:])
