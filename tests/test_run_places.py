"""run/places.py: the data sets of --data, and their weights."""

from pathlib import Path

import pytest

from run.places import Place, read_places


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("", []),
        ("a.jsonl", [Place("a.jsonl")]),
        ("a.jsonl,b.jsonl=0.5", [Place("a.jsonl"), Place("b.jsonl", 0.5)]),
        ("owner/name@v1=2, c d.csv", [Place("owner/name@v1", 2.0), Place("c d.csv")]),
        ("a:b=c.jsonl", [Place("a:b=c.jsonl")]),
        ("a=b.jsonl=1e-1,", [Place("a=b.jsonl", 0.1)]),
    ],
)
def test_commas_separate_and_an_equals_sign_weighs(text: str, places: list[Place]) -> None:
    assert read_places(text) == places


def test_a_path_that_is_there_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b=0.5", "x,y", "a", "z=2"):
        (tmp_path / name).write_text("")
    assert read_places("a,b=0.5") == [Place("a,b=0.5")]
    assert read_places("a,x,y=3,z=2") == [Place("a"), Place("x,y", 3.0), Place("z=2")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a=0", "a weight of --data must be above 0 and at most 1000: got 0 of a"),
        ("a,b=-1", "got -1 of b"),
        ("a=nan", "got nan of a"),
        ("a=1001", "got 1001 of a"),
        ("a,b,a=2", "--data must name each data set once: got a twice; a=2 reads it twice"),
        (" ,", "--data must name a data set: got ' ,'"),
    ],
)
def test_what_is_no_weight_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_places(text)


def test_no_folder_of_the_disk_is_public() -> None:
    assert Place("/home/me/a.jsonl", 0.5).public == "a.jsonl=0.5"
    assert Place("private/b.jsonl").public == "b.jsonl"
